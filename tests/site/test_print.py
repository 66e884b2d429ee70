"""The book on paper: one long page with its chapters, figures, formulas and code."""

import json
import re
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from conftest import BUILD, Visit, Visitor, window
from playwright.sync_api import Browser
from pypdf import PageObject, PdfReader
from pypdf.generic import Destination
from test_pages import console_errors
from test_widgets import WIDGETS

SPEC = spec_from_file_location("paper", BUILD.parent / "book" / "paper.py")
PRINT = module_from_spec(SPEC)
SPEC.loader.exec_module(PRINT)
MEGABYTES = 15  # of the printed book, at most
PAPER = {"width": 794, "height": 1123}  # A4 in CSS pixels
CHAPTERS = "article span[id^=document-] + section > :is(h2, h3)"
FORMULAS = "article mjx-container:visible"
PICTURES = "article img:visible:not([src$='.svg'])"  # a drawing stays a drawing
NOT_SET = "article .math:not(:has(mjx-container)), article [data-mml-node=merror]"
EMPTY = """all => all.map(e => e.getBoundingClientRect())
    .filter(b => !(b.width && b.height)).length"""
CUT_OFF = """all => all.filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => e.textContent.slice(0, 60))"""
FOLDED = """all => all
    .filter(e => !e.checkVisibility({visibilityProperty: true, opacityProperty: true}))
    .map(e => e.textContent.slice(0, 60))"""
CURVE = re.compile(rb" c\s")  # the operator of PDF for a piece of an outline
SHARED = re.compile(rb"(/O\d+) Do\s")  # an outline that is drawn by its name
PRESSED = "button, input, select, summary, .headerlink, figure.widget, .anim-controls"
SCREEN = re.compile(r"(?:Show|Hide) code cell|Click to|Copy to clipboard|Launch")


def formulas_missing(visit: Visit) -> list[str]:
    """Formulas that are not set, or take no room."""
    left = visit.page.locator(NOT_SET).all_text_contents()
    empty = visit.page.locator(f"{FORMULAS} > svg").evaluate_all(EMPTY)
    return [f"not set: {text}" for text in left] + [
        f"{empty} formulas without a size"
    ] * bool(empty)


def pictures_missing(visit: Visit) -> list[str]:
    """Pictures whose file was not read."""
    return visit.page.locator(PICTURES).evaluate_all(
        "all => all.filter(e => !e.naturalWidth).map(e => e.src)"
    )


def code_cut_off(visit: Visit) -> list[str]:
    """Code that is wider than its box, which cannot be scrolled on paper."""
    return visit.page.locator("article pre").evaluate_all(CUT_OFF)


def still_folded(visit: Visit) -> list[str]:
    """Solutions, answers and code that stay behind their titles."""
    return visit.page.locator(
        "article :is(details, .toggle) > :not(summary, button)"
    ).evaluate_all(FOLDED)


def pictures_not_printed(visit: Visit, paper: PdfReader) -> list[str]:
    """There are as many pictures on paper as the page shows."""
    shown = set(visit.page.locator(PICTURES).evaluate_all("all => all.map(e => e.src)"))
    objects = [sheet["/Resources"].get("/XObject", {}) for sheet in paper.pages]
    printed = {
        below.raw_get(name).idnum
        for below in objects
        for name in below
        if below[name]["/Subtype"] == "/Image"
    }
    return (
        []
        if len(printed) >= len(shown)
        else [f"{len(printed)} of {len(shown)} pictures are on paper"]
    )


def curves_on(sheet: PageObject, shared: dict[int, int]) -> int:
    """Pieces of outlines that a page draws, by itself or by the number of an object."""
    drawn = sheet.get_contents().get_data()
    curves = len(CURVE.findall(drawn))
    for name in SHARED.findall(drawn):
        outline = sheet["/Resources"]["/XObject"].raw_get(name.decode())
        if outline.idnum not in shared:  # read once, though drawn a thousand times
            found = CURVE.findall(outline.get_object().get_data())
            shared[outline.idnum] = len(found)
        curves += shared[outline.idnum]
    return curves


def formulas_not_printed(visit: Visit, paper: PdfReader) -> list[str]:
    """Letters of formulas are outlines, many to a formula; text has none."""
    shown = visit.page.locator(FORMULAS).count()
    shared: dict[int, int] = {}
    curves = sum(curves_on(sheet, shared) for sheet in paper.pages)
    return (
        []
        if curves >= 50 * shown
        else [f"{curves} curves on paper, too few for {shown} formulas"]
    )


def bookmarks(entries: list) -> Iterator[Destination]:
    """The bookmarks of a document, in their order."""
    for entry in entries:
        yield from bookmarks(entry) if isinstance(entry, list) else [entry]


def squeezed(text: str) -> str:
    """Text without the white space that pages lose, and without the mark of a link."""
    return re.sub(r"[\s#]", "", text)


def chapters_not_printed(visit: Visit, paper: PdfReader) -> list[str]:
    """Each chapter has a bookmark to a page with its title, in the book's order."""
    there = [
        (squeezed(mark.title), paper.get_destination_page_number(mark))
        for mark in bookmarks(paper.outline)
    ]
    missing, last = [], 0
    for title in map(squeezed, visit.page.locator(CHAPTERS).all_text_contents()):
        pages = [page for name, page in there if name.startswith(title) and page > last]
        if pages and title in squeezed(paper.pages[pages[0]].extract_text()):
            last = pages[0]
        else:
            missing.append(title)
    return missing


@pytest.fixture(scope="module")
def long_page(browser: Browser) -> Iterator[Visit]:
    """The long page, as it is on a screen."""
    with window(browser) as opened:
        yield opened((BUILD / "singlehtml").as_uri(), "intro.html")


@pytest.fixture(scope="module")
def book(long_page: Visit) -> Visit:
    """The same, as it is before it goes to paper."""
    long_page.page.set_viewport_size(PAPER)
    PRINT.arrange(long_page.page)
    return long_page


@pytest.fixture(scope="module")
def paper(book: Visit) -> PdfReader:
    """The printed book."""
    PRINT.printed(book.page, BUILD / "book.pdf")
    PRINT.finish(BUILD / "book.pdf")
    return PdfReader(BUILD / "book.pdf")


def test_widgets_stand_side_by_side(long_page: Visit) -> None:
    """The book as one page has them all, each with its own data and values."""
    for name, (_, reader) in WIDGETS.items():
        figures = long_page.page.locator(f'figure.widget.live[data-name="{name}"]')
        assert figures.count() == 1
        stored = figures.locator('script[type="application/json"]').text_content()
        shown = reader(figures, json.loads(stored))
        assert shown.seen == shown.expected
    assert console_errors(long_page) == []


@pytest.mark.parametrize(
    "check", [formulas_missing, pictures_missing, code_cut_off, still_folded]
)
def test_long_page_is_whole(check: Callable[[Visit], list[str]], book: Visit) -> None:
    """Formulas set, pictures there, no code cut off, and nothing folded."""
    assert check(book) == []


def test_long_page_has_what_is_checked(book: Visit) -> None:
    """There is something to look at; the console is silent, nothing left the book."""
    assert book.page.locator(FORMULAS).count() > 3000
    assert book.page.locator(PICTURES).count() >= 40
    assert book.page.locator(CHAPTERS).count() >= 20
    assert book.errors + book.outside == []


def test_nothing_on_paper_needs_a_screen(book: Visit) -> None:
    """Nothing to press, to drag or to copy, and no words about it."""
    assert book.page.locator(f"article :is({PRESSED}):visible").count() == 0
    assert SCREEN.findall(book.page.locator("article").inner_text()) == []


def test_links_stay_in_the_book(book: Visit) -> None:
    """A link leads to a place of the book or to an address, never to a file."""
    links = book.page.locator("article a[href]")
    targets = links.evaluate_all("all => all.map(e => e.getAttribute('href'))")
    assert len(targets) > 1000
    assert [t for t in targets if not t.startswith(("#", "http", "mailto"))] == []


def test_hints_and_solutions_stand_at_the_end(book: Visit) -> None:
    """Every solution, after the last chapter, with a way back to its exercise."""
    last = book.page.locator("article main > section").last
    exercises = book.page.locator(".exercise").evaluate_all("all => all.map(e => e.id)")
    titles = last.locator(".solution > .admonition-title a")
    assert book.page.locator(".solution").count() == titles.count() >= 80
    back = titles.evaluate_all("all => all.map(e => e.getAttribute('href').slice(1))")
    assert set(back) <= set(exercises)
    assert all(re.fullmatch(r"Exercise [\d.]+", t) for t in titles.all_text_contents())


def test_printed_book_is_whole(book: Visit, paper: PdfReader) -> None:
    """The pictures, formulas and chapters of the long page are on paper."""
    assert pictures_not_printed(book, paper) == []
    assert formulas_not_printed(book, paper) == []
    assert chapters_not_printed(book, paper) == []


def test_printed_book_is_light(paper: PdfReader) -> None:
    """It can be sent by mail."""
    assert (BUILD / "book.pdf").stat().st_size <= MEGABYTES * 1e6


def test_printed_book_has_a_title_page(paper: PdfReader) -> None:
    """The title, and neither a running head nor a page number."""
    words = squeezed(paper.pages[0].extract_text())
    assert words.count(squeezed(PRINT.TITLE)) == 1
    assert not words.endswith("1")


def contents_of(paper: PdfReader) -> dict[str, int]:
    """The number that the contents print beside each link, by the link's target."""
    contents = {}
    for sheet in paper.pages[1:12]:
        numbers = {}

        def note(text: str, _: object, at: list, font: dict | None, __: object) -> None:
            if font and font.get("/BaseFont") == "/Helvetica" and text.strip():
                numbers[at[5]] = int(text)  # noqa: B023

        sheet.extract_text(visitor_text=note)
        for annotation in sheet.get("/Annots", []) if numbers else []:
            link = annotation.get_object()
            _, low, _, high = map(float, link["/Rect"])
            beside = [number for y, number in numbers.items() if low <= y <= high]
            contents[link["/Dest"].removeprefix("/")] = beside[0]
    return contents


def test_contents_name_the_right_pages(book: Visit, paper: PdfReader) -> None:
    """The title stands on the page of that number, under its running head."""
    contents = contents_of(paper)
    assert len(contents) >= 200
    chapters = book.page.locator(".contents .chapter a")
    links = chapters.evaluate_all("all => all.map(e => [e.hash.slice(1), e.innerText])")
    assert len(links) >= 40
    for target, title in [*links[::6], links[-1]]:
        sheet = paper.pages[contents[target] - 1]
        words = squeezed(sheet.extract_text())
        # Once in the running head, and once as the heading.
        assert words.startswith(squeezed(PRINT.TITLE + title))
        assert words.count(squeezed(title)) >= 2
        assert str(contents[target]) in words


@pytest.mark.parametrize(
    ("body", "check"),
    [
        (r"<span class='math'>\(x\)</span>", formulas_missing),
        (
            "<mjx-container style='display: block; height: 9px'>"
            "<svg width=0 height=0></svg></mjx-container>",
            formulas_missing,
        ),
        ("<img src='missing.png'>", pictures_missing),
        (f"<pre style='overflow: auto'>{'x' * 400}</pre>", code_cut_off),
        ("<details><summary>answer</summary><p>42</p></details>", still_folded),
        (
            "<div class='toggle'><p style='visibility: hidden'>42</p></div>",
            still_folded,
        ),
    ],
)
def test_page_that_is_not_whole_is_caught(
    body: str, check: Callable[[Visit], list[str]], tmp_path: Path, visit: Visitor
) -> None:
    """Each check of the long page can fail."""
    (tmp_path / "broken.html").write_text(f"<!doctype html><article>{body}</article>")
    found = visit(tmp_path.as_uri(), "broken.html")
    found.page.set_viewport_size(PAPER)
    assert len(check(found)) == 1


PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
LETTER = f"<path d='M0 0{'C0 9 9 9 9 0C9 9 0 9 0 0' * 30}'/>"
SMALL = f"""<!doctype html><html lang=en><article><h1>Book</h1>
<p style='break-after: page'>First page.</p>
<span id='document-one'></span><section><h2>One</h2><img src='{PIXEL}'>
<mjx-container><svg width=9 height=9>{LETTER}</svg></mjx-container>
</section></article>"""


@pytest.mark.parametrize(
    ("selector", "check"),
    [
        ("img", pictures_not_printed),
        ("svg", formulas_not_printed),
        ("h2", chapters_not_printed),
        ("none", None),
    ],
)
def test_what_is_not_printed_is_missed(
    selector: str,
    check: Callable[[Visit, PdfReader], list[str]] | None,
    tmp_path: Path,
    visit: Visitor,
) -> None:
    """Each check fails where something is seen and not printed, and only then."""
    style = f"<style>@media print {{ {selector} {{ display: none }} }}</style>"
    (tmp_path / "small.html").write_text(SMALL + style)
    found = visit(tmp_path.as_uri(), "small.html")
    PRINT.printed(found.page, tmp_path / "small.pdf")
    paper = PdfReader(tmp_path / "small.pdf")
    checks = (pictures_not_printed, formulas_not_printed, chapters_not_printed)
    assert [failed for failed in checks if failed(found, paper)] == (
        [check] if check else []
    )
