"""What two chapters or the command line draw, and the pages' moving figures."""

import json
from base64 import b64encode
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike
from PIL import Image

ACCEPTED = "C0"
RUNNER_UP = "C1"
RADIUS = "0.45"


def legend_above(ax: Axes, columns: int = 3) -> None:
    """Put the legend above the axes: curves fill them, so no place inside is free."""
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False}
    ax.legend(**place, ncols=columns)


def distances(
    accepted: Sequence[float],
    runner_up: Sequence[float],
    radius: Sequence[float],
    ax: Axes | None = None,
) -> Axes:
    """Accepted distance, radius and runner-up by position; zeros stand at the bottom.

    >>> distances([0.0, 1e-6], [1.0, 2.0], [1e-4, 1e-4]).get_yscale()
    'log'
    """
    ax = ax or plt.subplots()[1]
    floor = min(radius) * 1e-4
    ax.plot(np.maximum(runner_up, floor), "^", color=RUNNER_UP, label="runner-up")
    ax.plot(radius, "--", color=RADIUS, label="radius of acceptance")
    ax.plot(np.maximum(accepted, floor), "o", color=ACCEPTED, label="accepted token")
    ax.set(yscale="log", xlabel="position", ylabel="distance to the observed state")
    legend_above(ax)
    return ax


def minima_by_layer(
    tests: dict[str, tuple[ArrayLike, ArrayLike]],
    threshold: float,
    ax: Axes | None = None,
) -> Axes:
    """Smallest distances by layer, each test (layers, minima) one line."""
    ax = ax or plt.subplots()[1]
    for i, (label, (layers, minima)) in enumerate(tests.items()):
        ax.plot(layers, minima, marker="o^sDv"[i % 5], label=label)
    ax.axhline(threshold, color=RADIUS, linestyle="--", label="collision threshold")
    ax.set(yscale="log", xlabel="layer", ylabel="smallest distance")
    legend_above(ax, columns=2)
    return ax


def player(draw: Callable[[int, Axes], object], frames: int, start: int) -> str:
    """Show frame ``start``; return a widget of all, each ``draw(k, ax)`` on empty axes.

    >>> page = player(lambda k, ax: ax.plot([k, 1]), 2, start=1)
    >>> page.count("data:image/png"), '"start":1' in page
    (2, True)
    """
    pictures = []
    figure, ax = plt.subplots(figsize=(5.6, 4.2))
    for k in range(frames):
        ax.clear()
        draw(k, ax)
        png = BytesIO()
        figure.savefig(png, dpi=110, transparent=True)
        # 64 colours are enough for a plot, and a third of the bytes.
        small = BytesIO()
        Image.open(png).quantize(64).save(small, "png")
        encoded = b64encode(small.getvalue()).decode()
        pictures.append(f"data:image/png;base64,{encoded}")
    plt.close(figure)
    draw(start, plt.subplots(figsize=(5.6, 4.2))[1])
    plt.show()
    return widget("player", {"frames": pictures, "start": start})


def widget(name: str, data: object) -> str:
    """HTML of a figure that a reader moves: ``data``, and a script that paints them.

    A cell shows a picture first, which stays on paper and where no script runs, then
    ``HTML(widget(...))``. Numbers of ``data`` are rounded, since nbval compares them.

    >>> page = widget("inverter", {"token": "</script>"})
    >>> page.count("</script>")  # the ends of the data and of the script
    2
    """
    folder = Path(__file__).parent / "widgets"
    names = ("frame.css", f"{name}.css", "frame.js", f"{name}.js")
    parts = [folder.joinpath(part).read_text("utf-8") for part in names]
    stored = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    # A token may look like the end of a script, or like a comment.
    stored = stored.replace("<", r"\u003c")
    return (
        f'<figure class="widget" data-name="{name}">'
        f"<style>\n{parts[0]}{parts[1]}</style>"
        f'<script type="application/json">{stored}</script>'
        f"<script>(() => {{\n{parts[2]}\n{parts[3]}}})();</script></figure>"
    )
