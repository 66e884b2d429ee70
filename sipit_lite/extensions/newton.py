"""Newton's method on the one-step map: few Jacobians suffice (``newton``)."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from sipit_lite.model import SipItError, plain_settings
from sipit_lite.onestep import ROWS, OneStepMap
from sipit_lite.policies import Batches, Policy, State, check_settings, nearest

Jacobian = Float[Tensor, "d_model inputs"]

TRIALS = 4  # dampings tried with one Jacobian
SMALLEST_DAMPING = 1e-4
LENS_BATCHES = 3  # of a lens, tried before Newton: few misses rank further down


@dataclass(frozen=True)
class Newton:
    """Levenberg–Marquardt on the one-step map, then the tokens nearest to its end.

    ``damping`` is λ at the start; it shrinks after a step that lowered the residual.
    ``lens`` gives the first candidates and the start, else the mean embedding.
    """

    proposals_per_step: int = 8
    max_steps: int = 12
    damping: float = 0.1
    lens: Policy | None = None  # a ``Lens``, which has ``embeddings``

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.damping > 0:
            raise SipItError(f"got damping={self.damping}; expected a number above 0")

    def proposals(
        self, step: OneStepMap, observed: State, generator: torch.Generator
    ) -> Batches:
        """Yield the lens's first candidates, those near each iterate, all others."""
        table = step.model.embeddings
        untried = torch.ones(len(table), dtype=torch.bool, device=table.device)
        start = table.mean(0)
        if self.lens is not None:
            start = self.lens.embeddings(observed).to(table)
            first = self.lens.proposals(step, observed, generator)
            for batch in islice(first, LENS_BATCHES):
                untried[batch] = False
                yield batch
        for e in islice(self.path(step, start, observed), 1, self.max_steps + 1):
            count = min(self.proposals_per_step, int(untried.sum()))
            if count == 0:
                return  # the vocabulary is exhausted
            batch = nearest(table, e, untried, count)
            untried[batch] = False
            yield batch
        yield from nearest(table, e, untried, int(untried.sum())).split(ROWS)

    def path(self, step: OneStepMap, e: State, observed: Tensor) -> Iterator[State]:
        """Yield the iterates for ever, the start first; residuals never grow."""
        damping = self.damping
        residual = observed - step.embedding(e[None])[0].detach()
        while True:
            yield e
            # The dear part, so that several dampings are tried with it.
            slope = jacobian(step, e)
            for _ in range(TRIALS):
                trial = e + damped_step(slope, residual, damping)
                left = observed - step.embedding(trial[None])[0].detach()
                if left.norm() < residual.norm():
                    e = trial
                    residual = left
                    damping = max(damping / 5, SMALLEST_DAMPING)
                    break
                # The model was trusted too far: a shorter step, nearer to the gradient.
                damping *= 5


@plain_settings()
def jacobian(step: OneStepMap, e: Float[Tensor, " inputs"]) -> Jacobian:
    """∂F/∂e at an embedding, row i of number i; ``ModelError`` where it has no room."""
    size = f"a Jacobian of {step.model.d_model} rows after {step.position} tokens"
    with torch.enable_grad(), step.model.advised(size):
        # A clone: gradients through a view would drag the whole table along.
        e = e.detach().clone().requires_grad_()
        state = step.embedding(e[None])[0]
        directions = torch.eye(len(state)).to(state)
        return torch.autograd.grad(state, e, directions, is_grads_batched=True)[0]


def damped_step(jacobian: Jacobian, residual: State, damping: float) -> Tensor:
    """δ with (JᵀJ + λ·diag(JᵀJ)) δ = Jᵀr (Levenberg, Marquardt); zero where J is."""
    # Solved in float64: the condition number of JᵀJ is that of J squared.
    normal = (jacobian.T @ jacobian).double()
    right = (jacobian.T @ residual).double()
    scale = normal.diagonal().clamp(min=torch.finfo(torch.float32).tiny)
    return torch.linalg.solve(normal + damping * torch.diag(scale), right).to(residual)
