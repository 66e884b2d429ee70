"""The contract of the book: executed notebooks, pages that need nothing else."""

import ast
import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from io import BytesIO
from math import ceil
from pathlib import Path
from types import ModuleType, SimpleNamespace

import nbformat
import pytest
import torch
import yaml
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from sphinx.errors import ExtensionError

from sipit_lite.teaching.figures import widget

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
PAGES = sorted([*NOTEBOOKS, *BOOK.glob("*.md")])
MAX_LINES = 25
# What a tag may do: hide, remove, announce an error, or loosen nbval for timings.
ALLOWED_TAGS = {
    "hide-input", "hide-output", "hide-cell",
    "remove-input", "remove-output", "remove-cell",
    "nbval-ignore-output", "raises-exception", "exercise", "solution",
    "every-model",
}  # fmt: skip
# For each of these MathJax would fetch a file that is not there (autoload.packages).
FETCHING_MACROS = re.compile(
    r"\\(boldsymbol|bbox|cancel|bcancel|xcancel|cancelto|color|textcolor|colorbox|fcolorbox|definecolor|enclose|href"
    r"|class|cssId|ce|pu|bra|ket|braket|unicode|verb|require|xmapsto|xlongequal|toggle|mathtip|texttip)(?![A-Za-z])"
)
Check = Callable[[NotebookNode], list[str]]


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells that hold code."""
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and cell.source.strip()
    ]


def tags(cell: NotebookNode) -> set[str]:
    """The tags of a cell."""
    return set(cell.metadata.get("tags", []))


def not_run_in_order(notebook: NotebookNode) -> list[str]:
    """Nbval passes cells without outputs: one that was not run proves nothing."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    return (
        []
        if counts == list(range(1, len(counts) + 1))
        else [f"execution counts {counts}: restart, run all, commit"]
    )


def stderr_outputs(notebook: NotebookNode) -> list[str]:
    """Nbval compares stderr, and warnings differ from machine to machine."""
    streams = [
        out
        for cell in code_cells(notebook)
        for out in cell.outputs
        if out.get("name") == "stderr"
    ]
    return [f"stderr: {out.text[:80]!r}" for out in streams]


def unannounced_errors(notebook: NotebookNode) -> list[str]:
    """An error on a page is meant to be there, and its cell says so."""
    return [
        f"{out.ename} in {cell.source[:80]!r} without the tag raises-exception"
        for cell in code_cells(notebook) if "raises-exception" not in tags(cell)
        for out in cell.outputs if out.output_type == "error"
    ]  # fmt: skip


def no_assert(notebook: NotebookNode) -> list[str]:
    """A chapter checks at least one of its claims."""
    asserts = [
        cell
        for cell in code_cells(notebook)
        if re.search(r"^\s*assert\b", cell.source, re.MULTILINE)
    ]
    return [] if asserts else ["no cell with an assert"]


def long_cells(notebook: NotebookNode) -> list[str]:
    """A longer cell should be shorter, or two."""
    lengths = [
        (len(cell.source.splitlines()), cell.source[:80])
        for cell in code_cells(notebook)
    ]
    return [
        f"{lines} lines, at most {MAX_LINES}: {start!r}"
        for lines, start in lengths
        if lines > MAX_LINES
    ]


def unknown_tags(notebook: NotebookNode) -> list[str]:
    """A tag that skips or loosens a check, nbval-skip above all, would go unnoticed."""
    found = {tag for cell in notebook.cells for tag in tags(cell)}
    return [
        f"tag {tag!r}; expected one of {sorted(ALLOWED_TAGS)}"
        for tag in sorted(found - ALLOWED_TAGS)
    ]


def figures_without_alt(notebook: NotebookNode) -> list[str]:
    """MyST-NB takes the text of a picture from ``mystnb.image.alt`` alone."""
    return [
        f"picture without metadata mystnb.image.alt: {cell.source[:80]!r}"
        for cell in code_cells(notebook)
        if any(
            mime.startswith("image/")
            for out in cell.outputs
            for mime in out.get("data", {})
        )
        and not str(
            cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        ).strip()
    ]


STYLE = 'plt.style.use("sipit_lite.teaching.book")'
COLUMN = 950  # pixels: 5.6 inches at 160, and a rim


def pictures(notebook: NotebookNode) -> Iterator[tuple[NotebookNode, Image.Image]]:
    """The pictures of a page, each with its cell."""
    for cell in code_cells(notebook):
        for out in cell.outputs:
            if "image/png" in out.get("data", {}):
                data = b64decode(out.data["image/png"])
                yield cell, Image.open(BytesIO(data)).convert("RGBA")


def for_both(cell: NotebookNode) -> bool:
    """Whether a picture is in colours for light and dark pages, as the book's first."""
    image = cell.metadata.get("mystnb", {}).get("image", {})
    return image.get("classes") == "dark-light"


def opaque_figures(notebook: NotebookNode) -> list[str]:
    """A page that is dark turns light into dark, and a white ground into a box."""
    corners = [image.getpixel((0, 0))[3] for _, image in pictures(notebook)]
    return [f"picture {i} has a ground" for i, alpha in enumerate(corners) if alpha]


def wide_figures(notebook: NotebookNode) -> list[str]:
    """A wider one has smaller letters on a phone."""
    return [
        f"{image.width} pixels wide, at most {COLUMN}: {cell.source[:80]!r}"
        for cell, image in pictures(notebook)
        if image.width > COLUMN and not for_both(cell)
    ]


def unstyled_figures(notebook: NotebookNode) -> list[str]:
    """One line after the imports gives all figures one look."""
    drawn = [cell for cell, _ in pictures(notebook) if not for_both(cell)]
    styled = any(STYLE in cell.source for cell in code_cells(notebook))
    return [] if styled or not drawn else [f"figures without {STYLE}"]


MAX_WORDS = 2500  # of a page
MAX_WORDS_CORE = 25_000  # of the landing page and the core path together
MAX_COLUMNS = 80
HIDDEN = {"hide-input", "remove-input", "hide-cell", "remove-cell"}


def words(text: str) -> int:
    """The words of Markdown: a formula is one, what only marks up is none."""
    text = re.sub(r"\$\$.*?\$\$", " F ", text, flags=re.DOTALL)
    text = re.sub(r"```\{math\}.*?```", " F ", text, flags=re.DOTALL)
    text = re.sub(r"\$[^$]*\$", "F", text)
    markup = re.compile(r"\s*(:[a-z-]+:|`{3,}|:{3,}|\()")
    lines = [line for line in text.splitlines() if not markup.match(line)]
    return sum(bool(re.search(r"\w", word)) for word in "\n".join(lines).split())


def page_words(notebook: NotebookNode) -> int:
    """The words of a page, exercises and solutions included."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return words("\n".join(cells))


def reading_minutes(notebook: NotebookNode) -> int:
    """200 words or 15 shown lines of code a minute; these, rounded up to five."""
    sources = [cell.source for cell in code_cells(notebook) if not tags(cell) & HIDDEN]
    lines = [line for line in "\n".join(sources).splitlines() if line.strip()]
    return 5 * ceil(round(page_words(notebook) / 200 + len(lines) / 15) / 5)


def too_many_words(notebook: NotebookNode) -> list[str]:
    """A page that a reader finishes."""
    count = page_words(notebook)
    return [f"{count} words, at most {MAX_WORDS}"] if count > MAX_WORDS else []


def wide_lines(notebook: NotebookNode) -> list[str]:
    """Wider code is cut on paper, and scrolls on a phone."""
    return [
        f"{len(line)} columns, at most {MAX_COLUMNS}: {line!r}"
        for cell in code_cells(notebook)
        for line in cell.source.splitlines()
        if len(line) > MAX_COLUMNS
    ]


def printed_verdicts(notebook: NotebookNode) -> list[str]:
    """A page prints the number, and the bound beside it."""
    printed = [
        out.text
        for cell in code_cells(notebook)
        for out in cell.outputs
        if out.output_type == "stream"
    ]
    return [
        f"prints a verdict, and no number: {line!r}"
        for line in "".join(printed).splitlines()
        if re.search(r"\b(True|False)\b", line)
    ]


EXERCISE_MARKUP = re.compile(
    r"^```\{exercise-(?:start\} .*\n:label: (\S+)|(end)\})"
    r"|^```\{solution-(?:start\} (\S+)|(end)\})",
    re.MULTILINE,
)
ATTEMPT = re.compile(r"attempt\((\w+), .+\)")


def cells_of_exercises(
    notebook: NotebookNode,
) -> dict[str, dict[str, list[NotebookNode]]]:
    """Code after each exercise, up to its solution, and code in that solution."""
    cells: dict[str, dict[str, list[NotebookNode]]] = {}
    label = place = None
    for cell in notebook.cells:
        if cell.cell_type == "code" and place:
            cells[label][place].append(cell)
        if cell.cell_type != "markdown":
            continue
        for started, _, solved, end in EXERCISE_MARKUP.findall(cell.source):
            if started or solved:
                label = started or solved
                place = "starter" if started else "solution"
                cells.setdefault(label, {"starter": [], "solution": []})
            elif end:
                place = None
    return cells


def printed(cell: NotebookNode) -> str:
    """What a cell printed."""
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def exercises_without_check(notebook: NotebookNode) -> list[str]:
    """A starter refuses the unfinished answer, and the solution passes its check."""
    found = []
    for label, cells in cells_of_exercises(notebook).items():
        if len(cells["starter"]) != 1 or "exercise" not in tags(cells["starter"][0]):
            found.append(f"{label}: one cell tagged exercise before its solution")
            continue
        [starter] = cells["starter"]
        call = starter.source.splitlines()[-1]
        check = ATTEMPT.fullmatch(call)
        if not check or f"def {check[1]}(" not in starter.source:
            found.append(f"{label}: the starter ends with attempt(check, answer)")
            continue
        asserts = [
            node
            for node in ast.walk(ast.parse(starter.source))
            if isinstance(node, ast.Assert)
        ]
        if not asserts or any(node.msg is None for node in asserts):
            found.append(f"{label}: each assert of the check says what is wrong")
        if not re.match("not yet: ", printed(starter)):
            found.append(f"{label}: the starter prints 'not yet: …'")
        solved = [
            cell
            for cell in cells["solution"]
            if cell.source.splitlines()[-1].startswith(f"attempt({check[1]}, ")
        ]
        last_lines = [printed(cell).splitlines()[-1:] for cell in solved]
        if last_lines != [["right"]]:
            found.append(f"{label}: one cell of the solution ends with {call}: right")
    return found


WIDGET = re.compile(
    r'<figure class="widget" data-name="(\w+)">'
    r'.*<script type="application/json">(.*?)</script>.*',
    re.DOTALL,
)


def stale_widgets(notebook: NotebookNode) -> list[str]:
    """A page holds the scripts of its widgets, and they are those of the package."""
    shown = [
        out.data["text/html"]
        for cell in code_cells(notebook)
        for out in cell.outputs
        if WIDGET.match(out.get("data", {}).get("text/html", ""))
    ]
    return [
        f"the widget {WIDGET.match(page)[1]!r} has another script: run its cell again"
        for page in shown
        if widget(WIDGET.match(page)[1], json.loads(WIDGET.match(page)[2])) != page
    ]


CHECKS: list[Check] = [
    not_run_in_order, stderr_outputs, unannounced_errors, no_assert, long_cells,
    unknown_tags, figures_without_alt, opaque_figures, wide_figures, unstyled_figures,
    too_many_words, wide_lines, printed_verdicts, exercises_without_check,
    stale_widgets,
]  # fmt: skip


def complaints(notebook: NotebookNode) -> list[str]:
    """Everything that keeps a notebook from being a reference."""
    return [complaint for check in CHECKS for complaint in check(notebook)]


# Pages that are still to be shortened, and may break these rules until then.
UNFINISHED: set[str] = set()
LENIENT = (too_many_words, wide_lines, printed_verdicts)
# Pages whose figures are still to be drawn in the style of the book.
UNSTYLED: set[str] = set()
FIGURES = (opaque_figures, wide_figures, unstyled_figures)


def test_there_are_notebooks() -> None:
    """The tests below run once per notebook, so they would pass without any."""
    assert NOTEBOOKS, f"no notebook in {BOOK}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_a_real_reference(path: Path) -> None:
    """Every notebook keeps the whole contract."""
    notebook = nbformat.read(path, as_version=4)
    spared = LENIENT if path.stem in UNFINISHED else ()
    spared += FIGURES if path.stem in UNSTYLED else ()
    checks = [check for check in CHECKS if check not in spared]
    assert [complaint for check in checks for complaint in check(notebook)] == []


def png(width: int, alpha: int) -> str:
    """A small picture, as a notebook holds it."""
    file = BytesIO()
    Image.new("RGBA", (width, 1), (255, 255, 255, alpha)).save(file, "png")
    return b64encode(file.getvalue()).decode()


def sound_notebook() -> NotebookNode:
    """A small notebook that keeps the contract: a checked claim, and a figure."""
    claim = new_code_cell("assert 1 < 2\nprint('ok')", execution_count=1)
    claim.outputs = [new_output("stream", name="stdout", text="ok\n")]
    figure = new_code_cell(f"{STYLE}\nplt.show()", execution_count=2)
    figure.metadata = NotebookNode(
        tags=["hide-input"],
        mystnb=NotebookNode(image=NotebookNode(alt="a rising line")),
    )
    figure.outputs = [new_output("display_data", data={"image/png": png(COLUMN, 0)})]
    return new_notebook(cells=[new_markdown_cell("# Title"), claim, figure])


def forget_to_run(claim: NotebookNode, figure: NotebookNode) -> None:
    """A cell was edited and not run again."""
    figure.execution_count = None


def run_out_of_order(claim: NotebookNode, figure: NotebookNode) -> None:
    """The cells were run in another order."""
    claim.execution_count, figure.execution_count = 2, 1


def warn(claim: NotebookNode, figure: NotebookNode) -> None:
    """A library printed a warning."""
    claim.outputs = [new_output("stream", name="stderr", text="UserWarning")]


def fail(claim: NotebookNode, figure: NotebookNode) -> None:
    """A cell stopped with an error."""
    claim.outputs = [
        new_output("error", ename="AssertionError", evalue="", traceback=[])
    ]


def only_mention_assert(claim: NotebookNode, figure: NotebookNode) -> None:
    """The word is in a comment, and nothing is checked."""
    claim.source = "print('ok')  # assert nothing"


def write_a_wide_line(claim: NotebookNode, figure: NotebookNode) -> None:
    """A comment ends in column 81."""
    claim.source = "assert True  # " + "x" * 66


def print_a_verdict(claim: NotebookNode, figure: NotebookNode) -> None:
    """The reader learns that a test passed, and not by how much."""
    claim.outputs = [new_output("stream", name="stdout", text="below: True\n")]


def write_26_lines(claim: NotebookNode, figure: NotebookNode) -> None:
    """A cell is one line too long."""
    claim.source = "\n".join(["assert True"] * (MAX_LINES + 1))


def skip_a_cell(claim: NotebookNode, figure: NotebookNode) -> None:
    """A cell is taken out of nbval."""
    claim.metadata = NotebookNode(tags=["nbval-skip"])


def forget_alt(claim: NotebookNode, figure: NotebookNode) -> None:
    """A figure has no metadata at all."""
    figure.metadata = NotebookNode()


def keep_an_old_script(claim: NotebookNode, figure: NotebookNode) -> None:
    """The script of a widget was mended, and its page not run again."""
    page = widget("inverter", {"levels": 9}).replace("nearest", "farthest")
    figure.outputs = [new_output("display_data", data={"text/html": page})]


def leave_alt_blank(claim: NotebookNode, figure: NotebookNode) -> None:
    """A figure has an alternative text that says nothing."""
    figure.metadata.mystnb.image.alt = " "


def draw_on_white(claim: NotebookNode, figure: NotebookNode) -> None:
    """A figure has matplotlib's own ground."""
    figure.outputs[0].data["image/png"] = png(9, 255)


def draw_wide(claim: NotebookNode, figure: NotebookNode) -> None:
    """A figure is one pixel wider than the column."""
    figure.outputs[0].data["image/png"] = png(COLUMN + 1, 0)


def forget_the_style(claim: NotebookNode, figure: NotebookNode) -> None:
    """A page draws in matplotlib's own colours."""
    figure.source = "plt.show()"


def put_alt_with_the_caption(claim: NotebookNode, figure: NotebookNode) -> None:
    """MyST-NB drops an alternative text that stands beside the caption."""
    figure.metadata = NotebookNode(
        mystnb=NotebookNode(figure=NotebookNode(alt="a rising line", caption="A line."))
    )


def test_contract_accepts_a_sound_notebook() -> None:
    """The checks do not refuse everything."""
    assert complaints(sound_notebook()) == []


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (forget_to_run, not_run_in_order),
        (run_out_of_order, not_run_in_order),
        (warn, stderr_outputs),
        (fail, unannounced_errors),
        (only_mention_assert, no_assert),
        (write_26_lines, long_cells),
        (write_a_wide_line, wide_lines),
        (print_a_verdict, printed_verdicts),
        (skip_a_cell, unknown_tags),
        (forget_alt, figures_without_alt),
        (leave_alt_blank, figures_without_alt),
        (put_alt_with_the_caption, figures_without_alt),
        (keep_an_old_script, stale_widgets),
        (draw_on_white, opaque_figures),
        (draw_wide, wide_figures),
        (forget_the_style, unstyled_figures),
    ],
    ids=lambda function: function.__name__,
)
def test_contract_catches(
    spoil: Callable[[NotebookNode, NotebookNode], None], check: Check
) -> None:
    """Each way to break the contract draws one complaint, from the check for it."""
    notebook = sound_notebook()
    spoil(*code_cells(notebook))
    assert complaints(notebook) == check(notebook)
    assert len(check(notebook)) == 1


def test_contract_lets_an_announced_error_pass() -> None:
    """A page may show an error on purpose."""
    notebook = sound_notebook()
    claim, figure = code_cells(notebook)
    fail(claim, figure)
    claim.metadata = NotebookNode(tags=["raises-exception"])
    assert complaints(notebook) == []


def notebook_with_exercise() -> NotebookNode:
    """A hint, a starter that refuses the dots, a solution that passes the check."""
    text = "```{exercise-start} Half, 5 minutes\n:label: ex-half\n```\n\nHalve 8.\n\n"
    text += "```{exercise-end}\n```\n\n```{admonition} Hint\n:class: dropdown tip\n```"
    check = "def check_half(half):\n    assert 2 * half == 8, 'twice it is not 8'\n"
    starter = new_code_cell(
        f"{check}\n\nhalf = ...\nattempt(check_half, half)", execution_count=1
    )
    starter.metadata.tags = ["exercise"]
    starter.outputs = [new_output("stream", name="stdout", text="not yet: dots\n")]
    begin = "```{solution-start} ex-half\n:class: dropdown\n```"
    solution = new_code_cell("half = 4\nattempt(check_half, half)", execution_count=2)
    solution.outputs = [new_output("stream", name="stdout", text="right\n")]
    end = "```{solution-end}\n```"
    texts = [new_markdown_cell(part) for part in (text, begin, end)]
    return new_notebook(cells=[texts[0], starter, texts[1], solution, texts[2]])


def leave_the_starter_out(page: NotebookNode) -> None:
    """The reader has nothing to fill in."""
    del page.cells[1]


def write_two_starters(page: NotebookNode) -> None:
    """Which of them is to be filled in?"""
    page.cells.insert(2, new_code_cell("half = ..."))


def put_the_starter_behind(page: NotebookNode) -> None:
    """The reader passes the solution on the way."""
    page.cells.append(page.cells.pop(1))


def forget_the_tag(page: NotebookNode) -> None:
    """The starter is a cell like any other."""
    page.cells[1].metadata.tags = []


def do_not_attempt(page: NotebookNode) -> None:
    """The check is never called."""
    page.cells[1].source += "\nprint(half)"


def check_elsewhere(page: NotebookNode) -> None:
    """The reader cannot see what is checked."""
    page.cells[1].source = "half = ...\nattempt(check_half, half)"


def give_no_reason(page: NotebookNode) -> None:
    """The check says no, and not why."""
    source = page.cells[1].source
    page.cells[1].source = source.replace(", 'twice it is not 8'", "")


def start_with_the_answer(page: NotebookNode) -> None:
    """The starter passes as it is."""
    page.cells[1].outputs[0].text = "right\n"


def solve_without_check(page: NotebookNode) -> None:
    """The solution shows an answer that nothing checks."""
    page.cells[3].source = "half = 4"


def solve_another(page: NotebookNode) -> None:
    """The solution passes a check of its own."""
    page.cells[3].source = "half = 4\nattempt(check_double, half)"


def solve_wrongly(page: NotebookNode) -> None:
    """The solution does not pass."""
    page.cells[3].outputs[0].text = "not yet: twice it is not 8\n"


def test_contract_accepts_an_exercise_with_a_check() -> None:
    """Hint, starter, solution."""
    assert complaints(notebook_with_exercise()) == []


@pytest.mark.parametrize(
    "spoil",
    [
        leave_the_starter_out, write_two_starters, put_the_starter_behind,
        forget_the_tag, do_not_attempt, check_elsewhere, give_no_reason,
        start_with_the_answer, solve_without_check, solve_another, solve_wrongly,
    ],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_contract_catches_an_exercise_without_check(
    spoil: Callable[[NotebookNode], None],
) -> None:
    """Each way to leave an exercise unchecked draws one complaint."""
    page = notebook_with_exercise()
    spoil(page)
    assert len(exercises_without_check(page)) == 1


def test_words_are_counted_as_a_reader_would() -> None:
    """A formula is one word, a directive none; one word more is too many."""
    text = "Let $a + b = c$ be.\n\n$$\nx = y\n$$\n\n```{note}\n:class: tip\nOne.\n```"
    assert words(text) == 5
    page = new_notebook(cells=[new_markdown_cell("word " * MAX_WORDS)])
    assert too_many_words(page) == [] and reading_minutes(page) == 15
    page.cells[0].source += "more"
    assert too_many_words(page) == ["2501 words, at most 2500"]


def listed_pages(entry: dict) -> Iterator[str]:
    """The names of all pages in a table of contents, from the root down."""
    yield from (entry[key] for key in ("root", "file") if key in entry)
    for key in ("parts", "chapters", "sections"):
        for below in entry.get(key, []):
            yield from listed_pages(below)


TOC = yaml.safe_load((BOOK / "_toc.yml").read_text(encoding="utf-8"))
INTRODUCTION = next(page for page in PAGES if page.stem == TOC["root"])
CAPTIONS = [part["caption"] for part in TOC["parts"]]
CHAPTERS = [list(listed_pages(part)) for part in TOC["parts"]]
CORE = [n for part in CHAPTERS[: CAPTIONS.index("Deeper")] for n in part]
DEEPER = CHAPTERS[CAPTIONS.index("Deeper")]


def test_chapters_are_numbered_and_the_reference_is_not() -> None:
    """Theorems and figures begin with the number of their chapter."""
    numbered = [part["caption"] for part in TOC["parts"] if part.get("numbered") == 1]
    assert numbered == CAPTIONS[:-1] and CAPTIONS[-1] == "Reference"
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert config["html"]["use_multitoc_numbering"] is True


def test_former_addresses_lead_to_pages() -> None:
    """The former name of a page leads to a page, and is no page itself."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    pages = {page.stem for page in PAGES}
    for old, new in config["sphinx"]["config"]["redirects"].items():
        assert old not in pages and new.partition("#")[0] in pages, (old, new)


def test_redirect_is_written(tmp_path: Path) -> None:
    """With the label of a section, or with that of the reader's link."""
    redirects = load_extension("redirects")
    app = SimpleNamespace(
        builder=SimpleNamespace(name="html"),
        config=SimpleNamespace(redirects={"old": "new", "part": "new#label"}),
        env=SimpleNamespace(found_docs={"new"}),
        outdir=tmp_path,
    )
    redirects.write_redirects(app, None)
    assert '"new.html" + ("new.html"' in (tmp_path / "old.html").read_text()
    assert 'href="new.html#label"' in (tmp_path / "part.html").read_text()
    app.config.redirects = {"old": "nowhere"}
    with pytest.raises(ExtensionError, match="'nowhere', no page"):
        redirects.write_redirects(app, None)


def test_pages_are_found(tmp_path: Path) -> None:
    """Description and card in each head, and a map; the address from one setting."""
    found = load_extension("found")
    config = SimpleNamespace(
        html_baseurl="",
        html_theme_options={"repository_url": "https://example.org/owner/name"},
        html_title="Book",
        description="About the book.",
    )
    app = SimpleNamespace(
        builder=SimpleNamespace(name="html"),
        config=config,
        env=SimpleNamespace(found_docs={"b", "a"}),
        outdir=tmp_path,
    )
    found.set_address(app, config)
    address = "https://owner.github.io/name/"
    assert config.html_baseurl == address
    context = {"title": "<span>1. </span>Less &lt; more"}
    found.add_metatags(app, "a", "page.html", context, None)
    head = context["metatags"]
    assert '<meta name="description" content="About the book.">' in head
    assert 'property="og:title" content="1. Less &lt; more"' in head
    assert f'property="og:image" content="{address}{found.CARD}"' in head
    found.write_sitemap(app, None)
    text = (tmp_path / "sitemap.xml").read_text(encoding="utf-8")
    assert re.findall("<loc>(.*)</loc>", text) == [f"{address}{n}.html" for n in "ab"]
    # Width and height stand in bytes 16 to 24 of a PNG.
    card = (BOOK / found.CARD).read_bytes()
    size = [int.from_bytes(card[i : i + 4], "big") for i in (16, 20)]
    assert size == [1200, 630] and len(card) <= 150_000


def load_extension(name: str) -> ModuleType:
    """A module of ``book/_ext``."""
    spec = spec_from_file_location(name, BOOK / "_ext" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_of_contents_lists_exactly_the_pages() -> None:
    """A page that is not listed is not built; one that is missing breaks the build."""
    assert sorted(listed_pages(TOC)) == sorted(page.stem for page in PAGES)


def test_formulas_need_no_network() -> None:
    """MathJax is in the repository, with its licence, and the book is built with it."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    script = BOOK / "_static" / config["sphinx"]["config"]["mathjax_path"]
    assert script.stat().st_size > 2_000_000, (
        "the whole of MathJax is one file of two megabytes"
    )
    assert "Apache License" in (script.parent / "LICENSE").read_text(encoding="utf-8")


def prose(path: Path) -> str:
    """The text of a page without its code cells, which may hold backslashes."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page_uses_no_macro_that_fetches_a_file(path: Path) -> None:
    """Offline, a formula with such a macro would stay raw TeX."""
    assert [match.group() for match in FETCHING_MACROS.finditer(prose(path))] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_address_of_the_repository_is_in_the_configuration_alone(path: Path) -> None:
    """Whoever moves the repository changes one line of ``_config.yml``."""
    url = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))[
        "repository"
    ]["url"]
    assert url.removeprefix("https://") not in path.read_text(encoding="utf-8")


def needs(path: Path) -> tuple[str, str]:
    """How long a chapter takes to read and to run, in the words of its line *Needs*."""
    line = re.search(r"^\*Needs:\*.*", prose(path), re.MULTILINE)
    found = line and re.search(
        r" · ([^·]+) to read(?:, [^·]*)? · ([^·]+?)(?: to run)? on two cores",
        line.group(),
    )
    assert found, (
        f"{path.name}: expected a line '*Needs:* … · … to read, … · … on two cores · …'"
    )
    return found[1], found[2]


# Chapters that measure something on a model: one cell each repeats it on any other.
EXPERIMENTAL = {
    "sipit_in_ten_minutes", "detector", "hundred_thousand", "from_scratch", "fast",
    "noise", "privacy", "positions", "families", "detector_closer", "chance",
    "one_step_map",
    "gradient_policy", "stress_tests", "real_models", "since_the_paper", "limits",
    "floats", "all_at_once",
    "last_state", "scale",
}  # fmt: skip


@pytest.mark.parametrize("name", CORE + DEEPER)
def test_minutes_follow_the_rule(name: str) -> None:
    """Those of the line *Needs* are counted, not felt."""
    path = BOOK / f"{name}.ipynb"
    if name not in UNFINISHED:
        minutes = reading_minutes(nbformat.read(path, as_version=4))
        assert needs(path)[0] == f"{minutes} minutes"


@pytest.mark.parametrize("name", CORE + DEEPER)
def test_experiments_have_one_cell_for_every_model(name: str) -> None:
    """Exactly one where the page is an experiment, and never two."""
    cells = code_cells(nbformat.read(BOOK / f"{name}.ipynb", as_version=4))
    count = sum("every-model" in tags(cell) for cell in cells)
    assert count == 1 or (count == 0 and name not in EXPERIMENTAL - UNFINISHED)


def test_core_path_is_short() -> None:
    """A reader finishes it."""
    pages = [BOOK / f"{name}.ipynb" for name in (TOC["root"], *CORE)]
    counts = [page_words(nbformat.read(page, as_version=4)) for page in pages]
    assert sum(counts) <= MAX_WORDS_CORE or UNFINISHED & set(CORE)


def exercises(text: str) -> dict[str, tuple[str, int]]:
    """The exercises of a page: {label: (title, minutes)}."""
    found = re.findall(
        r"^```\{exercise-start\} (.*), (\d+) minutes\n:label: (\S+)", text, re.MULTILINE
    )
    return {label: (title, int(minutes)) for title, minutes, label in found}


def headings(text: str) -> set[str]:
    """The headings of a page, without the numbers that some of them begin with."""
    return set(re.findall(r"^#+ (?:[\d–]+\. )?(.*)", text, re.MULTILINE))


def test_status_page_quotes_the_chapters() -> None:
    """The table of run times repeats what each chapter says, and leaves none out."""
    rows = re.findall(
        r"^\| \{doc\}`(\w+)` \| (.*) \| (.*) \|$",
        prose(BOOK / "status.md"),
        re.MULTILINE,
    )
    assert {name: (read, run) for name, read, run in rows} == {
        name: needs(BOOK / f"{name}.ipynb") for name in CORE + DEEPER
    }


def test_readme_and_introduction_name_the_chapters() -> None:
    """All of them, the core path in its order."""
    linked = re.findall(r"\]\(book/(\w+)\.ipynb\)", prose(ROOT / "README.md"))
    named = re.findall(r"\{doc\}`(?:[^`<]*<)?(\w+)>?`", prose(INTRODUCTION))
    for mentioned in (linked, named):
        assert {*CORE, *DEEPER} <= set(mentioned)
        in_order = list(dict.fromkeys(n for n in mentioned if n in CORE))
        assert in_order == CORE


def test_picture_of_the_readme_is_that_of_the_first_page() -> None:
    """It was made by the cell that stands there, and is small."""
    outputs = [
        out.data["image/png"]
        for cell in code_cells(nbformat.read(INTRODUCTION, as_version=4))
        for out in cell.outputs
        if "image/png" in out.get("data", {})
    ]
    [picture] = map(b64decode, outputs)
    name = "book/_static/prompt_comes_back.png"
    assert (ROOT / name).read_bytes() == picture and len(picture) <= 150_000
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"]({name})" in readme and len(readme.splitlines()) <= 120


PLAN = prose(BOOK / "instructors.md")
SESSIONS = re.split(
    r"^## Session \d+: .*\n",
    PLAN.split("\n## Chapters for reports")[0],
    flags=re.MULTILINE,
)[1:]
OVERVIEW = re.findall(
    r"^\| (\d+) \| (\{doc\}.*) \| (.*) \| .* \| (.*) \|$", PLAN, re.MULTILINE
)
TAUGHT = [re.findall(r"\{doc\}`(\w+)`", row[1]) for row in OVERVIEW]


def test_plan_follows_the_core_path() -> None:
    """Each chapter of it in one session, in order; others where a session needs it."""
    taught = [name for session in TAUGHT for name in session]
    assert [name for name in taught if name not in DEEPER] == CORE
    for number, (row, session) in enumerate(
        zip(OVERVIEW, TAUGHT, strict=True), start=1
    ):
        assert int(row[0]) == number
        assert all(int(earlier) < number for earlier in re.findall(r"\d+", row[2]))
        assert row[3] == ", ".join(
            needs(BOOK / f"{name}.ipynb")[1] for name in session
        ), session
    assert len(SESSIONS) == len(OVERVIEW) == 12


NAMED = re.compile(r"\{ref\}`(.*) <(ex-[\w-]+)>`, (\d+) minutes")


def test_sessions_name_exercises_of_chapters_taught_by_then() -> None:
    """Title, label and minutes are those of the chapter."""
    seen: dict[str, tuple[str, int]] = {}
    for text, chapters in zip(SESSIONS, TAUGHT, strict=True):
        for name in chapters:
            seen |= exercises(prose(BOOK / f"{name}.ipynb"))
        for title, label, minutes in NAMED.findall(text):
            assert seen.get(label) == (title, int(minutes)), label
        assert len(re.findall(r"<ex-", text)) == len(
            re.findall(r"`, \d+ minutes[;.]", text)
        )


def test_plan_names_every_exercise_of_the_book_once() -> None:
    """In a session, or with the chapters that are for reports."""
    every: dict[str, tuple[str, int]] = {}
    for path in NOTEBOOKS:
        every |= exercises(prose(path))
    named = NAMED.findall(PLAN)
    assert sorted(label for _, label, _ in named) == sorted(every)
    assert {label: (title, int(minutes)) for title, label, minutes in named} == every


@pytest.mark.parametrize("number", range(len(SESSIONS)))
def test_session_lasts_90_minutes(number: int) -> None:
    """The rows add up, exercises fit their row, and sections that are named exist."""
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", SESSIONS[number], re.MULTILINE)
    assert sum(int(minutes) for minutes, _ in rows) == 90
    block = re.search(r"^\*In class:\*\n((?:.+\n)+)", SESSIONS[number], re.MULTILINE)
    in_class = sum(map(int, re.findall(r"(\d+) minutes", block[1])))
    assert [int(minutes) for minutes, what in rows if what == "Exercises in class"] == [
        in_class
    ]
    there = set().union(
        *(headings(prose(BOOK / f"{name}.ipynb")) for name in TAUGHT[number])
    )
    assert {
        name for _, what in rows for name in re.findall(r"\*([^*]+)\*", what)
    } <= there


POINTS = re.compile(r"^##+ (\d+\. .* points\))\n", re.MULTILINE)
QUESTIONS = POINTS.split(PLAN.split("\n## Exam\n")[1])[1:]
ANSWERS = BOOK / "exam" / "answers.md"  # instructors may leave this folder out
answers_there = pytest.mark.skipif(not ANSWERS.exists(), reason="no book/exam")


def test_exam_has_100_points_and_no_answers() -> None:
    """Ten questions; model answers stand on no page of the built book."""
    worth = [int(re.search(r"(\d+) points\)$", title)[1]) for title in QUESTIONS[::2]]
    assert len(worth) == 10 and sum(worth) == 100
    assert "Model answer" not in "".join(QUESTIONS) and "Marking" not in PLAN
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert config["only_build_toc_files"] is True
    assert not [name for name in listed_pages(TOC) if "exam" in name]


@answers_there
def test_each_question_is_marked() -> None:
    """One answer for each, whose marks add up to its points."""
    answers = POINTS.split(prose(ANSWERS))[1:]
    assert answers[::2] == QUESTIONS[::2]
    for title, text in zip(answers[::2], answers[1::2], strict=True):
        assert not re.search(r"\{[\w:]+\}`", text), "it is read outside the book"
        marks = re.findall(
            r"^- (\d+) points? for ", text.split("*Marking:*")[1], re.MULTILINE
        )
        assert f"{sum(map(int, marks))} points)" in title, title


@answers_there
def test_exam_answer_runs() -> None:
    """The program recovers a prompt, counts tests, refuses a state of no token."""
    answer = re.search(
        r"^```python\n(.*?)^```", prose(ANSWERS), re.MULTILINE | re.DOTALL
    )[1]
    scope: dict = {}
    exec(answer, scope)
    table, prompt = (
        torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)),
        [2, 6, 6],
    )

    def states_after(prefix: list[int]) -> torch.Tensor:
        return table[:, len(prefix)] + sum(prefix)

    observed = torch.stack([states_after(prompt[:t])[v] for t, v in enumerate(prompt)])
    assert scope["sipit"](observed, states_after, range(7), 0.0) == (prompt, 3 + 7 + 7)
    with pytest.raises(ValueError, match=r"position 1, after \[2\]"):
        scope["sipit"](
            observed + torch.tensor([[0.0], [1.0], [0.0]]), states_after, range(7), 0.1
        )
