"""What each page measures on any model, for the model of SIPIT_LITE_MODEL.

    SIPIT_LITE_MODEL=smollm2 python every_model.py [PAGE ...]

The cells tagged ``every-model`` run, and ``runs/PAGE.json`` keeps what they measured.
"""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat

BOOK = Path(__file__).parent


def cells() -> Iterator[tuple[str, str]]:
    """The name of each page that has such a cell, and the cell's source."""
    for path in sorted(BOOK.glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            if "every-model" in cell.metadata.get("tags", []):
                yield path.stem, cell.source


if __name__ == "__main__":
    os.chdir(BOOK)
    for page, source in cells():
        if page in sys.argv[1:] or len(sys.argv) == 1:
            started = time.perf_counter()
            print(f"\n{page}")
            exec(compile(source, page, "exec"), {"__name__": page})
            print(f"{time.perf_counter() - started:.0f} s")
