"""The book on paper: one long page with its chapters, figures, formulas and code."""

import re
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
from conftest import BUILD, Visit, Visitor, window
from playwright.sync_api import Browser
from pypdf import PdfReader
from pypdf.generic import Destination

PAPER = {"width": 794, "height": 1123}  # A4 in CSS pixels
CHAPTERS = "article span[id^=document-] + section > :is(h2, h3)"
FORMULAS = "article mjx-container:visible"
PICTURES = "article img:visible"
NOT_SET = "article .math:not(:has(mjx-container)), article [data-mml-node=merror]"
EMPTY = """all => all.map(e => e.getBoundingClientRect())
    .filter(b => !(b.width && b.height)).length"""
CUT_OFF = """all => all.filter(e => e.scrollWidth > e.clientWidth + 1)
    .map(e => e.textContent.slice(0, 60))"""
FOLDED = """all => all
    .filter(e => !e.checkVisibility({visibilityProperty: true, opacityProperty: true}))
    .map(e => e.textContent.slice(0, 60))"""
CURVE = re.compile(rb" c\s")  # the operator of PDF for a piece of an outline


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


def formulas_not_printed(visit: Visit, paper: PdfReader) -> list[str]:
    """Letters of formulas are outlines, many to a formula; text has none."""
    shown = visit.page.locator(FORMULAS).count()
    curves = sum(
        len(CURVE.findall(sheet.get_contents().get_data())) for sheet in paper.pages
    )
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


def printed(visit: Visit, path: Path) -> PdfReader:
    """The page on paper, kept as a file."""
    return PdfReader(
        BytesIO(
            visit.page.pdf(
                path=path, tagged=True, outline=True, prefer_css_page_size=True
            )
        )
    )


@pytest.fixture(scope="module")
def book(browser: Browser) -> Iterator[Visit]:
    """The long page, as it is before it goes to paper."""
    with window(browser) as opened:
        visit = opened((BUILD / "singlehtml").as_uri(), "intro.html")
        visit.page.set_viewport_size(PAPER)
        visit.page.emulate_media(media="print")
        visit.page.evaluate(
            "dispatchEvent(new Event('beforeprint'))"
        )  # solutions listen to it
        yield visit


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


def test_printed_book_is_whole(book: Visit) -> None:
    """The pictures, formulas and chapters of the long page are on paper."""
    paper = printed(book, BUILD / "book.pdf")
    assert pictures_not_printed(book, paper) == []
    assert formulas_not_printed(book, paper) == []
    assert chapters_not_printed(book, paper) == []


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
    paper = printed(found, tmp_path / "small.pdf")
    checks = (pictures_not_printed, formulas_not_printed, chapters_not_printed)
    assert [failed for failed in checks if failed(found, paper)] == (
        [check] if check else []
    )
