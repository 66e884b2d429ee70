"""What the repository promises outside the code: pins, the model, the README."""

import json
import os
import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from conftest import NAMES
from packaging.requirements import Requirement
from pybtex.database import parse_file, parse_string
from test_book import MAX_LINES

ROOT = Path(__file__).parent.parent
POCKET = ROOT / "sipit_lite" / "pocket_gpt2"
README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE = (ROOT / "book" / "package.md").read_text(encoding="utf-8")


def pins() -> dict[str, str]:
    """requirements.txt as {name: version}."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    return {
        name.lower().replace("_", "-"): found
        for name, found in (line.split("==") for line in lines)
    }


def test_environment_yml_uses_the_pins() -> None:
    """Conda brings python and pip; every package comes from requirements.txt."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, section = environment["dependencies"]
    assert python == "python=3.11" and pip == "pip"
    assert section == {"pip": ["--requirement requirements.txt", "--editable ."]}


def test_pins_are_exact_and_meet_pyproject() -> None:
    """What package, book and tests need is pinned, within the lower bounds."""
    # The other extras are not installed by make: no test runs what needs them.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    extras = project["optional-dependencies"]
    for requirement in map(
        Requirement, project["dependencies"] + extras["book"] + extras["test"]
    ):
        pinned = pins()[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(pinned), requirement
    assert pins()["torch"] == "2.13.0" and pins()["jupyter-book"] == "1.0.4.post1"


def test_pins_are_what_runs() -> None:
    """The environment of the tests is the pinned one."""
    for name in ("transformers", "numpy", "safetensors", "jupyter-book", "nbval"):
        assert version(name) == pins()[name]


def test_model_is_small_and_stored_as_float16() -> None:
    """At most 12 MB of float16."""
    assert (POCKET / "model.safetensors").stat().st_size <= 12_000_000
    assert json.loads((POCKET / "config.json").read_text())["dtype"] == "float16"


def test_card_figures_are_those_of_the_weights() -> None:
    """The bundled passages cost about what the card says of all held-out text."""
    import torch
    from transformers import GPT2LMHeadModel

    from sipit_lite import load
    from sipit_lite.io.text import bundled

    rows = re.findall(
        r"^\| (prose|code) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        (POCKET / "README.md").read_text(),
        re.M,
    )
    assert [row[0] for row in rows] == ["prose", "code"]
    model, tokenizer = (
        GPT2LMHeadModel.from_pretrained(POCKET, dtype=torch.float32).eval(),
        load("pocket-gpt2").tokenizer,
    )
    for kind, own, bigram, unigram in rows:
        assert float(own) < float(bigram) - 0.5 < float(unigram) - 0.5
        texts = [
            tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :256]
            for text in bundled(kind)[:24]
        ]
        with torch.no_grad():
            loss = sum(float(model(ids, labels=ids).loss) for ids in texts) / len(texts)
        assert loss < float(bigram) and abs(loss - float(own)) < 0.8, (kind, loss)


def test_readme_is_true() -> None:
    """Its commands exist, and those of the page that goes on from it."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (\.?\w+)", README + USAGE):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.M), target


@pytest.mark.parametrize("browser", ["", "chromium"])
def test_without_a_browser_the_last_line_says_what_was_not_run(browser: str) -> None:
    """``make test`` still ends green; where there is one, the line is not there."""
    # Lint counts as done, and what make starts is not started.
    words = ["--old-file=lint", "MAKE=true", f"CHROMIUM={browser}"]
    outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}
    options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    options["env"] = {k: x for k, x in os.environ.items() if k not in outer}
    done = subprocess.run(["make", "--no-print-directory", *words, "test"], **options)
    started, *last = done.stdout.splitlines()
    assert started == "true -j 2 unit site-then-notebooks"
    rules = subprocess.run(["make", "--print-data-base", *words, "lint"], **options)
    pages = "site" if browser else "pages"
    assert f"\nsite-then-notebooks: {pages}\n" in rules.stdout
    assert len(last) == (0 if browser else 1)
    for line in last:
        assert re.fullmatch(r"not run: .* in a browser; for them: .* make site", line)


@pytest.mark.parametrize("given", [None, "7"])
def test_programs_of_make_spin_briefly(given: str | None) -> None:
    """What threads that wait do is set for all programs, unless the user has."""
    outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "GOMP_SPINCOUNT"}
    kept = {name: value for name, value in os.environ.items() if name not in outer}
    done = subprocess.run(
        ["make", "-s", "--eval", "spins:; @printenv GOMP_SPINCOUNT", "spins"],
        cwd=ROOT,
        env=kept if given is None else kept | {"GOMP_SPINCOUNT": given},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == (given or "3000")


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
REFERENCES = ROOT / "book" / "references.bib"
STATUS = (ROOT / "book" / "status.md").read_text(encoding="utf-8")


def test_status_page_names_the_pins() -> None:
    """The versions on the page are those of requirements.txt."""
    table = STATUS.split("## Versions")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| ([\w-]+) \| (\d\S*) \| .* \|$", table, re.MULTILINE))
    assert {"torch", "transformers", "numpy", "sympy", "jupyter-book", "nbval"} <= set(
        rows
    )
    assert rows == {name: pins()[name] for name in rows}


def test_status_page_names_the_architectures() -> None:
    """The rows are the small models of the tests, with their configuration classes."""
    rows = re.findall(r"^\| ([\w-]+) \| `(\w+Config)` \| .* \|$", STATUS, re.MULTILINE)
    assert rows == [(short, f"{name}Config") for short, name in NAMES.items()]


def test_package_says_who_where_and_what() -> None:
    """Complete metadata; its addresses are those of the book's configuration."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["authors"] == citation["authors"] == [{"name": config["author"]}]
    assert PROJECT["keywords"] == citation["keywords"]
    repository = config["repository"]["url"]
    owner, name = repository.split("/")[-2:]
    [paper] = citation["references"]
    assert PROJECT["urls"] == {
        "Book": f"https://{owner}.github.io/{name}/",
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Paper": paper["url"],
    }
    pythons = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)}
    assert pythons <= set(PROJECT["classifiers"])
    # The badge is a picture of the repository: no service is asked for it.
    assert f"](book/_static/paper.svg)]({paper['url']})" in README
    assert (ROOT / "book/_static/paper.svg").exists()


def test_pins_install_on_any_patch_of_python() -> None:
    """Python 3.11 is enough: later releases of soupsieve need 3.11.5."""
    assert pins()["soupsieve"] == "2.10"
    assert PROJECT["requires-python"] == ">=3.11"
    assert "3.11.5" not in README + USAGE


def test_citation_file() -> None:
    """CITATION.cff has version and licence of the package, and the paper's entry."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "abstract", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert (
        str(citation["version"]) == PROJECT["version"]
        and citation["license"] == PROJECT["license"]
    )
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert citation["title"] == config["title"] and citation["authors"] == [
        {"name": config["author"]}
    ]
    [paper], entry = (
        citation["references"],
        parse_file(REFERENCES).entries["nikolaou2026injective"],
    )
    assert (
        paper["title"] == entry.fields["title"]
        and str(paper["year"]) == entry.fields["year"]
    )
    assert paper["conference"]["name"] == entry.fields["booktitle"]
    assert paper["identifiers"][0]["value"] == f"arXiv:{entry.fields['eprint']}"
    names = [
        (str(person.rich_last_names[0]), person.first_names[0])
        for person in entry.persons["author"]
    ]
    assert [
        (person["family-names"], person["given-names"]) for person in paper["authors"]
    ] == names


def test_page_on_citing() -> None:
    """One entry is that of the bibliography, the other names the book."""
    page = (ROOT / "book" / "cite.md").read_text(encoding="utf-8")
    paper, book = (
        parse_string(text, "bibtex")
        for text in re.findall(r"^```bibtex\n(.*?)^```", page, re.M | re.S)
    )
    [(key, entry)], [own] = paper.entries.items(), book.entries.values()
    assert entry == parse_file(REFERENCES).entries[key]
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert (
        own.fields["title"] == config["title"]
        and str(own.persons["author"][0]) == "{" + config["author"] + "}"
    )
    assert own.fields["note"].endswith(
        f"{PROJECT['name']}, version {PROJECT['version']}"
    )


def test_changelog_and_contributing() -> None:
    """The newest version is that of the package, and the commands exist."""
    newest = re.search(
        r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M
    )
    assert newest and newest[1] == PROJECT["version"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\.?\w+)", text, re.M)
    assert targets and all(
        re.search(rf"^{re.escape(target)}:", makefile, re.M) for target in targets
    )
    assert f"at most {MAX_LINES} lines" in text
    assert "tests/test_house.py" in text
    named = re.findall(r"`((?:book|tests|sipit_lite)/[\w.-]+)`", text)
    assert named and all((ROOT / name).exists() for name in named)
