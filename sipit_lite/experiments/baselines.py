"""What SipIt is compared against, as published (paper §3 and appendix; chapters 8, 9).

As in the official code, every look at a candidate reads the full prefix through the
full model, final norm and logits included.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sipit_lite.acceptance import Observation
from sipit_lite.extensions.laststate import last_states
from sipit_lite.io.capture import tapped
from sipit_lite.model import LanguageModel
from sipit_lite.onestep import ROWS, OneStepMap
from sipit_lite.policies import Batches, Gradient, Policy, State, check_settings

CANDIDATES = 64  # substitutions that the greedy search considers for each position
BATCH = 256  # prompts that it reads in a step


@dataclass(frozen=True)
class Random:
    """All tokens in a random order (Algorithm 2), ``proposals_per_step`` at a time."""

    proposals_per_step: int = ROWS
    __post_init__ = check_settings

    def proposals(
        self, step: OneStepMap, observed: State, generator: torch.Generator
    ) -> Batches:
        """Yield a random permutation of the vocabulary in batches."""
        order = torch.randperm(step.model.vocab_size, generator=generator)
        yield from order.to(step.model.device).split(self.proposals_per_step)


@dataclass(frozen=True)
class Published(Gradient):
    """Algorithm 3 as published: the mean squared error, one candidate a step."""

    proposals_per_step: int = 1
    max_steps: int = 2**62
    mean: ClassVar[bool] = True


@dataclass(frozen=True, eq=False)
class Attempt:
    """What a baseline recovered, and whether that is the prompt (``finished``).

    ``tested`` counts candidates for each position that was started.
    """

    tokens: Int[Tensor, " pos"]
    tested: Int[Tensor, " started"]
    finished: bool
    seconds: float


def published(
    states: Tensor, model: LanguageModel, layer: int, seed: int = 0, limit: float = inf
) -> Attempt:
    """SipIt with the gradient policy (Algorithms 1 and 3) as the official code runs it.

    Ends after ``limit`` seconds. Accepts within the measured radius, not to 1e-5, which
    refuses true tokens read in another batch. Raises ``StatesError`` for bad states.
    """
    return _sequential(states, model, layer, Published(), seed, limit)


def brute_force(
    states: Tensor, model: LanguageModel, layer: int, seed: int = 0, limit: float = inf
) -> Attempt:
    """SipIt with the random policy (Algorithms 1 and 2), up to ``limit`` seconds."""
    return _sequential(states, model, layer, Random(1), seed, limit)


@dataclass(frozen=True, eq=False)
class FullPasses(OneStepMap):
    """A one-step map that reads the whole prefix anew for each single candidate."""

    prefix: list[int]

    def embedding(self, e: Float[Tensor, "1 d_model"]) -> Float[Tensor, "1 d_model"]:
        """The state of one candidate, given by its embedding; differentiable."""
        rows = torch.cat([self.model.embeddings[self.prefix], e])
        return _full_pass(self.model, rows, self.layer)[-1:]


def _sequential(
    states: Tensor,
    model: LanguageModel,
    layer: int,
    policy: Policy,
    seed: int,
    limit: float,
) -> Attempt:
    """Algorithm 1, one candidate a step."""
    generator = torch.Generator().manual_seed(seed)
    observed = Observation.of(states, model, layer)
    started = time.perf_counter()
    prefix = []
    tested = []
    for t, target in enumerate(observed.states):
        tested.append(0)  # candidates at this position
        step = FullPasses(model, layer, t, model.decoder, (), prefix)
        for token in policy.proposals(step, target, generator):
            tested[-1] += 1
            with torch.no_grad():
                state = step.embedding(model.embeddings[token])
            if torch.linalg.vector_norm(state - target) <= observed.radius[t]:
                prefix.append(int(token))
                break
            # One candidate is read in any case.
            if time.perf_counter() - started > limit:
                break
        # Without the token of this position there is no prefix for the next one.
        if len(prefix) == t:
            break
    tokens = torch.tensor(prefix).long()
    seconds = time.perf_counter() - started
    complete = len(tokens) == len(observed.states)
    return Attempt(tokens, torch.tensor(tested), complete, seconds)


def _full_pass(
    model: LanguageModel, rows: Float[Tensor, "pos d_model"], layer: int
) -> Float[Tensor, "pos d_model"]:
    """States at one layer of a pass up to the logits, which nobody uses."""
    with tapped(model, [layer]) as states:
        passed = model.decoder(inputs_embeds=rows[None], use_cache=False)
        # The unembedding is taken as large as the table of embeddings.
        _ = passed.last_hidden_state @ model.embeddings.T
    return states[layer][0]


def _last_state(
    cut: Callable, rows: Float[Tensor, "pos d_model"]
) -> Float[Tensor, "1 d_model"]:
    """The last state of a prompt of embeddings; differentiable."""
    return cut(inputs_embeds=rows[None], use_cache=False).last_hidden_state[:, -1]


def hard_prompts(
    states: Tensor,
    model: LanguageModel,
    layer: int,
    length: int | None = None,
    *,
    steps: int | None = None,
    rate: float = 0.1,
    seed: int = 0,
    limit: float = inf,
) -> Attempt:
    """HardPrompts (PEZ): all embeddings at once by Adam, projected onto tokens.

    The closest prompt met in ``steps``, T·|V|/4 as in the paper by default. With a
    ``length``, ``states`` is the last one of a prompt of so many tokens, and the first
    prompt that verifies ends the search.
    """
    observed = Observation.of(states if length is None else states[None], model, layer)
    started = time.perf_counter()
    cut = model.cut(layer)
    table = model.embeddings
    generator = torch.Generator().manual_seed(seed)
    count = length or len(observed.states)
    best = torch.randint(len(table), (count,), generator=generator).to(table.device)
    if length is None and steps is None:
        steps = len(observed.states) * len(table) // 4
    proxy = table[best].clone().requires_grad_()
    optimiser = torch.optim.Adam([proxy], rate)
    least = inf
    taken = 0
    finished = False
    # Without a length all steps are run, as published.
    while taken != steps and not (finished and length):
        taken += 1
        ids = torch.cdist(proxy.detach(), table).argmin(1)
        hard = table[ids].clone().requires_grad_()
        if length is None:
            missing = _full_pass(model, hard, layer) - observed.states
        else:
            missing = _last_state(cut, hard) - observed.states
        error = missing.square().sum()
        if error.item() < least:
            best = ids
            least = error.item()
            finished = bool((missing.norm(dim=1).cpu() <= observed.radius).all())
        # The gradient is that of the projection, the step that of the proxy.
        proxy.grad = torch.autograd.grad(error, hard)[0]
        optimiser.step()
        if time.perf_counter() - started > limit:
            break
    tested = torch.full((len(observed.states),), taken)
    return Attempt(best.cpu(), tested, finished, time.perf_counter() - started)


def greedy_coordinate(
    state: State,
    model: LanguageModel,
    layer: int,
    length: int,
    *,
    seed: int = 0,
    limit: float = inf,
) -> Attempt:
    """Greedy coordinate gradient (GCG) for the last state of a prompt of known length.

    The gradient at each position ranks substitutions, ``BATCH`` of the best
    ``CANDIDATES`` a position are read, and the closest prompt goes on; where none is
    closer, one token is drawn anew. Ends when a prompt verifies.
    """
    observed = Observation.of(state[None], model, layer)
    started = time.perf_counter()
    start = OneStepMap.after(model, layer)
    table = model.embeddings
    generator = torch.Generator().manual_seed(seed)
    options = min(CANDIDATES, len(table))
    ids = torch.randint(len(table), (length,), generator=generator)
    best = ids
    least = inf
    tested = 0
    while time.perf_counter() - started <= limit:
        rows = table[ids].detach().clone().requires_grad_()
        error = (_last_state(start.cut, rows) - observed.states).square().sum()
        gradient = torch.autograd.grad(error / 2, rows)[0]
        now = float(error.detach().sqrt())
        if now < least:
            best = ids
            least = now
        if least <= float(observed.radius):
            break
        # Where the loss falls most, to first order.
        promising = (gradient @ table.T).topk(options, largest=False).indices.cpu()
        where = torch.randint(length, (BATCH,), generator=generator)
        which = torch.randint(options, (BATCH,), generator=generator)
        prompts = ids.repeat(BATCH, 1)
        prompts[torch.arange(BATCH), where] = promising[where, which]
        distance, winner = observed.distance(0, last_states(start, prompts)).min(0)
        tested += BATCH
        if float(distance) < now:  # greedy
            ids = prompts[int(winner)]
        else:
            ids = ids.clone()
            ids[where[0]] = torch.randint(len(table), (), generator=generator)
    finished = least <= float(observed.radius)
    seconds = time.perf_counter() - started
    return Attempt(best, torch.tensor([tested]), finished, seconds)
