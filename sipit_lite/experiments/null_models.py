"""How close should N points be? Null models, and the shape of a cloud."""

import math

import mpmath
import torch
from jaxtyping import Float
from torch import Tensor

from sipit_lite.collisions import closest_pairs
from sipit_lite.model import StatesError
from sipit_lite.onestep import EXACT

Number = float | int


def birthday_count(distance: Number, dimension: Number, radius: Number = 1.0) -> float:
    """How many points on a sphere come within ``distance`` with probability one half.

    The n of n(n − 1)/2 · p = ln 2, with p = ½·I(dimension/2, ½; sin²φ) the share of a
    cap, distance = 2·radius·sin(φ/2) (chapter 7). The dimension need not be an integer.
    Raises ``StatesError`` unless 0 < distance < √2·radius, for a positive dimension.

    >>> round(birthday_count(1.0, 2))  # the ordinary sphere: p = ¼
    3
    """
    if not 0 < distance < math.sqrt(2) * radius or not dimension > 0:
        got = f"got distance={distance}, dimension={dimension}, radius={radius}"
        wanted = "0 < distance < √2·radius and a positive dimension"
        raise StatesError(f"{got}; expected {wanted}")
    # mpmath, because in many dimensions the share is below the smallest float64.
    square = mpmath.sin(2 * mpmath.asin(mpmath.mpf(distance) / (2 * radius))) ** 2
    share = mpmath.betainc(dimension / 2, 0.5, 0, square, regularized=True) / 2
    return float((1 + mpmath.sqrt(1 + 8 * mpmath.log(2) / share)) / 2)


def birthday_minimum(n: int, dimension: Number, radius: Number = 1.0) -> float:
    """Median of the smallest distance of n uniform points: ``birthday_count`` inverted.

    Raises ``StatesError`` for fewer than three points, and where that one does.

    >>> round(birthday_minimum(100_000, 1.0) * 100_000**2, 3)  # a circle: 2π ln 2
    4.355
    """
    if n < 3 or not dimension > 0 or not radius > 0:
        got = f"got n={n}, dimension={dimension}, radius={radius}"
        raise StatesError(f"{got}; expected n ≥ 3, and the others positive")
    low = 0.0
    # At a right angle the share is one half, more than any n ≥ 3 needs.
    high = math.sqrt(2) * radius * (1 - 1e-15)
    while high - low > 1e-15 * high:
        middle = (low + high) / 2
        if birthday_count(middle, dimension, radius) > n:
            low = middle
        else:
            high = middle
    return high


def gaussian_minimum(states: Float[Tensor, "n d_model"], seed: int = 0) -> float:
    """The smallest distance of n normal draws with the states' covariance."""
    centred = states.double() - states.double().mean(0)
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(states))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(states.shape, generator=generator, dtype=torch.float64)
    # A variance of zero may come out slightly negative.
    scales = variances.clamp_min(0).sqrt()
    return closest_pairs(drawn.to(states.device) * scales @ axes.T, 1).minimum


def intrinsic_dimension(states: Float[Tensor, "n d_model"]) -> float:
    """How many dimensions the cloud has locally: TwoNN (Facco et al., 2017).

    The ratio of second to first neighbour distance follows a Pareto law; the dimension
    is its exponent, by maximum likelihood. Compares all pairs of a few thousand rows.
    Raises ``StatesError`` for fewer than three rows, or equal ones.
    """
    if len(states) < 3:
        got = f"got {len(states)} rows"
        raise StatesError(f"{got}; the two nearest neighbours of each need at least 3")
    x = states.double()
    total = 0.0  # of the logs of the ratios; each is exponential under a Pareto law
    for rows in x.split(256):
        distances = torch.cdist(rows, x, compute_mode=EXACT)
        # The nearest of all is the row itself.
        _, first, second = distances.topk(3, largest=False).values.unbind(1)
        total += float((second / first).log().sum())
    if not 0 < total < math.inf:
        raise StatesError("got equal rows, or neighbours that are all equally far")
    return (len(states) - 1) / total


def anisotropy(states: Float[Tensor, "n d_model"]) -> float:
    """Share of the variance along the leading axis: 1/d for a ball, 1 on a line."""
    squares = torch.linalg.svdvals(states.double() - states.double().mean(0)).square()
    return float(squares[0] / squares.sum())
