"""Policies: the order in which candidate tokens are tried. A policy never decides, it only orders.

Every policy enumerates the whole vocabulary without repetition, so the bound of Theorem 3.1,
at most T·|V| verifier tests, holds for each of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sipit_lite.extensions.lens import FIRST, Lens
from sipit_lite.onestep import ROWS, OneStepMap

HUGE = torch.finfo(torch.float32).max
TRIALS = 4  # dampings tried with one Jacobian
SMALLEST_DAMPING = 1e-4


@runtime_checkable
class Policy(Protocol):
    """Π: which untried tokens to test next (paper §3), as batches of token ids."""

    def proposals(
        self,
        step: OneStepMap,
        observed: Float[Tensor, " d_model"],
        generator: torch.Generator,
    ) -> Iterator[Int[Tensor, " cand"]]:
        """Yield batches of candidates that together hold every token exactly once."""
        ...


@dataclass(frozen=True)
class Random:
    """Uniform over the untried tokens (Algorithm 2), ``proposals_per_step`` at a time.

    Raises ``ValueError`` for fewer than one proposal a step.
    """

    proposals_per_step: int = ROWS

    def __post_init__(self) -> None:
        _at_least_one("proposals_per_step", self.proposals_per_step)

    def proposals(
        self,
        step: OneStepMap,
        observed: Float[Tensor, " d_model"],
        generator: torch.Generator,
    ) -> Iterator[Int[Tensor, " cand"]]:
        """Yield a random permutation of the vocabulary in batches."""
        order = torch.randperm(step.model.vocab_size, generator=generator)
        yield from order.to(step.model.device).split(self.proposals_per_step)


@dataclass(frozen=True)
class Gradient:
    """Descend on a continuous proxy e, try the untried tokens nearest to it (Algorithm 3).

    The gradient of the loss ½‖F(e) − ĥ_t‖² is clipped to norm 1; the step size starts at ``step_size`` and decays
    linearly to 1 % inside each window of ``window`` steps, after which e snaps to the nearest untried embedding.
    Several nearest tokens are tested in one batch, and after ``max_steps`` the rest of the vocabulary follows,
    nearest first. ``proposals_per_step=1`` is the published loop: its loss is the mean squared error, and it takes a
    gradient step for every token of the vocabulary. Raises ``ValueError`` for a setting below one.
    """

    proposals_per_step: int = 32
    max_steps: int = 40
    step_size: float = 1.0
    window: int = 50

    def __post_init__(self) -> None:
        for name in ("proposals_per_step", "max_steps", "window"):
            _at_least_one(name, getattr(self, name))

    def proposals(
        self,
        step: OneStepMap,
        observed: Float[Tensor, " d_model"],
        generator: torch.Generator,
    ) -> Iterator[Int[Tensor, " cand"]]:
        """Yield the nearest untried tokens after each gradient step, then the rest of the vocabulary."""
        table, published = step.model.embeddings, self.proposals_per_step == 1
        untried = torch.ones(len(table), dtype=torch.bool, device=table.device)
        e = table[int(torch.randint(len(table), (), generator=generator))].clone()
        window = self.window * (1 + len(table) // 25_000 if step.position == 0 else 1)
        for taken in range(len(table) if published else self.max_steps):
            if taken and taken % window == 0:
                e = table[nearest(table, e, untried, 1)[0]].clone()
            rate = self.step_size * (1 - 0.99 * (taken % window) / max(window - 1, 1))
            e = e - rate * clipped_gradient(step, e, observed, mean=published)
            batch = nearest(table, e, untried, self.proposals_per_step)
            untried[batch] = False
            yield batch
            if not untried.any():
                return
        yield from nearest(table, e, untried, int(untried.sum())).split(ROWS)


@dataclass(frozen=True)
class Newton:
    """Levenberg–Marquardt on the one-step map, then the untried tokens nearest to where it arrives (chapter 12).

    Each step solves (JᵀJ + λ·diag(JᵀJ)) δ = Jᵀ(ĥ_t − F(e)) with the full Jacobian J of F at e; λ starts at
    ``damping``, shrinks after a step that lowered the residual and grows until one does. It starts from the mean
    embedding, or, with a ``lens``, from the embedding that the lens predicts, after the lens's own first candidates
    were tried. Training-free without a lens. Raises ``ValueError`` for a setting below one or a damping not above 0.
    """

    proposals_per_step: int = 8
    max_steps: int = 12
    damping: float = 0.1
    lens: Lens | None = None

    def __post_init__(self) -> None:
        for name in ("proposals_per_step", "max_steps"):
            _at_least_one(name, getattr(self, name))
        if not self.damping > 0:
            raise ValueError(f"got damping={self.damping}; expected a number above 0")

    def proposals(
        self,
        step: OneStepMap,
        observed: Float[Tensor, " d_model"],
        generator: torch.Generator,
    ) -> Iterator[Int[Tensor, " cand"]]:
        """Yield the lens's first candidates, the nearest untried tokens after each step, the rest of the vocabulary."""
        table = step.model.embeddings
        untried = torch.ones(len(table), dtype=torch.bool, device=table.device)
        if self.lens is not None:
            for batch in islice(
                self.lens.proposals(step, observed, generator), len(FIRST)
            ):
                untried[batch] = False
                yield batch
        start = (
            table.mean(0)
            if self.lens is None
            else self.lens.embeddings(observed).to(table)
        )
        for e in islice(self.path(step, start, observed), 1, self.max_steps + 1):
            batch = nearest(table, e, untried, self.proposals_per_step)
            if len(batch) == 0:
                return
            untried[batch] = False
            yield batch
        yield from nearest(table, e, untried, int(untried.sum())).split(ROWS)

    def path(
        self,
        step: OneStepMap,
        e: Float[Tensor, " d_model"],
        observed: Float[Tensor, " d_model"],
    ) -> Iterator[Float[Tensor, " d_model"]]:
        """Yield the iterates for ever, the start first; the residual ‖F(e) − ĥ_t‖ never grows along them."""
        damping, residual = self.damping, observed - _value(step, e)
        while True:
            yield e
            jacobian = step.jacobian(e)
            for _ in range(TRIALS):
                trial = e + damped_step(jacobian, residual, damping)
                left = observed - _value(step, trial)
                if left.norm() < residual.norm():
                    e, residual, damping = (
                        trial,
                        left,
                        max(damping / 5, SMALLEST_DAMPING),
                    )
                    break
                damping *= 5


def damped_step(
    jacobian: Float[Tensor, "d_model d_model"],
    residual: Float[Tensor, " d_model"],
    damping: float,
) -> Float[Tensor, " d_model"]:
    """δ with (JᵀJ + λ·diag(JᵀJ)) δ = Jᵀr, the step of Levenberg and Marquardt; zero where J is zero.

    >>> damped_step(2 * torch.eye(2), torch.tensor([4.0, 0.0]), 1.0).tolist()
    [1.0, 0.0]
    """
    normal, right = (jacobian.T @ jacobian).double(), (jacobian.T @ residual).double()
    scale = normal.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.linalg.solve(normal + damping * torch.diag(scale), right).to(residual)


def _value(step: OneStepMap, e: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    with torch.no_grad():
        return step.embedding(e[None])[0]


def clipped_gradient(
    step: OneStepMap,
    e: Float[Tensor, " d_model"],
    observed: Float[Tensor, " d_model"],
    *,
    mean: bool = False,
) -> Float[Tensor, " d_model"]:
    """∇_e ½‖F(e) − ĥ_t‖² (Algorithm 3), or that of the mean squared error, its norm clipped at 1."""
    with torch.enable_grad():
        e = e.detach().clone().requires_grad_()
        error = (step.embedding(e[None])[0] - observed).square()
        gradient = torch.autograd.grad(error.mean() if mean else error.sum() / 2, e)[0]
    return gradient / gradient.norm().clamp(min=1.0)


def nearest(
    table: Float[Tensor, "vocab d_model"],
    e: Float[Tensor, " d_model"],
    allowed: Bool[Tensor, " vocab"],
    count: int,
) -> Int[Tensor, " cand"]:
    """The ``count`` allowed tokens whose embeddings are nearest to e in ℓ2, nearest first.

    >>> nearest(torch.eye(3), torch.tensor([0.9, 0.5, 0.0]), torch.tensor([False, True, True]), 2).tolist()
    [1, 2]
    """
    # A proxy that ran off to NaN must not end the enumeration: its distances are huge, those of the tried infinite.
    distance = torch.linalg.vector_norm((table - e).float(), dim=1).nan_to_num(
        nan=HUGE, posinf=HUGE
    )
    distance = distance.masked_fill(~allowed, torch.inf)
    return distance.topk(min(count, int(allowed.sum())), largest=False).indices


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"got {name}={value}; expected at least 1")
