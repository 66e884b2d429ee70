"""The house stays small: capped lines, imports one way, lines that read."""

import ast
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

PACKAGE = Path(__file__).parent.parent / "sipit_lite"
ROOMS = ("io", "extensions", "experiments", "teaching", "pocket_gpt2")
# Lines of each file of the core, docstrings and blank lines included.
CORE = {
    "__init__.py": 40,
    "__main__.py": 12,
    "model.py": 260,
    "onestep.py": 143,
    "acceptance.py": 388,
    "policies.py": 104,
    "recovery.py": 85,
    "sipit.py": 398,
    "bounds.py": 60,
    "collisions.py": 360,
}
# Caps: before you add, delete.
BUDGET = {
    "core": 1800,
    "io": 1142,
    "extensions": 1714,
    "experiments": 2531,
    "teaching": 1000,
    "cli": 430,
    "all": 8600,
}
# What each part of the house may import, itself included.
MAY_IMPORT = {
    "core": {"core"},
    "io": {"core", "io"},
    "extensions": {"core", "io", "extensions"},
    "experiments": {"core", "io", "extensions", "experiments"},
    "teaching": {"core", "teaching"},
    "pocket_gpt2": {"core", "io", "pocket_gpt2"},
    "cli": {"core", "io", "extensions", "experiments", "cli"},
}
MANY_MEANINGS = set("whole asked told found crowd some kept begun own far".split())
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def sources() -> Iterator[Path]:
    """Every Python file of the package."""
    yield from sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the house that a file belongs to."""
    relative = path.relative_to(PACKAGE)
    if relative.parts[0] in ROOMS:
        return relative.parts[0]
    return "cli" if relative.name == "cli.py" else "core"


def line_count(path: Path) -> int:
    """All lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def imported_parts(path: Path) -> set[str]:
    """The parts of the house that a file imports from, wherever the import stands."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first == "sipit_lite":
                room = rest[0] if rest else ""
                parts.add(room if room in (*ROOMS, "cli") else "core")
    return parts


def docstring_lines(tree: ast.AST) -> set[int]:
    """Numbers of the lines that docstrings take."""
    lines = set()
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def figures(path: Path) -> dict[str, int]:
    """Code lines, comments, nested comprehensions and tuple assignments of a file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    docs = docstring_lines(tree)
    code, comments = set(), set()
    layout = {
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        span = range(token.start[0], token.end[0] + 1)
        if token.type == tokenize.COMMENT:
            # Remarks to tools say nothing to a reader.
            if not token.string.startswith(("# noqa", "# fmt:", "# type:")):
                comments.add(token.start[0])
        elif token.type not in layout:
            code.update(line for line in span if line not in docs)
    nested = 0
    packed = 0
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            inner = [n for n in ast.walk(node) if isinstance(n, COMPREHENSIONS)]
            nested += len(inner) > 1 or len(node.generators) > 1
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            packed += isinstance(node.targets[0], ast.Tuple)
    return {
        "code": len(code),
        "comments": len(comments),
        "nested": nested,
        "packed": packed,
    }


def totals() -> dict[str, int]:
    """The figures of the package."""
    total: dict[str, int] = {}
    for path in sources():
        for name, value in figures(path).items():
            total[name] = total.get(name, 0) + value
    return total


@pytest.mark.parametrize("name", sorted(CORE))
def test_files_of_the_core_stay_within_their_budget(name: str) -> None:
    """A reader of the paper reads each in one sitting."""
    assert line_count(PACKAGE / name) <= CORE[name]


def test_the_core_has_no_other_files() -> None:
    """What is not the paper's own lives in a room."""
    there = {path.name for path in PACKAGE.glob("*.py")}
    assert there == {*CORE, "cli.py"}


@pytest.mark.parametrize("part", sorted(BUDGET))
def test_parts_stay_within_their_budget(part: str) -> None:
    """Caps, docstrings included: before you add, delete."""
    lines = 0
    for path in sources():
        if part in ("all", part_of(path)):
            lines += line_count(path)
    assert lines <= BUDGET[part]


def test_imports_run_one_way() -> None:
    """cli → experiments → extensions → io → core; teaching uses the core alone."""
    for path in sources():
        # One names what every room offers, the other opens the command line.
        if path.parent == PACKAGE and path.name in ("__init__.py", "__main__.py"):
            continue
        wrong = imported_parts(path) - MAY_IMPORT[part_of(path)]
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_only_installed_text_is_remembered_by_a_module() -> None:
    """What is computed of a model is a field of it, and goes when the model goes."""
    for path in sources():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names |= {getattr(node, "module", "")}
                names |= {alias.name for alias in node.names}
        remembers = names & {"cache", "lru_cache", "weakref"}
        assert not remembers or path.name == "text.py", path


def test_lines_fit_the_page() -> None:
    """At most 88 columns."""
    for path in sources():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 88, f"{path.relative_to(PACKAGE)}:{number}"


def test_lines_hold_one_thing() -> None:
    """Per 1 000 code lines at most one nested comprehension and five packed tuples."""
    total = totals()
    assert total["nested"] * 1000 <= 1 * total["code"], total
    assert total["packed"] * 1000 <= 5 * total["code"], total


def test_names_say_one_thing_and_loops_are_loops() -> None:
    """No word that had several meanings; no list of one item in place of an "=".

    No name that is given a value amid an index, either.
    """
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            stored = isinstance(getattr(node, "ctx", None), ast.Store)
            names = {getattr(node, "arg", ""), getattr(node, "name", "")}
            names |= (
                {getattr(node, "id", ""), getattr(node, "attr", "")}
                if stored
                else set()
            )
            assert not names & MANY_MEANINGS, where
            if isinstance(node, ast.For | ast.comprehension):
                items = getattr(node.iter, "elts", (0, 0))
                assert len(items) > 1 or isinstance(items[0], ast.Starred), where
            if isinstance(node, ast.Subscript):
                inside = map(type, ast.walk(node.slice))
                assert ast.NamedExpr not in inside, where


def test_comments_stand_where_a_reader_stops() -> None:
    """At least eight in a hundred code lines."""
    total = totals()
    assert total["comments"] * 100 >= 8 * total["code"], total


def test_a_model_passes_few_rooms_and_returns_in_one_inversion() -> None:
    """At most five files and ten ``return`` in what takes it as an argument."""
    from sipit_lite import invert, load

    model = load("pocket-gpt2")
    states = model.states("The secret is out.", 3)
    passed = set()

    def look(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        given = [frame.f_locals.get(name) is model for name in names if name != "self"]
        if event == "call" and any(given) and str(PACKAGE) in code.co_filename:
            passed.add((code.co_filename, code.co_name))

    sys.setprofile(look)
    try:
        invert(states, model, 3)
    finally:
        sys.setprofile(None)
    returns = 0
    files = {file for file, _ in passed}
    for file in files:
        for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
            if (file, getattr(node, "name", "")) in passed:
                returns += sum(isinstance(x, ast.Return) for x in ast.walk(node))
    assert 3 <= len(files) <= 5, files
    assert 7 <= returns <= 10, passed


def test_public_functions_say_what_they_take_and_show_it() -> None:
    """In sections; an example that runs stands there, or on the page of the package."""
    import sipit_lite

    page = (PACKAGE.parent / "book" / "package.md").read_text(encoding="utf-8")
    functions = [name for name in sipit_lite.__all__ if name[0].islower()]
    assert len(functions) > 9
    for name in [*functions, "LanguageModel"]:
        doc = inspect.getdoc(getattr(sipit_lite, name))
        given = () if name == "LanguageModel" else ("Returns|Yields",)
        for titles in ("Parameters", *given, "Raises"):
            assert re.search(rf"^({titles})\n---", doc, re.MULTILINE), (name, titles)
        lines = re.findall(r"^\s*(?:>>>|\.\.\.) .*", f"{doc}\n{page}", re.MULTILINE)
        assert re.search(rf"\b{name}\(", "\n".join(lines)), name


def report() -> None:
    """Print where the lines are: ``python tests/test_house.py``."""
    by_part: dict[str, int] = {}
    for path in sources():
        lines = line_count(path)
        by_part[part_of(path)] = by_part.get(part_of(path), 0) + lines
        wide = sum(len(line) > 88 for line in path.read_text().splitlines())
        name = str(path.relative_to(PACKAGE))
        print(f"{name:34}{lines:6} lines  {figures(path)}  wide {wide}")
    for part, lines in by_part.items():
        print(f"{part:12}{lines:6} of {BUDGET.get(part, '-')}")
    total = totals()
    code = total["code"]
    print(f"all {sum(by_part.values())} of {BUDGET['all']}; {code} code lines")
    print(f"nested {1000 * total['nested'] / code:.1f} (≤ 1) per 1 000 code lines")
    print(f"packed {1000 * total['packed'] / code:.1f} (≤ 5) per 1 000 code lines")
    print(f"comments {100 * total['comments'] / code:.1f} (≥ 8) per 100 code lines")


if __name__ == "__main__":
    sys.exit(report())
