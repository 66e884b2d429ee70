"""Power series, their radii and their composition (chapter 2)."""

from collections.abc import Sequence
from itertools import pairwise

import sympy as sp

Coefficient = int | float | sp.Expr


def taylor(f: sp.Expr, x: sp.Symbol, order: int) -> list[sp.Expr]:
    """Exact coefficients c_0, …, c_order of the Taylor series of f at x = 0 (chapter 2).

    The series need not converge to f: that of exp(−1/x²) is zero. Raises ``ValueError`` for a negative order, or
    where the expansions from the right and from the left differ or are no power series.

    >>> x = sp.Symbol("x")
    >>> taylor(sp.tanh(x), x, 3)
    [0, 1, 0, -1/3]
    """
    if order < 0:
        raise ValueError(f"got order={order}; expected 0 or more")
    # sympy expands from one side at a time: from the right alone, |x| would pass for x.
    right, left = (
        sp.expand(sp.series(f, x, 0, order + 1, side).removeO()) for side in "+-"
    )
    if right != left or right.has(sp.oo, sp.zoo, sp.nan) or not right.is_polynomial(x):
        raise ValueError(
            f"got f = {f} with the expansions {right} and {left} at 0; expected one power series in {x}"
        )
    return [right.coeff(x, k) for k in range(order + 1)]


def compose(
    outer: Sequence[Coefficient], inner: Sequence[Coefficient]
) -> list[Coefficient]:
    """Coefficients of outer(inner(x)), as many as there are for both, by Horner's rule on truncated series (chapter 2).

    Numbers of any kind: exact in, exact out. Raises ``ValueError`` unless both have the same length and inner starts
    with 0, since otherwise every coefficient of the result would depend on coefficients that are not there.

    >>> compose([1, 1, 1, 1], [0, 1, 1, 0])  # 1 / (1 − (x + x²)): the Fibonacci numbers
    [1, 1, 2, 3]
    """
    if len(outer) != len(inner) or not len(inner) or inner[0] != 0:
        raise ValueError(
            f"got {len(outer)} outer and {len(inner)} inner coefficients that start with {list(inner[:1])}; "
            "expected two series of the same length, the inner one without a constant term"
        )
    result = [outer[-1]] + [0] * (len(inner) - 1)
    for c in reversed(outer[:-1]):
        result = [
            sum(result[i] * inner[k - i] for i in range(k + 1))
            for k in range(len(inner))
        ]
        result[0] += c
    return result


def root_test(coefficients: Sequence[Coefficient]) -> dict[int, float]:
    """Estimates |c_k|^(−1/k) of the radius of convergence, for each k ≥ 1 with c_k ≠ 0 (Cauchy–Hadamard, chapter 2).

    >>> root_test([1, 0, sp.Rational(1, 4)])
    {2: 2.0}
    """
    return {
        k: float(sp.N(abs(c)) ** sp.Rational(-1, k))
        for k, c in enumerate(coefficients)
        if k and c != 0
    }


def ratio_test(coefficients: Sequence[Coefficient]) -> dict[int, float]:
    """Estimates |c_j / c_k|^(1/(k−j)) of the radius from neighbouring non-zero coefficients j < k, by k (chapter 2).

    >>> ratio_test([1, 0, sp.Rational(1, 4)])
    {2: 2.0}
    """
    kept = [(k, c) for k, c in enumerate(coefficients) if c != 0]
    return {
        k: float(sp.N(abs(b / c)) ** sp.Rational(1, k - j))
        for (j, b), (k, c) in pairwise(kept)
    }
