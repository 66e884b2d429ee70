"""Policies: in which order candidate tokens are tried. A policy never decides.

Each enumerates all tokens once: the bound of Theorem 3.1, T·|V| tests, holds for all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sipit_lite.model import LanguageModel, SipItError
from sipit_lite.onestep import ROWS, OneStepMap

FIRST_WINDOW = 25_000  # tokens for each of which the first position's window grows

Batches = Iterator[Int[Tensor, " cand"]]
State = Float[Tensor, " d_model"]


@runtime_checkable
class Policy(Protocol):
    """Π: which untried tokens to test next (paper §3), as batches of token ids."""

    def proposals(
        self, step: OneStepMap, observed: State, generator: torch.Generator
    ) -> Batches:
        """Yield batches of candidates that together hold every token once."""


@runtime_checkable
class Drafter(Protocol):
    """Reads prompts off their states at one layer, and searches for what it misses."""

    def check(self, model: LanguageModel, layer: int) -> None:
        """Raise a ``SipItError`` for a model or layer that it was not made for."""

    def read(self, prompts: Sequence[Tensor]) -> list[tuple[Tensor, Policy]]:
        """A draft of each prompt, and a policy that searches for what it has wrong."""


def check_settings(policy: object) -> None:
    """Raise a ``SipItError`` unless all integer settings are at least one."""
    for name, value in vars(policy).items():
        if isinstance(value, int) and value < 1:
            raise SipItError(f"got {name}={value}; expected at least 1")


@dataclass(frozen=True)
class Gradient:
    """Descend on a continuous proxy e, try the untried tokens nearest to it.

    Algorithm 3, several candidates a step: the gradient of ½‖F(e) − ĥ_t‖² is clipped to
    norm 1; the step size falls linearly to 1 % within ``window`` steps, after which e
    snaps to the nearest untried embedding. After ``max_steps`` all others follow.
    """

    proposals_per_step: int = 32
    max_steps: int = 40
    step_size: float = 1.0
    window: int = 50
    mean: ClassVar[bool] = False  # whether the loss is the mean over coordinates
    __post_init__ = check_settings

    def proposals(
        self, step: OneStepMap, observed: State, generator: torch.Generator
    ) -> Batches:
        """Yield the nearest untried tokens after each step, then all others."""
        table = step.model.embeddings
        untried = torch.ones(len(table), dtype=torch.bool, device=table.device)
        left = len(table)
        e = table[int(torch.randint(left, (), generator=generator))].clone()
        window = self.window * (1 + (step.position == 0) * (left // FIRST_WINDOW))
        for taken in range(min(self.max_steps, -(-left // self.proposals_per_step))):
            if taken and taken % window == 0:
                e = table[nearest(table, e, untried, 1)][0]
            rate = self.step_size * (1 - 0.99 * (taken % window) / max(window - 1, 1))
            with torch.enable_grad():
                proxy = e.clone().requires_grad_()
                squares = (step.embedding(proxy[None])[0] - observed).square()
                loss = squares.mean() if self.mean else squares.sum() / 2
                gradient = torch.autograd.grad(loss, proxy)[0]
            e = e - rate * (gradient / gradient.norm().clamp(min=1.0))
            batch = nearest(table, e, untried, min(self.proposals_per_step, left))
            untried[batch] = False
            left -= len(batch)
            yield batch
        yield from filter(len, nearest(table, e, untried, left).split(ROWS))


def nearest(table: Tensor, e: State, allowed: Tensor, count: int) -> Tensor:
    """The ``count`` allowed tokens whose embeddings are nearest; so many are left."""
    distance = torch.linalg.vector_norm((table - e).float(), dim=1)
    # A proxy that ran off to NaN must not end the enumeration: huge, but not tried.
    distance = distance.nan_to_num(3e38).masked_fill(~allowed, torch.inf)
    return distance.topk(count, largest=False).indices
