"""The built book in a headless browser, where no request leaves the book."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import Browser, Page, Request, Route, sync_playwright

BUILD = Path(__file__).parents[2] / "_build"
CHROMIUM = os.environ.get("CHROMIUM") or "chromium"  # a command or a path
# Playwright switches the background traffic of the browser off. Besides, no name has
# an address but this machine's: what bypasses the gate below, as a look-up ahead of a
# click, finds nobody.
NO_NAMES = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
SCREEN = {"width": 1280, "height": 720}
TYPESET = (
    "async () => { await window.MathJax?.startup?.promise; await document.fonts.ready }"
)


@dataclass(frozen=True)
class Visit:
    """An open page, the errors on its console, and its requests outside the book."""

    page: Page
    errors: list[str]
    outside: list[str]


Visitor = Callable[[str, str], Visit]


def pytest_configure() -> None:
    """Say in one line what is missing, before any test runs."""
    if shutil.which(CHROMIUM) is None:
        raise pytest.UsageError(
            f"got no browser {CHROMIUM!r}; expected a Chromium, as by: apt-get install "
            "chromium; the variable CHROMIUM names another command"
        )
    for builder in ("html", "singlehtml"):
        if not (BUILD / builder / "intro.html").exists():
            raise pytest.UsageError(
                f"got no intro.html in {BUILD / builder}; expected the book: make pages"
            )


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server of one folder, on this machine alone."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=folder)
    ) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session", params=["disk", "server"])
def book(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of the book: a folder on the disk, and a server."""
    if request.param == "disk":
        yield (BUILD / "html").as_uri()
    else:
        with serving(BUILD / "html") as address:
            yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's browser; Playwright's own is never downloaded."""
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(
            executable_path=shutil.which(CHROMIUM), args=[NO_NAMES]
        ) as started,
    ):
        yield started


@contextmanager
def window(browser: Browser) -> Iterator[Visitor]:
    """A fresh window, and what opens a page in it and waits for its formulas.

    One page goes after the other, as a reader follows links: a new tab has a new
    process, which reads the script of formulas anew.
    """
    with browser.new_context(service_workers="block") as context:
        page = context.new_page()
        visit = Visit(page, [], [])
        inside = ""

        def gate(route: Route, request: Request) -> None:
            if request.url.startswith((f"{inside}/", "data:", "blob:")):
                route.continue_()
            else:
                visit.outside.append(request.url)
                route.abort()

        page.route("**/*", gate)
        page.on(
            "console",
            lambda m: visit.errors.append(m.text) if m.type == "error" else None,
        )
        page.on("pageerror", lambda error: visit.errors.append(str(error)))

        def opened(book: str, name: str) -> Visit:
            nonlocal visit, inside
            page.goto("about:blank")  # what the last page still says is not the next's
            page.set_viewport_size(SCREEN)
            page.emulate_media(media="null", reduced_motion="null")
            inside = book
            visit = Visit(page, [], [])
            page.goto(f"{book}/{name}", timeout=120_000)
            page.evaluate(TYPESET)
            return visit

        yield opened


@pytest.fixture(scope="session")
def visit(browser: Browser) -> Iterator[Visitor]:
    """One window for all tests; a visit lasts until the next."""
    with window(browser) as opened:
        yield opened
