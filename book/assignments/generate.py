"""Three graded assignments: from one master each, all that a course hands out.

    python generate.py [FOLDER]

A master is a program in cells, ``# %% KIND``: ``setup``, then for each question
``question NAME, N points: TITLE``, ``solution``, ``public N``, ``hidden N`` and
``mistake``, a wrong answer that the hidden tests must catch. Students get the
solution without what stands between ``# BEGIN SOLUTION`` and ``# END SOLUTION``, or
before ``# SOLUTION``. Tests are written in the format of otter-grader.
"""

import ast
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from pprint import pformat

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

HERE = Path(__file__).parent
MASTERS = sorted(HERE.glob("after_session_*.py"))
INSTALL = """\
# Only where the package is missing, as on Colab: install it.
from importlib.util import find_spec

if find_spec("sipit_lite") is None:
    %pip install -q "sipit-lite==0.1.0"
"""
HEADER = re.compile(r"^question (\w+), (\d+) points: (.*)$")


@dataclass
class Question:
    """One question: the task, the answer, and what tests it."""

    name: str
    points: int
    title: str
    prompt: str
    solution: str = ""
    mistake: str = ""
    cases: list[tuple[int, bool, str]] = field(default_factory=list)

    @property
    def starter(self) -> str:
        """The solution, without what makes it one."""
        text = re.sub(
            r"^( *)# BEGIN SOLUTION\n.*?^ *# END SOLUTION$",
            r"\1...",
            self.solution,
            flags=re.MULTILINE | re.DOTALL,
        )
        return re.sub(r"= .*  # SOLUTION$", "= ...", text, flags=re.MULTILINE)

    @property
    def answer(self) -> str:
        """The solution, without its marks."""
        text = re.sub(r"^ *# (BEGIN|END) SOLUTION\n", "", self.solution, flags=re.M)
        return re.sub(r"^ *# (BEGIN|END) SOLUTION$|  # SOLUTION$", "", text, flags=re.M)

    @property
    def test(self) -> dict:
        """The test file of otter-grader: a dictionary of doctests."""
        cases = [
            {"points": points, "hidden": hidden, "code": as_doctest(code)}
            for points, hidden, code in self.cases
        ]
        suite = {"cases": cases, "scored": True, "setup": "", "teardown": ""}
        suite["type"] = "doctest"
        return {"name": self.name, "points": None, "suites": [suite]}


@dataclass
class Assignment:
    """A master, read."""

    name: str
    introduction: str = ""
    setup: str = ""
    questions: list[Question] = field(default_factory=list)

    def notebook(self, solved: bool) -> nbformat.NotebookNode:
        """What a student gets, or what an instructor keeps."""
        cells = [new_markdown_cell(self.introduction), new_code_cell(INSTALL.rstrip())]
        cells.append(new_code_cell(self.setup))
        for number, question in enumerate(self.questions, 1):
            title = f"## {number}. {question.title} ({question.points} points)"
            cells.append(new_markdown_cell(f"{title}\n\n{question.prompt}"))
            code = question.answer if solved else question.starter
            cells.append(new_code_cell(code))
            cells.append(new_code_cell(public_check(question)))
        for number, cell in enumerate(cells):
            cell["id"] = f"{self.name.replace('_', '-')}-{number:02}"
        kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
        return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def public_check(question: Question) -> str:
    """A cell that shows the public tests, and says what they find."""
    codes = [code for _, hidden, code in question.cases if not hidden]
    body = "\n".join(codes).replace("\n", "\n    ")
    return (
        f"def check_{question.name}():\n    {body}\n\n\nattempt(check_{question.name})"
    )


def as_doctest(code: str) -> str:
    """Statements, as a reader would type them at the prompt."""
    lines = code.splitlines()
    starts = {node.lineno for node in ast.parse(code).body}
    typed = []
    for number, line in enumerate(lines, 1):
        typed.append((">>> " if number in starts else "... ") + line)
    return "\n".join(typed) + "\n"


def read(path: Path) -> Assignment:
    """A master, cell by cell."""
    assignment = Assignment(path.stem)
    for cell in re.split(r"^# %% ", path.read_text("utf-8"), flags=re.M)[1:]:
        kind, _, body = cell.partition("\n")
        body = body.strip("\n")
        # In cells of prose each line is a comment.
        prose = re.sub(r"^# ?", "", body, flags=re.M).strip()
        header = HEADER.match(kind)
        if kind == "introduction":
            assignment.introduction = prose
        elif kind == "setup":
            assignment.setup = body
        elif header:
            name, points, title = header.groups()
            assignment.questions.append(Question(name, int(points), title, prose))
        elif kind in ("solution", "mistake"):
            setattr(assignment.questions[-1], kind, body)
        elif re.fullmatch(r"(public|hidden) \d+", kind):
            which, points = kind.split()
            case = (int(points), which == "hidden", body)
            assignment.questions[-1].cases.append(case)
        else:
            raise ValueError(f"got a cell {kind!r} in {path.name}")
    return assignment


def write(assignment: Assignment, folder: Path) -> None:
    """The student's notebook, the instructor's, and the tests."""
    place = folder / assignment.name
    tests = place / "tests"
    tests.mkdir(parents=True, exist_ok=True)
    nbformat.write(assignment.notebook(False), place / f"{assignment.name}.ipynb")
    nbformat.write(assignment.notebook(True), place / "solution.ipynb")
    for question in assignment.questions:
        text = f"OK_FORMAT = True\n\ntest = {pformat(question.test, width=88)}\n"
        (tests / f"{question.name}.py").write_text(text, "utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "_build/assignments")
    for path in MASTERS:
        write(read(path), folder)
        print(folder / path.stem)
