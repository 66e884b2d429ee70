"""Tubes and zero contours against geometry and exact counts, and refusals."""

import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import ArrayLike

from sipit_lite.teaching.zero_sets import (
    TubeArea,
    tube_area,
    zero_contours,
)

SQUARE = [(-2.0, 2.0), (-2.0, 2.0)]
WIDTHS = [0.01, 0.02, 0.05, 0.1, 0.2]
SAMPLES = 100_000
SURE = 5  # standard errors: a normal variable is farther out with probability 6e-7


def estimate(
    f,
    box: ArrayLike = SQUARE,
    widths: ArrayLike = WIDTHS,
    samples: int = SAMPLES,
    seed: int = 0,
) -> TubeArea:
    """An estimate with a seed of its own."""
    return tube_area(f, box, widths, samples, np.random.default_rng(seed))


def to_circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the unit circle."""
    return np.hypot(x, y) - 1


def to_line(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the diagonal."""
    return (x - y) / math.sqrt(2)


@pytest.mark.parametrize(
    ("f", "exact"),
    [
        (
            to_circle,
            lambda w: math.pi * ((1 + w) ** 2 - (1 - w) ** 2),
        ),  # the ring between two circles
        (
            to_line,
            lambda w: 16 - (4 - w * math.sqrt(2)) ** 2,
        ),  # the square without two triangles
        (
            lambda x, y: x**2,
            lambda w: 4 * 2 * math.sqrt(w),
        ),  # |x| < √ε: the strip of a double zero
    ],
    ids=["circle", "line", "double zero"],
)
def test_area_is_that_of_geometry(f, exact) -> None:
    """Within five standard errors, and these are as large as they should be."""
    found = estimate(f)
    areas = np.array([exact(w) for w in WIDTHS])
    assert (np.abs(found.area - areas) < SURE * found.standard_error).all()
    binomial = np.sqrt(areas * (16 - areas) / SAMPLES)
    assert np.allclose(found.standard_error, binomial, rtol=0.2)


def test_standard_error_is_the_spread_of_repeated_estimates() -> None:
    """The formula for the error knows nothing of the repeats."""
    repeats = [estimate(to_circle, samples=4000, seed=seed) for seed in range(200)]
    spread = np.std([found.area for found in repeats], axis=0, ddof=1)
    assert np.allclose(
        spread, np.mean([found.standard_error for found in repeats], axis=0), rtol=0.25
    )


def test_three_dimensions() -> None:
    """The tube round a point in space is a ball."""
    cube, widths = [(-1.0, 1.0)] * 3, [0.3, 0.5, 0.8]
    found = estimate(lambda x, y, z: np.sqrt(x**2 + y**2 + z**2), cube, widths)
    ball = 4 / 3 * math.pi * np.array(widths) ** 3
    assert (np.abs(found.area - ball) < SURE * found.standard_error).all()


def test_counts_agree_with_exact_rational_arithmetic() -> None:
    """The same points, compared as fractions: no rounding, no vectors."""
    found = estimate(lambda x, y: x - y, [(0.0, 1.0), (0.0, 1.0)], [0.25], 500, seed=7)
    points = np.random.default_rng(7).uniform(
        np.zeros((2, 1)), np.ones((2, 1)), (2, 500)
    )
    hits = sum(
        abs(Fraction(x) - Fraction(y)) < Fraction(1, 4) for x, y in points.T.tolist()
    )
    assert Fraction(hits, 500) == Fraction(found.area[0]).limit_denominator(500)
    assert math.isclose(
        found.standard_error[0], math.sqrt((hits + 1) * (501 - hits) / 502**2 / 500)
    )


def test_a_zero_set_with_interior_does_not_shrink() -> None:
    """ReLU is zero on half of the square; the analytic x at no sampled point."""
    flat, analytic = estimate(lambda x, y: np.maximum(x, 0.0)), estimate(lambda x, y: x)
    assert (flat.area > 7.5).all() and flat.zeros > 0.49 * SAMPLES
    assert analytic.zeros == 0


def test_never_hit_is_not_certain() -> None:
    """A width that no sample met has a positive standard error."""
    found = estimate(lambda x, y: x + 10)
    assert (found.area == 0).all() and (found.standard_error > 0).all()


def test_contour_of_a_circle() -> None:
    """One closed curve of length 2πr, corners at distance r, every angle met."""
    r, step = 1.25, 4 / 199
    (curve,) = zero_contours(lambda x, y: x**2 + y**2 - r**2, SQUARE)
    # Linear interpolation of x² between two nodes is off by step²/4 at most, and the
    # slope of x² + y² is 2r.
    assert np.abs(np.hypot(*curve.T) - r).max() < step**2 / 4 / (2 * r) * 2
    assert np.array_equal(curve[0], curve[-1])
    length = np.linalg.norm(np.diff(curve, axis=0), axis=1).sum()
    assert 0 < 2 * math.pi * r - length < 2 * math.pi * r * (step / r) ** 2
    angles = np.sort(np.arctan2(curve[:, 1], curve[:, 0]))
    assert np.diff(angles).max() < 2 * step / r


def test_contour_of_an_affine_function_is_exact() -> None:
    """Interpolation is exact there, up to rounding; the coordinates are not swapped."""
    (curve,) = zero_contours(
        lambda x, y: x - 2 * y + 0.3, [(-1.0, 1.0), (-3.0, 3.0)], 37
    )
    assert np.abs(curve[:, 0] - 2 * curve[:, 1] + 0.3).max() < 1e-14
    assert np.allclose(curve[:, 0].min(), -1) and np.allclose(curve[:, 0].max(), 1)


def test_zeros_without_a_change_of_sign_leave_no_contour() -> None:
    """The squared distance to the circle has the zeros of its root, and no contour."""
    assert zero_contours(lambda x, y: (x**2 + y**2 - 1) ** 2, SQUARE) == []
    assert zero_contours(lambda x, y: x**2 + y**2 + 1, SQUARE) == []


def not_a_number(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Finite but for one point."""
    return np.where(np.arange(len(x)) == 3, np.nan, x)


BAD_BOXES = [
    [(1.0, 1.0)] * 2,
    [(0.0, 1.0), (1.0, 0.0)],
    [],
    [(0.0, math.nan)] * 2,
    [(0.0, math.inf)] * 2,
    [1.0, 2.0],
]


@pytest.mark.parametrize("box", BAD_BOXES)
def test_bad_boxes_are_refused(box: ArrayLike) -> None:
    """Empty, turned round, unbounded, or no box at all."""
    for attempt in (
        lambda: estimate(to_circle, box),
        lambda: zero_contours(to_circle, box),
    ):
        with pytest.raises(
            ValueError,
            match=r"got the box .*; expected finite pairs \(low, high\) with low",
        ):
            attempt()


@pytest.mark.parametrize("widths", [[-0.1], [0.0], [0.1, math.nan], [], np.array(0.1)])
def test_bad_widths_are_refused(widths: ArrayLike) -> None:
    """Widths are positive numbers, in a list."""
    with pytest.raises(
        ValueError, match=r"got widths .* and 100000 samples; expected positive widths"
    ):
        estimate(to_circle, widths=widths)


def test_other_bad_input_is_refused() -> None:
    """No numbers, wrong shapes, grids that are too small, nothing to draw."""
    with pytest.raises(ValueError, match="1 of them not finite"):
        estimate(not_a_number)
    with pytest.raises(ValueError, match="1 of them not finite"):
        zero_contours(not_a_number, SQUARE)
    with pytest.raises(ValueError, match=r"got values of shape \(\)"):
        estimate(lambda x, y: 0.0)
    with pytest.raises(ValueError, match="and 0 samples"):
        estimate(to_circle, samples=0)
    with pytest.raises(
        ValueError,
        match="got 1 dimensions and resolution 200; expected 2, and 2 or more",
    ):
        zero_contours(lambda x: x, [(0.0, 1.0)])
    with pytest.raises(ValueError, match="got 2 dimensions and resolution 1"):
        zero_contours(to_circle, SQUARE, 1)
    with pytest.raises(ValueError, match="0 on the grid"):
        zero_contours(lambda x, y: 0 * x, SQUARE)
