"""When is a token accepted? The rule of the local verifier, all of it (chapters 8, 9).

1. Its state lies within the radius ε_t of the observed one. No magic ε: the radius is
   the float noise of this model at this layer and position, or of a noisier token, all
   measured, plus what was announced; rounding to a coarser format is an interval.
2. No other tested token lies there too. Rivals always are: the nearest embeddings, all
   whose states the first block leaves nearly equal, all tokens behind a narrow pass.
3. A drafted token is spared its rivals only where it agrees clearly, the first block
   tells it from all others, and states of different tokens are known to be far apart.
4. In 16 bits several tokens may lie within the noise: that one is accepted whose state
   comes out bit for bit in a pass of the same length. A draft that does is spared too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import pad

from sipit_lite.collisions import closest_pairs
from sipit_lite.model import LanguageModel, ModelError, StatesError, plain_settings
from sipit_lite.onestep import EXACT, ROWS, OneStepMap
from sipit_lite.policies import nearest

SAFETY = 16  # noise is measured at few positions; other prompts stay within this factor
PROBES = (0, 1, 3, 7, 15, 31, 63, 127, 255)  # where: it grows with the prefix
APART = 64  # radii between tokens for a draft to be trusted without testing rivals
CLEAR = 0.25  # a residual beyond this share of the radius has all tokens tested
RELATED = 0.05  # nearer than this share of the usual distance from the mean state
LATER = 7  # the later position at which tokens are compared
CHALLENGERS = 8  # tokens with the nearest embeddings, tested against each candidate

States = Float[Tensor, "rows d_model"]
Distances = Float[Tensor, " rows"]
Tokens = Int[Tensor, " tokens"]
Bound = float | Tensor | None


@dataclass(frozen=True, eq=False)
class Observation:
    """Observed states with what is known of their noise: A_{π,t}(·; ε_t) for each t.

    ``half_width`` is how far rounding to the stored format may have moved each number,
    ``radius`` is ε_t; ``trusted`` are positions where states of different tokens lie
    ``APART`` radii apart, as measured: a draft that agrees needs no rivals.
    """

    states: States
    half_width: States
    radius: Distances
    trusted: Bool[Tensor, " pos"]

    @classmethod
    @plain_settings()
    def of(
        cls,
        states: object,
        model: LanguageModel,
        layer: int,
        epsilon: Bound = None,
        half_width: Bound = None,
        prefix: Tokens | None = None,
    ) -> "Observation":
        """Check the states and work out their acceptance regions.

        ``epsilon`` bounds noise added on purpose, ``half_width`` overrides that of the
        format, one number or one a position. Raises ``StatesError``, ``ModelError``.
        """
        model.check_layer(layer)
        if str(getattr(states, "dtype", "")) in ("float16", "float32", "float64"):
            states = torch.tensor(states)  # an array of NumPy
        if getattr(states, "shape", ())[:-2] == (1,):
            states = states[0]  # a batch of one
        values = check_states(states, model)
        known = 0 if prefix is None else len(prefix)
        if known:
            states = torch.cat([model.states(prefix, layer).to(states), states])
            values = check_states(states, model)
        bound = _check_bound("epsilon", epsilon, values, known)
        # The first position is a world of its own: often all its states are huge.
        first = torch.arange(len(values), device=values.device).clamp(max=1)
        floor, gap = (column[first] for column in _measured(model, layer).to(values))
        radius = floor * vector_norm(values, dim=1)
        radius = (radius.to(model.dtype) + bound.to(model.dtype)).cpu()
        # Tokens whose states differ by more than the noise never agree in every bit.
        trusted = radius * (1 / SAFETY if model.sixteen_bits else APART) <= gap.cpu()
        if not radius.isfinite().all():
            norm = float(values.double().norm(dim=1).max())
            raise StatesError(f"got states of norm {norm:.1e}; {model.dtype} overflows")
        if half_width is None:
            # Numbers stored in the model's own format are compared in it, bit for bit.
            widths = rounding_half_width(states, model)
            values = values.to(model.dtype)
        else:
            widths = _check_bound("half_width", half_width, values, known)[:, None]
        return cls(values, widths.expand_as(values), radius, trusted)

    def distance(self, t: int | slice, candidates: States) -> Distances:
        """Distance of each candidate's state from the observed one at position t."""
        return distance_to_stored(candidates, self.states[t], self.half_width[t])


def distance_to_stored(
    candidates: States, observed: Tensor, half_width: Tensor
) -> Distances:
    """ℓ2 distance to the nearest state that would have been stored as the observed one.

    With half width zero it is the paper's ‖F(v) − ĥ_t‖₂; infinite for what overflowed.
    """
    beyond = ((candidates - observed).abs() - half_width).clamp(min=0)
    return vector_norm(beyond.float(), dim=1).nan_to_num(torch.inf, torch.inf)


def check_states(states: object, model: LanguageModel) -> States:
    """The states, in the model's format or a finer one; ``StatesError`` for none."""
    cache = "; keys or values of a cache go through Leaked(model, 'values').rows"
    if not isinstance(states, Tensor):
        got = f"got states of type {type(states).__name__}"
        raise StatesError(f"{got}; expected a torch.Tensor{cache}")
    if not states.is_floating_point():
        got = f"got states of {states.dtype}; expected a floating-point format"
        raise StatesError(f"{got}: integers times a scale, half of it as half_width")
    fits = states.ndim == 2 and states.shape[1] == model.d_model
    if not fits or not 1 <= len(states) <= model.n_positions:
        got = f"got states of shape {tuple(states.shape)}"
        shape = f"(T, {model.d_model}) with T from 1 to {model.n_positions}"
        shape += cache * (states.ndim > 3)
        raise StatesError(f"{got}; {model.name} has shape {shape}")
    try:
        values = states.detach().to(model.device)
        values = values.to(torch.promote_types(model.dtype, torch.float32))
        # What overflows in the model's format is no state of its.
        finite = values.to(model.dtype).isfinite().all(1)
    except (NotImplementedError, RuntimeError) as error:
        got = f"got states of {states.dtype}, {states.layout}"
        raise StatesError(f"{got}; not convertible to {model.dtype}") from error
    if not finite.all():
        got = f"got NaN or Inf in the state at position {int(finite.int().argmin())}"
        raise StatesError(f"{got}; expected finite {model.dtype} numbers")
    return values


def _check_bound(name: str, value: Bound, values: States, known: int) -> Distances:
    """One number for each position, 0 for None; ``StatesError`` for anything else."""
    if value is None:
        return torch.zeros_like(values[:, 0])
    count = len(values) - known
    try:
        bound = torch.as_tensor(value).to(values)
    except (TypeError, RuntimeError):  # not even a number
        bound = torch.full((), torch.nan)
    if bound.shape not in ((), (count,)) or not ((bound >= 0) & bound.isfinite()).all():
        expected = "expected one finite number, not negative, or one for each of the"
        raise StatesError(f"got {name}={value}; {expected} {count} positions")
    return pad(bound.expand(count), (known, 0))


def rounding_half_width(states: States, model: LanguageModel) -> States:
    """Half a unit of the stored format; zero if that is as fine as the model's."""
    stored = torch.finfo(states.dtype)
    values = states.to(model.device, torch.float32)
    half = torch.zeros_like(values)
    if stored.eps > torch.finfo(model.dtype).eps:
        # A number 2^e · m with ½ ≤ m < 1 has its last digit at eps · 2^(e − 1).
        exponent = torch.frexp(values).exponent
        unit = torch.ldexp(torch.full_like(values, stored.eps), exponent - 1)
        half = (unit / 2).clamp(min=stored.tiny * stored.eps / 2)
    return half.to(model.dtype)


@plain_settings()
def noise_floor(model: LanguageModel, layer: int) -> float:
    """Float noise of a state over its norm, times ``SAFETY``, where it is largest.

    Parameters
    ----------
    model, layer: where it is measured, once; layers are 0 to L + 1

    Returns
    -------
    The radius ε_t of a state, without announced noise, over ‖ĥ_t‖₂ (chapter 8)

    Raises
    ------
    ModelError: no such layer, or states that differ by more than rounding

    >>> from sipit_lite import load
    >>> noise_floor(load(device="cpu"), layer=3) < 1e-4
    True
    """
    return float(_measured(model, layer)[0].max())


def _measured(model: LanguageModel, layer: int) -> Float64[Tensor, "2 2"]:
    """Noise, and the least distance of tokens: of the first and of later positions."""
    key = ("noise", layer)
    if key in model.measured:
        return model.measured[key]
    generator = torch.Generator().manual_seed(0)
    length = min(max(PROBES) + 1, model.n_positions)
    vocab = model.vocab_size
    ids = model.vocabulary[torch.randint(vocab, (length,), generator=generator)]
    drawn = model.vocabulary[torch.randperm(vocab, generator=generator)[: ROWS // 2]]
    table = model.embeddings.float()
    apart = torch.cdist(table[drawn], table).scatter(1, drawn[:, None], torch.inf)
    sample = torch.cat([drawn, apart.argmin(1)])
    states = model.states(ids, layer)
    columns = []
    for t in [t for t in PROBES if t < length]:
        step = OneStepMap.after(model, layer, ids[:t])
        sample[-1] = ids[t]
        rows = step.tokens(sample).double()
        alone = step.tokens(ids[t : t + 1])[0].double()
        routes = torch.stack([states[t].double(), alone, rows[-1]])
        pairs = torch.cdist(rows, rows, compute_mode=EXACT)
        same = sample[:, None] == sample  # drawn tokens may be each other's neighbours
        noise = torch.pdist(routes).max() / routes[0].norm()
        columns.append([noise, pairs.masked_fill(same, torch.inf).min()])
    spread, gap = map(torch.stack, zip(*columns, strict=True))
    unit = torch.finfo(model.dtype).eps
    # Half of the digits are no rounding: such states depend on what comes later.
    if not spread.max() <= unit**0.5:  # NaN is no rounding either
        got = f"got {model.name}, whose states at layer {layer} differ by"
        expected = f"expected rounding alone, under {unit**0.5:.1e} (is it causal?)"
        raise ModelError(f"{got} {spread.max():.1e} in cached steps; {expected}")
    floor = SAFETY * spread.clamp(min=unit / 2)
    last = min(1, length - 1)  # a context of one position has no later ones
    columns = [floor[0], floor[last:].max(), gap[0], gap[last:].min()]
    return model.measured.setdefault(key, torch.stack(columns).reshape(2, 2))


def related(model: LanguageModel, layer: int) -> Bool[Tensor, " vocab"]:
    """Which tokens another token nearly equals once the first block has read them.

    All blocks behind see nothing else of a token, so what is equal there stays equal.
    Compared at the first and at one later position, once a model, by the detector.
    """
    depth = min(layer, 1)
    key = ("related", depth)
    if key not in model.measured:
        with plain_settings():
            near = torch.zeros_like(model.vocabulary, dtype=torch.bool)
            generator = torch.Generator().manual_seed(0)
            prefix = torch.randint(model.vocab_size, (LATER,), generator=generator)
            for t in {0, min(LATER, model.n_positions - 1)} if len(near) > 1 else ():
                step = OneStepMap.after(model, depth, prefix[:t])
                states = step.tokens(model.vocabulary).float().nan_to_num(0.0, 0.0, 0.0)
                limit = RELATED * vector_norm(states - states.mean(0), dim=1).median()
                report = closest_pairs(states, 1, nearest=True, within=float(limit))
                near |= report.nearest.to(near.device) < float(limit)
        model.measured[key] = near
    return model.measured[key]


def agreeing(
    observed: Observation, tokens: Tokens, states: States, twins: Tensor, clear: float
) -> tuple[int, Tensor]:
    """How many of the drafted tokens, the last ones, are accepted; distances, tokens.

    Behind the first that does not agree clearly, or has rivals, states prove nothing.
    """
    first = len(observed.states) - len(tokens)
    distance = observed.distance(slice(first, None), states)
    # One read of the device: radius and trust are on the CPU, where all is decided.
    read = torch.stack([distance.double(), tokens, twins[tokens]]).cpu()
    agrees = read[0] <= clear * observed.radius[first:]
    agrees &= observed.trusted[first:] & (read[2] == 0)
    return int(agrees.cumprod(0).sum()), read[:2]


def try_candidates(
    step: OneStepMap, observed: Observation, t: int, order: Iterable, learn: Any = None
) -> Distances:
    """Distances of the tokens tested at position t, NaN for the others.

    Batches of an ``order`` are tested until one verifies; then its rivals. ``learn``,
    of a drafter's search, receives each batch and its states; such a search spares a
    clear token without twins its rivals, as a draft does.
    """
    table = step.model.embeddings
    twins = related(step.model, step.layer)
    distance = torch.full((len(table),), torch.nan, device=table.device)
    radius = float(observed.radius[t])
    best = [torch.inf, 0, 0]  # distance, token, whether it has twins
    left = len(table)
    for batch in order:
        states = step.tokens(batch)
        left -= len(batch)
        if learn:
            learn(batch, states)
        distance[batch] = observed.distance(t, states)
        # One read. An index of no dimension would be another.
        token = batch[distance[batch].argmin(0, keepdim=True)]
        read = torch.cat([distance[token].double(), token, twins[token]]).tolist()
        best = min(best, read)
        widen(observed, t, token, read[0], step)
        if read[0] <= float(observed.radius[t]):
            break
    near, token, twin = best
    # What verifies by its own noise alone stands alone only where states are apart.
    apart = bool(observed.trusted[t])
    clear = near <= CLEAR * float(observed.radius[t]) and (near <= radius or apart)
    if learn and clear and apart and not twin:
        return distance
    # Far out in the radius another token may well be nearer: then all are tested.
    count = min(CHALLENGERS if clear else len(table), left)
    rivals = nearest(table, table[int(token)], distance.isnan(), count)
    if clear and twin:
        others = (twins & distance.isnan()).nonzero()[:, 0]
        rivals = torch.cat([rivals, others]).unique()
    if len(rivals):
        distance[rivals] = observed.distance(t, step.tokens(rivals))
    return distance


def suspected(states: States, model: LanguageModel, layer: int) -> str:
    """What may be wrong where no token verifies."""
    hint = f"after the norm? that is layer {layer + 1}; " * (layer == model.n_layers)
    for dtype in (torch.bfloat16, torch.float16):
        # Numbers that fit into fewer bits may have been computed in them.
        if model.dtype.itemsize > dtype.itemsize and (states.to(dtype) == states).all():
            hint += f"{dtype} numbers, {model.dtype} here: load(name, dtype={dtype})? "
    others = "noisy states need epsilon, centred ones Leaked(model, 'centred')"
    return f"{hint}{others}; or another model, layer, or positions not from 0?"


def widen(observed: Observation, t: int, token: Tokens, near: float, step: OneStepMap):
    """Raise the radius to the nearest token's own noise: some sinks are noisier."""
    radius = float(observed.radius[t])
    share = CLEAR if observed.trusted[t] else 1.0  # of the radius, without a question
    # By half of APART at most: where states lie that far apart, two tokens never fit.
    if not share * radius < near <= APART / 2 * radius:
        return
    routes = torch.cat([step.tokens(token.expand(n))[-1:] for n in (1, 7, ROWS)])
    noise = SAFETY * float(torch.pdist(routes.double()).max())
    if near <= noise:
        observed.radius[t] = min(max(radius, noise), APART / 2 * radius)


def bit_for_bit(
    distance: Distances,
    observed: Observation,
    prefix: Tokens,
    passes: Sequence[int],
    step: OneStepMap,
) -> tuple[Distances, float]:
    """Distances and radius, computed anew where several tokens lie within the noise.

    A pass of the same length rounds in the same way, whatever stands behind: the true
    token comes out bit for bit, with radius zero. On other hardware nothing changes.
    """
    t = len(prefix)
    radius = float(observed.radius[t])
    within = (distance <= radius).nonzero()[:, 0]
    # Up to the pass that holds t, with whatever tokens came behind.
    starts = accumulate(passes, initial=0)
    lengths = [n for n, start in zip(passes, starts, strict=False) if start <= t]
    row = pad(prefix, (0, sum(lengths) - t))
    anew = []
    # Of fewer than two the noise leaves nothing to decide.
    for token in within if len(within) > 1 else ():
        row[t] = token
        states = repeated(step.model, step.layer, row, lengths)
        anew.append(observed.distance(t, states[t : t + 1]))
    if any(bool(d == 0) for d in anew):
        return distance.index_copy(0, within, torch.cat(anew)), 0.0
    return distance, radius


def repeated(
    model: LanguageModel, layer: int, tokens: Tokens, passes: Sequence[int]
) -> States:
    """The states of tokens to the last bit, as passes of these lengths round them."""
    first, *others = tokens.split(list(passes))
    # No cache in the first pass: the very computation that made the states.
    parts = [model.states(first, layer)]
    step = OneStepMap.after(model, layer, first if others else None)
    for rows in others:
        states, step = step.follow(rows)
        parts.append(states)
    return torch.cat(parts)
