"""SipIt (Algorithm 1): read the exact prompt back, one position at a time, from the hidden states of one layer.

A token is accepted only when it is verified, and only when no other token that was tested verifies too.
What cannot be verified is an error that carries what was recovered so far, never a guess.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sipit_lite.models import LanguageModel
from sipit_lite.onestep import OneStepMap
from sipit_lite.policies import Gradient, Policy, nearest
from sipit_lite.verify import Observation

SALT = 2510_15511  # a prompt drawn with the same seed must not be the stream of starts: they would be the answers
CLEAR = 0.25  # a token further out than this share of the radius is accepted only after the whole vocabulary was tested
CHALLENGERS = 8  # tokens with the nearest embeddings, tested against each token found


@dataclass(frozen=True, eq=False)
class Recovery:
    """What SipIt recovered, and how clearly: one entry a position, tensors on the CPU.

    ``distance`` is that of the accepted token, ‖F(v) − ĥ_t‖₂ (beyond the rounding, for states stored in a coarser
    format); ``runner_up`` the smallest among the other tokens tested; ``radius`` the ε_t that ``distance`` had to
    meet; ``tested`` the number of candidates, the challengers of the accepted one included; ``seconds`` the wall-clock
    time of the whole inversion.
    """

    tokens: Int[Tensor, " pos"]
    text: str
    distance: Float[Tensor, " pos"]
    runner_up: Float[Tensor, " pos"]
    radius: Float[Tensor, " pos"]
    tested: Int[Tensor, " pos"]
    seconds: float


class NotVerified(ValueError):
    """No token lies in the acceptance region; ``recovered`` holds the verified prefix.

    ``position`` counts from 0, ``nearest`` is the closest token tested, ``distance`` its distance, ``radius`` ε_t.
    """

    def __init__(self, message: str, *, nearest: int, distance: float, radius: float, recovered: Recovery):
        super().__init__(message)
        self.nearest, self.distance, self.radius, self.recovered = nearest, distance, radius, recovered
        self.position = len(recovered.tokens)


class Ambiguous(NotVerified):
    """Several tokens lie in the acceptance region: the noise is too large, or they share one state.

    Exact twins among the embeddings share every state; in a coarse format two tokens may round to the same numbers.
    """


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during an inversion; ``recovered`` holds the verified prefix."""

    def __init__(self, recovered: Recovery):
        super().__init__(f"interrupted after {len(recovered.tokens)} verified tokens: {recovered.text!r}")
        self.recovered = recovered


class _Row(NamedTuple):
    token: int
    distance: float
    runner_up: float
    radius: float
    tested: int


def invert(
    states: Tensor,
    model: LanguageModel,
    layer: int,
    *,
    policy: Policy | None = None,
    seed: int = 0,
    epsilon: float | None = None,
    certify: bool = False,
    progress: bool = False,
) -> Recovery:
    """Recover the exact prompt from the hidden states of all its positions at one layer (Algorithm 1).

    ``states`` has shape (T, d_model), 1 ≤ T ≤ K, in any floating-point format; the last layer means before the final
    norm. ``policy`` orders the candidates (``Gradient()`` by default). ``epsilon`` bounds noise ‖ĥ_t − h_t‖₂ that
    was added on purpose; without it, ε_t is the measured noise floor alone. ``certify=True`` tests the whole
    vocabulary at each position, so that acceptance means this token and no other; it is always on where the states
    are coarser than the model's own format, the model computes in 16 bits, or an ``epsilon`` is given, since there two
    tokens could fit. Elsewhere ``radius`` is float noise, and a rival would have to agree within it to be mistaken.

    Raises ``StatesError`` for states that no prompt has, ``ModelError`` for a layer outside 0..L, ``NotVerified``
    where no token verifies, ``Ambiguous`` where several do, ``Interrupted`` on Ctrl-C; the last three carry the
    verified prefix.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> invert(model.states("hidden states", 3), model, 3).text
    'hidden states'
    """
    observed = Observation.of(states, model, layer, epsilon)
    certify = certify or epsilon is not None or not observed.exact or torch.finfo(model.dtype).bits <= 16
    policy, generator, begun = policy or Gradient(), torch.Generator().manual_seed(seed + SALT), time.perf_counter()
    step, rows = OneStepMap.after(model, layer), []
    try:
        for t in tqdm(range(len(observed)), "inverting", disable=None if progress else True):
            step = step.extend(rows[-1].token) if rows else step
            batches = [every_token(model)] if certify else policy.proposals(step, observed.states[t], generator)
            distance = try_candidates(step, observed, t, batches)
            rows.append(_accept(distance, float(observed.radius[t]), _recovery(rows, model, begun), model))
        return _check_whole(_recovery(rows, model, begun), observed, model, layer)
    except KeyboardInterrupt:
        raise Interrupted(_recovery(rows, model, begun)) from None


def every_token(model: LanguageModel) -> Int[Tensor, " vocab"]:
    """The whole vocabulary, in order, as one batch of candidates."""
    return torch.arange(model.vocab_size, device=model.device)


def try_candidates(
    step: OneStepMap, observed: Observation, t: int, batches: Iterable[Int[Tensor, " cand"]]
) -> Float[Tensor, " vocab"]:
    """Test batches of candidates until one verifies; the distance of every token tested, NaN for the untested.

    The token found is then challenged by the untested tokens whose embeddings are nearest to its own, the likeliest
    to produce the same state: twins among the embeddings first of all. If it verified only just, by all of them.

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
    rivals = nearest(table, table[found], distance.isnan(), CHALLENGERS if clear else len(table))
    if len(rivals):
        distance[rivals] = observed.distance(t, step.tokens(rivals))
    return distance


def _accept(distance: Float[Tensor, " vocab"], radius: float, prefix: Recovery, model: LanguageModel) -> _Row:
    """The one token that verifies; refuse where there is none, or more than one."""
    best = distance.nan_to_num(nan=torch.inf, posinf=torch.inf).topk(min(2, len(distance)), largest=False)
    runner_up = float(best.values[1]) if len(distance) > 1 else float("inf")
    row = _Row(int(best.indices[0]), float(best.values[0]), runner_up, radius, int((~distance.isnan()).sum()))
    verified = (distance <= radius).nonzero()[:, 0]
    if len(verified) == 1:
        return row
    seen = f"nearest of {row.tested} tested is {_quote(row.token, model)} at distance {row.distance:.3g}"
    kind, what = (
        (Ambiguous, f"{len(verified)} tokens verify, among them {_quote(int(verified[-1]), model)}")
        if len(verified)
        else (NotVerified, "no token verifies (noisy states need epsilon; or another model, or another layer?)")
    )
    raise kind(
        f"position {len(prefix.tokens)}: {what}; {seen}, radius {radius:.3g}; "
        f"verified so far: {len(prefix.tokens)} tokens {prefix.text!r}",
        nearest=row.token,
        distance=row.distance,
        radius=radius,
        recovered=prefix,
    )


def _check_whole(recovery: Recovery, observed: Observation, model: LanguageModel, layer: int) -> Recovery:
    """Re-encode the whole prompt in one pass and compare every row once more."""
    again = model.states(recovery.tokens, layer)
    for t in range(len(observed)):
        distance, radius = float(observed.distance(t, again[t : t + 1])), float(observed.radius[t])
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
    columns = _Row(*zip(*rows, strict=True)) if rows else _Row([], [], [], [], [])
    tokens = torch.tensor(columns.token, dtype=torch.int64)
    return Recovery(
        tokens=tokens,
        text=model.decode(tokens),
        distance=torch.tensor(columns.distance, dtype=torch.float32),
        runner_up=torch.tensor(columns.runner_up, dtype=torch.float32),
        radius=torch.tensor(columns.radius, dtype=torch.float32),
        tested=torch.tensor(columns.tested, dtype=torch.int64),
        seconds=time.perf_counter() - begun,
    )


def _first(recovery: Recovery, count: int, model: LanguageModel) -> Recovery:
    cut = {name: getattr(recovery, name)[:count] for name in ("tokens", "distance", "runner_up", "radius", "tested")}
    return Recovery(text=model.decode(cut["tokens"]), seconds=recovery.seconds, **cut)


def _quote(token: int, model: LanguageModel) -> str:
    return f"{token} {model.decode(torch.tensor([token]))!r}"
