"""The printed book: ``make pdf`` writes _build/book.pdf from the long page, offline.

Chromium lays out and prints; it cannot write page numbers into the contents, and it
draws each letter of each formula anew. Both are mended in the file that it writes.
"""

import os
import re
import shutil
from collections import Counter
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from pypdf import PageObject, PdfWriter
from pypdf.generic import (
    ArrayObject,
    DictionaryObject,
    FloatObject,
    NameObject,
    StreamObject,
)

HERE = Path(__file__).parent
BUILD = HERE.parent / "_build"
TITLE = "Hidden states that give back the prompt"
MINUTES = 10 * 60 * 1000  # a busy machine takes its time
TYPESET = "async () => { await MathJax.startup.promise; await document.fonts.ready }"
# An outline, from its first move: moves, lines and curves, filled.
OUTLINE = re.compile(rb"(?m)^(?<! [mlcvy]\n)(?<!re\n)(?<!h\n)([-\d. ]+ m\n(?:[-\d. ]+ [mlcvy]\n|h\n)+f\*?\n)")
NUMBER = re.compile(rb"-?\d*\.?\d+")


def arrange(page: Page) -> None:
    """Make a book of the long page: title, contents, running heads, solutions."""
    page.set_default_timeout(MINUTES)
    page.evaluate(TYPESET)
    page.evaluate((HERE / "paper.js").read_text(encoding="utf-8"))
    page.add_style_tag(path=HERE / "paper.css")
    page.emulate_media(media="print")


def printed(page: Page, path: Path) -> None:
    """Print a page, with bookmarks and with tags for readers aloud."""
    page.pdf(path=path, tagged=True, outline=True, prefer_css_page_size=True)


def form(outline: bytes) -> StreamObject:
    """An outline that is drawn by its name."""
    numbers = [float(number) for number in NUMBER.findall(outline)]
    across = numbers[::2]
    down = numbers[1::2]
    box = [min(across) - 1, min(down) - 1, max(across) + 1, max(down) + 1]
    drawn = StreamObject()
    drawn.set_data(outline)
    drawn[NameObject("/Type")] = NameObject("/XObject")
    drawn[NameObject("/Subtype")] = NameObject("/Form")
    drawn[NameObject("/BBox")] = ArrayObject(map(FloatObject, box))
    return drawn.flate_encode(9)


def share_outlines(paper: PdfWriter) -> list[bytes]:
    """Write outlines that repeat once, and give back what the pages draw then."""
    # What stands between outlines, and at odd places the outlines.
    drawn = [OUTLINE.split(sheet.get_contents().get_data()) for sheet in paper.pages]
    uses: Counter[bytes] = Counter()
    for parts in drawn:
        uses.update(parts[1::2])
    repeated = [outline for outline, times in uses.items() if times > 1]
    names = {outline: b"/O%d" % i for i, outline in enumerate(repeated)}
    forms = {name: paper._add_object(form(outline)) for outline, name in names.items()}
    for sheet, parts in zip(paper.pages, drawn, strict=True):
        objects = DictionaryObject(sheet["/Resources"].get("/XObject", {}))
        for i, outline in enumerate(parts):
            if i % 2 and outline in names:
                name = names[outline]
                parts[i] = name + b" Do\n"
                objects[NameObject(name.decode())] = forms[name]
        sheet["/Resources"][NameObject("/XObject")] = objects
    return [b"".join(parts) for parts in drawn]


def page_numbers(sheet: PageObject, pages: dict[str, int]) -> bytes:
    """Page numbers for the links of a page of contents, at their right ends."""
    lines = []
    for annotation in sheet.get("/Annots", []):
        link = annotation.get_object()
        target = str(link.get("/Dest", "")).removeprefix("/")
        if re.fullmatch(r"page-\d+", target):
            _, low, right, high = map(float, link["/Rect"])
            number = str(pages[target])
            # A digit of Helvetica is 0.556 of its size wide.
            x = right - 9 * 0.556 * len(number)
            y = (low + high) / 2 - 3
            lines.append(f"BT /Helvetica 9 Tf {x:.2f} {y:.2f} Td ({number}) Tj ET\n")
    return "".join(lines).encode()


def finish(path: Path) -> None:
    """Write the page numbers of the contents, and what repeats once."""
    paper = PdfWriter(clone_from=path)
    order = {sheet.indirect_reference.idnum: i for i, sheet in enumerate(paper.pages, 1)}
    pages = {
        name.removeprefix("/"): order[target.raw_get("/Page").idnum]
        for name, target in paper.named_destinations.items()
    }
    helvetica = DictionaryObject()
    for key, value in (("Type", "Font"), ("Subtype", "Type1"), ("BaseFont", "Helvetica")):
        helvetica[NameObject(f"/{key}")] = NameObject(f"/{value}")
    helvetica = paper._add_object(helvetica)
    for sheet, stream in zip(paper.pages, share_outlines(paper), strict=True):
        numbers = page_numbers(sheet, pages)
        if numbers:
            # What Chromium draws leaves its scale behind: it is put aside.
            stream = b"q\n" + stream + b"\nQ\n/Artifact BMC\n" + numbers + b"EMC\n"
            sheet["/Resources"]["/Font"][NameObject("/Helvetica")] = helvetica
        sheet["/Contents"].set_data(stream)
    paper.add_metadata({"/Title": TITLE, "/Author": "the sipit-lite authors"})
    with path.open("wb") as file:  # a million small pieces, which this file collects
        paper.write(file)


def main() -> None:
    """Print _build/singlehtml as _build/book.pdf."""
    chromium = shutil.which(os.environ.get("CHROMIUM") or "chromium")
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium) as browser,
    ):
        page = browser.new_page()
        address = (BUILD / "singlehtml" / "intro.html").as_uri()
        page.goto(address, timeout=MINUTES)
        arrange(page)
        printed(page, BUILD / "book.pdf")
    finish(BUILD / "book.pdf")
    megabytes = (BUILD / "book.pdf").stat().st_size / 1e6
    print(f"{BUILD / 'book.pdf'}: {megabytes:.1f} MB")


if __name__ == "__main__":
    main()
