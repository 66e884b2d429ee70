"""The prompt from one vector: the state of its last token at a layer (``last_state``).

The paper leaves an algorithm open. This one sharpens a belief, a probability for every
token at every position: draw prompts from it, linearise the model at one of them,
measure on all how wrong that is, and score every token against the rest of the state.
Then blocks of positions are forgotten and recovered. Nothing is returned unverified.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

from sipit_lite.acceptance import Observation, States, Tokens
from sipit_lite.extensions.lens import Pairs, Regression, ridge
from sipit_lite.model import LanguageModel, SipItError, StatesError, plain_settings
from sipit_lite.onestep import ROWS
from sipit_lite.policies import State
from sipit_lite.recovery import Interrupted, Recovery
from sipit_lite.sipit import SALT

LONGEST = 16  # tokens of the longest prompt looked for, where no length is given
DRAWN = 96  # prompts of a round; the error of the linear model is measured on them
DAMPING = 0.5  # share of the log-belief that a round replaces
ALL = 6  # rounds over all positions
BLOCK = 5  # rounds over a block that was forgotten
SURE = 0.9  # a belief that repeats tokens of this probability is not sharpened further
BLOCKS = 3  # blocks tried in a row before a search gives way to the next restart
RESTARTS = 16  # how often a search begins
NEIGHBOURS = 0.5  # share of a token's law that the token before has; the rest is prior
LARGEST = 16_384  # vocabulary whose table of neighbours, a gigabyte then, is made
TRUST = 0.5  # share of a regression's log-likelihood: its residuals are not normal
CALM = 0.16  # of that for the last token: where held-out last tokens are likeliest
HOPE = 1e-3  # least share of the prior in any belief about the last token
TILT = 1.0  # standard deviation by which all restarts but the first tilt log-priors
FAR = 8.0  # distance that a length is taken to have before its first step
RIVALS = 8  # tokens with the nearest embeddings, each put in a recovered one's place

Prompts = Int[Tensor, "row pos"]
OverVocab = Float[Tensor, " vocab"]
Rows = Float[Tensor, "block vocab"]
Squares = Float[Tensor, "block d_model d_model"]


class LastStateError(SipItError):
    """A question without an answer: a bad length, budget or regression."""


class NotRecovered(LastStateError):
    """No prompt read agrees; ``recovered`` is the closest one, not verified."""

    def __init__(self, line: str, recovered: object = None, other: object = None):
        # Defaults: pickle makes an error from its message before it knows the rest.
        super().__init__(line)
        self.recovered = recovered
        self.other = other


class Collision(NotRecovered):
    """Several prompts agree; ``recovered`` is one of them, ``other`` another."""


@plain_settings()
def invert_last(
    state: Tensor,
    model: LanguageModel,
    layer: int | None = None,
    length: int | None = None,
    *,
    epsilon: float | None = None,
    ends: "Ends | None" = None,
    longest: int | None = None,
    seconds: float = 300.0,
    seed: int = 0,
    progress: bool = False,
) -> Recovery:
    """Recover the exact prompt from its last-token state alone, or refuse.

    Parameters
    ----------
    state, layer: shape (d_model,), before the final norm; by default of the last layer
    length, longest: T where it is known, else all lengths up to ``longest`` (16)
    epsilon: a bound on noise that was added to the state on purpose, ℓ2
    ends: a regression for this model and layer; by default it is fitted, once
    seconds: wall-clock time after which to give up

    Of the ``Recovery`` all positions but the last are NaN; ``runner_up`` is the closest
    of ``rivals``. Raises ``StatesError``, ``ModelError``, ``LastStateError`` for a bad
    state, layer, length or budget; ``NotRecovered``, ``Collision``, ``Interrupted``,
    with the closest prompt, where none agrees or several, or on Ctrl-C.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> ends = Ends.fit(model, 1, longest=2, tokens=2000, features=0)
    >>> state = model.states("hidden states", 1)[-1]
    >>> invert_last(state, model, layer=1, length=2, ends=ends).text
    'hidden states'
    """
    started = time.perf_counter()
    layer = model.n_layers if layer is None else layer
    if isinstance(state, Tensor) and state.ndim != 1:
        shape = tuple(state.shape)
        raise StatesError(f"got a state of shape {shape}; expected ({model.d_model},)")
    rows = state[None] if isinstance(state, Tensor) else state  # refused there
    observed = Observation.of(rows, model, layer, epsilon)
    longest = min(LONGEST, model.n_positions) if longest is None else longest
    if torch.finfo(model.dtype).bits <= 16:
        got = f"got a model that computes in {model.dtype}"
        raise LastStateError(f"{got}; expected torch.float32 or torch.float64")
    for name, value in {"length": length, "longest": longest}.items():
        if value is not None and not 1 <= value <= model.n_positions:
            reads = f"{model.name} reads 1 to {model.n_positions} tokens"
            raise LastStateError(f"got {name}={value}; {reads}")
    if layer == 0 and length != 1:
        got = "got layer 0, whose last state knows the last token alone"
        raise LastStateError(f"{got}; expected length=1, or layer 1")
    if not seconds > 0:  # NaN too
        raise LastStateError(f"got seconds={seconds}; expected a budget above 0")
    ends = ends or fitted_ends(model, layer, max(longest, length or 1))
    most = length or longest
    whose = "this" if ends.model is model else "another"
    if whose == "another" or ends.layer != layer or ends.longest < most:
        got = f"layer {ends.layer} and up to {ends.longest} tokens of {whose} model"
        needed = f"layer {layer} of {model.name} and {most} tokens"
        raise LastStateError(f"got a fit for {got}; expected one for {needed}")
    said = ends.read(observed.states[0]).to(model.dtype)[:, :most]
    generator = torch.Generator().manual_seed(seed + SALT)  # one for all lengths
    law = Law.of(model, ends)
    last = LastMap(model, layer)
    searches = {}
    for n in range(length or 1, most + 1):
        search = Search(last, observed, law.ending(said[:, n - 1]), generator)
        searches[n] = search.steps(n)
    best = Guess(torch.zeros(1, dtype=torch.long), torch.inf, 0)
    try:
        steps = _by_promise(searches, said.logsumexp(0))
        bar = tqdm(steps, "inverting", disable=None if progress else True)
        for step in bar:
            best = best.or_closer(step)
            bar.set_postfix_str(f"distance {best.distance:.3g}")
            if search.agrees(best) or time.perf_counter() - started > seconds:
                break
        return checked(search, best, started, None if length else longest)
    except KeyboardInterrupt:
        raise Interrupted(_recovery(search, best, started)) from None


@dataclass(frozen=True, eq=False)
class LastMap:
    """F(e_1, …, e_T) = h_T: the last-token state of a layer as a map of embeddings."""

    model: LanguageModel
    layer: int

    def embeddings(self, e: Float[Tensor, "row pos d_model"]) -> States:
        """The state of each row of embeddings; differentiable in e."""
        output = self.model.cut(self.layer)(inputs_embeds=e, use_cache=False)
        return output.last_hidden_state[:, -1].to(self.model.device)

    def tokens(self, prompts: Prompts) -> States:
        """The state of each row of token ids."""
        table = self.model.embeddings
        with torch.no_grad():
            parts = [self.embeddings(table[rows]) for rows in prompts.split(ROWS)]
        return torch.cat(parts)

    def jacobians(self, e: Float[Tensor, "pos d_model"], block: slice) -> Squares:
        """∂F/∂e_t for the positions t of a block, by one batched reverse pass."""
        with torch.enable_grad():
            free = e[block].detach().clone().requires_grad_()
            # The other positions are constants, which saves their derivatives.
            row = torch.cat([e[: block.start], free, e[block.stop :]])
            state = self.embeddings(row[None])[0]
            each = torch.eye(len(state)).to(state)
            # Layer 0 does not depend on earlier positions: zeros, not an error.
            how = {"is_grads_batched": True, "materialize_grads": True}
            (slopes,) = torch.autograd.grad(state, free, each, **how)
        return slopes.transpose(0, 1)  # position first, then number of the state


@dataclass(frozen=True, eq=False)
class Ends(Regression):
    """What a last-token state says of the last token and of T, by one regression."""

    model: LanguageModel
    layer: int
    longest: int
    frequency: OverVocab  # how often the model itself writes each token

    @classmethod
    @plain_settings()
    def fit(
        cls,
        model: LanguageModel,
        layer: int,
        longest: int = LONGEST,
        tokens: int = 20_000,
        features: int = 512,
    ) -> "Ends":
        """Fit on so many tokens, in prompts of ``longest`` and all their beginnings."""
        generator = torch.Generator().manual_seed(0)
        shape = (max(1, tokens // longest // 2), longest)
        drawn = torch.randint(model.vocab_size, shape, generator=generator)
        written = _written(model, shape, generator)  # half random, half plausible
        prompts = torch.cat([drawn.to(model.device), written])

        def pairs() -> Pairs:
            for ids in prompts.split(ROWS):
                length = torch.eye(longest, device=model.device).repeat(len(ids), 1)
                goals = torch.cat([model.embeddings[ids.flatten()], length], 1)
                yield model.states(ids, layer).flatten(0, 1), goals

        fields = vars(ridge(pairs(), features, generator))
        # Half a sighting for all, so that no token is impossible.
        counts = torch.bincount(written.flatten(), minlength=model.vocab_size) + 0.5
        return cls(*fields.values(), model, layer, longest, counts / counts.sum())

    def read(self, state: State) -> Float[Tensor, "vocab longest"]:
        """Log-probabilities of each last token and length together."""
        whiten = self.whiten.double()  # a direction without residual cancels there
        tokens, lengths = whiten.split([self.model.d_model, self.longest])
        away = self.model.embeddings.double() @ tokens
        away -= self.predict(state).double() @ whiten
        squares = away.square().sum(1)[:, None] + 2 * away @ lengths.T
        squares += lengths.square().sum(1)
        likely = (-TRUST / 2 * squares).flatten().log_softmax(0)
        return likely.view_as(squares).float()


def fitted_ends(model: LanguageModel, layer: int, longest: int) -> Ends:
    """``Ends.fit`` with its defaults, once for a model, a layer and a length."""
    key = ("ends", layer, longest)
    if key not in model.measured:
        model.measured[key] = Ends.fit(model, layer, longest)
    return model.measured[key]


def _next_law(model: LanguageModel, e: Tensor, cache: DynamicCache | None) -> Tensor:
    """The model's own law of the next token after rows of embeddings, (row, vocab)."""
    use = cache is not None  # else every pass would make one
    table = model.decoder.get_input_embeddings().weight
    with torch.no_grad():
        read = model.decoder(inputs_embeds=e, past_key_values=cache, use_cache=use)
        return (read.last_hidden_state[:, -1] @ table.T).softmax(-1)


def _written(model: LanguageModel, shape: tuple, generator: torch.Generator) -> Prompts:
    """Prompts that the model writes itself after a random token; else random ones."""
    ids = torch.randint(model.vocab_size, shape, generator=generator).to(model.device)
    cache = DynamicCache()
    tied = model.decoder.config.tie_word_embeddings
    for t in range(1, shape[1] if tied else 1):
        law = _next_law(model, model.embeddings[ids[:, t - 1 : t]], cache)
        law = law.float().cpu()  # the same prompts on every device
        ids[:, t] = torch.multinomial(law, 1, generator=generator)[:, 0]
    return ids


def followers(model: LanguageModel) -> Float[Tensor, "vocab vocab"] | None:
    """P(v | u) after ⟨u⟩ alone; None beyond ``LARGEST`` tokens, or if not tied."""
    if not model.decoder.config.tie_word_embeddings or model.vocab_size > LARGEST:
        return None
    key = ("followers",)
    if key not in model.measured:
        rows = model.embeddings[:, None].split(ROWS)
        model.measured[key] = torch.cat([_next_law(model, e, None) for e in rows])
    return model.measured[key]


@dataclass(frozen=True, eq=False)
class Law:
    """What is expected of a prompt before its state is looked at: a Markov chain."""

    anywhere: OverVocab  # the probability of each token
    after: Tensor | None = None  # by the token before, where these are not independent
    last: OverVocab | None = None  # log-evidence about the last token

    @classmethod
    def of(cls, model: LanguageModel, ends: Ends) -> "Law":
        """``followers``; anywhere half uniform, half how often the model writes it."""
        anywhere = ends.frequency / 2 + 1 / (2 * model.vocab_size)
        return cls(anywhere.to(model.embeddings), followers(model))

    def ending(self, last_token: OverVocab) -> "Law":
        """With what ``Ends`` says of the last token: ``CALM`` of it, and a floor."""
        said = (CALM * last_token).log_softmax(0) + math.log1p(-HOPE)
        floor = self.anywhere.log() + math.log(HOPE)
        return replace(self, last=torch.logaddexp(said, floor))

    def next(self, law: OverVocab) -> OverVocab:
        """The law of a token, if this is the law of the one before, up to a factor."""
        if self.after is None:
            return self.anywhere
        follow = law / law.sum() @ self.after  # each row of ``after`` is a law
        return NEIGHBOURS * follow + (1 - NEIGHBOURS) * self.anywhere

    def back(self, likelihood: OverVocab) -> OverVocab:
        """The likelihood of a token, if this is that of the one behind it."""
        if self.after is None:
            return torch.ones_like(likelihood)
        likelihood = likelihood / likelihood.sum()  # else it vanishes along the chain
        lead = self.after @ likelihood
        return NEIGHBOURS * lead + (1 - NEIGHBOURS) * (likelihood @ self.anywhere)

    def given(self, ids: Tokens, block: slice, evidence: Rows) -> Rows:
        """Log-probabilities of a block's tokens, given log-evidence and all others."""
        known = nn.functional.one_hot(ids, len(self.anywhere)).to(self.anywhere)
        forward = [self.anywhere]
        if block.start > 0:
            forward = [self.next(known[block.start - 1])]
        backward = [torch.ones_like(self.anywhere)]
        if block.stop < len(ids):
            backward = [self.back(known[block.stop])]
        elif self.last is not None:
            evidence = torch.cat([evidence[:-1], evidence[-1:] + self.last])
        # At most 1, so that nothing overflows; factors of a position cancel at the end.
        weight = (evidence - evidence.amax(-1, keepdim=True)).exp()
        for k in range(len(evidence) - 1):
            forward.append(self.next(forward[-1] * weight[k]))
            backward.append(self.back(backward[-1] * weight[-1 - k]))
        both = torch.stack(forward).log() + torch.stack(backward[::-1]).log()
        return (evidence + both).log_softmax(-1)


@dataclass(frozen=True, eq=False)
class Belief:
    """Log-probabilities of every token at the ``block`` of positions of ``ids``."""

    log: Rows
    ids: Tokens
    block: slice

    def draw(self, count: int, generator: torch.Generator) -> Prompts:
        """Prompts drawn from it; the first takes the likeliest token everywhere."""
        size, vocab = self.log.shape
        if size == 1 and count <= vocab:
            drawn = self.log.topk(count).indices  # each once: no need for luck
        else:
            law = self.log.exp().cpu()
            drawn = torch.multinomial(law, count, replacement=True, generator=generator)
            drawn[:, 0] = self.log.argmax(-1)  # the answer, if the belief is right
        prompts = self.ids.repeat(count, 1)
        prompts[:, self.block] = drawn.T.to(self.ids)
        return prompts

    def moments(self, table: Float[Tensor, "vocab d_model"]) -> tuple[States, Squares]:
        """Mean and covariance of the embedding at each position."""
        law = self.log.exp()
        mean = law @ table
        # One position at a time: a weighted copy of the table each.
        square = torch.stack([(table * q[:, None]).T @ table for q in law])
        return mean, square - mean[:, :, None] * mean[:, None, :]


def sharpened(
    belief: Belief, law: Law, goal: State, last: LastMap, drawn: Prompts, states: States
) -> Belief:
    """One round: the belief after the state is compared with a linear model of the map.

    The model is c + Σ J_t (e_t − m_t), right on average on the ``drawn`` prompts. A
    token at t is scored by a normal density with covariance S = R + Σ J_u C_u J_uᵀ over
    other positions u: R is that of its error, C_u that of an embedding.
    """
    table = last.model.embeddings
    mean, spread = belief.moments(table)
    # Not at the means, where a linear model is worse than a constant (``last_state``).
    slopes = last.jacobians(table[drawn[1]], belief.block)
    away = table[drawn[:, belief.block]] - mean
    error = states - torch.einsum("nij,snj->si", slopes, away)
    centre = error.mean(0)
    residual = goal - centre
    parts = slopes @ spread @ slopes.mT  # J_t C_t J_tᵀ, what each position explains
    explained = parts.sum(0)
    noise = error_covariance(error - centre, residual, explained)
    left = residual + (slopes @ mean[..., None])[..., 0]  # y: this position unknown
    factor, failed = torch.linalg.cholesky_ex(noise + explained - parts)
    # A belief so sure that its covariance is rounding says no more than it did.
    if failed.any():
        return belief
    solved = torch.cholesky_solve(torch.cat([slopes, left[..., None]], -1), factor)
    # −½ (y − J E_v)ᵀ S⁻¹ (y − J E_v) multiplied out: the table meets d × d matrices.
    projected = slopes.mT @ solved  # Jᵀ S⁻¹ [J, y]
    linear = (table @ projected[..., -1:])[..., 0]
    quadratic = (table @ projected[..., :-1] * table).sum(-1)
    new = law.given(belief.ids, belief.block, linear - quadratic / 2)
    mixed = (1 - DAMPING) * belief.log + DAMPING * new
    return replace(belief, log=mixed.log_softmax(-1))


def error_covariance(error: States, residual: State, explained: Tensor) -> Tensor:
    """Covariance of the error of a linear model, half way to a multiple of I."""
    width = len(residual)
    sample = error.T @ error / len(error)
    size = sample.diagonal().mean() / 2  # half of it, as the same for all directions
    square = residual.square().sum()
    # What nothing explains goes to all directions: it unsettles a wrong belief.
    missing = (square - (2 * size * width + explained.diagonal().sum())) / width
    # Never singular, also where prompts were drawn that agree exactly.
    least = square.clamp_min(torch.finfo(residual.dtype).tiny) * 1e-6
    extra = size + torch.maximum(missing, least)
    return sample / 2 + extra * torch.eye(width).to(error)


class Guess(NamedTuple):
    """A prompt, the distance of its last state, and how many prompts were read."""

    ids: Tokens
    distance: float
    tested: int

    def or_closer(self, other: "Guess") -> "Guess":
        """The closer of two; what was read adds up."""
        closer = other if other.distance < self.distance else self
        return closer._replace(tested=self.tested + other.tested)


@dataclass(frozen=True, eq=False)
class Search:
    """The search for one observed last state, under a law of prompts."""

    last: LastMap
    observed: Observation
    law: Law
    generator: torch.Generator

    def agrees(self, guess: Guess) -> bool:
        """Whether the state of a prompt lies inside the radius."""
        return guess.distance <= float(self.observed.radius)

    def read(self, prompts: Prompts, states: States) -> Guess:
        """The closest of prompts whose last states are known."""
        distance, which = self.observed.distance(0, states).min(0)
        return Guess(prompts[which], float(distance), len(prompts))

    def steps(self, length: int) -> Iterator[Guess]:
        """Yield the closest prompt of each step: all positions, blocks, then anew."""
        if length == 1:
            prompts = self.last.model.vocabulary[:, None]
            yield self.read(prompts, self.last.tokens(prompts))
            return
        drawing = {"generator": self.generator}
        nothing = torch.zeros(length, dtype=torch.long, device=self.last.model.device)
        for restart in range(RESTARTS):
            current = self.rounds(nothing, slice(0, length), ALL, TILT * (restart > 0))
            yield current
            for k in range(BLOCKS):
                # A block of one seldom helps: its neighbours are wrong as well.
                size = int(torch.randint(min(2, length - 1), length, (1,), **drawing))
                first = int(torch.randint(length - size + 1, (1,), **drawing))
                tilt = TILT * float(torch.rand(1, **drawing)) * (k > 0)
                block = slice(first, first + size)
                guess = self.rounds(current.ids, block, BLOCK, tilt)
                yield guess
                current = current.or_closer(guess)

    def rounds(self, ids: Tokens, block: slice, count: int, tilt: float) -> Guess:
        """The closest prompt while a block is recovered; ``tilt``: random evidence."""
        shape = (len(ids[block]), len(self.law.anywhere))
        noise = torch.randn(shape, generator=self.generator).to(self.law.anywhere)
        belief = Belief(self.law.given(ids, block, tilt * noise), ids, block)
        best = Guess(ids, torch.inf, 0)
        settled = torch.full_like(ids[block], -1)
        for k in range(count + 1):
            drawn = belief.draw(DRAWN, self.generator)
            states = self.last.tokens(drawn)
            best = best.or_closer(self.read(drawn, states))
            sure, likeliest = belief.log.max(-1)
            stuck = likeliest.equal(settled) and bool((sure.exp() > SURE).all())
            if k == count or stuck or self.agrees(best):
                break
            settled = likeliest
            goal = self.observed.states[0]
            belief = sharpened(belief, self.law, goal, self.last, drawn, states)
        return best


def _by_promise(searches: dict, likely: Tensor) -> Iterator[Guess]:
    """Yield steps of searches by length, the most promising one first."""
    # Time, a token each, goes by √(probability of the length) / distance so far.
    weight = likely.exp().clamp_min(1e-9).sqrt().tolist()
    spent = dict.fromkeys(searches, 0)
    nearest = dict.fromkeys(searches, FAR)
    while searches:
        price = {n: n * (spent[n] + 1) * nearest[n] / weight[n - 1] for n in searches}
        n = min(price, key=price.get)
        step = next(searches[n], None)
        if step is None:
            del searches[n]
            continue
        nearest[n] = min(nearest[n], step.distance) if spent[n] else step.distance
        spent[n] += 1
        yield step


def _recovery(search: Search, guess: Guess, started: float, *rival: float) -> Recovery:
    """A prompt as a ``Recovery``, not verified: NaN at all positions but the last."""
    ids = guess.ids.cpu()
    columns = torch.full((4, len(ids)), torch.nan)
    known = [guess.distance, min(rival, default=torch.inf), search.observed.radius[0]]
    columns[:3, -1] = torch.tensor(known)
    *measured, margin = columns
    tested = torch.zeros_like(ids)
    tested[-1] = guess.tested
    unsure = torch.zeros_like(ids).bool()
    rest = (search.last.model.decode(ids), time.perf_counter() - started)
    return Recovery(ids, *measured, tested, unsure, margin, *rest, search.last.layer)


def checked(search: Search, best: Guess, started: float, most: int | None) -> Recovery:
    """Read the prompt once more, alone, and its rivals, up to ``most`` tokens."""
    model = search.last.model
    state = model.states(best.ids, search.last.layer)[-1:]
    again = search.read(best.ids[None], state)._replace(tested=best.tested)
    recovered = _recovery(search, again, started)
    line = f"{recovered.text!r} ({len(best.ids)} tokens) is {again.distance:.3g} away"
    line += f", radius {float(search.observed.radius):.3g}"
    # Alone and in a batch: two routes, as the noise floor was measured.
    if not (search.agrees(again) and search.agrees(best)):
        line = f"no prompt was found: the closest of {best.tested} read, {line}"
        raise NotRecovered(f"{line}, after {recovered.seconds:.0f} s", recovered)
    rival = Guess(best.ids, torch.inf, 0)
    for prompts in rivals(model, best.ids, most):
        rival = rival.or_closer(search.read(prompts, search.last.tokens(prompts)))
    recovered = _recovery(search, again, started, rival.distance)
    if search.agrees(rival):
        other = rival.ids.cpu()
        line += f"; so is {model.decode(other)!r} ({len(other)} tokens)"
        raise Collision(f"{line}, {rival.distance:.3g} away", recovered, other)
    return replace(recovered, verified=torch.ones_like(recovered.verified))


def rivals(model: LanguageModel, ids: Tokens, longest: int | None) -> list[Tensor]:
    """The prompts most likely to share a last state with one, by their lengths."""
    table = model.embeddings.float()
    count = min(RIVALS, model.vocab_size - 1)
    apart = torch.cdist(table[ids], table).scatter(1, ids[:, None], torch.inf)
    near = ids.repeat(len(ids), count, 1)
    positions = torch.arange(len(ids))
    near[positions, :, positions] = apart.topk(count, largest=False).indices
    # Models of relative positions cannot always count repeated tokens (``positions``).
    resized = (ids[1:], torch.cat([ids[:1], ids]))
    fitting = [rows[None] for rows in resized if 1 <= len(rows) <= (longest or 0)]
    return [near.flatten(0, 1), *fitting]
