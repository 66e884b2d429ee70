"""One gradient step, its Jacobian and its determinant (chapter 5)."""

from collections.abc import Sequence

import sympy as sp
import torch
from jaxtyping import Float
from torch import Tensor

Coefficient = int | float | sp.Expr


def gradient_step(
    loss: sp.Expr, parameters: Sequence[sp.Symbol], eta: Coefficient
) -> sp.Matrix:
    """The map φ(θ) = θ − η∇L(θ) as a column of expressions (Theorem 2.3, chapter 5).

    Raises ``ValueError`` for no parameters, or for one that is listed twice.

    >>> x = sp.Symbol("x")
    >>> gradient_step(x**4 / 4, [x], sp.Rational(1, 3))
    Matrix([[-x**3/3 + x]])
    """
    if not parameters or len(set(parameters)) < len(parameters):
        raise ValueError(
            f"got the parameters {list(parameters)}; expected at least one, and none twice"
        )
    return sp.Matrix([theta - eta * sp.diff(loss, theta) for theta in parameters])


def witness_hessian(target: Sequence[Coefficient], d: int) -> sp.Matrix:
    """Hessian of the cross-entropy of the logits Uβ at U = 0, β = 0, by differentiation (Theorem 2.3, chapter 5).

    U has the n rows of the target and d columns; the order is U column by column, then β, so the result should be
    [[0, I_d⊗w], [I_d⊗wᵀ, 0]] with w = (1/n)1 − target, which is not used here. Raises ``ValueError`` for fewer than
    two classes, a width below 1, or a target that does not sum to 1.

    >>> witness_hessian([1, 0], 1)
    Matrix([
    [   0,   0, -1/2],
    [   0,   0,  1/2],
    [-1/2, 1/2,    0]])
    """
    n = len(target)
    if n < 2 or d < 1 or sp.expand(sum(target)) != 1:
        raise ValueError(
            f"got the target {list(target)} and width {d}; expected 2 classes or more, sum 1, width >= 1"
        )
    rows = sp.Matrix(n, d, lambda i, j: sp.Symbol(f"U{i}_{j}", real=True))
    bias = sp.Matrix(d, 1, lambda j, _: sp.Symbol(f"beta{j}", real=True))
    logits, theta = list(rows * bias), [*rows.T, *bias]
    loss = sp.log(sum(map(sp.exp, logits))) - sum(
        p * z for p, z in zip(target, logits, strict=True)
    )
    gradient, origin = [sp.diff(loss, a) for a in theta], dict.fromkeys(theta, 0)
    second = {
        (i, j): sp.diff(gradient[i], theta[j]).xreplace(origin)
        for j in range(len(theta))
        for i in range(j + 1)
    }
    return sp.Matrix(
        len(theta), len(theta), lambda i, j: sp.expand(second[min(i, j), max(i, j)])
    )


def step_determinant(
    hessian: sp.Matrix, eta: Coefficient, decay: Coefficient = 0
) -> sp.Expr:
    """det Dφ = det((1 − ηλ)I − ηH), factored, for φ(θ) = θ − η∇L(θ) − ηλθ with weight decay λ (chapter 5).

    Exact, by way of the characteristic polynomial of the Hessian H. Raises ``ValueError`` unless H is symmetric.

    >>> step_determinant(sp.Matrix([[0, -1], [-1, 0]]), sp.Symbol("eta"))
    -(eta - 1)*(eta + 1)
    """
    if (
        not hessian.is_square
        or not (hessian - hessian.T).applyfunc(sp.expand).is_zero_matrix
    ):
        raise ValueError(
            f"got a matrix of shape {hessian.shape}; expected a symmetric one"
        )
    powers = hessian.charpoly(
        sp.Dummy("x")
    ).terms()  # det(xI − H), taken at x = (1 − ηλ)/η and multiplied by η^p
    return sp.factor(
        sum(
            c * (1 - eta * decay) ** k * eta ** (hessian.rows - k) for (k,), c in powers
        )
    )


def parameter_hessian(
    loss: Tensor, parameters: Sequence[Tensor]
) -> Float[Tensor, "p p"]:
    """All second derivatives of a loss by the parameters, in their order, flattened (chapter 5).

    By automatic differentiation; the memory is of order p². Raises ``ValueError`` unless the loss is one number that
    depends on something that requires gradients.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> parameter_hessian(x[0] * x[1] ** 2, [x]).tolist()
    [[0.0, 4.0], [4.0, 2.0]]
    """
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"got a loss of {loss.numel()} numbers, requires_grad={loss.requires_grad}; expected 1, and True"
        )
    by_tensor = torch.autograd.grad(
        loss, parameters, create_graph=True, materialize_grads=True
    )
    gradient = torch.cat([part.reshape(-1) for part in by_tensor])
    p = len(gradient)
    if not gradient.requires_grad:  # the loss is linear
        return gradient.new_zeros(p, p)
    units = torch.eye(p, dtype=gradient.dtype, device=gradient.device)
    rows = torch.autograd.grad(
        gradient, parameters, units, is_grads_batched=True, materialize_grads=True
    )
    # The zeros of a parameter that the gradient does not reach come without the dimension of the batch.
    shapes = [theta.shape for theta in parameters]
    return torch.cat(
        [
            part.expand(p, *shape).reshape(p, -1)
            for part, shape in zip(rows, shapes, strict=True)
        ],
        dim=1,
    )
