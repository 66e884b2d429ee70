"""What SipIt is compared against, as published (paper §3 and appendix): no prefix cache, one candidate a step.

These exist for the comparisons of chapters 11 to 13 and ``sipit-lite bench inversion``, not for use. Every look at a
candidate reads the whole prefix through the whole model, the final norm and the unembedding included, as the
official code does; the unembedding is taken as large as the embedding table.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sipit_lite.acceptance import Observation
from sipit_lite.model import LanguageModel

WINDOW = 50  # steps after which the proxy snaps to the nearest untried embedding
FIRST_WINDOW = 25_000  # tokens of vocabulary for each of which the first position's window grows by itself


@dataclass(frozen=True, eq=False)
class Attempt:
    """What a baseline found: ``tokens`` so far, candidates ``tested`` for each, and whether the prompt is ``finished``.

    ``tested`` has one entry a position begun. Not finished means that the time limit came first.
    """

    tokens: Int[Tensor, " pos"]
    tested: Int[Tensor, " begun"]
    finished: bool
    seconds: float


def published(
    states: Tensor,
    model: LanguageModel,
    layer: int,
    *,
    seed: int = 0,
    limit: float = torch.inf,
) -> Attempt:
    """SipIt with the gradient policy (Algorithms 1 and 3) as the official code runs it, up to ``limit`` seconds.

    Accepts within the measured radius: the official ``torch.allclose`` to 1e-5 refuses true tokens whose state was
    computed in another batch. Raises ``StatesError`` for states that no prompt has.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> published(model.states("a", 0), model, 0).finished
    True
    """
    return _sequential(states, model, layer, seed, limit, gradient=True)


def brute_force(
    states: Tensor,
    model: LanguageModel,
    layer: int,
    *,
    seed: int = 0,
    limit: float = torch.inf,
) -> Attempt:
    """SipIt with the random policy (Algorithms 1 and 2), one candidate a step, up to ``limit`` seconds.

    Raises ``StatesError`` for states that no prompt has.
    """
    return _sequential(states, model, layer, seed, limit, gradient=False)


def hard_prompts(
    states: Tensor,
    model: LanguageModel,
    layer: int,
    *,
    steps: int | None = None,
    rate: float = 0.1,
    seed: int = 0,
    limit: float = torch.inf,
) -> Attempt:
    """HardPrompts (PEZ): all embeddings at once by Adam, the gradient taken at the projection onto tokens.

    Runs T·|V|/4 steps as in the paper unless ``steps`` says otherwise. The closest prompt met is returned;
    ``finished`` says whether all its positions verify. Raises ``StatesError`` for states that no prompt has.
    """
    observed, begun = Observation.of(states, model, layer), time.perf_counter()
    table, generator = model.embeddings, torch.Generator().manual_seed(seed)
    start = torch.randint(len(table), (len(observed),), generator=generator).to(
        table.device
    )
    proxy = table[start].clone().requires_grad_()
    optimiser = torch.optim.Adam([proxy], rate)
    best, least, taken = start, torch.inf, 0
    for taken in range(  # noqa: B007
        1, 1 + (len(observed) * len(table) // 4 if steps is None else steps)
    ):
        ids = torch.cdist(proxy.detach(), table).argmin(1)
        hard = table[ids].clone().requires_grad_()
        error = (_whole_model(model, hard, layer) - observed.states).square().sum()
        if error.item() < least:
            best, least = ids, error.item()
        proxy.grad = torch.autograd.grad(error, hard)[0]
        optimiser.step()
        if time.perf_counter() - begun > limit:
            break
    distance = torch.linalg.vector_norm(
        _read(model, best, layer) - observed.states, dim=1
    )
    exact = bool((distance <= observed.radius).all())
    tested = torch.full((len(observed),), taken)
    return Attempt(best.cpu(), tested, exact, time.perf_counter() - begun)


def _sequential(
    states: Tensor,
    model: LanguageModel,
    layer: int,
    seed: int,
    limit: float,
    gradient: bool,
) -> Attempt:
    observed, begun = Observation.of(states, model, layer), time.perf_counter()
    generator, prefix, tested = torch.Generator().manual_seed(seed), [], []
    for t in range(len(observed)):
        tested.append(0)
        for token in _candidates(
            model, prefix, observed.states[t], layer, generator, gradient
        ):
            tested[-1] += 1
            state = _read(
                model, torch.tensor([*prefix, token], device=model.device), layer
            )[-1]
            if (
                torch.linalg.vector_norm(state - observed.states[t])
                <= observed.radius[t]
            ):
                prefix.append(token)
                break
            if time.perf_counter() - begun > limit:
                return Attempt(
                    torch.tensor(prefix).long(),
                    torch.tensor(tested),
                    False,
                    time.perf_counter() - begun,
                )
    finished = len(prefix) == len(observed)
    return Attempt(
        torch.tensor(prefix).long(),
        torch.tensor(tested),
        finished,
        time.perf_counter() - begun,
    )


def _candidates(
    model: LanguageModel,
    prefix: list[int],
    target: Float[Tensor, " d_model"],
    layer: int,
    generator: torch.Generator,
    gradient: bool,
) -> Iterator[int]:
    """Every token once: in random order, or nearest to a proxy that descends on the mean squared error."""
    table = model.embeddings
    if not gradient:
        yield from torch.randperm(len(table), generator=generator).tolist()
        return
    untried = torch.ones(len(table), dtype=torch.bool, device=table.device)
    proxy = table[int(torch.randint(len(table), (), generator=generator))].clone()
    window = WINDOW * (1 if prefix else 1 + len(table) // FIRST_WINDOW)
    for step in range(len(table)):
        if step and step % window == 0:
            proxy = table[_nearest(table, proxy, untried)].clone()
        rate = 1 - 0.99 * (step % window) / (window - 1)
        proxy = proxy - rate * _clipped_gradient(model, prefix, proxy, target, layer)
        token = _nearest(table, proxy, untried)
        untried[token] = False
        yield token


def _clipped_gradient(
    model: LanguageModel,
    prefix: list[int],
    proxy: Float[Tensor, " d_model"],
    target: Float[Tensor, " d_model"],
    layer: int,
) -> Float[Tensor, " d_model"]:
    proxy = proxy.detach().clone().requires_grad_()
    rows = torch.cat(
        [
            model.embeddings[torch.tensor(prefix, device=proxy.device).long()],
            proxy[None],
        ]
    )
    error = (_whole_model(model, rows, layer)[-1] - target).square().mean()
    gradient = torch.autograd.grad(error, proxy)[0]
    return gradient * min(1.0, 1.0 / max(float(gradient.norm()), 1e-30))


def _nearest(
    table: Float[Tensor, "vocab d_model"],
    proxy: Float[Tensor, " d_model"],
    untried: Bool[Tensor, " vocab"],
) -> int:
    distance = torch.linalg.vector_norm(table - proxy, dim=1)
    return int(distance.masked_fill(~untried, torch.inf).argmin())


def _read(
    model: LanguageModel, ids: Int[Tensor, " pos"], layer: int
) -> Float[Tensor, "pos d_model"]:
    with torch.no_grad():
        return _whole_model(model, model.embeddings[ids], layer)


def _whole_model(
    model: LanguageModel, rows: Float[Tensor, "pos d_model"], layer: int
) -> Float[Tensor, "pos d_model"]:
    """States at one layer of a pass through everything, up to the logits that nobody asked for."""
    with model.tapped([layer]) as states:
        last = model.decoder(
            inputs_embeds=rows[None], use_cache=False
        ).last_hidden_state
        _ = last @ model.embeddings.T
    return states[layer][0]


CANDIDATES, BATCH = (
    64,
    256,
)  # substitutions kept for each position, and prompts read in a step, of the greedy search


def greedy_coordinate(
    state: Float[Tensor, " d_model"],
    model: LanguageModel,
    layer: int,
    length: int,
    *,
    seed: int = 0,
    limit: float = torch.inf,
) -> Attempt:
    """Greedy coordinate gradient (GCG) for one last-token state of a prompt of known length.

    From random tokens: the gradient of ½‖F − ĥ‖² at each position ranks all substitutions, ``BATCH`` of the best
    ``CANDIDATES`` a position are read, and the closest prompt is kept. Where none is closer, one token is drawn anew.
    Ends when a prompt verifies, or at the limit. Raises ``StatesError`` for a state that no prompt has.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> greedy_coordinate(model.states("a", 1)[-1], model, 1, 1, limit=0.1).tokens.shape
    torch.Size([1])
    """
    observed, begun = Observation.of(state[None], model, layer), time.perf_counter()
    table, generator = model.embeddings, torch.Generator().manual_seed(seed)
    cut, radius, tested = model.cut(layer), float(observed.radius), 0
    kept = min(CANDIDATES, len(table))
    ids = torch.randint(len(table), (length,), generator=generator)
    best, least = ids, torch.inf
    while time.perf_counter() - begun <= limit:
        rows = table[ids].detach().clone().requires_grad_()
        error = _last_error(cut, rows, observed)
        gradient = torch.autograd.grad(error / 2, rows)[0]
        if (now := float(error.detach().sqrt())) < least:
            best, least = ids, now
        if least <= radius:
            break
        promising = (gradient @ table.T).topk(kept, largest=False).indices.cpu()
        where = torch.randint(length, (BATCH,), generator=generator)
        which = torch.randint(kept, (BATCH,), generator=generator)
        crowd = ids.repeat(BATCH, 1)
        crowd[torch.arange(BATCH), where] = promising[where, which]
        with torch.no_grad():
            states = cut(inputs_embeds=table[crowd], use_cache=False).last_hidden_state[
                :, -1
            ]
        far, winner = observed.distance(0, states).min(0)
        tested += BATCH
        if float(far) < now:
            ids = crowd[int(winner)]
        else:
            ids = ids.clone()
            ids[int(where[0])] = int(torch.randint(len(table), (), generator=generator))
    return Attempt(
        best, torch.tensor([tested]), least <= radius, time.perf_counter() - begun
    )


def hard_prompts_last(
    state: Float[Tensor, " d_model"],
    model: LanguageModel,
    layer: int,
    length: int,
    *,
    rate: float = 0.1,
    seed: int = 0,
    limit: float = torch.inf,
) -> Attempt:
    """HardPrompts (PEZ) for one last-token state of a prompt of known length, up to ``limit`` seconds.

    As ``hard_prompts``, with the error of the last position alone. Raises ``StatesError`` for a state that no prompt
    has.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> hard_prompts_last(model.states("a", 1)[-1], model, 1, 1, limit=0.1).tokens.shape
    torch.Size([1])
    """
    observed, begun = Observation.of(state[None], model, layer), time.perf_counter()
    table, generator = model.embeddings, torch.Generator().manual_seed(seed)
    cut, radius, tested = model.cut(layer), float(observed.radius), 0
    best = torch.randint(len(table), (length,), generator=generator).to(table.device)
    proxy, least = table[best].clone().requires_grad_(), torch.inf
    optimiser = torch.optim.Adam([proxy], rate)
    while time.perf_counter() - begun <= limit and least > radius:
        ids, tested = torch.cdist(proxy.detach(), table).argmin(1), tested + 1
        hard = table[ids].clone().requires_grad_()
        error = _last_error(cut, hard, observed)
        if (now := float(error.detach().sqrt())) < least:
            best, least = ids, now
        proxy.grad = torch.autograd.grad(error, hard)[0]
        optimiser.step()
    return Attempt(
        best.cpu(), torch.tensor([tested]), least <= radius, time.perf_counter() - begun
    )


def _last_error(
    cut: nn.Module, rows: Float[Tensor, "pos d_model"], observed: Observation
) -> Float[Tensor, ""]:
    """‖F − ĥ‖² of the last-token state for one prompt's embeddings."""
    return (
        (
            cut(inputs_embeds=rows[None], use_cache=False).last_hidden_state[0, -1]
            - observed.states[0]
        )
        .square()
        .sum()
    )
