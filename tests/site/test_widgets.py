"""Figures that a reader moves: from the disk, by the keyboard, fast, right, on paper.

A widget is a row of ``WIDGETS``: its page, and what reads the values that it shows and
works the same out from its data, independently of its script.
"""

import copy
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import sympy as sp
from conftest import BUILD, Visit, Visitor
from playwright.sync_api import Browser, Locator
from test_pages import DISK, console_errors, requests_outside, sideways_scroll

from sipit_lite.teaching.toy_transformer import toy_state, toy_symbols

KILOBYTES = 300  # of a widget's HTML, at most
PAINT = 1000  # milliseconds until it is painted, at most
OWN = 8  # milliseconds of a frame that a move may take, on a busy machine too
FIRST_PAINT = "performance.getEntriesByName('first-contentful-paint')"
# Moves the range one step a frame and back, as a hand would, and times each frame.
DRAG = """async (range) => {
    const times = [], frame = () => new Promise(requestAnimationFrame);
    let last = await frame(), up = true;
    for (let i = 0; i < 60; i++) {
        const before = range.value;
        up ? range.stepUp() : range.stepDown();
        if (range.value === before) up = !up;
        range.dispatchEvent(new Event('input', {bubbles: true}));
        const now = await frame();
        times.push(now - last);
        last = now;
    }
    return times;
}"""


@dataclass(frozen=True)
class Shown:
    """What a widget shows, and what it should show, in the same words or numbers."""

    seen: list
    expected: list


def inverter(figure: Locator, data: dict) -> Shown:
    """Tokens that came back, their runners-up, and the nearest of the last one."""
    prompt = data["prompts"][figure.locator("select").evaluate("e => e.selectedIndex")]
    count = int(figure.locator("input[type=range]").input_value())
    rows = figure.locator(".state:not(.head):not(.unread)").all_text_contents()
    bars = figure.locator(".bar").all_text_contents()

    def named(token: str) -> str:
        return token.replace(" ", "␣").replace("\n", "⏎")

    wanted = []
    for (token, _), (rival, far), *_ in prompt["near"][:count]:
        wanted.append(f"{named(token)}{far:.1f} {named(rival)}")
    nearest = prompt["near"][count - 1] if count else []
    lengths = [f"{named(token)}{far:.1f}" for token, far in nearest]
    if count:
        lengths[0] = f"{named(nearest[0][0])}< {data['bound']}"
    return Shown([rows, bars], [wanted, lengths])


def chosen(figure: Locator) -> list[int]:
    """The number of the choice in each of its menus."""
    return figure.locator("select").evaluate_all("all => all.map(e => e.selectedIndex)")


def snap(figure: Locator, data: dict) -> Shown:
    """Distances of the pushed state, from the places of the points in the plane."""
    where, how, within = chosen(figure)
    place = data["places"][where]
    margin = place["margin"]
    s = margin * 10 ** float(figure.locator("input[type=range]").input_value())
    radius = (place["floor"], place["least"] / 2, margin / 2)[within]
    rivals = []
    lost = [math.inf]
    for token, along, away, _ in place["pushes"][how]["rivals"]:
        side = math.sqrt(max(0, away**2 - along**2))
        rivals.append((math.hypot(s - along, side), token))
        if along > 0:
            # Where the line of the push meets the border midway.
            lost.append((along + side**2 / along) / 2)
    nearest = min(rivals)
    fit = [token for far, token in [(s, place["token"]), *rivals] if far <= radius]
    numbers = [s, nearest[0], margin / 2, radius, min(lost)]
    said = figure.locator(".report").text_content()
    seen = [
        float(
            figure.locator(f"dd[data-key={key}]").text_content().replace("never", "inf")
        )
        for key in ("truth", "rival", "half", "radius", "lost")
    ]
    verdict = ("refuses", "accepts", "refuses")[min(2, len(fit))]
    right = s <= nearest[0]
    return Shown(
        [seen, verdict in said, "the true one" in said, "several" in said],
        [pytest.approx(numbers, rel=0.006), True, right, len(fit) > 1],
    )


@cache
def formulas(epsilon: float) -> dict:
    """The states of prompts of two tokens, by sympy."""
    theta = toy_symbols(vocab=2, positions=2, d=2, inner=1)
    letters = [letter for matrix in theta.values() for letter in matrix]
    modules = [{"erf": np.vectorize(math.erf)}, "numpy"]
    pairs = product(range(2), repeat=2)
    return {
        ids: sp.lambdify(
            letters, list(toy_state(ids, theta, epsilon)), modules, cse=True
        )
        for ids in pairs
    }


def zero(figure: Locator, data: dict) -> Shown:
    """Shares of boxes with corners of both signs, from the formulas of sympy."""
    prompts, letter = chosen(figure)
    ranges = figure.locator("input[type=range]").all()
    theta = copy.deepcopy(data["theta"])
    named = data["letters"][letter]
    theta[named["name"]][named["index"]] = float(ranges[0].input_value())
    _, _, *numbers = [number for array in theta.values() for number in array]
    sides = [np.linspace(low, high, 65) for low, high in data["box"]]
    u, v = np.meshgrid(*sides)
    states = formulas(data["epsilon"])
    s, t = (
        states[tuple(ids)](u, v, *numbers) for ids in data["pairs"][prompts]["rows"]
    )
    expected = [[], [], []]
    for n in (4, 8, 16, 32, 64):
        hit = []
        for one, other in zip(s, t, strict=True):
            sign = (one - other > 0)[:: 64 // n, :: 64 // n]
            corners = [sign[i : n + i, j : n + j] for i in (0, 1) for j in (0, 1)]
            hit.append(np.any(corners, 0) & ~np.all(corners, 0))
        for row, boxes in zip(expected, (*hit, hit[0] & hit[1]), strict=True):
            row.append(f"{100 * boxes.mean():.2f}%")
    rows = figure.locator("tr[data-key]").all()
    seen = [row.locator("td").all_text_contents() for row in rows]
    # The report speaks of the grid that is painted.
    n = 4 * 2 ** int(ranges[1].input_value())
    said = figure.locator(".report").text_content()
    painted = int(said.removeprefix("Of ").split()[0])
    return Shown([*seen, painted], [*expected, n])


def search(figure: Locator, data: dict) -> Shown:
    """The first eight by the sum of lens and weighted prior, and the true token's place."""
    at = figure.locator("select").evaluate("e => e.selectedIndex")
    each = data["positions"][at]
    weight, steps = (
        int(moved.input_value()) for moved in figure.locator("input[type=range]").all()
    )
    both = zip(each["lens"], each["prior"], strict=True)
    scores = [lens + weight * prior for lens, prior in both]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    odds = [math.exp((s - max(scores)) / max(weight, 1)) for s in scores]
    drawn = (1 - each["rest"][weight]) / sum(odds)
    lines = []
    for i in order[:8]:
        places = each["lens_place"][i], each["prior_place"][i]
        lines.append((each["token"][i], *places, each["proxy_place"][i][steps]))
    true = order.index(each["true"]) + 1 + each["ahead"][weight]
    cells = [
        line.locator("span").all_text_contents()
        for line in figure.locator(".line:not(.head)").all()
    ]
    seen = [
        (token.replace("␣", " ").replace("⏎", "\n"), *map(int, places))
        for token, _, *places in cells
    ]
    said = figure.locator("[aria-live]").text_content()
    place = re.search(r"at place (\d+)\. The", said)
    # The line touches the token on top: no point lies beyond it.
    corners = [figure.locator(".edge").get_attribute(n) for n in ("x1", "x2")]
    x = float(figure.locator("circle.top").get_attribute("cx"))
    y = float(figure.locator("circle.top").get_attribute("cy"))
    low, high = map(float, corners)
    height = float(figure.locator(".edge").get_attribute("y1"))
    on_line = high + (low - high) * y / height
    shares = [odds[i] * drawn for i in order[:8]]
    off = [
        abs(float(line[1].rstrip("%")) / 100 - share) < 0.0051
        for line, share in zip(cells, shares, strict=True)
    ]
    return Shown(
        [seen, int(place[1]) if place else 1, abs(on_line - x) < 0.2, off],
        [lines, true, True, [True] * 8],
    )


Reader = Callable[[Locator, dict], Shown]
WIDGETS: dict[str, tuple[str, Reader]] = {
    "inverter": ("intro.html", inverter),
    "snap": ("noise.html", snap),
    "zero": ("transformer.html", zero),
    "search": ("fast.html", search),
}


def opened(name: str, visit: Visitor) -> tuple[Visit, Locator, dict]:
    """The page of a widget, the widget, and its data."""
    found = visit(DISK, WIDGETS[name][0])
    figure = found.page.locator(f'figure.widget[data-name="{name}"]').first
    values = figure.locator('script[type="application/json"]').text_content()
    return found, figure, json.loads(values)


def picture(figure: Locator) -> Locator:
    """What stands for it where no script runs: the picture of the same cell."""
    return figure.locator("xpath=ancestor::div[contains(@class, 'cell_output')]//img")


def stored(name: str) -> list[str]:
    """The widget as the file of its page has it, before any script runs."""
    page = (BUILD / "html" / WIDGETS[name][0]).read_text(encoding="utf-8")
    return re.findall(
        rf'<figure class="widget" data-name="{name}">.*?</figure>', page, re.DOTALL
    )


@pytest.mark.parametrize("name", WIDGETS)
def test_widget_is_small(name: str) -> None:
    """It travels inside the page, and the page stays small."""
    found = stored(name)
    assert found
    assert all(len(each.encode()) < 1000 * KILOBYTES for each in found)


@pytest.mark.parametrize("name", WIDGETS)
def test_widget_paints_at_once(name: str, visit: Visitor, tmp_path: Path) -> None:
    """Alone on a page; what a page of the book needs besides is not its."""
    head = "<!doctype html><meta charset=utf-8><title>widget</title>"
    (tmp_path / "alone.html").write_text(head + stored(name)[0], encoding="utf-8")
    times = []
    for _ in range(3):  # other work may delay one of them, not what the widget needs
        found = visit(tmp_path.as_uri(), "alone.html")
        found.page.locator("figure.widget.live").wait_for()
        found.page.wait_for_function(f"() => {FIRST_PAINT}.length")
        times.append(found.page.evaluate(f"{FIRST_PAINT}[0].startTime"))
        if times[-1] < PAINT:
            break
    assert min(times) < PAINT
    assert found.errors + found.outside == []


@pytest.mark.parametrize("name", WIDGETS)
def test_widget_takes_the_place_of_its_picture(name: str, visit: Visitor) -> None:
    """The picture goes once it is painted; it fits a phone, and asks for nothing.

    On paper the picture is back, with a text that says what is on it, and no control.
    """
    found, figure, _ = opened(name, visit)
    still = picture(figure)
    assert figure.locator("[role=group]").is_visible()
    assert still.count() == 1 and not still.is_visible()
    assert (
        sideways_scroll(found) + console_errors(found) + requests_outside(found) == []
    )
    found.page.emulate_media(media="print")
    assert not figure.is_visible()
    assert still.is_visible() and len(still.get_attribute("alt")) > 40


@pytest.mark.parametrize("name", WIDGETS)
def test_widget_moves_by_keyboard(name: str, visit: Visitor) -> None:
    """Every control has a label; the arrows move each, and the values are right.

    The two ends of each range differ in what they show, else all this holds nothing.
    """
    found, figure, data = opened(name, visit)
    reader = WIDGETS[name][1]
    for control in figure.locator("input, select").all():
        assert control.evaluate("e => e.labels[0].textContent.trim()")
        ends = {}
        for key in ("ArrowLeft", "ArrowLeft", "ArrowDown", "ArrowRight", "End", "Home"):
            control.focus()
            assert control.evaluate("e => getComputedStyle(e).outlineStyle") != "none"
            found.page.keyboard.press(key)
            # Two frames: the move waits for the first.
            found.page.evaluate("() => new Promise(d => requestAnimationFrame("
                                "() => requestAnimationFrame(d)))")  # fmt: skip
            shown = reader(figure, data)
            assert shown.seen == shown.expected, (control, key)
            ends[key] = shown.seen
        if control.get_attribute("type") == "range":
            assert ends["Home"] != ends["End"]
    assert figure.locator("[aria-live=polite]").first.text_content()
    assert console_errors(found) == []


@pytest.mark.parametrize("name", WIDGETS)
def test_widget_keeps_up_with_the_hand(name: str, visit: Visitor) -> None:
    """Sixty frames a second, or its own part of a frame is short."""
    found, figure, _ = opened(name, visit)
    found.page.wait_for_timeout(500)  # formulas are being set
    devtools = found.page.context.new_cdp_session(found.page)
    # Of the processor, not of the clock: other processes do not count.
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def spent() -> float:
        """Seconds of script, style and layout so far."""
        metrics = devtools.send("Performance.getMetrics")["metrics"]
        parts = ("ScriptDuration", "RecalcStyleDuration", "LayoutDuration")
        return sum(each["value"] for each in metrics if each["name"] in parts)

    for control in figure.locator("input[type=range]").all():
        before = spent()
        frames = control.evaluate(DRAG)
        own = 1000 * (spent() - before) / len(frames)
        print(f"{name}: median frame {median(frames):.1f} ms, of it {own:.1f} its own")
        assert median(frames) <= 17 or own < OWN


@pytest.mark.parametrize("name", WIDGETS)
def test_picture_stays_where_no_script_runs(name: str, browser: Browser) -> None:
    """As in a notebook that is not trusted, or with scripts switched off."""
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(f"{DISK}/{WIDGETS[name][0]}")
        figure = page.locator(f'figure.widget[data-name="{name}"]')
        assert picture(figure).is_visible() and not figure.is_visible()


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_inverter_plays(motion: str, visit: Visitor) -> None:
    """Token by token; at once for who wants no motion."""
    found, figure, data = opened("inverter", visit)
    found.page.emulate_media(reduced_motion=motion)
    back = figure.locator("input[type=range]")
    play = figure.get_by_role("button")
    last = back.get_attribute("max")
    assert back.input_value() == last
    play.press("Enter")
    seen = {back.input_value()}
    if motion == "reduce":
        assert seen == {last}
        return
    while len(seen) < 3:  # or the time of this test is up
        found.page.wait_for_timeout(50)
        seen.add(back.input_value())
    play.press("Enter")
    stopped = back.input_value()
    found.page.wait_for_timeout(700)  # more than a token takes
    assert back.input_value() == stopped != last
    shown = inverter(figure, data)
    assert shown.seen == shown.expected
