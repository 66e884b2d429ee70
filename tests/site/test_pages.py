"""Every page in a real browser, and what a reader does with a page."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import BUILD, Visit, Visitor
from playwright.sync_api import expect

WIDTHS = {"phone": 375, "tablet": 768, "desk": 1280}  # of the window, in CSS pixels
DISK = (BUILD / "html").as_uri()
HTML = sorted((BUILD / "html").glob("*.html"))
MOVED = [
    path.name for path in HTML if "<title>Moved</title>" in path.read_text("utf-8")
]
PAGES = [p.name for p in HTML if p.name not in ("index.html", *MOVED)]
# A command, an opening bracket of a formula, or a dollar.
RAW_TEX = re.compile(r".{0,30}(?:\\[a-zA-Z(\[]|\$).{0,30}")
# Code is code, and MathJax keeps the source of a formula nowhere else than in itself.
PROSE = """() => {
    const nodes = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = [document.title], set = 'code, pre, script, style, mjx-container';
    while (nodes.nextNode())
        if (!nodes.currentNode.parentElement.closest(set))
            found.push(nodes.currentNode.data);
    return found.join('\\n');
}"""
UNFOLD = """() => {
    document.querySelectorAll('.toggle-hidden')
        .forEach(e => e.classList.remove('toggle-hidden'));
    document.querySelectorAll('details').forEach(e => e.open = true);
}"""
WIDER = """() => [...document.querySelectorAll('article *')]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .slice(0, 3).map(e => `${e.tagName} .${e.getAttribute('class')}`)"""


def console_errors(visit: Visit) -> list[str]:
    """What the page logged as an error, or did not catch."""
    return [f"console error: {error}" for error in visit.errors]


def requests_outside(visit: Visit) -> list[str]:
    """Addresses that are not the book's."""
    return [f"asked for {url}" for url in visit.outside]


def formulas_not_set(visit: Visit) -> list[str]:
    """Formulas that MathJax left alone, or could not read."""
    left = visit.page.locator(".math:not(:has(mjx-container))").all_text_contents()
    refused = visit.page.locator("[data-mml-node=merror]").all_text_contents()
    return [f"formula not set: {text}" for text in left + refused]


def raw_tex(visit: Visit) -> list[str]:
    """TeX in the text of the page, opened solutions included."""
    return [
        f"raw TeX: {found}" for found in RAW_TEX.findall(visit.page.evaluate(PROSE))
    ]


def sideways_scroll(visit: Visit) -> list[str]:
    """What makes the page wider than some window, with everything unfolded."""
    visit.page.evaluate(UNFOLD)
    found = []
    for window, width in WIDTHS.items():
        visit.page.set_viewport_size({"width": width, "height": 800})
        more = visit.page.evaluate("document.scrollingElement.scrollWidth - innerWidth")
        found += (
            [f"{more} pixels wider than a {window}: {visit.page.evaluate(WIDER)}"]
            if more > 1
            else []
        )
    return found


CHECKS = (console_errors, requests_outside, formulas_not_set, raw_tex, sideways_scroll)


def complaints(visit: Visit) -> list[str]:
    """What is wrong with a page."""
    return [complaint for check in CHECKS for complaint in check(visit)]


@pytest.mark.parametrize("name", PAGES)
def test_page_is_sound(name: str, visit: Visitor) -> None:
    """Formulas set, a silent console, no request outside, no window too narrow."""
    assert complaints(visit(DISK, name)) == []


@pytest.mark.parametrize(
    ("body", "check"),
    [
        ("<script>undefined_name()</script>", console_errors),
        ("<img src='missing.png'>", console_errors),
        ("<img src='http://192.0.2.1/tracker.png'>", requests_outside),
        (r"<span class='math'>\(x\)</span>", formulas_not_set),
        (r"<p>the norm \(x\) of a state</p>", raw_tex),
        (r"<p>half, that is \frac12</p>", raw_tex),
        ("<p>a layer $l$</p>", raw_tex),
        ("<p style='width: 400px'>wide</p>", sideways_scroll),
        ("<details><p style='width: 400px'>wide</p></details>", sideways_scroll),
    ],
)
def test_unsound_page_is_caught(
    body: str, check: Callable[[Visit], list[str]], tmp_path: Path, visit: Visitor
) -> None:
    """Each check can fail."""
    (tmp_path / "broken.html").write_text(
        f"<!doctype html><title>broken</title><article>{body}</article>"
    )
    assert check(visit(tmp_path.as_uri(), "broken.html"))


def test_formulas_are_there(visit: Visitor) -> None:
    """The check of formulas has formulas to check."""
    page = visit(DISK, "claim.html").page
    assert page.locator(".math mjx-container svg").count() > 100


def test_front_page_leads_to_the_introduction(book: str, visit: Visitor) -> None:
    """The address of the folder is enough."""
    page = visit(book, "genindex.html").page
    page.goto(f"{book}/index.html", wait_until="commit")
    page.wait_for_url("**/intro.html")


@pytest.mark.parametrize("name", MOVED)
def test_former_address_leads_on(name: str, book: str, visit: Visitor) -> None:
    """A reader with an old link reaches the page that took its place."""
    page = visit(book, "genindex.html").page
    page.goto(f"{book}/{name}", wait_until="commit")
    page.wait_for_url(lambda url: name not in url)
    page.locator("article h1").wait_for()


def test_search_answers(book: str, visit: Visitor) -> None:
    """A word of the book finds its pages, another word none, and a result opens."""
    found = visit(book, "intro.html")
    results = found.page.locator("#search-results li a")
    for word, expected in (("separation margin", True), ("xylophone", False)):
        if not found.page.url.partition("?")[0].endswith("search.html"):
            found.page.locator("button.search-button__button:visible").first.click()
        found.page.locator("input[type=search]:visible").fill(word)
        with found.page.expect_navigation():
            found.page.keyboard.press("Enter")
        found.page.get_by_text(
            re.compile("Search finished|did not match any")
        ).wait_for()
        assert (
            any(
                "from_scratch" in link
                for link in results.evaluate_all("a => a.map(x => x.href)")
            )
            is expected
        )
    found.page.go_back()
    results.first.click()
    found.page.locator("article h1").wait_for()
    assert console_errors(found) + requests_outside(found) == []


def test_head_describes_the_page_for_search_and_previews() -> None:
    """Each page differs; the card is there, and the map names all pages."""
    described = {}
    for name in PAGES:
        head = (BUILD / "html" / name).read_text("utf-8").partition("</head>")[0]
        described[name] = re.findall('<meta name="description" content="(.+)">', head)
        if name not in ("search.html", "genindex.html"):
            [address] = re.findall('property="og:url" content="(.+)"', head)
            assert address.endswith(f"/{name}")
            [card] = re.findall('property="og:image" content="(.+)"', head)
            assert (BUILD / "html" / card[len(address) - len(name) :]).exists()
    assert all(len(found) == 1 for found in described.values()), described
    written = (BUILD / "html" / "sitemap.xml").read_text("utf-8")
    listed = {url.rpartition("/")[2] for url in re.findall("<loc>(.*)</loc>", written)}
    assert {"intro.html", "claim.html"} <= listed <= set(PAGES)


def test_what_is_folded_opens_and_closes(book: str, visit: Visitor) -> None:
    """A solution until its title is clicked, the code of a figure until its line is."""
    found = visit(book, "claim.html")
    folded = found.page.locator("details:visible").first
    assert not folded.locator("pre").first.is_visible()
    folded.locator("summary").click()
    assert folded.locator("pre").first.is_visible()
    solutions = found.page.locator(".solution.dropdown").all()
    assert len(solutions) >= 3
    for solution in solutions:
        content, title = (
            solution.locator("p:not(.admonition-title)").first,
            solution.locator(".admonition-title"),
        )
        for seen in (False, True, False):
            assert content.is_visible() is seen
            title.click()
    assert console_errors(found) + requests_outside(found) == []


def test_animation_plays(visit: Visitor) -> None:
    """It opens on a chosen frame; play shows one after the other, and pause stops."""
    animated = [
        name
        for name in PAGES
        if 'data-name="player"' in (BUILD / "html" / name).read_text(encoding="utf-8")
    ]
    assert animated
    for name in animated:
        found = visit(DISK, name)
        animation = found.page.locator("figure.widget[data-name=player]").first
        frame = animation.locator("img")
        data = json.loads(animation.locator("script").first.text_content())
        frames, opening = data["frames"], frame.get_attribute("src")
        assert data["start"] > 0 and opening == frames[data["start"]]
        assert frame.evaluate("e => e.clientWidth / e.parentNode.clientWidth") > 0.99

        slider = animation.get_by_role("slider")
        slider.press("Home")
        slider.press("ArrowRight")
        expect(frame).to_have_attribute("src", frames[1])
        play = animation.get_by_role("button", name="Play")
        play.click()
        # Looked at in every frame of the page: on a busy machine it is soon past.
        found.page.wait_for_function(
            "([e, src]) => e.getAttribute('src') === src",
            arg=[frame.element_handle(), frames[3]],
        )
        animation.get_by_role("button", name="Pause").click()
        stopped = frame.get_attribute("src")
        found.page.wait_for_timeout(500)  # more than a frame
        assert frame.get_attribute("src") == stopped
        assert console_errors(found) + requests_outside(found) == []
