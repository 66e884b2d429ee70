"""Coefficients against Cauchy's integral formula, radii against known singularities."""

import cmath
import math

import numpy as np
import pytest
import sympy as sp

from sipit_lite.teaching.power_series import ratio_test, root_test, taylor

x = sp.Symbol("x", real=True)
SERIES = {
    "tanh": (sp.tanh(x), np.tanh, 1.0),
    "sigmoid": (1 / (1 + sp.exp(-x)), lambda z: 1 / (1 + np.exp(-z)), 2.0),
    "silu": (x / (1 + sp.exp(-x)), lambda z: z / (1 + np.exp(-z)), 2.0),
    "reciprocal root": (1 / sp.sqrt(x**2 + 1), lambda z: 1 / np.sqrt(z * z + 1), 0.7),
    "exp of sine": (sp.exp(sp.sin(x)), lambda z: np.exp(np.sin(z)), 1.0),
}


@pytest.mark.parametrize("name", SERIES)
def test_coefficients_are_cauchys_integrals(name: str) -> None:
    """c_k = (1/2πi) ∮ f(z) z^(−k−1) dz, on a circle by the trapezoidal rule."""
    f, on_circle, r = SERIES[name]
    # sympy takes seconds for the higher orders of a composed function.
    order = 8 if name == "exp of sine" else 12
    nodes = 512
    z = r * np.exp(2j * np.pi * np.arange(nodes) / nodes)
    powers = r ** np.arange(order + 1)
    oracle = np.fft.fft(on_circle(z)).real[: order + 1] / nodes / powers
    exact = [float(c) for c in taylor(f, x, order)]
    # float64, and r^-12 is at most 72
    assert np.allclose(exact, oracle, rtol=0, atol=1e-11)


def test_gelu_has_the_series_of_the_error_function() -> None:
    """Against the closed form of the coefficients, written out by hand."""
    found = taylor(x * (1 + sp.erf(x / sp.sqrt(2))) / 2, x, 11)
    for n in range(5):
        by_hand = (-1) ** n / (
            math.sqrt(2 * math.pi) * math.factorial(n) * (2 * n + 1) * 2**n
        )
        assert math.isclose(found[2 * n + 2], by_hand, rel_tol=1e-12)
    assert found[1] == sp.Rational(1, 2) and found[0] == found[3] == 0


@pytest.mark.parametrize("f", [sp.sqrt(x), sp.log(x), 1 / x, sp.Abs(x), sp.Max(0, x)])
def test_functions_without_a_power_series_are_refused(f: sp.Expr) -> None:
    """Each of these has a singularity, a branch point or a corner at 0."""
    with pytest.raises(ValueError, match="expected one power series"):
        taylor(f, x, 4)


def test_negative_order_is_refused() -> None:
    """A series has at least its constant term."""
    with pytest.raises(ValueError, match="got order=-1; expected 0 or more"):
        taylor(sp.exp(x), x, -1)


def test_ratios_find_the_radius_of_tanh() -> None:
    """The nearest poles are ±iπ/2; the error is that of the next ones, 3^(−k)."""
    estimates = ratio_test(taylor(sp.tanh(x), x, 31))
    assert list(estimates) == list(range(3, 32, 2))
    assert abs(estimates[31] - math.pi / 2) < 1e-12
    assert (
        abs(estimates[5] - math.pi / 2) > 1e-4
    )  # and early coefficients do not know it yet


def test_roots_find_a_radius_that_ratios_miss() -> None:
    """Two pairs of poles at one distance: the ratios oscillate, the roots converge."""
    z = cmath.exp(1j)  # poles at z, −z and their conjugates, none real or imaginary
    c = [sp.Rational(0)] * 200
    for k in range(200):
        c[k] = sp.Float(
            (z**-k + z.conjugate() ** -k + (-z) ** -k + (-z.conjugate()) ** -k).real
        )
    kept = [c if abs(c) > 1e-9 else 0 for c in c]
    assert abs(max(root_test(kept).values()) - 1) < 0.5
    assert min(v for k, v in root_test(kept).items() if k > 150) == pytest.approx(
        1, abs=0.01
    )
    ratios = [v for k, v in ratio_test(kept).items() if k > 150]
    assert max(ratios) > 1.3 * min(ratios)
