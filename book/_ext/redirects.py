"""Old addresses of pages: each becomes a page that leads to the new one.

The dictionary ``redirects`` in ``_config.yml`` says which: the name of the page that
is gone, and the name of the page that tells it now, with ``#label`` for a section.
"""

from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

# Without a script the reader lands on the page, with one on the section as well.
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Moved</title>
<meta name="robots" content="noindex">
<link rel="canonical" href="{new}">
<script>location.replace("{new}" + ("{new}".includes("#") ? "" : location.hash))</script>
<meta http-equiv="refresh" content="0; url={new}">
<p>This page has moved to <a href="{new}">{new}</a>.</p>
</html>
"""


def write_redirects(app: Sphinx, error: Exception | None) -> None:
    """One small page for each old name."""
    if error or app.builder.name != "html":
        return
    for old, new in app.config.redirects.items():
        page, _, label = new.partition("#")
        if old in app.env.found_docs:
            raise ExtensionError(f"redirects: {old!r} is a page; expected a former one")
        if page not in app.env.found_docs:
            raise ExtensionError(f"redirects: {old!r} leads to {page!r}, no page")
        address = f"{page}.html#{label}" if label else f"{page}.html"
        path = Path(app.outdir) / f"{old}.html"
        path.write_text(PAGE.format(new=address), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the extension; Sphinx calls this."""
    app.add_config_value("redirects", {}, "html", types=dict)
    app.connect("build-finished", write_redirects)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
