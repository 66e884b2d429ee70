"""The prompt from one vector: the state of its last token at a layer (``last_state``).

The paper leaves an algorithm open. This one measures at a prompt what tokens do to the
state at each position, adds these effects up, and cools many prompts until their sums
explain the state. At the closest it measures next. Nothing is returned unverified.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from tqdm import tqdm
from transformers import DynamicCache

from sipit_lite.acceptance import Observation, States, Tokens
from sipit_lite.extensions.imprints import imprints, regressed, whitening
from sipit_lite.extensions.lens import Pairs, Regression, ridge
from sipit_lite.model import LanguageModel, SipItError, StatesError, plain_settings
from sipit_lite.onestep import ROWS, OneStepMap
from sipit_lite.policies import State
from sipit_lite.recovery import Interrupted, Recovery
from sipit_lite.sipit import SALT

LONGEST = 16  # tokens of the longest prompt looked for, where no length is given
CHAINS = 256  # prompts cooled at once
MEASURED = 512  # tokens read at the last position, half the likeliest, half by law
OPTIONS = 8192  # tokens that a position may have while prompts are cooled
SWEEPS = 8  # visits to each position while a prompt is cooled
HOT = 0.1  # share of the log-likelihood that counts in the first sweep
COLD = 2.5  # the same in the last sweep, of the coldest prompt; of the hottest 1
PATIENCE = 4  # rounds in a row that may come no closer before a restart
TRUST = 0.5  # share of a regression's log-likelihood: its residuals are not normal
CALM = 0.16  # of that for the last token: where held-out last tokens are likeliest
HOPE = 1e-3  # least share of the prior in any belief about the last token
LEAST = -25.0  # log-probability of any token where part of a prompt is drawn anew
LENT = 64  # prompts with tokens of another length's closest, drawn for each round
RIVALS = 8  # tokens with the nearest embeddings, each put in a recovered one's place

Prompts = Int[Tensor, "row pos"]
OverVocab = Float[Tensor, " vocab"]
Rows = Float[Tensor, "row vocab"]
Likely = Float[Tensor, "pos vocab"]
Each = Float[Tensor, "pos options numbers"]
Options = Int[Tensor, "pos options"]
Known = dict[int, tuple[Tensor, Tensor]]  # tokens of a position, their effects


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

    Returns
    -------
    Recovery: NaN at all positions but the last; the ``runner_up`` is one of ``rivals``

    Raises
    ------
    StatesError, ModelError, LastStateError: a bad state, layer, length or budget
    NotRecovered, Collision, Interrupted: with the closest prompt; none or several agree

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
    generator = Generator(model.device).manual_seed(seed + SALT)  # of all lengths
    start = OneStepMap.after(model, layer)
    searches = {}
    closest = {}
    for n in range(length or 1, most + 1):
        law = prior_law(ends.frequency.to(said), said[:, n - 1], n)
        search = Search(start, observed, law, generator, closest)
        searches[n] = search.steps()
    best = Guess(torch.zeros(1, dtype=torch.long), torch.inf, 0)
    try:
        steps = _by_promise(searches, closest, said.logsumexp(0))
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
        generator = Generator().manual_seed(0)
        shape = (max(1, tokens // longest // 2), longest)
        drawn = torch.randint(model.vocab_size, shape, generator=generator)
        # Half random, half plausible.
        written, frequency = _written(model, shape, generator)
        prompts = torch.cat([drawn.to(model.device), written])

        def pairs() -> Pairs:
            for ids in prompts.split(ROWS):
                length = torch.eye(longest, device=model.device).repeat(len(ids), 1)
                goals = torch.cat([model.embeddings[ids.flatten()], length], 1)
                yield model.states(ids, layer).flatten(0, 1), goals

        fields = vars(ridge(pairs(), features, generator))
        return cls(*fields.values(), model, layer, longest, frequency)

    def read(self, state: State) -> Float[Tensor, "vocab longest"]:
        """Log-probabilities of each last token and length together."""
        whiten = self.whiten.double()  # a direction without residual cancels there
        tokens, lengths = whiten.tensor_split([-self.longest])
        away = self.predict(state).double() @ whiten
        apart = torch.cdist(away - self.model.embeddings.double() @ tokens, lengths)
        likely = (-TRUST / 2 * apart.square()).flatten().log_softmax(0)
        return likely.view_as(apart).float()


def fitted_ends(model: LanguageModel, layer: int, longest: int) -> Ends:
    """``Ends.fit`` with its defaults, once for a model, a layer and a length."""
    key = ("ends", layer, longest)
    if key not in model.measured:
        model.measured[key] = Ends.fit(model, layer, longest)
    return model.measured[key]


def _written(model: LanguageModel, shape: tuple, generator: Generator) -> tuple:
    """Prompts that the model writes itself after a random token, and their mean law."""
    ids = torch.randint(model.vocab_size, shape, generator=generator).to(model.device)
    total = torch.full((model.vocab_size,), 1 / model.vocab_size)
    cache = DynamicCache()
    table = model.decoder.get_input_embeddings().weight
    tied = model.decoder.config.tie_word_embeddings
    for t in range(1, shape[1] if tied else 1):
        e = model.embeddings[ids[:, t - 1 : t]]
        with torch.no_grad():
            read = model.decoder(inputs_embeds=e, past_key_values=cache, use_cache=True)
            law = (read.last_hidden_state[:, -1] @ table.T).softmax(-1)
        law = law.float().cpu()  # the same prompts on every device
        total += law.mean(0)
        ids[:, t] = torch.multinomial(law, 1, generator=generator)[:, 0]
    return ids, (total / total.sum()).to(model.device)


def prior_law(frequency: OverVocab, last_token: OverVocab, length: int) -> Likely:
    """Log-probabilities of tokens at each position before the state is searched for.

    Half uniform, half the ``frequency``; of the last token what ``Ends`` says besides.
    """
    prior = (frequency / 2 + 1 / (2 * len(frequency))).log()
    said = (CALM * last_token).log_softmax(0) + math.log1p(-HOPE)
    last = prior + torch.logaddexp(said, prior + math.log(HOPE))
    return torch.stack([prior] * (length - 1) + [last.log_softmax(0)])


def sampled(score: Rows, generator: Generator) -> Tokens:
    """A token for each row of log-probabilities up to constants."""
    sums = score.softmax(-1).cumsum(-1)
    chance = torch.rand(len(sums), 1, generator=generator, device=sums.device)
    # Where the sums pass this share of all: one random number for each row.
    place = torch.searchsorted(sums, chance.to(sums) * sums[:, -1:])[:, 0]
    return place.clamp_max(sums.shape[1] - 1)


def mean_law(score: Rows) -> OverVocab:
    """Log-probabilities of a row drawn blindly: no token is ever rounded to zero."""
    return score.log_softmax(-1).logsumexp(0) - math.log(len(score))


class Effects(NamedTuple):
    """What each token at each position of a prompt does to its last state."""

    state: State
    options: Options  # tokens, sorted: all of them, or the likeliest
    each: Each  # the state with that token there, less the state

    def sums(self, prompts: Prompts) -> States:
        """The states of prompts if effects simply added up: exact for one change."""
        columns = torch.searchsorted(self.options, prompts.T.contiguous())
        positions = torch.arange(len(self.each))[:, None]
        return self.state + self.each[positions, columns].sum(0)

    def whitened(self, goal: State, error: States) -> tuple[Each, State]:
        """Effects, in place, and their goal in units of the ``error`` of prompts."""
        centre = error.mean(0)
        least = torch.finfo(goal.dtype).eps * self.state.square().mean() + 1e-30
        whiten = whitening(error - centre, least)
        for effects in self.each:  # one position at a time: the table is large
            effects.copy_(effects @ whiten)
        return self.each, (goal - self.state - centre) @ whiten


def cooled(
    prompts: Prompts,
    free: Bool[Tensor, "row pos"],
    law: Likely,
    options: Options,
    each: Each,
    goal: Float[Tensor, " numbers"],
    generator: Generator,
) -> tuple[Prompts, Likely]:
    """Simulated annealing by Gibbs sampling: a normal likelihood of sums, and a law.

    Draws the ``free`` positions one after the other, given the rest; ``each`` and
    ``goal`` are in units of the error. Returns the mean log-law of the last sweep too.
    """
    prompts = prompts.clone()
    likely = law + LEAST
    half = each.square().sum(-1) / 2
    columns = torch.searchsorted(options, prompts.T.contiguous())
    total = each[torch.arange(len(each))[:, None], columns].sum(0)
    coldest = torch.logspace(0, math.log10(COLD), len(prompts)).to(each)[:, None]
    for sweep in range(SWEEPS):
        share = coldest * HOT ** (1 - sweep / (SWEEPS - 1))
        order = torch.randperm(len(each), generator=generator, device=each.device)
        for t in order.tolist():
            rest = goal - total + each[t, columns[t]]
            # −½ ‖rest − effect‖², less what is the same for all tokens.
            score = share * (rest @ each[t].T - half[t])
            score += law[t, options[t]]
            if sweep == SWEEPS - 1:
                likely[t, options[t]] = mean_law(score)
            drawn = torch.where(free[:, t], sampled(score, generator), columns[t])
            total += each[t, drawn] - each[t, columns[t]]
            columns[t] = drawn
            prompts[:, t] = options[t, drawn]
    return prompts, likely


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

    start: OneStepMap  # after the tokens that are known, as a rule none
    observed: Observation
    law: Likely  # of tokens at each position, before the state is looked at
    generator: Generator
    closest: dict  # prompts by length, whose searches lend each other tokens

    def agrees(self, guess: Guess) -> bool:
        """Whether the state of a prompt lies inside the radius."""
        return guess.distance <= float(self.observed.radius)

    def read(self, prompts: Prompts, states: States) -> Guess:
        """The closest of prompts whose last states are known."""
        distance, which = self.observed.distance(0, states).min(0)
        return Guess(prompts[which], float(distance), len(prompts))

    def steps(self) -> Iterator[Guess]:
        """Yield the closest prompt of each round; a restart forgets all but the law."""
        if len(self.law) == 1:
            prompts = self.start.model.vocabulary[:, None]
            yield self.read(prompts, last_states(self.start, prompts))
            return
        while True:
            likely = self.law
            prompts = self.drawn(likely)
            states = last_states(self.start, prompts)
            base = self.read(prompts, states)
            fresh = base
            free = torch.ones_like(prompts, dtype=torch.bool)
            stale = 0
            known: Known = {}
            while stale < PATIENCE:
                fresh = fresh.or_closer(self.lent(base))
                if fresh.distance < base.distance:
                    base = fresh
                    known = {}
                    stale = 0
                effects, near = self.effects(base.ids, prompts, likely, known)
                error = states - effects.sums(prompts)
                sums = effects.whitened(self.observed.states[0], error)
                drawing = (effects.options, *sums, self.generator)
                prompts, likely = cooled(prompts, free, self.law, *drawing)
                states = last_states(self.start, prompts)
                guess = self.read(prompts, states).or_closer(near).or_closer(fresh)
                yield guess
                stale = 0 if guess.distance < base.distance else stale + 1
                known = known if stale else {}
                base = base.or_closer(guess)
                free = torch.ones_like(free)
                fresh = Guess(base.ids, torch.inf, 0)
                if stale:
                    # Close to the base sums are more exact: change part of it only.
                    prompts, free = self.around(base.ids, likely)
                    states = last_states(self.start, prompts)
                    fresh = self.read(prompts, states)

    def lent(self, base: Guess) -> Guess:
        """The closest with tokens of another length's closest, in their order."""
        ids = base.ids
        record = self.closest.get(len(ids), base)
        others = [guess for n, guess in self.closest.items() if n != len(ids)]
        near = min(others, key=lambda guess: guess.distance, default=base)
        # A restart is left alone, unless another length has come closer than its own.
        if not others or record.distance < min(base.distance, near.distance):
            return Guess(ids, torch.inf, 0)
        other = near.ids
        drawing = {"generator": self.generator, "device": ids.device}
        places = []
        for n in (len(ids), len(other)):
            chance = torch.rand(LENT, n, **drawing)
            chance[:, -1] = 1.0  # the last token stays the last
            few = chance.topk(min(len(ids), len(other))).indices
            places.append(few.sort().values)
        mixed = ids.repeat(LENT, 1).scatter(1, places[0], other[places[1]])
        # From none of these tokens to all.
        share = torch.linspace(0, 1, LENT, device=ids.device)[:, None]
        rows = torch.where(torch.rand(mixed.shape, **drawing) <= share, mixed, ids)
        rows = rows.unique(dim=0)
        return self.read(rows, last_states(self.start, rows))

    def around(self, ids: Tokens, likely: Likely) -> tuple[Prompts, Tensor]:
        """Prompts with two to two thirds of the tokens, of two one, anew; and which."""
        drawing = {"generator": self.generator, "device": ids.device}
        most = max(1, 2 * len(ids) // 3)
        size = torch.randint(min(2, most), most + 1, (CHAINS, 1), **drawing)
        free = torch.rand(CHAINS, len(ids), **drawing).argsort(1).argsort(1) < size
        # Flatter than what is believed, which has led here.
        flat = likely.clamp_min(LEAST) / 2
        return torch.where(free, self.drawn(flat), ids), free

    def drawn(self, likely: Likely) -> Prompts:
        """Prompts by the log-law of each position."""
        options = {"replacement": True, "generator": self.generator}
        return torch.multinomial(likely.exp(), CHAINS, **options).T.contiguous()

    def effects(
        self, ids: Tokens, prompts: Prompts, likely: Likely, known: Known
    ) -> tuple[Effects, Guess]:
        """Effects at a prompt, the closest with one token changed; fills ``known``."""
        # What is expected first stands for all positions: of the last Ends has spoken.
        frequent = int(self.law[0].argmax())
        table = imprints(self.start.model, self.start.layer, frequent)
        state = last_states(self.start, ids[None])[0]
        each = state.new_empty(len(ids), min(OPTIONS, len(table)), len(state))
        options = []
        near = Guess(ids, torch.inf, 0)
        step = self.start
        for t in range(len(ids)):
            # Fewer where more tokens follow, which are passed for each of them.
            half = min(MEASURED // (2 * (len(ids) - t)), len(table))
            before, measured = known.get(t, (ids[:0], each[0, :0]))
            best = likely[t].index_fill(0, before, -torch.inf).topk(half).indices
            # Without regard to the state: effects not read may be predicted badly.
            chances = self.law[0].exp().index_fill(0, before, 0) + 1e-12
            others = torch.multinomial(chances, half, generator=self.generator)
            read = torch.cat([best, others]).unique()
            # The token there once more: there is a row at least.
            read = torch.cat([read[~torch.isin(read, before)], ids[t : t + 1]])
            rows = ids.repeat(len(read), 1)
            rows[:, t] = read
            states = last_states(step, rows[:, t:])
            near = near.or_closer(self.read(rows, states))
            tokens = torch.cat([before, read])
            known[t] = tokens, torch.cat([measured, states - state])
            needed = torch.cat([tokens, prompts[:, t]])
            ranked = likely[t].index_fill(0, needed, torch.inf)
            few = ranked.topk(each.shape[1]).indices.sort().values
            columns = torch.searchsorted(few, tokens)
            each[t] = regressed(table[few], columns, known[t][1])
            options.append(few)
            step = step.follow(ids[t : t + 1])[1]
        return Effects(state, torch.stack(options), each), near


def last_states(step: OneStepMap, rows: Prompts) -> States:
    """The last state of each of these continuations of a prompt."""
    return torch.cat([step.branch(part)[0][:, -1] for part in rows.split(ROWS)])


def _by_promise(searches: dict, closest: dict, likely: Tensor) -> Iterator[Guess]:
    """Yield steps of searches by length, the most promising first; keep the closest."""
    # Time, a token each, goes by √(probability of the length) / distance so far.
    weight = likely.exp().clamp_min(1e-9).sqrt().tolist()
    spent = dict.fromkeys(searches, 0)
    while searches:
        nearest = {n: guess.distance for n, guess in closest.items()}
        # A length not begun is taken to come as close as the others on average.
        typical = sum(nearest.values()) / len(nearest) if nearest else 1.0
        price = {}
        for n in searches:
            price[n] = n * (spent[n] + 1) * nearest.get(n, typical) / weight[n - 1]
        n = min(price, key=price.get)
        step = next(searches[n], None)
        if step is None:
            del searches[n]
            continue
        closest[n] = step.or_closer(closest.get(n, step))
        spent[n] += 1
        yield step


def _recovery(search: Search, guess: Guess, started: float, *rival: float) -> Recovery:
    """A prompt as a ``Recovery``, not verified: NaN at all positions but the last."""
    ids = guess.ids.cpu()
    columns = torch.full((4, len(ids)), torch.nan)
    known = [guess.distance, min(rival, default=torch.inf), search.observed.radius[0]]
    columns[:3, -1] = torch.tensor(known)
    tested = torch.zeros_like(ids)
    tested[-1] = guess.tested
    model = search.start.model
    rest = (model.decode(ids), time.perf_counter() - started, search.start.layer)
    return Recovery(ids, *columns[:3], tested, tested < 0, columns[3], *rest)


def checked(search: Search, best: Guess, started: float, most: int | None) -> Recovery:
    """Read the prompt once more, alone, and its rivals, up to ``most`` tokens."""
    model = search.start.model
    state = model.states(best.ids, search.start.layer)[-1:]
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
        states = last_states(search.start, prompts)
        rival = rival.or_closer(search.read(prompts, states))
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
    near.diagonal(dim1=0, dim2=2)[:] = apart.topk(count, largest=False).indices.T
    # Models of relative positions cannot always count repeated tokens (``positions``).
    resized = (ids[1:], torch.cat([ids[:1], ids]))
    fitting = [rows[None] for rows in resized if 1 <= len(rows) <= (longest or 0)]
    return [near.flatten(0, 1), *fitting]
