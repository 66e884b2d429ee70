"""What search engines and previews read: a description, a card, a map of the site.

The address of the site is that of the GitHub Pages of ``repository.url`` in
``_config.yml``, or ``html.baseurl`` where that is set.
"""

import re
from html import escape, unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xml.sax.saxutils import escape as escape_xml

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

CARD = "_static/social_card.png"  # 1200 by 630, the size that previews are cut to
LONGEST = 200  # of a description, in characters
MAP = """<?xml version="1.0" encoding="utf-8"?>
<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">
{}
</urlset>
"""


def pages_address(repository: str) -> str:
    """Where GitHub Pages shows a repository: https://OWNER.github.io/NAME/."""
    owner, name = urlsplit(repository).path.strip("/").split("/")
    return f"https://{owner}.github.io/{name}/"


def set_address(app: Sphinx, config: Config) -> None:
    """The address of the site; the theme makes canonical links of it."""
    if not config.html_baseurl:
        repository = config.html_theme_options.get("repository_url", "")
        config.html_baseurl = pages_address(repository) if repository else ""


def description(doctree: nodes.document | None, default: str) -> str:
    """The first sentences of a page, as far as they are words alone."""
    paragraphs = list(doctree.findall(nodes.paragraph)) if doctree else []
    for paragraph in paragraphs:
        in_text = isinstance(paragraph.parent, nodes.section)
        formulas = any(paragraph.findall(nodes.math))
        text = " ".join(paragraph.astext().split())
        # A line such as "Needs: ..." says nothing to somebody who is elsewhere.
        if in_text and not formulas and len(text) > 60 and "·" not in text:
            words = text[: LONGEST + 1].rsplit(" ", 1)[0]
            return text if len(text) <= LONGEST else words + " …"
    return default


def add_metatags(
    app: Sphinx,
    page: str,
    template: str,
    context: dict[str, Any],
    doctree: nodes.document | None,
) -> None:
    """Description, title and card in the head of one page."""
    if app.builder.name != "html":
        return
    base = app.config.html_baseurl
    # The title is HTML, with the number of the chapter.
    title = re.sub(r"<[^>]+>", "", context.get("title", ""))
    about = description(doctree, app.config.description)
    tags = {
        "og:type": "article",
        "og:site_name": app.config.html_title,
        "og:title": title,
        "og:description": about,
        "og:url": f"{base}{page}.html",
        "og:image": f"{base}{CARD}",
        "og:image:width": "1200",
        "og:image:height": "630",
    }
    lines = [f'<meta name="description" content="{escape(about)}">']
    lines.append('<meta name="twitter:card" content="summary_large_image">')
    for name, value in tags.items():
        lines.append(f'<meta property="{name}" content="{escape(unescape(value))}">')
    context["metatags"] = context.get("metatags", "") + "\n".join(lines) + "\n"


def write_sitemap(app: Sphinx, error: Exception | None) -> None:
    """The addresses of all pages."""
    if error or app.builder.name != "html":
        return
    base = escape_xml(app.config.html_baseurl)
    entries = [f"  <url><loc>{base}{page}.html</loc></url>" for page in sorted(app.env.found_docs)]
    path = Path(app.outdir) / "sitemap.xml"
    path.write_text(MAP.format("\n".join(entries)), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension; Sphinx calls this."""
    app.add_config_value("description", "", "html", types=str)
    app.connect("config-inited", set_address)
    app.connect("html-page-context", add_metatags)
    app.connect("build-finished", write_sitemap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
