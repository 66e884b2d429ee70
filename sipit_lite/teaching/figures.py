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


def shifted_twins(
    sizes: ArrayLike,
    bands: dict[str, tuple[ArrayLike, ArrayLike]],
    threshold: float,
    ax: Axes | None = None,
) -> Axes:
    """Distances of planted pairs over the size of the shift that parts them: from the smallest to the largest.

    A distance of zero is drawn at the bottom, at 1e-4 of the threshold.

    >>> shifted_twins([1e-8, 1e-6], {"float64": ([0.0, 1e-6], [1e-7, 1e-5])}, 1e-6).get_xscale()
    'log'
    """
    ax, floor = ax or plt.subplots()[1], threshold * 1e-4
    for (label, (low, high)), color in zip(
        bands.items(), (ACCEPTED, RUNNER_UP, "tab:green"), strict=False
    ):
        low, high = np.maximum(low, floor), np.maximum(high, floor)
        ax.fill_between(sizes, low, high, color=color, alpha=0.25)
        ax.plot(sizes, low, ".-", color=color, label=label)
        ax.plot(sizes, high, ".-", color=color)
    ax.axhline(threshold, color=RADIUS, linestyle="--", label="collision threshold")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="size of the shift",
        ylabel="distance of the planted pairs",
    )
    legend_above(ax)
    return ax


def equal_pairs(
    sizes: ArrayLike,
    counts: dict[str, ArrayLike],
    expected: dict[str, ArrayLike],
    ax: Axes | None = None,
) -> Axes:
    """Equal pairs among the first N rounded states, one format a colour; dashed, the expected number.

    Counts of zero are not drawn.

    >>> len(equal_pairs([10, 20], {"int4": [0, 3]}, {"int4": [0.5, 2.0]}).lines)
    2
    """
    ax = ax or plt.subplots()[1]
    for i, (label, found) in enumerate(counts.items()):
        ax.plot(
            sizes,
            np.where(np.asarray(found) > 0, found, np.nan),
            "os^Dv"[i % 5],
            color=f"C{i}",
            label=label,
        )
        ax.plot(sizes, expected[label], "--", color=f"C{i}", linewidth=1.2)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="number of prompts N",
        ylabel="equal pairs",
        ylim=(0.3, None),
    )
    legend_above(ax)
    return ax


def layer_profile(
    layers: ArrayLike,
    profiles: dict[str, ArrayLike],
    axes: Sequence[Axes] | None = None,
) -> Sequence:
    """Several quantities over the layer, one panel below the other; the keys are the labels.

    >>> len(layer_profile([1, 2], {"margin": [1.0, 2.0], "anisotropy": [0.1, 0.2]}))
    2
    """
    if axes is None:
        axes = list(
            plt.subplots(
                len(profiles), sharex=True, layout="constrained", squeeze=False
            )[1][:, 0]
        )
    for i, (ax, (label, values)) in enumerate(zip(axes, profiles.items(), strict=True)):
        ax.plot(layers, values, "o-", color=f"C{i}")
        ax.set(ylabel=label, ylim=(0, 1.15 * np.max(values)))
    axes[-1].set(xlabel="layer", xticks=list(layers))
    return axes


def computed_distances(
    true: ArrayLike, computed: dict[str, ArrayLike], ax: Axes | None = None
) -> Axes:
    """What formulas compute against the true distance, both on logarithmic scales, and the diagonal.

    A computed distance of zero is drawn at the bottom.

    >>> computed_distances([0.1, 1.0], {"product": [0.0, 1.0]}).get_xscale()
    'log'
    """
    ax, true = ax or plt.subplots()[1], np.asarray(true)
    floor, reach = true.min() / 2, true.max()
    ax.plot([floor, reach], [floor, reach], color=RADIUS, linewidth=1)
    for (label, found), color, marker in zip(
        computed.items(), (RUNNER_UP, ACCEPTED), "^.", strict=False
    ):
        ax.plot(
            true,
            np.maximum(found, floor),
            marker,
            color=color,
            markersize=5,
            label=label,
        )
    ax.set(
        xscale="log", yscale="log", xlabel="true distance", ylabel="computed distance"
    )
    legend_above(ax)
    return ax


def lower_bounds(
    true: ArrayLike, bound: ArrayLike, limit: float, ax: Axes | None = None
) -> Axes:
    """Lower bounds of distances against the distances, the diagonal, and the limit above which pairs are skipped.

    >>> len(lower_bounds([1.0, 2.0], [0.5, 1.5], 1.0).get_legend().get_texts())
    3
    """
    ax, reach = ax or plt.subplots()[1], np.asarray(true).max()
    ax.plot(
        true,
        bound,
        ".",
        color=ACCEPTED,
        markersize=2,
        alpha=0.5,
        label="pair of states",
    )
    ax.plot(
        [0, reach], [0, reach], color="black", linewidth=1.2, label="bound = distance"
    )
    ax.axhline(
        limit, color=RUNNER_UP, linestyle="--", linewidth=1.8, label="smallest distance"
    )
    ax.set(xlabel="true distance", ylabel="lower bound", xlim=(0, None), ylim=(0, None))
    ax.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=3,
        frameon=False,
        fontsize="small",
        markerscale=5,
    )
    return ax


def pairs_left(
    layers: Sequence[int], stages: dict[str, ArrayLike], ax: Axes | None = None
) -> Axes:
    """Numbers of pairs that each stage of a search left over, one line a stage over the layers, on a logarithmic scale.

    >>> pairs_left([1, 2], {"all": [10, 10], "recomputed": [1, 2]}).get_yscale()
    'log'
    """
    ax = ax or plt.subplots()[1]
    for (label, counts), marker in zip(stages.items(), "os^Dv", strict=False):
        ax.plot(layers, counts, marker=marker, markersize=5, label=label)
    ax.set(yscale="log", xlabel="layer", ylabel="pairs", xticks=list(layers))
    ax.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=4,
        frameon=False,
        fontsize="small",
    )
    return ax


def discs(
    centres: ArrayLike, radius: float, labels: Sequence[str], ax: Axes | None = None
) -> Axes:
    """Points of the plane, each the centre of a disc of the same radius: the acceptance regions of a few tokens.

    >>> len(discs([[0, 0], [1, 1]], 0.5, ["a", "b"]).patches)
    2
    """
    ax = ax or plt.subplots()[1]
    for i, ((x, y), label) in enumerate(zip(np.asarray(centres), labels, strict=True)):
        ax.add_patch(plt.Circle((x, y), radius, color=f"C{i}", alpha=0.25))
        ax.plot(x, y, "os^Dv"[i % 5], color=f"C{i}", label=label)
    ax.set(xlabel="first number", ylabel="second number", aspect="equal")
    ax.margins(0.1)
    legend_above(ax)
    return ax


def neighbour_counts(
    groups: dict[str, ArrayLike], margin: float, ax: Axes | None = None
) -> Axes:
    """Numbers of tokens by the distance to their nearest neighbour, one outline a group, and the margin dashed.

    >>> neighbour_counts({"occurs": [2.0, 3.0]}, 1.0).get_ylabel()
    'tokens'
    """
    ax = ax or plt.subplots()[1]
    edges = np.linspace(
        0, max(np.asarray(found).max() for found in groups.values() if len(found)), 41
    )
    for i, (label, found) in enumerate(groups.items()):
        ax.hist(
            found, edges, histtype="step", linewidth=1.8, color=f"C{i}", label=label
        )
    ax.axvline(margin, color=RADIUS, linestyle="--", label="margin")
    ax.set(xlabel="distance to the nearest neighbour", ylabel="tokens")
    legend_above(ax)
    return ax


def margin_lines(
    x: ArrayLike,
    lines: dict[str, ArrayLike],
    marks: dict[str, ArrayLike],
    xlabel: str,
    ax: Axes | None = None,
    noise: ArrayLike | None = None,
) -> Axes:
    """Margins of prefixes as lines and margins of the true tokens as markers, one colour a kind of prompt.

    ``noise``, where given, is drawn dashed: below it a margin could not be told from rounding.

    >>> len(margin_lines([1, 2], {"prose": [1, 1]}, {"prose": [9, 8]}, "layer").lines)
    2
    """
    ax = ax or plt.subplots()[1]
    for i, (label, values) in enumerate(lines.items()):
        ax.plot(
            x,
            values,
            "-",
            color=f"C{i}",
            linewidth=[3.2, 1.6][i % 2],
            label=f"{label}, prefix",
        )
        ax.plot(
            x, marks[label], "o^"[i % 2], color=f"C{i}", label=f"{label}, true token"
        )
    if noise is not None:
        ax.plot(x, noise, "--", color=RADIUS, label="twice the radius")
    ax.set(
        yscale="log",
        xlabel=xlabel,
        ylabel="margin",
        xticks=list(x),
        xticklabels=list(map(str, x)),
    )
    ax.legend(
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=2,
        frameon=False,
        fontsize="small",
    )
    return ax
