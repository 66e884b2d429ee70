"""A deck for each session: all that was chosen is there, and fits its slide."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from conftest import BUILD, Visit, Visitor
from test_pages import console_errors, formulas_not_set, requests_outside

SPEC = spec_from_file_location("slides", BUILD.parent / "book" / "slides.py")
SLIDES = module_from_spec(SPEC)
SPEC.loader.exec_module(SLIDES)
SESSIONS = range(1, 13)
# Where a slide shows less than it holds, and why.
OVER = """all => all.flatMap((slide, i) => {
    const body = slide.querySelector('.body'), found = [], edge = body.getBoundingClientRect();
    if (body.scrollHeight > body.clientHeight + 1) found.push(`${i + 1}: too high`);
    if (body.scrollWidth > body.clientWidth + 1) found.push(`${i + 1}: too wide`);
    if (slide.scrollHeight > 720) found.push(`${i + 1}: over its page`);
    for (const part of body.querySelectorAll('*'))
        if (part.getBoundingClientRect().right > edge.right + 1 && !part.closest('mjx-assistive-mml'))
            found.push(`${i + 1}: ${part.tagName} leaves it`);
    return found;
})"""


@pytest.fixture(scope="module")
def book() -> SLIDES.Book:
    """The long page, read."""
    return SLIDES.read()


@pytest.fixture(scope="module")
def decks(book: SLIDES.Book, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decks, freshly written."""
    folder = tmp_path_factory.mktemp("decks") / "slides"
    SLIDES.write(book, folder)
    return folder


def opened(visit: Visitor, folder: Path, name: str) -> Visit:
    """A deck whose letters have found their size."""
    deck = visit(folder.as_uri(), name)
    deck.page.set_viewport_size({"width": 1280, "height": 720})
    deck.page.wait_for_selector("body.ready", state="attached")
    return deck


@pytest.mark.parametrize("number", SESSIONS)
def test_deck_fits_its_pages(number: int, decks: Path, visit: Visitor) -> None:
    """Twelve to twenty slides, none too full; formulas set, nothing fetched."""
    deck = opened(visit, decks, f"session-{number:02}.html")
    slides = deck.page.locator(".slide")
    assert 12 <= slides.count() <= 20
    assert slides.evaluate_all(OVER) == []
    pictures = deck.page.locator("img").evaluate_all(
        "all => all.map(e => e.naturalWidth)"
    )
    assert all(pictures)
    assert console_errors(deck) + requests_outside(deck) + formulas_not_set(deck) == []
    assert deck.page.locator(".opening aside table").count() == 1


def test_keys_turn_slides(decks: Path, visit: Visitor) -> None:
    """Forward, to the end, back; N shows the notes, which start hidden."""
    page = opened(visit, decks, "session-01.html").page
    number = page.locator(".slide.current footer")
    count = page.locator(".slide").count()
    for key, expected in (("ArrowRight", 2), ("End", count), ("ArrowLeft", count - 1)):
        page.keyboard.press(key)
        assert number.inner_text().endswith(f"{expected} / {count}")
    page.keyboard.press("Home")
    notes = page.locator(".slide.current aside")
    assert not notes.is_visible()
    page.keyboard.press("n")
    assert notes.is_visible()
    assert "Pitfall." in notes.inner_text()


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        ("<p>short</p>", True),
        ("<p>high</p>" * 60, False),
        (f"<pre>{'x' * 200}</pre>", False),
    ],
)
def test_slide_that_is_too_full_is_caught(
    body: str, fits: bool, decks: Path, visit: Visitor
) -> None:
    """The check can fail."""
    slide = SLIDES.SLIDE.format(kind="", title="t", body=body, footer="", notes="")
    (decks / "full.html").write_text(SLIDES.PAGE.format(title="t", slides=slide))
    deck = opened(visit, decks, "full.html")
    assert (deck.page.locator(".slide").evaluate_all(OVER) == []) is fits


@pytest.mark.parametrize(
    "chosen",
    [
        ["no_such_page", "top", "text"],
        ["claim", "No such section", "text"],
        ["claim", "Which map", "text 99"],
    ],
)
def test_plan_that_names_what_is_not_there_is_refused(
    chosen: list[str], book: SLIDES.Book
) -> None:
    """A chapter that changes cannot leave a hole in a deck."""
    with pytest.raises(SLIDES.PlanError, match=r"^got "):
        list(SLIDES.slides(book, 1, [chosen]))
