"""One gradient step: Hessians against torch, determinants against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
import sympy as sp
import torch
from torch.nn.functional import cross_entropy

from sipit_lite.teaching.gradient_step import (
    gradient_step,
    step_determinant,
    witness_hessian,
)

ETA, DECAY = sp.symbols("eta lambda", positive=True)
TARGETS = [[0, 1], ["1/3", "1/6", "1/2"], [0, 0, 1, 0], ["1/5"] * 5]


def exact_determinant(matrix: list[list[Fraction]]) -> Fraction:
    """Gaussian elimination in exact fractions."""
    rows, product = [list(row) for row in matrix], Fraction(1)
    for k in range(len(rows)):
        pivot = next((i for i in range(k, len(rows)) if rows[i][k]), None)
        if pivot is None:
            return Fraction(0)
        if pivot != k:
            rows[k], rows[pivot], product = rows[pivot], rows[k], -product
        product *= rows[k][k]
        for i in range(k + 1, len(rows)):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [a - factor * b for a, b in zip(rows[i], rows[k], strict=True)]
    return product


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("target", TARGETS, ids=len)
def test_hessian_at_the_witness_is_that_of_torch(target: list, d: int) -> None:
    """Against automatic differentiation of torch's own cross-entropy, in float64."""
    target = [sp.Rational(p) for p in target]
    n, p = len(target), torch.tensor([float(q) for q in target], dtype=torch.float64)

    def loss(theta: torch.Tensor) -> torch.Tensor:
        return cross_entropy(theta[: n * d].reshape(d, n).T @ theta[n * d :], p)

    oracle = torch.autograd.functional.hessian(
        loss, torch.zeros(n * d + d, dtype=torch.float64)
    )
    found = np.array(witness_hessian(target, d), dtype=float)
    assert np.allclose(
        found, oracle.numpy(), rtol=0, atol=1e-15
    )  # a few roundings of numbers below 1


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize("target", TARGETS, ids=len)
def test_determinant_is_that_of_fractions(target: list, d: int) -> None:
    """At one η and λ against elimination, for symbolic η against the theorem."""
    target, eta, decay = (
        [sp.Rational(p) for p in target],
        Fraction(3, 7),
        Fraction(2, 9),
    )
    hessian = witness_hessian(target, d)
    entries = [
        [Fraction(int(x.p), int(x.q)) for x in hessian.row(i)]
        for i in range(hessian.rows)
    ]
    jacobian = [
        [(1 - eta * decay) * (i == j) - eta * x for j, x in enumerate(row)]
        for i, row in enumerate(entries)
    ]
    found = step_determinant(hessian, sp.Rational(3, 7), sp.Rational(2, 9))
    assert Fraction(int(found.p), int(found.q)) == exact_determinant(jacobian)
    square = sum((sp.Rational(1, len(target)) - p) ** 2 for p in target)
    assert sp.expand(step_determinant(hessian, ETA) - (1 - ETA**2 * square) ** d) == 0


def test_determinant_with_decay_is_that_of_sympy() -> None:
    """A dense Hessian with symbols, against the determinant by expansion."""
    a, b, c = sp.symbols("a b c")
    hessian = sp.Matrix([[a, b, 1], [b, c, 0], [1, 0, a + c]])
    oracle = ((1 - ETA * DECAY) * sp.eye(3) - ETA * hessian).det(method="berkowitz")
    assert sp.expand(step_determinant(hessian, ETA, DECAY) - oracle) == 0


def test_step_moves_against_finite_differences() -> None:
    """φ of a loss with no symmetry, against central differences in float64."""
    x, y = sp.symbols("x y", real=True)
    loss = sp.log(1 + sp.exp(-x * y)) + sp.sin(x) * y**2
    value, step = (
        sp.lambdify([x, y], loss),
        gradient_step(loss, [x, y], sp.Rational(1, 4)),
    )
    at, h = np.array([0.7, -1.3]), 1e-5
    slopes = [
        (value(*(at + h * unit)) - value(*(at - h * unit))) / (2 * h)
        for unit in np.eye(2)
    ]
    found = np.array(step.subs({x: at[0], y: at[1]}), dtype=float).ravel()
    assert np.allclose(
        found, at - np.array(slopes) / 4, rtol=0, atol=1e-8
    )  # h² and 1e-16/h are both below 1e-10


@pytest.mark.parametrize(
    ("target", "d"), [([1], 1), ([1, 0], 0), ([1, 1], 2), ([sp.Symbol("p"), 0], 1)]
)
def test_hessian_refuses(target: list, d: int) -> None:
    """One class, no width, sums other than 1: the message repeats the target."""
    with pytest.raises(ValueError, match="sum 1") as refused:
        witness_hessian(target, d)
    assert str(target) in str(refused.value)


@pytest.mark.parametrize("matrix", [sp.Matrix([[0, 1], [2, 0]]), sp.Matrix([[1, 2]])])
def test_determinant_refuses_what_is_no_hessian(matrix: sp.Matrix) -> None:
    """Second derivatives are symmetric."""
    with pytest.raises(ValueError, match="expected a symmetric one"):
        step_determinant(matrix, ETA)


def test_step_refuses_parameters_listed_twice() -> None:
    """And no parameters at all."""
    for parameters in ([], [ETA, ETA]):
        with pytest.raises(ValueError, match="none twice"):
            gradient_step(ETA**2, parameters, 1)
