"""What two chapters or the command line draw: arrays in, matplotlib axes out."""

import re
from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

ACCEPTED = "tab:blue"
RUNNER_UP = "tab:orange"
RADIUS = "tab:gray"
# Signs in place of the icons of matplotlib's player, whose font is on the network.
ICONS = {
    "minus": "\u2212", "plus": "+", "play": "\u25b6", "pause": "\u2016",
    "play fa-flip-horizontal": "\u25c0", "fast-backward": "|\u25c0",
    "fast-forward": "\u25b6|", "step-backward": "\u2039", "step-forward": "\u203a",
}  # fmt: skip


def legend_above(ax: Axes, columns: int = 3) -> None:
    """Put the legend above the axes: curves fill them, so no place inside is free."""
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False}
    ax.legend(**place, ncols=columns, fontsize="small")


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


def nearest_by_layer(
    layers: Sequence[int],
    nearest: Sequence[ArrayLike],
    threshold: float,
    ax: Axes | None = None,
) -> Axes:
    """Boxes of nearest-neighbour distances by layer, whiskers to the extremes.

    >>> nearest_by_layer([1, 2], [[1.0, 2.0], [2.0, 3.0]], 1e-6).get_yscale()
    'log'
    """
    ax = ax or plt.subplots()[1]
    # Equal states have distance 0, which a logarithmic scale cannot show.
    shown = [np.maximum(distance, threshold / 10) for distance in nearest]
    ax.boxplot(shown, tick_labels=list(layers), whis=(0, 100))
    ax.axhline(threshold, color=RADIUS, linestyle="--", label="collision threshold")
    ax.set(yscale="log", xlabel="layer", ylabel="distance to the nearest neighbour")
    legend_above(ax)
    return ax


def minima_by_layer(
    tests: dict[str, tuple[ArrayLike, ArrayLike]],
    threshold: float,
    ax: Axes | None = None,
) -> Axes:
    """Smallest distances by layer, each test (layers, minima) one line.

    >>> minima_by_layer({"windows": ([1, 2], [0.1, 0.2])}, 1e-6).get_yscale()
    'log'
    """
    ax = ax or plt.subplots()[1]
    for i, (label, (layers, minima)) in enumerate(tests.items()):
        ax.plot(layers, minima, marker="o^sDv"[i % 5], label=label)
    ax.axhline(threshold, color=RADIUS, linestyle="--", label="collision threshold")
    ax.set(yscale="log", xlabel="layer", ylabel="smallest distance")
    legend_above(ax, columns=2)
    return ax


def success_by_length(
    groups: dict[str, Sequence[ArrayLike]], ax: Axes | None = None
) -> Axes:
    """Shares of prompts recovered by length: (lengths, share, lower, upper end) each.

    >>> groups = {"prose": ([1, 2], [1, 0.9], [0.9, 0.8], [1, 1])}
    >>> success_by_length(groups).get_xlabel()
    'tokens in the prompt'
    """
    ax = ax or plt.subplots()[1]
    for i, (name, (lengths, share, low, high)) in enumerate(groups.items()):
        bars = np.clip([np.subtract(share, low), np.subtract(high, share)], 0, None)
        # Side by side, so that no bar hides another.
        at = np.asarray(lengths) + 0.06 * (i - (len(groups) - 1) / 2)
        ax.errorbar(at, share, bars, fmt="os^D"[i % 4] + "-", capsize=3, label=name)
    every = np.unique(np.concatenate([group[0] for group in groups.values()]))
    ax.set(xlabel="tokens in the prompt", xticks=every)
    ax.set(ylabel="share recovered exactly", ylim=(-0.03, 1.05))
    legend_above(ax)
    return ax


def time_ladder(
    seconds: dict[str, float], reference: float, label: str, ax: Axes | None = None
) -> Axes:
    """Seconds of several ways as bars, the first on top; dashed, a reference.

    >>> time_ladder({"slow": 10.0, "fast": 0.1}, 0.01, "one pass").get_xscale()
    'log'
    """
    ax = ax or plt.subplots()[1]
    bars = ax.barh(list(seconds), list(seconds.values()), color=ACCEPTED, height=0.7)
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the line
    ax.bar_label(bars, fmt="{:.2g} s", padding=3, fontsize="small", bbox=white)
    ax.axvline(reference, color=RADIUS, linestyle="--", label=label)
    ax.set(xscale="log", xlabel="seconds per prompt")
    ax.margins(x=0.2)  # room for the numbers
    ax.invert_yaxis()
    legend_above(ax)
    return ax


def player(draw: Callable[[int, Axes], object], frames: int) -> str:
    """An animation as HTML without a network: ``draw(k, ax)`` fills empty axes.

    >>> "http" in player(lambda k, ax: ax.plot([k]), 2).split("data:image")[0]
    False
    """
    figure, ax = plt.subplots(figsize=(4.6, 3.6), dpi=72, layout="constrained")

    def update(k: int) -> None:
        ax.clear()
        draw(k, ax)

    film = FuncAnimation(figure, update, frames=frames, interval=400)
    page = film.to_jshtml(default_mode="once")
    plt.close(figure)
    page = re.sub(r'<link rel="stylesheet"\s+href="[^"]*">', "", page)
    for icon, sign in ICONS.items():
        page = page.replace(f'<i class="fa fa-{icon}"></i>', sign)
    return page
