"""Zero sets of analytic functions: areas of tubes, and contours."""

from collections.abc import Callable
from dataclasses import dataclass

import contourpy
import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from sipit_lite.model import SipItError


@dataclass(frozen=True, eq=False)
class TubeArea:
    """Monte-Carlo areas of {x in the box : |f(x)| < ε}, one for each width ε.

    One sample serves all widths: the estimates never rise as ε falls."""

    widths: Float64[np.ndarray, " widths"]
    area: Float64[np.ndarray, " widths"]  # in n dimensions the volume
    standard_error: Float64[np.ndarray, " widths"]
    box_area: float
    samples: int
    zeros: int  # sampled points where f is exactly 0


def tube_area(
    f: Callable[..., ArrayLike],
    box: ArrayLike,
    widths: ArrayLike,
    samples: int,
    generator: np.random.Generator,
) -> TubeArea:
    """Estimate the area of {|f| < ε} in a box, for each width ε, from uniform points.

    With f the distance to a set this is the area of its tube.

    Parameters
    ----------
    f
        Takes n arrays of one length, the coordinates; returns an array of that length.
    box
        n pairs (low, high).

    Raises
    ------
    SipItError
        The box is empty, widths or samples are not positive, or values of f are not
        finite or of the wrong shape.

    Examples
    --------
    >>> square, random = [(0, 1), (0, 1)], np.random.default_rng(0)
    >>> tube_area(lambda x, y: x - y, square, [2.0], 100, random).area.tolist()
    [1.0]
    """
    low, high = _corners(box)
    widths = np.asarray(widths, dtype=float)
    if widths.ndim != 1 or not len(widths) or not (widths > 0).all() or samples < 1:
        raise SipItError(
            f"got widths {widths} and {samples} samples; "
            "expected positive widths and samples"
        )
    shape = (len(low), samples)  # one point a column
    points = generator.uniform(low[:, None], high[:, None], shape)
    values = np.abs(_values(f, points))
    hits = (values < widths[:, None]).sum(axis=1)
    zeros = int((values == 0).sum())
    box_area = float(np.prod(high - low))
    # Binomial, with one hit and one miss more: no hits must not pass for certainty.
    p = (hits + 1) / (samples + 2)
    error = box_area * np.sqrt(p * (1 - p) / samples)
    return TubeArea(widths, box_area * hits / samples, error, box_area, samples, zeros)


def zero_contours(
    f: Callable[..., ArrayLike], box: ArrayLike, resolution: int = 200
) -> list[Float64[np.ndarray, "points 2"]]:
    """Curves on which f changes its sign in a box of the plane, as polylines.

    Their corners lie on the lines of a grid of ``resolution`` points a side, by linear
    interpolation: off by about the square of the grid step where the gradient is not 0.
    Zeros where f keeps its sign, as those of x² do, leave no contour. Raises
    ``SipItError`` as ``tube_area`` does, for a resolution below 2, or if f is zero on
    all of the grid.

    >>> curves = zero_contours(lambda x, y: x**2 + y**2 - 1, [(-2, 2), (-2, 2)])
    >>> [len(curve) > 100 for curve in curves]
    [True]
    """
    low, high = _corners(box)
    if len(low) != 2 or resolution < 2:
        raise SipItError(
            f"got {len(low)} dimensions and resolution {resolution}; "
            "expected 2, and 2 or more"
        )
    # Shape (resolution, resolution): a row for each y, a column for each x.
    x, y = np.meshgrid(*np.linspace(low, high, resolution).T)
    values = _values(f, np.stack([x.ravel(), y.ravel()])).reshape(x.shape)
    if not values.any():
        raise SipItError("got a function that is 0 on the grid; expected contours")
    return contourpy.contour_generator(x, y, values).lines(0)  # where the value is 0


def _corners(box: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high ends of the sides, each of shape (n,)."""
    sides = np.asarray(box, dtype=float)
    shaped = sides.ndim == 2 and sides.shape[1] == 2
    if not shaped or not np.isfinite(sides).all() or (sides[:, 0] >= sides[:, 1]).any():
        raise SipItError(
            f"got the box {sides.tolist()}; "
            "expected finite pairs (low, high) with low < high"
        )
    return sides[:, 0], sides[:, 1]


def _values(f: Callable[..., ArrayLike], points: np.ndarray) -> np.ndarray:
    """Values of f at points of shape (n, points), checked."""
    values = np.asarray(f(*points), dtype=float)
    if values.shape != points.shape[1:] or not np.isfinite(values).all():
        raise SipItError(
            f"got values of shape {values.shape}, "
            f"{np.count_nonzero(~np.isfinite(values))} of them not finite; "
            f"expected finite ones of shape {points.shape[1:]}"
        )
    return values
