"""A deck of slides for each session of the course: ``make slides``, offline.

The plan is ``slides.yml``: a slide is a page, a section of it, and what it shows of it.
All is taken from the built book, so a deck changes with its chapters; the notes for the
instructor come from the plan of the session on the page *For instructors*.
"""

import re
import shutil
from collections.abc import Iterator
from html import escape
from pathlib import Path

import yaml
from bs4 import BeautifulSoup, Tag

HERE = Path(__file__).parent
BUILD = HERE.parent / "_build"
BOOK = BUILD / "singlehtml"
SENTENCES = 3  # of a paragraph, on a slide
Book = dict[str, Tag]  # what can be linked to, by its id
# What a slide can show of a section, by its name in the plan; `text 2` is the second.
KINDS = {
    "text": ":scope > p",
    "statement": ":scope > .proof:not([id=proof])",
    "math": ":scope > div.math",
    "list": ":scope > :is(ul, ol, dl)",
    "table": ":scope table",
    "code": ":scope > .cell:has(.cell_input)",
    "output": ":scope > .cell:has(.cell_output)",
    "figure": ":scope > .cell:has(img)",
}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<link rel="stylesheet" href="pygments.css">
<link rel="stylesheet" href="slides.css">
<script src="slides.js"></script>
<script src="tex-svg.js" defer></script>
<body>
{slides}
</body>
</html>
"""
SLIDE = """<section class="slide{kind}">
<h2>{title}</h2>
<div class="body">{body}</div>
<footer>{footer}</footer>
<aside>{notes}</aside>
</section>
"""


class PlanError(ValueError):
    """The plan names what the book does not have."""


def read() -> Book:
    """The long page, read once: a search through all of it takes a second."""
    text = (BOOK / "intro.html").read_text("utf-8")
    page = BeautifulSoup(text, "html.parser")
    return {node["id"]: node for node in reversed(page.find_all(id=True))}


def words(node: Tag) -> str:
    """The text of a heading, without its number and the mark of its link."""
    text = re.sub(r"\s+", " ", node.get_text()).removesuffix("#").strip()
    return re.sub(r"^\d+\. ", "", text)


def heading(section: Tag) -> Tag:
    """The heading of a section."""
    return section.find(re.compile("^h[1-6]$"), recursive=False)


def page_of(book: Book, name: str) -> Tag:
    """A page of the book."""
    start = book.get(f"document-{name}")
    if start is None:
        raise PlanError(f"got the page {name!r}; expected one of the book")
    return start.find_next_sibling("section")


def section_of(page: Tag, name: str) -> Tag:
    """A section of a page by its heading; the page itself is the section ``top``."""
    if name == "top":
        return page
    for section in page.find_all("section"):
        if heading(section) is not None and words(heading(section)) == name:
            return section
    raise PlanError(f"got the section {name!r}; expected one of {words(heading(page))!r}")


def plain(node: Tag) -> BeautifulSoup:
    """A copy without links and without what is folded or moved."""
    copy = BeautifulSoup(str(node), "html.parser")
    for part in copy.select(".headerlink, summary, script, style, figure.widget"):
        part.decompose()
    for part in copy.select("a, details"):
        part.unwrap()
    return copy


def shown(section: Tag, what: str) -> str:
    """One thing that a slide shows of a section, as HTML."""
    kind, _, place = what.partition(" ")
    choice = section.select(KINDS[kind])
    number = int(place or 1)
    if len(choice) < number:
        raise PlanError(f"got {what!r} of {words(heading(section))!r}; it has none")
    node = plain(choice[number - 1])
    if kind == "figure":
        return str(node.find("img"))
    if kind == "output":
        return str(node.select_one(".cell_output"))
    for picture in node.select(".cell figure, .cell img"):
        picture.decompose()  # a figure has a slide of its own
    if kind == "text":
        lines = node.p.decode_contents().split("\n")  # a sentence is a line
        return f"<p>{' '.join(lines[:SENTENCES])}</p>"
    return str(node)


def session(book: Book, number: int) -> Tag:
    """The plan of a session, on the page for instructors."""
    for section in page_of(book, "instructors").find_all("section"):
        if words(heading(section)).startswith(f"Session {number}:"):
            return section
    raise PlanError(f"got session {number}; expected one of the page for instructors")


def notes_of(plan: Tag, title: str) -> str:
    """The rows of the plan that name a section: minutes, and what to ask."""
    notes = []
    for row in plan.select("tbody tr"):
        minutes, what = row.select("td")
        if title in [words(name) for name in what.select("em")]:
            notes.append(f"<p>{words(minutes)} minutes: {plain(what)}</p>")
    return "".join(notes)


def exercises(book: Book, plan: Tag) -> Iterator[Tag]:
    """The exercises that the plan sets in class."""
    for paragraph in plan.find_all("p", recursive=False):
        if paragraph.get_text().startswith("In class:"):
            for link in paragraph.select("a[href*='#ex-']"):
                yield book[link["href"].partition("#")[2]]


def slides(book: Book, number: int, chosen: list) -> Iterator[str]:
    """The slides of a session: its title, what was chosen, and its end."""
    plan = session(book, number)
    title = words(heading(plan)).partition(": ")[2]
    chapters = dict.fromkeys(name for name, *_ in chosen)
    names = [words(heading(page_of(book, name))) for name in chapters]
    body = f"<p>Session {number}</p><p>{'<br>'.join(map(escape, names))}</p>"
    whole = "".join(str(plain(node)) for node in plan.select(".pst-scrollable-table-container, p"))
    yield SLIDE.format(kind=" opening", title=escape(title), body=body, footer="", notes=whole)
    for name, part, what, *other in chosen:
        page = page_of(book, name)
        section = section_of(page, part)
        link = heading(section)
        called = other[0] if other else words(link)
        body = "".join(shown(section, one.strip()) for one in what.split(","))
        chapter = escape(words(heading(page)))
        yield SLIDE.format(
            kind="",
            title=escape(called),
            body=body,
            footer=f'<a href="../html/{name}.html#{section["id"]}">{chapter}</a>',
            notes=notes_of(plan, words(link)),
        )
    for exercise in exercises(book, plan):
        yield SLIDE.format(
            kind="",
            title="Exercise in class",
            body=plain(exercise),
            footer="",
            notes=notes_of(plan, "Exercises"),
        )


def write(book: Book, target: Path) -> None:
    """Write a deck for each session, and what the decks share."""
    shutil.rmtree(target, ignore_errors=True)
    (target / "_images").mkdir(parents=True)
    for path in (
        HERE / "slides.css",
        HERE / "slides.js",
        BOOK / "_static" / "pygments.css",
        HERE / "_static" / "mathjax" / "tex-svg.js",
    ):
        shutil.copy(path, target)
    plan = yaml.safe_load((HERE / "slides.yml").read_text("utf-8"))
    for number, chosen in plan.items():
        made = list(slides(book, number, chosen))
        deck = PAGE.format(title=f"Session {number}", slides="".join(made))
        for picture in set(re.findall(r'src="(_images/[^"]+)"', deck)):
            shutil.copy(BOOK / picture, target / picture)
        path = target / f"session-{number:02}.html"
        path.write_text(deck, "utf-8")
        print(f"{path}: {len(made)} slides")


if __name__ == "__main__":
    write(read(), BUILD / "slides")
