"""The book as one page, for printing: solutions and folded cells are written as on the pages of the site."""

from sphinx.application import Sphinx


def lend_html_handlers(app: Sphinx) -> None:
    """Let the builder of the single page write every node that the builder of the pages can."""
    # Sphinx looks handlers up by the name of the builder, and sphinx-exercise and MyST-NB register theirs for html.
    handlers = app.registry.translation_handlers
    handlers["singlehtml"] = handlers.get("html", {}) | handlers.get("singlehtml", {})


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension; Sphinx calls this."""
    app.connect("builder-inited", lend_html_handlers)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
