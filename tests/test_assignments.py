"""The autograder: solutions pass, empty answers fail each check, mistakes are caught."""

import ast
import doctest
import json
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
SPEC = spec_from_file_location("generate", ROOT / "book/assignments/generate.py")
GENERATE = module_from_spec(SPEC)
sys.modules["generate"] = GENERATE  # where its dataclasses look for their module
SPEC.loader.exec_module(GENERATE)
NAMES = [path.stem for path in GENERATE.MASTERS]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes."""
    place = tmp_path_factory.mktemp("assignments")
    for path in GENERATE.MASTERS:
        GENERATE.write(GENERATE.read(path), place)
    return place


def run(notebook: Path) -> dict:
    """The names that a notebook leaves behind, its public checks left out."""
    scope: dict = {}
    for cell in nbformat.read(notebook, as_version=4).cells:
        skipped = "%pip" in cell.source or "\nattempt(" in cell.source
        if cell.cell_type == "code" and not skipped:
            exec(cell.source, scope)
    return scope


def passed(test: Path, scope: dict) -> list[tuple[bool, bool]]:
    """Of each case of a test file: whether it is hidden, and whether it passes."""
    found: dict = {}
    exec(test.read_text("utf-8"), found)
    results = []
    for case in found["test"]["suites"][0]["cases"]:
        examples = doctest.DocTestParser().get_examples(case["code"])
        assert examples
        trial = doctest.DocTest(examples, dict(scope), test.stem, None, None, None)
        failed = doctest.DocTestRunner(verbose=False).run(trial, out=str).failed
        results.append((case["hidden"], failed == 0))
    return results


def grade(folder: Path, scope: dict) -> dict[str, list[tuple[bool, bool]]]:
    """All questions of an assignment."""
    tests = sorted((folder / "tests").glob("*.py"))
    return {test.stem: passed(test, scope) for test in tests}


@pytest.mark.parametrize("name", NAMES)
def test_assignment_is_worth_20_points(name: str) -> None:
    """Five or six questions; the points of the cases are those of the question."""
    assignment = GENERATE.read(ROOT / f"book/assignments/{name}.py")
    assert 5 <= len(assignment.questions) <= 6
    assert sum(question.points for question in assignment.questions) == 20
    for question in assignment.questions:
        assert question.points == sum(points for points, _, _ in question.cases)
        assert {hidden for _, hidden, _ in question.cases} == {False, True}


@pytest.mark.parametrize("name", NAMES)
def test_student_sees_no_answer_and_no_hidden_test(name: str, folder: Path) -> None:
    """Neither a line of a solution nor one of a hidden test is in the notebook."""
    student = nbformat.read(folder / name / f"{name}.ipynb", as_version=4)
    nbformat.validate(student)
    shown = {line.strip() for cell in student.cells for line in cell.source.split("\n")}
    for question in GENERATE.read(ROOT / f"book/assignments/{name}.py").questions:
        public = [code for _, hidden, code in question.cases if not hidden]
        seen = {
            line.strip() for line in "\n".join([question.starter, *public]).split("\n")
        }
        hidden = [code for _, hidden, code in question.cases if hidden]
        secret = "\n".join([question.answer, *hidden]).split("\n")
        lines = {
            line.strip() for line in secret if "assert" in line or "return" in line
        }
        assert lines and not (lines - seen) & shown, question.name


@pytest.mark.parametrize("name", NAMES)
def test_solution_passes_and_nothing_fails(name: str, folder: Path) -> None:
    """Each check of each question, on the solution and on the dots."""
    solved = grade(folder / name, run(folder / name / "solution.ipynb"))
    assert all(ok for cases in solved.values() for _, ok in cases), solved
    empty = grade(folder / name, run(folder / name / f"{name}.ipynb"))
    assert not any(ok for cases in empty.values() for _, ok in cases), empty


@pytest.mark.parametrize("name", NAMES)
def test_hidden_tests_catch_a_mistake(name: str, folder: Path) -> None:
    """An answer that passes the public tests, and is wrong."""
    assignment = GENERATE.read(ROOT / f"book/assignments/{name}.py")
    prepared: dict = {}
    exec(assignment.setup, prepared)
    for question in assignment.questions:
        scope = dict(prepared)
        exec(question.mistake, scope)
        cases = passed(folder / name / "tests" / f"{question.name}.py", scope)
        assert all(ok for hidden, ok in cases if not hidden), question.name
        assert not all(ok for hidden, ok in cases if hidden), question.name


def test_public_check_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cell says not yet to the dots, and right to the solution."""
    for name, answer in (("after_session_4", "not yet"), ("solution", "right")):
        scope: dict = {}
        page = nbformat.read(folder / "after_session_4" / f"{name}.ipynb", as_version=4)
        for cell in [c for c in page.cells if c.cell_type == "code"]:
            if "%pip" not in cell.source:
                exec(cell.source, scope)
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == 6 and all(line.startswith(answer) for line in printed)


def test_statements_become_doctests() -> None:
    """What a loop holds is continued, blank lines included."""
    code = "for i in (1, 2):\n\n    assert i\nx = 3"
    typed = GENERATE.as_doctest(code)
    assert typed.splitlines() == [
        ">>> for i in (1, 2):", "... ", "...     assert i", ">>> x = 3",
    ]  # fmt: skip
    examples = doctest.DocTestParser().get_examples(typed)
    assert ast.dump(ast.parse("".join(e.source for e in examples))) == ast.dump(
        ast.parse(code)
    )


@pytest.mark.skipif(find_spec("otter") is None, reason="make assignments-test has it")
@pytest.mark.parametrize("name", NAMES)
def test_otter_agrees(name: str, folder: Path, tmp_path: Path) -> None:
    """The tool itself, on the command line: all points, and none."""
    place = folder / name
    otter = [sys.executable, "-m", "otter"]
    tests = ["--tests-dir", str(place / "tests"), "--no-environment"]
    zipped = tmp_path / "autograder.zip"
    subprocess.run([*otter, "generate", *tests, "-o", str(zipped)], check=True)
    for notebook, expected in (
        (place / "solution.ipynb", 20),
        (place / f"{name}.ipynb", 0),
    ):
        out = tmp_path / notebook.stem
        out.mkdir()
        command = [*otter, "run", "-a", str(zipped), "-o", str(out), str(notebook)]
        subprocess.run(command, check=True, cwd=tmp_path)
        results = json.loads((out / "results.json").read_text("utf-8"))
        assert sum(test.get("score", 0) for test in results["tests"]) == expected
