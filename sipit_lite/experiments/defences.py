"""Defences of hidden states: what is still recovered of the prompt, and what they cost.

A client runs the first blocks, changes the states, and sends them to a server. The
attacker sees these, and knows the model and the defence, all but the noise itself
(Kerckhoffs): it does to all candidates what a known function does (chapter 11).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import cross_entropy, log_softmax

from sipit_lite.acceptance import SAFETY, Observation, distance_to_stored, noise_floor
from sipit_lite.extensions.laststate import Guess, Search
from sipit_lite.extensions.reading import final_states
from sipit_lite.io.text import bundled
from sipit_lite.model import LanguageModel, ModelError, SipItError
from sipit_lite.onestep import OneStepMap

REACH = 5.0  # d normal numbers are longer than √d + REACH with p < exp(−REACH²/2)
ROUNDS = 20  # of the search for one run of dropped tokens

Ids = Int[Tensor, " pos"]
Texts = Iterable[Ids]
State = Float[Tensor, " d_model"]
States = Float[Tensor, "pos d_model"]
Cloud = Float[Tensor, "vocab d_model"]  # the state of every candidate
Costs = Float64[Tensor, " vocab"]
Fits = Bool[Tensor, " vocab"]


class DefenceError(SipItError):
    """A defence without sense: a bad strength, or positions that are not there."""


class Defence:
    """What a client does to each state, and what an attacker who knows it concludes.

    Here the attack on a known function: all that is left to chance is float noise,
    ``floor`` times the norm. Raises ``DefenceError`` for a strength outside ``limits``.
    """

    limits: tuple[float, float] = (0, 0)

    def __post_init__(self) -> None:
        name, number = next(iter(vars(self).items()))
        least, most = self.limits
        # Bits, dimensions and periods are integers, as their limits are.
        if not least <= number <= most or number != type(least)(number):
            raise DefenceError(f"got {self}; expected {name} from {least} to {most}")

    def positions(self, length: int) -> Ids:
        """Of the states that are sent."""
        return torch.arange(length)

    def send(self, states: States, seed: int = 0) -> States:
        """What the server receives; ``seed`` draws the noise, where there is any."""
        return states

    def surprise(self, sent: State, cloud: Cloud, floor: float) -> Costs:
        """−log of the likelihood of each candidate, up to a constant."""
        distance = vector_norm(self.send(cloud.double()) - sent.double(), dim=1)
        return (distance / (floor * vector_norm(cloud.double(), dim=1))).square() / 2

    def fits(self, sent: State, cloud: Cloud, floor: float) -> Fits:
        """The candidates that could have led to what was sent."""
        return self.surprise(sent, cloud, floor) <= 0.5  # a distance of one floor


@dataclass(frozen=True)
class Noise(Defence):
    """Gaussian noise: every number of h gets an error of deviation size·‖h‖/√d."""

    size: float
    limits = (1e-9, 1e9)

    def send(self, states: States, seed: int = 0) -> States:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(states.shape, generator=generator, dtype=torch.float64)
        error = drawn.to(states.device) * self._deviation(states)[:, None]
        return states + error.to(states)

    def surprise(self, sent: State, cloud: Cloud, floor: float) -> Costs:
        # A normal law around each candidate, as wide as its own norm would make it.
        deviation = self._deviation(cloud)
        square = (cloud.double() - sent.double()).square().sum(1)
        return square / (2 * deviation**2) + cloud.shape[1] * deviation.log()

    def fits(self, sent: State, cloud: Cloud, floor: float) -> Fits:
        # The true token is missed with a probability below 4 in a million.
        distance = vector_norm(cloud.double() - sent.double(), dim=1)
        return distance <= self._deviation(cloud) * (cloud.shape[1] ** 0.5 + REACH)

    def _deviation(self, states: States) -> Float64[Tensor, " pos"]:
        return self.size * vector_norm(states.double(), dim=1) / states.shape[1] ** 0.5


@dataclass(frozen=True)
class Rounding(Defence):
    """Every number in one of 2^bits equal steps from −m to m, where m = max |h_i|.

    >>> Rounding(1).send(torch.tensor([[2.0, -0.1]])).tolist()
    [[1.0, -1.0]]
    """

    bits: int
    limits = (1, 16)

    def send(self, states: States, seed: int = 0) -> States:
        half = 2 ** (self.bits - 1)  # steps on either side of zero
        step = states.abs().amax(1, keepdim=True) / half
        level = (states / step.where(step > 0, 1.0)).floor()
        # m itself begins a step above the last one; numbers go to the middle of theirs.
        return (level.clamp(max=half - 1) + 0.5) * step

    def fits(self, sent: State, cloud: Cloud, floor: float) -> Fits:
        # No number is further off than half a step; the outermost level is that inside.
        half_step = sent.abs().max() / (2**self.bits - 1)
        beyond = distance_to_stored(cloud, sent, half_step.expand_as(sent))
        return beyond <= floor * vector_norm(cloud, dim=1)


@dataclass(frozen=True)
class Projection(Defence):
    """Orthogonal projection onto a random subspace, drawn from a known ``key``."""

    dim: int
    key: int = 0
    limits = (1, 2**20)

    def send(self, states: States, seed: int = 0) -> States:
        width = states.shape[1]
        if self.dim > width:
            raise DefenceError(f"got {self}; the states have {width} dimensions")
        generator = torch.Generator().manual_seed(self.key)
        drawn = torch.randn(width, self.dim, generator=generator, dtype=torch.float64)
        # The Q of a Gaussian matrix spans a subspace that is uniformly distributed.
        basis = torch.linalg.qr(drawn).Q.to(states)
        return states @ basis @ basis.T


@dataclass(frozen=True)
class Dropping(Defence):
    """Of every ``period`` states the last is sent, the others are not.

    >>> Dropping(3).positions(8).tolist()
    [2, 5]
    """

    period: int
    limits = (2, 2**20)

    def positions(self, length: int) -> Ids:
        if length < self.period:
            raise DefenceError(f"got {self} of {length} states; none would be sent")
        return torch.arange(self.period - 1, length, self.period)


Masks = Sequence[Defence]


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a probability: the p with |p̂ − p| ≤ z √(p(1 − p)/n).

    >>> [round(end, 3) for end in wilson(10, 10)]
    [0.722, 1.0]
    """
    if not 0 <= successes <= trials or trials < 1:
        raise DefenceError(f"got {successes} successes in {trials} trials")
    share = successes / trials
    weight = NormalDist().inv_cdf(0.975) ** 2 / trials
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def openings(model: LanguageModel, length: int, seed: int = 0) -> Iterator[Ids]:
    """The first ``length`` tokens of each bundled passage of prose that has so many."""
    texts = bundled("prose")  # held out: the bundled model was not trained on them
    generator = torch.Generator().manual_seed(seed)
    for i in torch.randperm(len(texts), generator=generator).tolist():
        ids = model.encode(texts[i])[:length]
        if len(ids) == length:
            yield ids


def continued(
    model: LanguageModel, states: States, layer: int, positions: Ids | None = None
) -> Float[Tensor, "pos vocab"]:
    """Logits of the next token, as the server computes them from what it receives.

    ``positions`` says where the states belong, if not at the start, without gaps.
    Raises ``ModelError`` for a bad layer, or an unembedding that is not the embeddings.
    """
    model.check_layer(layer)
    if not model.decoder.config.tie_word_embeddings:
        raise ModelError(f"{model.name} was loaded without its unembedding")
    table = model.decoder.get_input_embeddings().weight.detach()
    return final_states(model, states, layer, positions) @ table.T


def losses(
    model: LanguageModel, ids: Ids, layer: int, defence: Defence, seed: int = 0
) -> Float[Tensor, " predicted"]:
    """Loss in nats at each position that is sent and predicts a token of the prompt."""
    ids = ids.to(model.device)
    positions = defence.positions(len(ids)).to(model.device)
    sent = defence.send(model.states(ids, layer)[positions], seed)
    predicting = positions[positions + 1 < len(ids)]
    logits = continued(model, sent, layer, positions)[: len(predicting)]
    return cross_entropy(logits.float(), ids[predicting + 1], reduction="none")


def extra_losses(
    model: LanguageModel, texts: Texts, layer: int, defence: Defence, seed: int = 0
) -> Float[Tensor, " predicted"]:
    """What a defence costs at each predicted token: loss with it minus without it."""
    extra = [torch.zeros(0, device=model.device)]  # no texts are no losses
    for i, ids in enumerate(texts):
        defended = losses(model, ids, layer, defence, seed + i)
        clean = losses(model, ids, layer, Defence())
        positions = defence.positions(len(ids))[: len(defended)]
        extra.append(defended - clean[positions.to(model.device)])
    if not sum(map(len, extra)):
        raise DefenceError("got texts that predict no token; expected longer ones")
    return torch.cat(extra)


class Score(NamedTuple):
    """How many tokens and prompts an attack recovered."""

    trials: int  # tokens
    recovered: int
    verified: int  # just one candidate fitted
    false: int  # of the verified ones
    prompts: int
    complete: int  # prompts with all tokens recovered: no prefix has to be granted
    certain: int  # prompts with all tokens verified

    @classmethod
    def of(cls, tables: Sequence[Bool[Tensor, "_ 3"]]) -> "Score":
        """From a table a prompt: a row a token; recovered, verified and false."""
        if not tables:
            raise DefenceError("got no prompts; expected one or more")
        tokens = torch.cat(list(tables))
        complete, certain, _ = sum(table.all(0).int() for table in tables).tolist()
        return cls(len(tokens), *tokens.sum(0).tolist(), len(tables), complete, certain)


def recovery(
    model: LanguageModel, texts: Texts, layer: int, defences: Masks, seed: int = 0
) -> list[Score]:
    """Attack defended states with all tokens, after the true prefix; one score each.

    Raises ``ModelError`` for a bad layer or prompt.
    """
    floor = noise_floor(model, layer)
    tables = []
    for i, ids in enumerate(texts):
        model.check_ids(ids)
        states = model.states(ids, layer)
        sent = [defence.send(states, seed + i) for defence in defences]
        following = log_softmax(continued(model, states, layer).double(), -1)
        marks = torch.zeros(len(defences), len(ids), 3, dtype=torch.bool)
        for t, token in enumerate(ids.tolist()):
            # One table of all candidates serves all defences.
            cloud = OneStepMap.after(model, layer, ids[:t]).tokens(model.vocabulary)
            prior = following[t - 1] if t else 0.0  # of the first token: nothing known
            for k, defence in enumerate(defences):
                # Fitting takes the noise with its safety factor, a likelihood without.
                cost = defence.surprise(sent[k][t], cloud, floor / SAFETY) - prior
                fitting = defence.fits(sent[k][t], cloud, floor)
                marks[k, t, 0] = cost.argmin() == token
                marks[k, t, 1] = fitting.sum() == 1
                marks[k, t, 2] = marks[k, t, 1] & ~fitting[token].cpu()
        tables.append(marks)
    return [Score.of(marks) for marks in zip(*tables, strict=True)]


def recovery_of_dropped(
    model: LanguageModel, texts: Texts, layer: int, defence: Dropping
) -> Score:
    """Attack states of which some were dropped, run by run; raises as ``recovery``."""
    level = torch.full_like(model.embeddings[:, 0], -math.log(model.vocab_size))
    tables = []
    for ids in texts:
        model.check_ids(ids)
        ids = ids.to(model.device)
        states = model.states(ids, layer)
        following = log_softmax(continued(model, states, layer), -1)
        table = torch.zeros(len(ids), 3, dtype=torch.bool)
        for t in defence.positions(len(ids)).tolist():
            observed = Observation.of(states[t : t + 1], model, layer)
            generator = torch.Generator(model.device).manual_seed(t)
            run = slice(t + 1 - defence.period, t + 1)
            law = level.repeat(defence.period, 1)
            if run.start:  # half of it is what the model itself expects
                law[0] = torch.logaddexp(level, following[run.start - 1]) - math.log(2)
            start = OneStepMap.after(model, layer, ids[: run.start])
            tokens, verified = repair(Search(start, observed, law, generator, {}))
            table[run, 0] = (tokens == ids[run]).cpu()
            table[run, 1] = verified
            table[run, 2] = verified & ~table[run, 0]
        tables.append(table)
    return Score.of(tables)


def repair(search: Search) -> tuple[Tensor, bool]:
    """The tokens after a prefix that are closest by the last state; is it theirs?"""
    best = Guess(torch.zeros(0, dtype=torch.long), math.inf, 0)
    for guess in islice(search.steps(), ROUNDS):
        best = best.or_closer(guess)
        if search.agrees(best):
            break
    return best.ids, search.agrees(best)
