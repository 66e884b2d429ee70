"""One gradient step and its determinant (the page on the paper's proof of 2.3)."""

from collections.abc import Sequence

import sympy as sp

from sipit_lite.model import SipItError
from sipit_lite.teaching.power_series import Number


def gradient_step(
    loss: sp.Expr, parameters: Sequence[sp.Symbol], eta: Number
) -> sp.Matrix:
    """The map φ(θ) = θ − η∇L(θ) as a column of expressions (Theorem 2.3).

    Raises ``SipItError`` without parameters, or if one is listed twice.

    >>> x = sp.Symbol("x")
    >>> gradient_step(x**4 / 4, [x], sp.Rational(1, 3))
    Matrix([[-x**3/3 + x]])
    """
    if not parameters or len(set(parameters)) < len(parameters):
        raise SipItError(
            f"got the parameters {list(parameters)}; "
            "expected at least one, and none twice"
        )
    return sp.Matrix([theta - eta * sp.diff(loss, theta) for theta in parameters])


def witness_hessian(target: Sequence[Number], d: int) -> sp.Matrix:
    """Hessian of the cross-entropy of the logits Uβ at U = 0, β = 0 (Theorem 2.3).

    By differentiation, so that the chapter can compare it with its formula
    [[0, I_d⊗w], [I_d⊗wᵀ, 0]], where w = (1/n)1 − target. Its rows and columns, (n + 1)d
    each, are U, of shape (n, d) for n classes, column by column, and then β. Raises
    ``SipItError`` for fewer than two classes, a width below 1, or another sum than 1.

    >>> witness_hessian([1, 0], 1)
    Matrix([
    [   0,   0, -1/2],
    [   0,   0,  1/2],
    [-1/2, 1/2,    0]])
    """
    n = len(target)
    if n < 2 or d < 1 or sp.expand(sum(target)) != 1:
        raise SipItError(
            f"got the target {list(target)} and width {d}; "
            "expected 2 classes or more, sum 1, width >= 1"
        )
    rows = sp.Matrix(n, d, lambda i, j: sp.Symbol(f"U{i}_{j}", real=True))
    beta = sp.Matrix(d, 1, lambda j, _: sp.Symbol(f"beta{j}", real=True))
    logits = rows * beta
    loss = sp.log(sum(logits.applyfunc(sp.exp))) - sp.Matrix(target).dot(logits)
    theta = [*rows.T, *beta]  # the transpose lists U column by column
    # Differentiated first and evaluated then: at the origin all logits are equal.
    return sp.hessian(loss, theta).xreplace(dict.fromkeys(theta, 0)).expand()


def step_determinant(hessian: sp.Matrix, eta: Number, decay: Number = 0) -> sp.Expr:
    """det Dφ = det((1 − ηλ)I − ηH), factored, of a step with weight decay λ.

    The step is φ(θ) = θ − η∇L(θ) − ηλθ; the result is exact.

    Raises ``SipItError`` if the Hessian H is not symmetric.

    >>> step_determinant(sp.Matrix([[0, -1], [-1, 0]]), sp.Symbol("eta"))
    -(eta - 1)*(eta + 1)
    """
    if not hessian.is_square or not (hessian - hessian.T).expand().is_zero_matrix:
        raise SipItError(
            f"got a matrix of shape {hessian.shape}; expected a symmetric one"
        )
    # det(xI − H) at x = (1 − ηλ)/η, times η^p: no division, so η may be 0.
    determinant = 0
    for (k,), c in hessian.charpoly(sp.Dummy("x")).terms():
        determinant += c * (1 - eta * decay) ** k * eta ** (hessian.rows - k)
    return sp.factor(determinant)
