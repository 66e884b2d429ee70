"""Figures: arrays in, matplotlib axes out."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

ACCEPTED, RUNNER_UP, RADIUS = "tab:blue", "tab:orange", "tab:gray"


def distances(
    accepted: Sequence[float], runner_up: Sequence[float], radius: Sequence[float], ax: Axes | None = None
) -> Axes:
    """Accepted distance, radius ε_t and runner-up at each position, on a logarithmic scale.

    A distance of exactly zero is drawn at the bottom of the scale.

    >>> distances([0.0, 1e-6], [1.0, 2.0], [1e-4, 1e-4]).get_yscale()
    'log'
    """
    ax = ax or plt.subplots()[1]
    positions, floor = np.arange(len(accepted)), min(radius) * 1e-4
    ax.plot(positions, np.maximum(runner_up, floor), "^", color=RUNNER_UP, label="runner-up")
    ax.plot(positions, radius, "--", color=RADIUS, label="radius of acceptance")
    ax.plot(positions, np.maximum(accepted, floor), "o", color=ACCEPTED, label="accepted token")
    ax.set(yscale="log", xlabel="position", ylabel="distance to the observed state")
    _legend_above(ax)
    return ax


def candidates(tested: Sequence[Sequence[int]], labels: Sequence[str], vocab_size: int, ax: Axes | None = None) -> Axes:
    """Candidates tested at each position, one line a prompt, against the size of the vocabulary.

    >>> candidates([[32, 64]], ["prose"], 4096).get_ylabel()
    'candidates tested'
    """
    ax = ax or plt.subplots()[1]
    for counts, label in zip(tested, labels, strict=True):
        ax.plot(counts, ".-", label=label)
    ax.axhline(vocab_size, color=RADIUS, linestyle="--", label="whole vocabulary")
    ax.set(yscale="log", xlabel="position", ylabel="candidates tested")
    _legend_above(ax)
    return ax


def _legend_above(ax: Axes) -> None:
    # Points fill these axes from top to bottom, so there is no best place inside them.
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize="small")
