"""The head of the built pages, so that they open from the disk without an error.

MathJax once, where there is a formula; Thebe, which needs the network, never; no font fetched ahead of its use; no
excerpts in search results where a page may not read another.
"""

import re
from pathlib import Path
from typing import Any

from docutils.nodes import document
from sphinx.application import Sphinx
from sphinx.config import Config


def leave_mathjax_to_sphinx(app: Sphinx, config: Config) -> None:
    """Take MathJax out of the scripts for every page."""
    # Jupyter Book adds all scripts below _static to every page; Sphinx adds MathJax again to pages with formulas.
    config.html_js_files = [script for script in config.html_js_files if script != config.mathjax_path]


def drop_thebe(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: document | None) -> None:
    """Take Thebe out of the scripts of one page."""
    # Jupyter Book loads sphinx-thebe even when its button is off, and its script stops with an error on every page.
    context["script_files"] = [script for script in context["script_files"] if "thebe" not in str(script).lower()]


def drop_font_preloads(app: Sphinx, error: Exception | None) -> None:
    """Take the links that fetch fonts ahead of their use out of all pages."""
    # From the disk a browser refuses them as a request of another origin; the style sheet loads the same fonts.
    for page in Path(app.outdir).glob("*.html"):
        page.write_text(re.sub(r'<link rel="preload" as="font"[^>]*>\s*', "", page.read_text("utf-8")), "utf-8")


EXCERPTS = "DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = location.protocol !== 'file:';"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension; Sphinx calls this."""
    app.add_js_file(None, body=EXCERPTS)  # after documentation_options.js, whose priority is 200
    app.connect("config-inited", leave_mathjax_to_sphinx)
    app.connect("html-page-context", drop_thebe, priority=900)  # after Sphinx added the scripts of the page
    app.connect("build-finished", drop_font_preloads)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
