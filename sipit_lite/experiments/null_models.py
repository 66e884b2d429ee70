"""How close should N points be? Null models for the closest pair, and the shape of a cloud (chapters 7, 8)."""

import math

import mpmath
import torch
from jaxtyping import Float
from torch import Tensor

from sipit_lite.collisions import closest_pairs
from sipit_lite.model import StatesError
from sipit_lite.onestep import EXACT


def birthday_minimum(
    n: int, dimension: float | int, radius: float | int = 1.0
) -> float:
    """Median of the smallest distance among n points drawn uniformly from a sphere of that dimension and radius.

    Two points are within r with probability p(r) = ½·I(dimension/2, ½; sin²φ), r = 2·radius·sin(φ/2): the share of a
    cap. The n(n − 1)/2 pairs are treated as independent (the birthday argument), so the median solves
    n(n − 1)/2 · p(r) = ln 2. Dimension 2 is the ordinary sphere; it need not be an integer.
    Raises ``ValueError`` for fewer than three points, or a dimension or radius that is not positive.

    >>> round(birthday_minimum(100_000, 1.0) * 100_000**2, 3)  # on a circle of length 2π: 2π ln 2
    4.355
    """
    if n < 3 or not dimension > 0 or not radius > 0:
        raise ValueError(
            f"got n={n}, dimension={dimension}, radius={radius}; expected n ≥ 3, and the others positive"
        )
    wanted = math.log(2) / (n * (n - 1) / 2)
    low, high = (
        0.0,
        math.pi / 2,
    )  # the angle: at a right angle the share is one half, more than any n ≥ 3 asks for
    for _ in range(200):
        middle = (low + high) / 2
        share = (
            mpmath.betainc(
                dimension / 2, 0.5, 0, math.sin(middle) ** 2, regularized=True
            )
            / 2
        )
        low, high = (middle, high) if share < wanted else (low, middle)
    return 2 * radius * math.sin(high / 2)


def gaussian_minimum(states: Float[Tensor, "n d_model"], seed: int = 0) -> float:
    """The smallest distance among N draws from the normal law with the mean and covariance of the N states given.

    Raises ``StatesError`` for what ``closest_pairs`` refuses.

    >>> states = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    >>> 0 < gaussian_minimum(states) < 1
    True
    """
    centred = states.double() - states.double().mean(0)
    spread, axes = torch.linalg.eigh(centred.T @ centred / len(states))
    drawn = torch.randn(
        states.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return closest_pairs(
        drawn.to(states.device) * spread.clamp_min(0).sqrt() @ axes.T, 1
    ).minimum


def intrinsic_dimension(states: Float[Tensor, "n d_model"]) -> float:
    """How many dimensions the cloud has locally: the TwoNN estimate of Facco et al. (2017), by maximum likelihood.

    The ratio of a point's second to first neighbour distance follows a Pareto law; the dimension is its exponent.
    Compares all pairs: meant for a few thousand rows. Raises ``StatesError`` for fewer than three or equal rows.

    >>> flat = torch.zeros(2000, 50)
    >>> flat[:, :3] = torch.rand(2000, 3, generator=torch.Generator().manual_seed(0))
    >>> 2.7 < intrinsic_dimension(flat) < 3.3
    True
    """
    if len(states) < 3:
        raise StatesError(
            f"got {len(states)} rows; the two nearest neighbours of each need at least 3"
        )
    x, logs = states.double(), []
    for rows in x.split(256):
        first, second = (
            torch.cdist(rows, x, compute_mode=EXACT)
            .topk(3, largest=False)
            .values[:, 1:]
            .unbind(1)
        )
        logs.append((second / first).log())
    total = float(torch.cat(logs).sum())
    if not 0 < total < math.inf:
        raise StatesError(
            "got equal rows, or neighbours that are all equally far; the ratio of distances says nothing"
        )
    return (len(states) - 1) / total


def anisotropy(states: Float[Tensor, "n d_model"]) -> float:
    """Share of the variance along the direction of largest variance: 1/d for a round cloud, 1 for a line.

    >>> anisotropy(torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 4.0]]))
    1.0
    """
    squares = torch.linalg.svdvals(states.double() - states.double().mean(0)).square()
    return float(squares[0] / squares.sum())
