"""Power series: exact coefficients, and radii of convergence from them."""

from collections.abc import Sequence
from itertools import pairwise

import sympy as sp

from sipit_lite.model import SipItError

Number = int | float | sp.Expr  # exact, where it is not a float


def taylor(f: sp.Expr, x: sp.Symbol, order: int) -> list[sp.Expr]:
    """Exact coefficients c_0, …, c_order of the Taylor series of f at x = 0.

    Of the series alone: it need not converge to f. That of exp(−1/x²) is zero. Raises
    ``SipItError`` where the order is negative, or the expansions from the right and
    from the left differ or are no power series.

    >>> x = sp.Symbol("x")
    >>> taylor(sp.tanh(x), x, 3)
    [0, 1, 0, -1/3]
    """
    if order < 0:
        raise SipItError(f"got order={order}; expected 0 or more")
    # sympy expands from one side at a time: from the right alone, |x| would pass for x.
    right = sp.expand(sp.series(f, x, 0, order + 1, "+").removeO())
    left = sp.expand(sp.series(f, x, 0, order + 1, "-").removeO())
    if right != left or right.has(sp.oo, sp.zoo, sp.nan) or not right.is_polynomial(x):
        raise SipItError(
            f"got f = {f} with the expansions {right} and {left} at 0; "
            f"expected one power series in {x}"
        )
    return [right.coeff(x, k) for k in range(order + 1)]


def root_test(coefficients: Sequence[Number]) -> dict[int, float]:
    """Estimates |c_k|^(−1/k) of the radius by k ≥ 1, where c_k ≠ 0 (Cauchy–Hadamard).

    >>> root_test([1, 0, sp.Rational(1, 4)])
    {2: 2.0}
    """
    radii = {}
    for k, c in enumerate(coefficients):
        if k > 0 and c != 0:
            # The root is taken by sympy: c_k may be too small for a float.
            radii[k] = float(sp.N(abs(c)) ** sp.Rational(-1, k))
    return radii


def ratio_test(coefficients: Sequence[Number]) -> dict[int, float]:
    """Estimates |c_j / c_k|^(1/(k−j)) of the radius by k; j < k are neighbours ≠ 0.

    >>> ratio_test([1, 0, sp.Rational(1, 4)])
    {2: 2.0}
    """
    nonzero = [(k, c) for k, c in enumerate(coefficients) if c != 0]
    radii = {}
    for (j, before), (k, c) in pairwise(nonzero):
        radii[k] = float(sp.N(abs(before / c)) ** sp.Rational(1, k - j))
    return radii
