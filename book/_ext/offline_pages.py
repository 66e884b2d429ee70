"""The scripts of the built pages: MathJax once, where there is a formula; Thebe, which needs the network, never."""

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


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension; Sphinx calls this."""
    app.connect("config-inited", leave_mathjax_to_sphinx)
    app.connect("html-page-context", drop_thebe, priority=900)  # after Sphinx added the scripts of the page
    return {"parallel_read_safe": True, "parallel_write_safe": True}
