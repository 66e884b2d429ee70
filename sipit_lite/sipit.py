"""SipIt (Algorithm 1): read the exact prompt back, one position at a time, from the hidden states of one layer.

A token is accepted only when it is verified, and only when no other token that was tested verifies too.
What cannot be verified is an error that carries what was recovered so far, never a guess. With a lens, whole prompts
are drafted and verified in a few passes (``speculation``), and only what the drafts miss is searched for.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sipit_lite.acceptance import Observation, separated
from sipit_lite.collisions import closest_pairs
from sipit_lite.extensions.lens import Lens
from sipit_lite.io.capture import Captured
from sipit_lite.model import LanguageModel, StatesError
from sipit_lite.onestep import OneStepMap
from sipit_lite.policies import Gradient, Newton, Policy, nearest
from sipit_lite.recovery import Ambiguous, Interrupted, NotVerified, Outcome, Recovery
from sipit_lite.speculation import CLEAR, Draft, draft, read, related

SALT = 2510_15511  # a prompt drawn with the same seed must not be the stream of starts: they would be the answers
CHALLENGERS = 8  # tokens with the nearest embeddings, tested against each token found


class _Row(NamedTuple):
    token: int
    distance: float
    runner_up: float
    radius: float
    tested: int
    verified: bool = True
    margin: float = float("nan")


def invert(
    states: Tensor | Captured,
    model: LanguageModel,
    layer: int | None = None,
    *,
    policy: Policy | str = "auto",
    lens: Lens | None = None,
    seed: int = 0,
    epsilon: float | Tensor | None = None,
    scale: Tensor | None = None,
    passes: Sequence[int] | None = None,
    certify: bool = False,
    on_fail: str = "raise",
    progress: bool = False,
) -> Recovery:
    """Recover the exact prompt from the hidden states of all its positions at one layer (Algorithm 1).

    ``states`` has shape (T, d_model), 1 ≤ T ≤ K, in any floating-point format; the last layer means before the final
    norm. Or they are a ``Captured``, which knows its layers, scales and passes: then ``layer`` picks one of them, and
    without it the cheapest is taken, and the next one where that refuses.
    With ``scale``, one number a position, the states are ``states · scale``: 8-bit integers have to come so.
    ``policy`` orders the candidates: ``"auto"`` drafts the prompt with ``lens`` and searches with ``Newton`` for
    what the draft misses, or is ``Gradient()`` without a lens. ``epsilon`` bounds noise ‖ĥ_t − h_t‖₂ that was added on
    purpose, one number or one a position; without it, ε_t is the measured noise floor alone. ``certify=True`` tests the
    whole vocabulary at each position and measures the margin Δ_{π,t}, so that acceptance means this token and no other.
    The whole vocabulary is always tested where the states are coarser than the model's own format, the model computes
    in 16 bits, or an ``epsilon`` is given, since there two tokens could fit. A model of 16 bits decides between tokens
    inside its wide noise floor by computing their states anew in passes of the lengths ``passes`` (the default is one
    pass), and takes the one that agrees bit for bit. Elsewhere ``radius`` is float noise, and
    a rival would have to agree within it to be mistaken. ``on_fail="nearest"`` keeps the nearest token where none or
    several verify, marks the position as not ``verified``, and goes on.

    Raises ``StatesError`` for states that no prompt has, ``ModelError`` for a layer outside 0..L, ``LensError`` for
    a lens of another model or layer, ``NotVerified`` where no token verifies, ``Ambiguous`` where several do,
    ``Interrupted`` on Ctrl-C; the last three carry the verified prefix.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> invert(model.states("hidden states", 3), model, 3).text
    'hidden states'
    """
    if on_fail not in ("raise", "nearest") or (
        isinstance(policy, str) and policy != "auto"
    ):
        raise StatesError(
            f"got policy={policy!r}, on_fail={on_fail!r}; expected 'auto' or a policy, 'raise' or 'nearest'"
        )
    if isinstance(states, Captured):
        asked = {
            "policy": policy,
            "lens": lens,
            "seed": seed,
            "epsilon": epsilon,
            "certify": certify,
        }
        return _of_captured(
            states, model, layer, asked | {"on_fail": on_fail, "progress": progress}
        )
    if layer is None:
        raise StatesError(
            "got a tensor of states and no layer; expected its layer, or a Captured, which knows its own"
        )
    if lens is not None:
        lens.check(model, layer)
    observed, begun = (
        Observation.of(states, model, layer, epsilon, scale),
        time.perf_counter(),
    )
    passes = _check_passes(passes, len(observed))
    whole = (
        certify
        or epsilon is not None
        or on_fail == "nearest"
        or _coarse(observed, model)
    )
    if policy == "auto" and lens is not None and not whole and separated(model, layer):
        found = _by_speculation([observed], model, layer, lens, seed, begun, progress)[
            0
        ]
        if isinstance(found, NotVerified):
            raise found
        return found
    policy = (Newton(lens=lens) if lens else Gradient()) if policy == "auto" else policy
    generator, step, rows = (
        torch.Generator().manual_seed(seed + SALT),
        OneStepMap.after(model, layer),
        [],
    )
    try:
        for t in tqdm(
            range(len(observed)), "inverting", disable=None if progress else True
        ):
            step = step.extend(rows[-1].token) if rows else step
            if whole:
                distance, margin = _whole_vocabulary(step, observed, t, certify)
            else:
                batches = policy.proposals(step, observed.states[t], generator)
                distance, margin = (
                    try_candidates(step, observed, t, batches),
                    float("nan"),
                )
            prefix, radius = _recovery(rows, model, begun), float(observed.radius[t])
            if epsilon is None and torch.finfo(model.dtype).bits <= 16:
                distance, radius = _bit_for_bit(
                    distance, observed, prefix.tokens, passes, model, layer
                )
            row = _accept(distance, radius, prefix, model, on_fail == "nearest")
            rows.append(row._replace(margin=margin))
        found = _recovery(rows, model, begun)
        return _check_whole(found, observed, model, model.states(found.tokens, layer))
    except KeyboardInterrupt:
        raise Interrupted(_recovery(rows, model, begun)) from None


def _of_captured(
    captured: Captured, model: LanguageModel, layer: int | None, asked: dict
) -> Recovery:
    """From the layer asked for, that of the lens, or the cheapest that does not refuse."""
    captured.check(model)
    layer = (
        asked["lens"].layer if layer is None and asked["lens"] is not None else layer
    )
    layers = sorted(captured.states) if layer is None else [layer]
    for number in layers:
        states, scale = captured.at(number), captured.scales.get(number)
        try:
            return replace(
                invert(
                    states, model, number, scale=scale, passes=captured.passes, **asked
                ),
                layer=number,
            )
        except NotVerified:
            if number == layers[-1]:
                raise
    raise StatesError(
        "got a Captured without states; expected those of at least one layer"
    )


def invert_many(
    states: Sequence[Tensor],
    model: LanguageModel,
    layer: int,
    *,
    lens: Lens | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[Outcome]:
    """Recover many prompts, of any lengths, from the states of each: one outcome a prompt, in their order.

    A prompt that cannot be recovered does not stop the others: its outcome is the error that ``invert`` would raise.
    With a ``lens`` the prompts share their passes. ``seconds`` counts from the start of the whole call.
    Raises ``ModelError`` for a bad layer, ``LensError`` for a wrong lens, ``Interrupted`` on Ctrl-C.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> lens = Lens.fit(model, 1, tokens=4000, features=0)
    >>> texts = ["hidden states", "give back", "the prompt"]
    >>> [found.text for found in invert_many([model.states(text, 1) for text in texts], model, 1, lens=lens)]
    ['hidden states', 'give back', 'the prompt']
    """
    model.check_layer(layer)
    if lens is not None:
        lens.check(model, layer)
    begun, outcomes = time.perf_counter(), {}
    for i, x in enumerate(states):
        try:
            outcomes[i] = Observation.of(x, model, layer)
        except StatesError as error:
            outcomes[i] = error
    fast = [
        i
        for i, o in outcomes.items()
        if isinstance(o, Observation) and lens and not _coarse(o, model)
    ]
    fast = fast if fast and separated(model, layer) else []
    try:
        together = (
            _by_speculation(
                [outcomes[i] for i in fast], model, layer, lens, seed, begun, progress
            )
            if fast
            else []
        )
        outcomes |= dict(zip(fast, together, strict=True))
        for i in [i for i, o in outcomes.items() if isinstance(o, Observation)]:
            try:
                outcomes[i] = invert(states[i], model, layer, lens=lens, seed=seed)
            except NotVerified as error:
                outcomes[i] = error
    except Interrupted as stop:
        done = outcomes | dict(zip(fast, stop.outcomes, strict=False))
        empty = _recovery([], model, begun)
        raise Interrupted(
            stop.recovered,
            [empty if isinstance(o, Observation) else o for o in done.values()],
        ) from None
    return list(outcomes.values())


def _by_speculation(
    observed: Sequence[Observation],
    model: LanguageModel,
    layer: int,
    lens: Lens,
    seed: int,
    begun: float,
    progress: bool,
) -> list[Recovery | NotVerified]:
    """Drafts, read together; what they miss is searched for, prompt by prompt, and read once more."""
    drafts, outcomes = draft(observed, lens, model), {}
    policy, generator = Newton(lens=lens), torch.Generator().manual_seed(seed + SALT)
    try:
        reading = read([d.tokens for d in drafts], model, layer)
        for i, states, step in tqdm(
            reading, "inverting", len(drafts), disable=None if progress else True
        ):
            drafts[i].look(states, 0)
            try:
                _finish(drafts[i], step, policy, generator, begun)
                outcomes[i] = _recovery(_rows(drafts[i]), model, begun)
            except NotVerified as error:
                outcomes[i] = error
        again = [
            i
            for i, found in outcomes.items()
            if drafts[i].searched and isinstance(found, Recovery)
        ]
        for k, states, _ in read([drafts[i].tokens for i in again], model, layer):
            try:
                _check_whole(outcomes[again[k]], observed[again[k]], model, states)
            except NotVerified as error:
                outcomes[again[k]] = error
    except KeyboardInterrupt:
        known = [
            outcomes.get(i) or _recovery(_rows(d), model, begun)
            for i, d in enumerate(drafts)
        ]
        stopped = next((i for i in range(len(drafts)) if i not in outcomes), 0)
        raise Interrupted(
            _recovery(_rows(drafts[stopped]), model, begun), known
        ) from None
    return [outcomes[i] for i in range(len(drafts))]


def every_token(model: LanguageModel) -> Int[Tensor, " vocab"]:
    """The whole vocabulary, in order, as one batch of candidates."""
    return torch.arange(model.vocab_size, device=model.device)


def try_candidates(
    step: OneStepMap,
    observed: Observation,
    t: int,
    batches: Iterable[Int[Tensor, " cand"]],
    *,
    trusting: bool = False,
) -> Float[Tensor, " vocab"]:
    """Test batches of candidates until one verifies; the distance of every token tested, NaN for the untested.

    The token found is then challenged by the untested tokens whose embeddings are nearest to its own, the likeliest
    to produce the same state: twins among the embeddings first of all. If it verified only just, by all of them.
    Where states are ``separated``, ``trusting`` spares a token without near relatives this test, as in a draft.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> seen = Observation.of(model.states("hidden states", 3), model, 3)
    >>> distance = try_candidates(OneStepMap.after(model, 3), seen, 0, [every_token(model)])
    >>> int(distance.argmin()) == int(model.encode("hidden states")[0])
    True
    """
    table = step.model.embeddings
    distance = torch.full((len(table),), torch.nan, device=table.device)
    for batch in batches:
        distance[batch] = observed.distance(t, step.tokens(batch))
        if bool((distance[batch] <= observed.radius[t]).any()):
            break
    found = int(distance.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin())
    clear = bool(distance[found] <= CLEAR * observed.radius[t])
    alone = (
        trusting
        and clear
        and not bool(related(torch.tensor([found], device=table.device), step.model))
    )
    challengers = 0 if alone else CHALLENGERS if clear else len(table)
    rivals = nearest(table, table[found], distance.isnan(), challengers)
    if len(rivals):
        distance[rivals] = observed.distance(t, step.tokens(rivals))
    return distance


def _coarse(observed: Observation, model: LanguageModel) -> bool:
    """Whether two tokens could fit one stored state, so that only the whole vocabulary can tell."""
    return not observed.exact or torch.finfo(model.dtype).bits <= 16


def _whole_vocabulary(
    step: OneStepMap, observed: Observation, t: int, certify: bool
) -> tuple[Float[Tensor, " vocab"], float]:
    """Distances of all tokens, and the margin Δ_{π,t} where it is asked for."""
    states = step.tokens(every_token(step.model))
    return observed.distance(t, states), closest_pairs(
        states, 1
    ).minimum if certify else float("nan")


def _check_passes(passes: Sequence[int] | None, count: int) -> Sequence[int]:
    passes = [count] if passes is None else passes
    if min(passes, default=0) < 1 or sum(passes) != count:
        raise StatesError(
            f"got passes of {list(passes)} positions; expected lengths of at least 1, {count} in all"
        )
    return passes


def _bit_for_bit(
    distance: Float[Tensor, " vocab"],
    observed: Observation,
    prefix: Int[Tensor, " pos"],
    passes: Sequence[int],
    model: LanguageModel,
    layer: int,
) -> tuple[Float[Tensor, " vocab"], float]:
    """Distances and radius; where several tokens lie within the noise, those of states computed as they were.

    A pass of the same length has the same roundings, whatever stands after the position, so the true token comes out
    bit for bit, and the radius is zero. Where no token does (other hardware, other passes), nothing changes.
    """
    t, radius = len(prefix), float(observed.radius[len(prefix)])
    within = (distance <= radius).nonzero()[:, 0]
    if len(within) < 2:
        return distance, radius
    step, ids = OneStepMap.after(model, layer), prefix.to(model.device)
    for length in passes:
        if step.position + length > t:
            break
        step = step.follow(ids[step.position : step.position + length])[1]
    row = torch.zeros(length, dtype=torch.int64, device=model.device)
    row[: t - step.position] = ids[step.position :]
    anew = []
    for token in within.tolist():
        row[t - step.position] = token
        states = step.follow(row)[0] if step.position else model.states(row, layer)
        anew.append(observed.distance(t, states[t - step.position][None]))
    if not any(d == 0 for d in anew):
        return distance, radius
    return distance.index_copy(0, within, torch.cat(anew)), 0.0


def _finish(
    d: Draft, step: OneStepMap, policy: Policy, generator: torch.Generator, begun: float
) -> None:
    """Search for the first token that the draft has wrong, read what follows it, and so on to the end."""
    while not d.done:
        t, step = d.verified, step.crop(d.verified)
        batches = policy.proposals(step, d.observed.states[t], generator)
        distance = try_candidates(step, d.observed, t, batches, trusting=True)
        row = _accept(
            distance,
            float(d.observed.radius[t]),
            _recovery(_rows(d), d.model, begun),
            d.model,
        )
        d.settle(row.token, row.distance, row.runner_up, row.tested)
        if not d.done:
            states, step = step.follow(d.tokens[t:])
            d.look(states[1:], t + 1)


def _rows(d: Draft) -> list[_Row]:
    columns = (
        getattr(d, name)[: d.verified].tolist()
        for name in ("tokens", "distance", "runner_up", "tested")
    )
    radii = d.observed.radius.tolist()
    return [
        _Row(v, x, r, radius, n)
        for (v, x, r, n), radius in zip(zip(*columns, strict=True), radii, strict=False)
    ]


def _accept(
    distance: Float[Tensor, " vocab"],
    radius: float,
    prefix: Recovery,
    model: LanguageModel,
    keep: bool = False,
) -> _Row:
    """The one token that verifies; where there is none, or more than one, refuse, or ``keep`` the nearest, marked."""
    best = distance.nan_to_num(nan=torch.inf, posinf=torch.inf).topk(
        min(2, len(distance)), largest=False
    )
    runner_up = float(best.values[1]) if len(distance) > 1 else float("inf")
    row = _Row(
        int(best.indices[0]),
        float(best.values[0]),
        runner_up,
        radius,
        int((~distance.isnan()).sum()),
    )
    verified = (distance <= radius).nonzero()[:, 0]
    if len(verified) == 1:
        return row
    if keep:
        return row._replace(verified=False)
    seen = f"nearest of {row.tested} tested is {_quote(row.token, model)} at distance {row.distance:.3g}"
    kind, what = (
        (
            Ambiguous,
            f"{len(verified)} tokens verify, among them {_quote(int(verified[-1]), model)}",
        )
        if len(verified)
        else (
            NotVerified,
            "no token verifies (noisy states need epsilon; or another model, or another layer?)",
        )
    )
    raise kind(
        f"position {len(prefix.tokens)}: {what}; {seen}, radius {radius:.3g}; "
        f"verified so far: {len(prefix.tokens)} tokens {prefix.text!r}",
        nearest=row.token,
        distance=row.distance,
        radius=radius,
        recovered=prefix,
    )


def _check_whole(
    recovery: Recovery,
    observed: Observation,
    model: LanguageModel,
    again: Float[Tensor, "pos d_model"],
) -> Recovery:
    """Compare every row once more, with the states of the whole prompt read in one pass."""
    for t in recovery.verified.nonzero()[:, 0].tolist():
        distance, radius = (
            float(observed.distance(t, again[t : t + 1])),
            float(observed.radius[t]),
        )
        if not distance <= radius:
            prefix = _first(recovery, t, model)
            raise NotVerified(
                f"position {t}: the recovered prompt, read in one pass, is {distance:.3g} away, radius {radius:.3g}; "
                f"verified so far: {t} tokens {prefix.text!r}",
                nearest=int(recovery.tokens[t]),
                distance=distance,
                radius=radius,
                recovered=prefix,
            )
    return recovery


def _recovery(rows: list[_Row], model: LanguageModel, begun: float) -> Recovery:
    columns = (
        _Row(*zip(*rows, strict=True)) if rows else _Row(*[[]] * len(_Row._fields))
    )
    tokens = torch.tensor(columns.token, dtype=torch.int64)
    return Recovery(
        tokens=tokens,
        text=model.decode(tokens),
        distance=torch.tensor(columns.distance, dtype=torch.float32),
        runner_up=torch.tensor(columns.runner_up, dtype=torch.float32),
        radius=torch.tensor(columns.radius, dtype=torch.float32),
        tested=torch.tensor(columns.tested, dtype=torch.int64),
        verified=torch.tensor(columns.verified, dtype=torch.bool),
        margin=torch.tensor(columns.margin, dtype=torch.float32),
        seconds=time.perf_counter() - begun,
    )


def _first(recovery: Recovery, count: int, model: LanguageModel) -> Recovery:
    columns = {
        name: value[:count]
        for name, value in vars(recovery).items()
        if isinstance(value, Tensor)
    }
    return replace(recovery, text=model.decode(columns["tokens"]), **columns)


def _quote(token: int, model: LanguageModel) -> str:
    return f"{token} {model.decode(torch.tensor([token]))!r}"
