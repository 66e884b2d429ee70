"""Zero sets of analytic functions, drawn and measured: contours, tubes (chapter 3)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import contourpy
import numpy as np
import sympy as sp
from jaxtyping import Float64
from numpy.typing import ArrayLike

Coefficient = int | float | sp.Expr

SAMPLES = 2**17  # points per call of a function: a few megabytes an array


@dataclass(frozen=True, eq=False)
class TubeArea:
    """Monte-Carlo estimates of the area (in n dimensions the volume) of {x in the box : |f(x)| < ε}, one a width ε.

    One sample serves all widths, so the estimates never rise as ε falls. ``standard_error`` is √(p(1 − p)/samples)
    times the area of the box, with p = (hits + 1)/(samples + 2), so that no hits at all do not pass for certainty.
    ``zeros`` counts the sampled points where f is exactly 0.
    """

    widths: Float64[np.ndarray, " widths"]
    area: Float64[np.ndarray, " widths"]
    standard_error: Float64[np.ndarray, " widths"]
    box_area: float
    samples: int
    zeros: int

    def exponent(self) -> tuple[float, float]:
        """Slope of log area over log width by least squares, and its standard error (chapter 3).

        The estimates share a sample. For nested sets with probabilities p ≤ q the covariance of the two frequencies is
        p(1 − q)/samples, so that of their logarithms is about (1/q − 1)/samples. Raises ``ValueError`` where some width
        was never hit, or with fewer than two different widths.

        >>> tube_area(lambda x: x, [(-1, 1)], [0.1, 1.0], 10_000, np.random.default_rng(0)).exponent()[0].__round__(1)
        1.0
        """
        if not self.area.all() or len(set(self.widths)) < 2:
            raise ValueError(
                f"got areas {self.area} at widths {self.widths}; expected two widths or more, all hit"
            )
        x = np.log(self.widths) - np.log(self.widths).mean()
        weights, p = x / (x @ x), self.area / self.box_area
        covariance = (1 / np.maximum(p[:, None], p) - 1) / self.samples
        return float(weights @ np.log(self.area)), float(
            np.sqrt(weights @ covariance @ weights)
        )


def tube_area(
    f: Callable[..., ArrayLike],
    box: ArrayLike,
    widths: ArrayLike,
    samples: int,
    generator: np.random.Generator,
) -> TubeArea:
    """Estimate the area of the sublevel set |f| < ε in a box, for each width ε, from uniform points (chapter 3).

    ``f`` takes n arrays of one length, the coordinates, and returns an array of that length; ``box`` holds n pairs
    (low, high). With f the distance to a set this is the area of its tube. Raises ``ValueError`` for an empty box,
    widths or samples that are not positive, and values of f that are not finite or of the wrong shape.

    >>> tube_area(lambda x, y: x - y, [(0, 1), (0, 1)], [2.0], 100, np.random.default_rng(0)).area.tolist()
    [1.0]
    """
    (low, high), widths = _corners(box), np.asarray(widths, dtype=float)
    if widths.ndim != 1 or not len(widths) or not (widths > 0).all() or samples < 1:
        raise ValueError(
            f"got widths {widths} and {samples} samples; expected positive widths and samples"
        )
    hits, zeros = np.zeros(len(widths)), 0
    for first in range(0, samples, SAMPLES):
        shape = (len(low), min(SAMPLES, samples - first))
        values = np.abs(
            _values(f, generator.uniform(low[:, None], high[:, None], shape))
        )
        hits += (values < widths[:, None]).sum(axis=1)
        zeros += int((values == 0).sum())
    box_area, p = float(np.prod(high - low)), (hits + 1) / (samples + 2)
    error = box_area * np.sqrt(p * (1 - p) / samples)
    return TubeArea(widths, box_area * hits / samples, error, box_area, samples, zeros)


def zero_contours(
    f: Callable[..., ArrayLike], box: ArrayLike, resolution: int = 200
) -> list[Float64[np.ndarray, "points 2"]]:
    """Curves on which f changes its sign inside a box of the plane, from a grid, as polylines (chapter 3).

    The corners lie on grid lines, placed by linear interpolation: off by about the square of the grid step where f is
    smooth and its gradient is not 0. Zeros where f keeps its sign, as those of x² do, leave no contour. Raises
    ``ValueError`` as ``tube_area``, for a resolution under 2, and for a function that is zero on the whole grid.

    >>> [len(curve) > 100 for curve in zero_contours(lambda x, y: x**2 + y**2 - 1, [(-2, 2), (-2, 2)])]
    [True]
    """
    low, high = _corners(box)
    if len(low) != 2 or resolution < 2:
        raise ValueError(
            f"got {len(low)} dimensions and resolution {resolution}; expected 2, and 2 or more"
        )
    x, y = np.meshgrid(*np.linspace(low, high, resolution).T)
    values = _values(f, np.stack([x.ravel(), y.ravel()])).reshape(x.shape)
    if not values.any():
        raise ValueError(
            "got a function that is 0 on the whole grid; expected one with zero contours"
        )
    return contourpy.contour_generator(x, y, values).lines(0)


def curve_distance(
    curves: Sequence[np.ndarray], x: ArrayLike, y: ArrayLike
) -> Float64[np.ndarray, " points"]:
    """Distance of each point (x, y) to the nearest of some polylines of shape (corners, 2) in the plane (chapter 3).

    Raises ``ValueError`` where no polyline has a segment.

    >>> curve_distance([np.array([[0.0, 0.0], [2.0, 0.0]])], [1.0, 5.0], [2.0, 4.0]).tolist()
    [2.0, 5.0]
    """
    a, b = (
        np.concatenate([c[part] for c in curves] or [np.empty((0, 2))])
        for part in (slice(-1), slice(1, None))
    )
    if not len(a):
        raise ValueError(
            f"got {len(curves)} curves without a segment; expected at least one segment"
        )
    nearest = np.full(np.shape(x), np.inf)
    for start, step in zip(a, b - a, strict=True):
        dx, dy = np.asarray(x) - start[0], np.asarray(y) - start[1]
        along = np.clip((dx * step[0] + dy * step[1]) / ((step @ step) or 1.0), 0, 1)
        nearest = np.minimum(
            nearest, (dx - along * step[0]) ** 2 + (dy - along * step[1]) ** 2
        )
    return np.sqrt(nearest)


def _corners(box: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    sides = np.asarray(box, dtype=float)
    if (
        sides.ndim != 2
        or sides.shape[1] != 2
        or not (np.isfinite(sides).all() and (sides[:, 0] < sides[:, 1]).all())
    ):
        raise ValueError(
            f"got the box {sides.tolist()}; expected finite pairs (low, high) with low < high"
        )
    return sides[:, 0], sides[:, 1]


def _values(f: Callable[..., ArrayLike], points: np.ndarray) -> np.ndarray:
    values = np.asarray(f(*points), dtype=float)
    if values.shape != points.shape[1:] or not np.isfinite(values).all():
        raise ValueError(
            f"got values of shape {values.shape}, {np.count_nonzero(~np.isfinite(values))} of them not finite; "
            f"expected finite ones of shape {points.shape[1:]}"
        )
    return values
