"""Defences of hidden states and what they buy: how much of the prompt is still recovered, and what the model loses.

A client keeps the first blocks, changes the states, and sends them to a server that runs the rest. The attacker sees
what the server sees, has the model, and knows the defence and its strength, all but the noise itself (Kerckhoffs):
whatever is done to the states by a known function, the attacker does to the states of every candidate (chapter 15).
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice, permutations
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from tqdm import tqdm

from sipit_lite.acceptance import SAFETY, distance_to_stored, noise_floor
from sipit_lite.io.loading import load
from sipit_lite.io.text import bundled
from sipit_lite.model import LanguageModel, ModelError, landmarks
from sipit_lite.onestep import ROWS, OneStepMap

Z = 1.959963984540054  # the normal law is within ± Z with probability 0.95
STEPS, HALVINGS = 8, 5  # of Gauss and Newton in one solution, and of one step of theirs
LONG = 64  # tokens of the texts on which the loss is measured
NARROW = 3  # dropped tokens in a row for which a second round is worth its time
RIDGE, TIGHT = (
    1e-3,
    1e-4,
)  # added to the covariance of embeddings; the smallest noise, over the size of a state
REACH = 5.0  # a Gaussian vector of unit variance is longer than √d + REACH with probability below exp(−REACH²/2)


class DefenceError(ValueError):
    """A defence without sense: a strength out of range, or positions that are not there."""


@runtime_checkable
class Defence(Protocol):
    """What a client does to each state before sending it, and what an attacker who knows that makes of it."""

    def send(
        self, states: Float[Tensor, "pos d_model"], seed: int = 0
    ) -> Float[Tensor, "pos d_model"]:
        """The states that the server receives, in the shape of states, so that it can go on with them."""

    def surprise(
        self,
        sent: Float[Tensor, " d_model"],
        cloud: Float[Tensor, "vocab d_model"],
        floor: float,
    ) -> Float64[Tensor, " vocab"]:
        """−log of the likelihood of what was sent, for each candidate's state, up to a constant."""

    def fits(
        self,
        sent: Float[Tensor, " d_model"],
        cloud: Float[Tensor, "vocab d_model"],
        floor: float,
    ) -> Bool[Tensor, " vocab"]:
        """The candidates that could have led to what was sent; ``floor`` is the relative float noise."""


@dataclass(frozen=True)
class Noise:
    """Gaussian noise: every state gets an error of about ``size`` times its own norm, √d numbers of size·‖h‖/√d.

    Raises ``DefenceError`` for a size that is not above zero and finite.

    >>> Noise(0.5).send(torch.ones(2, 4)).shape
    torch.Size([2, 4])
    """

    size: float

    def __post_init__(self) -> None:
        if not 0 < self.size < math.inf:
            raise DefenceError(
                f"got noise of size {self.size}; expected a finite number above 0"
            )

    def send(
        self, states: Float[Tensor, "pos d_model"], seed: int = 0
    ) -> Float[Tensor, "pos d_model"]:
        """See ``Defence``; the same seed draws the same noise."""
        drawn = torch.randn(
            states.shape,
            generator=torch.Generator().manual_seed(seed),
            dtype=torch.float64,
        )
        return states + (drawn.to(states.device) * self._deviation(states)[:, None]).to(
            states
        )

    def surprise(
        self,
        sent: Float[Tensor, " d_model"],
        cloud: Float[Tensor, "vocab d_model"],
        floor: float,
    ) -> Float64[Tensor, " vocab"]:
        """See ``Defence``: a normal law around each candidate, with the deviation that its own norm would give."""
        deviation = self._deviation(cloud)
        square = (cloud.double() - sent.double()).square().sum(1)
        return square / (2 * deviation**2) + cloud.shape[1] * deviation.log()

    def fits(
        self,
        sent: Float[Tensor, " d_model"],
        cloud: Float[Tensor, "vocab d_model"],
        floor: float,
    ) -> Bool[Tensor, " vocab"]:
        """See ``Defence``: the true token is missed with probability below exp(−REACH²/2), about 4 in a million."""
        distance = torch.linalg.vector_norm(cloud.double() - sent.double(), dim=1)
        return distance <= self._deviation(cloud) * (cloud.shape[1] ** 0.5 + REACH)

    def _deviation(
        self, states: Float[Tensor, "rows d_model"]
    ) -> Float64[Tensor, " rows"]:
        return (
            self.size
            * torch.linalg.vector_norm(states.double(), dim=1)
            / states.shape[1] ** 0.5
        )


@dataclass(frozen=True)
class Rounding:
    """Every number in ``bits`` bits: 2^bits equal steps from −m to m, m the largest size of a number in the state.

    One bit keeps the signs and m. Raises ``DefenceError`` unless ``bits`` is from 1 to 16.

    >>> Rounding(1).send(torch.tensor([[2.0, -0.1]])).tolist()
    [[1.0, -1.0]]
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in range(1, 17):
            raise DefenceError(f"got {self.bits} bits; expected 1 to 16")

    def send(
        self, states: Float[Tensor, "pos d_model"], seed: int = 0
    ) -> Float[Tensor, "pos d_model"]:
        """See ``Defence``; nothing is drawn, so the seed does nothing."""
        step = states.abs().amax(1, keepdim=True) / 2 ** (self.bits - 1)
        level = (
            (states / step.where(step > 0, 1.0))
            .floor()
            .clamp(max=2 ** (self.bits - 1) - 1)
        )
        return (level + 0.5) * step

    def surprise(
        self,
        sent: Float[Tensor, " d_model"],
        cloud: Float[Tensor, "vocab d_model"],
        floor: float,
    ) -> Float64[Tensor, " vocab"]:
        """See ``Defence``: each candidate is rounded too, and what is left to chance is float noise."""
        return _float_noise(
            torch.linalg.vector_norm((self.send(cloud) - sent).double(), dim=1),
            cloud,
            floor,
        )

    def fits(
        self,
        sent: Float[Tensor, " d_model"],
        cloud: Float[Tensor, "vocab d_model"],
        floor: float,
    ) -> Bool[Tensor, " vocab"]:
        """See ``Defence``: no number of the candidate is further from what was sent than half a step."""
        half = sent.abs().max() / (
            2**self.bits - 1
        )  # the outermost level is half a step inside m
        beyond = distance_to_stored(cloud, sent, half.expand_as(sent))
        return beyond <= floor * torch.linalg.vector_norm(cloud, dim=1)


@dataclass(frozen=True)
class Projection:
    """Orthogonal projection onto a random subspace of ``dim`` dimensions, the same for all states.

    The client may send ``dim`` numbers, and the server lifts them back. The subspace, drawn from ``key``, is known to
    the attacker. Raises ``DefenceError`` for ``dim`` below one, or above the width of the states that are sent.

    >>> sent = Projection(2).send(torch.randn(5, 4))
    >>> int(torch.linalg.matrix_rank(sent))
    2
    """

    dim: int
    key: int = 0

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise DefenceError(
                f"got a projection to {self.dim} dimensions; expected at least 1"
            )

    def basis(self, width: int) -> Float64[Tensor, "{width} {self.dim}"]:
        """An orthonormal basis of the subspace, drawn uniformly: the Q of a Gaussian matrix."""
        if self.dim > width:
            raise DefenceError(
                f"got a projection to {self.dim} dimensions; the states have {width}"
            )
        drawn = torch.randn(
            width,
            self.dim,
            generator=torch.Generator().manual_seed(self.key),
            dtype=torch.float64,
        )
        return torch.linalg.qr(drawn).Q

    def send(
        self, states: Float[Tensor, "pos d_model"], seed: int = 0
    ) -> Float[Tensor, "pos d_model"]:
        """See ``Defence``; the subspace comes from ``key``, so the seed does nothing."""
        basis = self.basis(states.shape[1]).to(states)
        return states @ basis @ basis.T

    def surprise(
        self,
        sent: Float[Tensor, " d_model"],
        cloud: Float[Tensor, "vocab d_model"],
        floor: float,
    ) -> Float64[Tensor, " vocab"]:
        """See ``Defence``: each candidate is projected too, and what is left to chance is float noise."""
        return _float_noise(self._distance(sent, cloud), cloud, floor)

    def fits(
        self,
        sent: Float[Tensor, " d_model"],
        cloud: Float[Tensor, "vocab d_model"],
        floor: float,
    ) -> Bool[Tensor, " vocab"]:
        """See ``Defence``: the candidate, projected, is as far from what was sent as float noise allows."""
        return self._distance(sent, cloud) <= floor * torch.linalg.vector_norm(
            cloud.double(), dim=1
        )

    def _distance(
        self, sent: Float[Tensor, " d_model"], cloud: Float[Tensor, "vocab d_model"]
    ) -> Float64[Tensor, " vocab"]:
        basis = self.basis(len(sent)).to(sent.device)
        return torch.linalg.vector_norm((cloud.double() - sent.double()) @ basis, dim=1)


def _float_noise(
    distance: Float64[Tensor, " vocab"],
    cloud: Float[Tensor, "vocab d_model"],
    floor: float,
) -> Float64[Tensor, " vocab"]:
    return (
        distance / (floor * torch.linalg.vector_norm(cloud.double(), dim=1))
    ).square() / 2


@dataclass(frozen=True)
class Dropping:
    """Of every ``period`` states the last is sent, the others are not; the positions are known.

    Raises ``DefenceError`` for a period below two.

    >>> Dropping(3).kept(8).tolist()
    [2, 5]
    """

    period: int

    def __post_init__(self) -> None:
        if self.period < 2:
            raise DefenceError(
                f"got a period of {self.period}; expected at least 2: one state sent, one dropped"
            )

    def kept(self, length: int) -> Int[Tensor, " kept"]:
        """The positions that are sent, of a prompt of ``length`` tokens. Raises ``DefenceError`` where none is."""
        if length < self.period:
            raise DefenceError(
                f"got a prompt of {length} tokens; a period of {self.period} would send no state at all"
            )
        return torch.arange(self.period - 1, length, self.period)


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a probability, from so many successes in so many independent trials.

    The p with |p̂ − p| ≤ Z √(p(1 − p)/n); unlike p̂ ± Z √(p̂(1 − p̂)/n) it does not shrink to a point at 0 or n.
    Raises ``DefenceError`` unless 0 ≤ successes ≤ trials and there is a trial.

    >>> [round(end, 3) for end in wilson(10, 10)]
    [0.722, 1.0]
    """
    if not 0 <= successes <= trials or trials < 1:
        raise DefenceError(
            f"got {successes} successes in {trials} trials; expected 0 to {trials}, at least one trial"
        )
    share, weight = successes / trials, Z**2 / trials
    middle = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def continued(
    model: LanguageModel,
    states: Float[Tensor, "pos d_model"],
    layer: int,
    positions: Int[Tensor, " pos"] | None = None,
) -> Float[Tensor, "pos vocab"]:
    """Logits of the next token when the blocks after ``layer``, the final norm and the unembedding run on the states.

    What the server of split inference computes. ``positions`` are those of the states, where some were dropped.
    Raises ``ModelError`` for a bad layer, or a model whose unembedding is not its table of embeddings: it is not kept.

    >>> model = load(device="cpu")
    >>> ids = model.encode("the hidden states")
    >>> ends = [continued(model, model.states(ids, layer), layer)[-1] for layer in (0, 6)]
    >>> torch.allclose(*ends, atol=1e-3)
    True
    """
    model.check_layer(layer)
    if not model.decoder.config.tie_word_embeddings:
        raise ModelError(
            f"got {model.name} with an unembedding of its own; expected one tied to the embeddings"
        )
    positions = torch.arange(len(states)) if positions is None else positions
    # Without a mask, transformers takes positions with gaps for several prompts packed into one row.
    rows = {
        "position_ids": positions[None].to(model.device),
        "attention_mask": torch.ones(1, len(states)).to(states),
    }
    with torch.no_grad(), _replaced(model, layer, states[None]):
        # The blocks before the layer run on whatever this is, and their result is thrown away.
        found = model.decoder(inputs_embeds=states[None], use_cache=False, **rows)
        return (
            found.last_hidden_state[0] @ model.decoder.get_input_embeddings().weight.T
        )


@contextmanager
def _replaced(model: LanguageModel, layer: int, states: Float[Tensor, "1 pos d_model"]):
    blocks, norm = (getattr(model.decoder, name) for name in landmarks(model.decoder))

    def put(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return (
            ((states, *args[1:]), kwargs)
            if args
            else (args, kwargs | {"hidden_states": states})
        )

    handle = (
        blocks[layer] if layer < model.n_layers else norm
    ).register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def loss(
    model: LanguageModel,
    ids: Int[Tensor, " pos"],
    states: Float[Tensor, "kept d_model"],
    layer: int,
    kept: Int[Tensor, " kept"] | None = None,
) -> Float[Tensor, " predicted"]:
    """Loss in nats at each position that predicts a token of the prompt, from the states that the server received.

    ``kept`` are the positions of the states; without it, all. See ``continued`` for what is raised.

    >>> model = load(device="cpu")
    >>> ids = model.encode("the hidden states")
    >>> loss(model, ids, model.states(ids, 3), 3).shape
    torch.Size([2])
    """
    kept = torch.arange(len(ids)) if kept is None else kept
    predicts = kept[kept + 1 < len(ids)]
    logits = continued(model, states, layer, kept)[: len(predicts)]
    return cross_entropy(
        logits.float(),
        ids.to(model.device)[predicts.to(model.device) + 1],
        reduction="none",
    )


def extra_losses(
    model: LanguageModel,
    texts: Sequence[Int[Tensor, " pos"]],
    layer: int,
    defence: Defence | Dropping,
    seed: int = 0,
) -> Float[Tensor, " predicted"]:
    """What a defence costs at each predicted token: the loss with it minus the loss without it, in nats.

    Where states are dropped, the positions of those that were sent alone predict, and are compared.
    Raises ``DefenceError`` for no texts, or texts that are too short to predict anything; see also ``continued``.

    >>> model = load(device="cpu")
    >>> texts = [model.encode("the hidden states of a prompt")]
    >>> extra_losses(model, texts, 3, Rounding(1)).mean() > extra_losses(model, texts, 3, Rounding(12)).mean()
    tensor(True)
    """
    found = [torch.zeros(0, device=model.device)]
    for i, ids in enumerate(texts):
        states, kept = model.states(ids, layer), torch.arange(len(ids))
        clean = loss(model, ids, states, layer)
        if isinstance(defence, Dropping):
            kept = defence.kept(len(ids))
            sent = states[kept.to(states.device)]
        else:
            sent = defence.send(states, seed + i)
        defended = loss(model, ids, sent, layer, kept)
        found.append(defended - clean[kept[: len(defended)].to(clean.device)])
    if not sum(map(len, found)):
        raise DefenceError(
            f"got {len(texts)} texts that predict no token; expected texts of several tokens"
        )
    return torch.cat(found)


@dataclass(frozen=True)
class Score:
    """What an attack recovered: tokens right by likelihood alone, and with the model's own next-token probabilities.

    ``verified`` counts the tokens where exactly one candidate fitted, ``false`` those of them that are wrong. Of the
    ``prompts``, ``whole`` are right at every position with the probabilities: an attacker who is granted no prefix, and
    goes on from the tokens found, recovers just these. ``certain`` are the prompts with every token verified.
    """

    trials: int = 0
    likelihood: int = 0
    posterior: int = 0
    verified: int = 0
    false: int = 0
    prompts: int = 0
    whole: int = 0
    certain: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(
            *(
                a + b
                for a, b in zip(
                    asdict(self).values(), asdict(other).values(), strict=True
                )
            )
        )

    def of_prompt(self) -> "Score":
        """The same counts, as those of all positions of one prompt."""
        whole, certain = self.posterior == self.trials, self.verified == self.trials
        return replace(self, prompts=1, whole=int(whole), certain=int(certain))


def recovery(
    model: LanguageModel,
    texts: Iterable[Int[Tensor, " pos"]],
    layer: int,
    defences: Sequence[Defence],
    seed: int = 0,
    *,
    progress: bool = False,
) -> list[Score]:
    """Attack defended states with the whole vocabulary, after the true prefix: one score a defence, over all positions.

    The prefix is granted, which favours the attacker: an error at one position does not spread to the next.
    Raises ``ModelError`` for a bad layer or prompt.

    >>> model = load(device="cpu")
    >>> recovery(model, [model.encode("hidden")], 1, [Rounding(8)])[0].likelihood
    1
    """
    scores, floor = [Score()] * len(defences), noise_floor(model, layer)
    for i, ids in enumerate(
        tqdm(texts, "recovery", disable=None if progress else True)
    ):
        model.check_ids(ids)
        states = model.states(ids, layer)
        sent = [defence.send(states, seed + i) for defence in defences]
        prior = log_softmax(continued(model, states, layer).double(), -1)
        step, own = OneStepMap.after(model, layer), [Score()] * len(defences)
        for t, token in enumerate(ids.tolist()):
            cloud = step.tokens(torch.arange(model.vocab_size, device=model.device))
            expected = prior[t - 1] if t else torch.zeros_like(prior[0])
            own = [
                score + _attack(defence, x[t], cloud, expected, token, floor)
                for score, defence, x in zip(own, defences, sent, strict=True)
            ]
            step = step.extend(token) if t + 1 < len(ids) else step
        scores = [
            score + of_one.of_prompt()
            for score, of_one in zip(scores, own, strict=True)
        ]
    return scores


def _attack(
    defence: Defence,
    sent: Float[Tensor, " d_model"],
    cloud: Float[Tensor, "vocab d_model"],
    prior: Float64[Tensor, " vocab"],
    token: int,
    floor: float,
) -> Score:
    fitting = defence.fits(sent, cloud, floor).nonzero()[:, 0].tolist()
    surprise = defence.surprise(
        sent, cloud, floor / SAFETY
    )  # to fit, the noise is taken with its safety factor
    verified = len(fitting) == 1
    return Score(
        1,
        int(surprise.argmin() == token),
        int((surprise - prior).argmin() == token),
        int(verified),
        int(verified and fitting != [token]),
    )


def recovery_of_dropped(
    model: LanguageModel,
    texts: Iterable[Int[Tensor, " pos"]],
    layer: int,
    defence: Dropping,
    *,
    progress: bool = False,
) -> Score:
    """Attack states of which some were dropped, run by run with ``repair``, after the true prefix: over all tokens.

    Tokens behind the last state that was sent count as lost. Raises ``DefenceError`` for a text shorter than a period,
    ``ModelError`` for a bad layer or prompt.

    >>> model = load(device="cpu")
    >>> recovery_of_dropped(model, [model.encode("hidden states")[:2]], 1, Dropping(2))
    Score(trials=2, likelihood=2, posterior=2, verified=2, false=0, prompts=1, whole=1, certain=1)
    """
    score = Score()
    for ids in tqdm(texts, "dropped", disable=None if progress else True):
        model.check_ids(ids)
        states, ids = model.states(ids, layer), ids.to(model.device)
        prior, own = (
            log_softmax(continued(model, states, layer), -1),
            Score(trials=len(ids)),
        )
        for t in defence.kept(len(ids)).tolist():
            start = t - defence.period + 1
            expected = prior[start - 1] if start else torch.zeros_like(prior[0])
            rounds = 2 if t - start <= NARROW else 1
            found = repair(
                OneStepMap.after(model, layer, ids[:start]),
                states[t],
                t - start,
                expected,
                rounds,
            )
            right = found.tokens == ids[start : t + 1]
            verified = len(right) if found.verified else 0
            own += Score(
                0,
                int(right.sum()),
                int(right.sum()),
                verified,
                verified and int((~right).sum()),
            )
        score += own.of_prompt()
    return score


@dataclass(frozen=True, eq=False)
class Repair:
    """A run of dropped tokens and the observed one behind it, as the attacker has them: verified, or a guess."""

    tokens: Int[Tensor, " pos"]
    verified: bool


def repair(
    step: OneStepMap,
    observed: Float[Tensor, " d_model"],
    gap: int,
    prior: Float[Tensor, " vocab"],
    rounds: int = 2,
) -> Repair:
    """The ``gap`` dropped tokens behind a prefix and the one after them, from the one state that was sent.

    In each round the observed token is the nearest of the whole vocabulary behind the gap as it is believed to be, at
    first the mean embedding. The embeddings of the gap are then the likeliest under a normal law of embeddings, by
    Gauss and Newton, and the nearest tokens to them are tried in every order; where none agrees, the surer half is set
    to its tokens, and the rest solved for again. ``prior`` has the log probabilities of the first token of the gap.
    Verified where all tokens together give the state within float noise; otherwise a guess.
    """
    table, law = step.model.embeddings, _NormalLaw.of(step.model.embeddings)
    guess, embeds = (
        torch.zeros(gap + 1, dtype=torch.long, device=table.device),
        law.mean.repeat(gap, 1),
    )
    for rate in (0.5, *[0.3] * (rounds - 1)):  # how fast the noise is annealed
        everything = torch.arange(len(table), device=table.device)
        guess[gap] = everything[
            _distance(_behind(step, embeds).tokens(everything), observed).argmin()
        ]
        embeds, free = (
            torch.cat([embeds, table[guess[gap:]]]),
            torch.arange(gap, device=table.device),
        )
        while len(free):
            embeds = _likeliest(step, observed, embeds, free, law, rate)
            surprise = _surprise(step, observed, embeds, free, law)
            surprise[free == 0] -= prior.to(surprise)
            best = surprise.topk(2, largest=False)
            guess[free] = best.indices[:, 0]
            guess, verified = _best_order(step, observed, guess)
            if verified:
                return Repair(guess, True)
            order = (best.values[:, 1] - best.values[:, 0]).argsort(descending=True)
            sure, unsure = order[: (len(free) + 1) // 2], order[(len(free) + 1) // 2 :]
            embeds[free[sure]] = table[best.indices[sure, 0]]
            free = free[unsure].sort().values
        embeds = (table[guess[:gap]] + law.mean) / 2
    return Repair(guess, False)


def _best_order(
    step: OneStepMap, observed: Float[Tensor, " d_model"], guess: Int[Tensor, " pos"]
) -> tuple[Int[Tensor, " pos"], bool]:
    """The order of the gap whose state is nearest, and whether it agrees: right tokens in a wrong order are common."""
    orders = torch.tensor(
        list(islice(permutations(range(len(guess) - 1)), ROWS)), device=guess.device
    )
    rows = torch.cat([guess[orders], guess[-1:].expand(len(orders), 1)], 1)
    distance = _distance(step.branch(rows)[0][:, -1], observed)
    radius = noise_floor(step.model, step.layer) * torch.linalg.vector_norm(
        observed.double()
    )
    return rows[distance.argmin()], bool(distance.min() <= radius)


def _distance(
    states: Float[Tensor, "cand d_model"], observed: Float[Tensor, " d_model"]
) -> Float64[Tensor, " cand"]:
    return torch.linalg.vector_norm((states - observed).double(), dim=1)


@dataclass(frozen=True, eq=False)
class _NormalLaw:
    """A normal law of embeddings: mean and inverse covariance of those of the vocabulary."""

    mean: Float[Tensor, " d_model"]
    precision: Float[Tensor, "d_model d_model"]

    @classmethod
    def of(cls, table: Float[Tensor, "vocab d_model"]) -> "_NormalLaw":
        covariance = torch.cov(table.T)
        ridge = (
            RIDGE
            * covariance.trace()
            / len(covariance)
            * torch.eye(len(covariance)).to(table)
        )
        return cls(table.mean(0), torch.linalg.inv(covariance + ridge))


def _behind(step: OneStepMap, embeds: Float[Tensor, "pos d_model"]) -> OneStepMap:
    """The one-step map after further inputs that are embeddings of no token."""
    cache = step._cache(1)
    with torch.no_grad():
        step._run(embeds[None], cache)
    past = tuple((x.keys, x.values) for x in cache.layers)
    return replace(step, position=step.position + len(embeds), past=past)


def _last(
    step: OneStepMap, embeds: Float[Tensor, "pos d_model"]
) -> Float[Tensor, " d_model"]:
    return step._run(embeds[None], step._cache(1))[0, -1]


def _slope(
    step: OneStepMap, embeds: Float[Tensor, "pos d_model"], free: Int[Tensor, " free"]
) -> tuple[Float[Tensor, "d_model numbers"], Float[Tensor, " d_model"]]:
    """Jacobian of the last state with respect to the free embeddings, all their numbers in a row; and the state."""
    with torch.enable_grad():
        e = embeds.detach().clone().requires_grad_()
        state = _last(step, e)
        rows = torch.autograd.grad(
            state, e, torch.eye(len(state)).to(state), is_grads_batched=True
        )[0]
    return rows[:, free].flatten(1), state.detach()


def _likeliest(
    step: OneStepMap,
    observed: Float[Tensor, " d_model"],
    embeds: Float[Tensor, "pos d_model"],
    free: Int[Tensor, " free"],
    law: _NormalLaw,
    rate: float,
) -> Float[Tensor, "pos d_model"]:
    """Gauss–Newton on ‖ĥ − f(e)‖²/σ² + Σ (e_t − μ)ᵀ P (e_t − μ) over the free e_t, with σ² shrinking step by step."""
    precision = torch.block_diag(*[law.precision] * len(free))
    for k in range(STEPS):
        slope, state = _slope(step, embeds, free)
        noise = (rate**k * (observed - state).square().mean()).clamp_min(
            TIGHT * observed.square().mean()
        )
        away = (embeds[free] - law.mean).flatten()
        pull = slope.T @ (observed - state) / noise - precision @ away
        change = torch.linalg.solve(slope.T @ slope / noise + precision, pull).view(
            len(free), -1
        )

        def cost(e: Tensor, noise: Tensor = noise) -> Tensor:
            apart = (e[free] - law.mean).flatten()
            with torch.no_grad():
                return (
                    observed - _last(step, e)
                ).square().sum() / noise + apart @ precision @ apart

        moved = (
            embeds.index_add(0, free, change / 2**half) for half in range(HALVINGS)
        )
        now = cost(embeds)
        embeds = next((e for e in moved if cost(e) < now), embeds)
    return embeds


def _surprise(
    step: OneStepMap,
    observed: Float[Tensor, " d_model"],
    embeds: Float[Tensor, "pos d_model"],
    free: Int[Tensor, " free"],
    law: _NormalLaw,
) -> Float[Tensor, "free vocab"]:
    """−log of the posterior of each token at each free position, up to a constant: its Laplace approximation."""
    slope, table = _slope(step, embeds, free)[0], step.model.embeddings
    precision = torch.block_diag(*[law.precision] * len(free))
    spread = torch.linalg.inv(
        slope.T @ slope / (TIGHT * observed.square().mean()) + precision
    )
    width, found = embeds.shape[1], []
    for i, t in enumerate(free.tolist()):
        own = spread[i * width : (i + 1) * width, i * width : (i + 1) * width]
        away = table - embeds[t]
        found.append(
            (
                away
                @ torch.linalg.inv(
                    own + 1e-6 * own.trace() / width * torch.eye(width).to(own)
                )
                * away
            ).sum(1)
            / 2
        )
    return torch.stack(found)


def keys_and_values(
    step: OneStepMap, tokens: Int[Tensor, " cand"]
) -> Float[Tensor, "cand width"]:
    """The row that each candidate would write into the key-value cache of the last block of the step: key, then value.

    Raises ``ModelError`` for layer 0, which has no block.

    >>> model = load(device="cpu")
    >>> keys_and_values(OneStepMap.after(model, 2), torch.tensor([5, 6, 7])).shape
    torch.Size([3, 512])
    """
    if step.layer < 1:
        raise ModelError(
            f"got layer {step.layer}; keys and values belong to a block, layers 1 to {step.model.n_layers}"
        )
    after = [
        end for rows in tokens.split(ROWS) for end in step.branch(rows[:, None])[1]
    ]
    return torch.stack(
        [
            torch.cat([x[0, :, -1].flatten() for x in end.past[step.layer - 1]])
            for end in after
        ]
    )


STRENGTHS: dict[str, tuple[Defence | Dropping, ...]] = {
    "noise": tuple(map(Noise, (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0))),
    "rounding": tuple(map(Rounding, (8, 6, 4, 3, 2, 1))),
    "projection": tuple(map(Projection, (192, 128, 64, 16, 4, 1))),
    "dropping": tuple(map(Dropping, (2, 3, 4, 5, 6))),
}


def strength(defence: Defence | Dropping) -> float | int:
    """The number that says how strong a defence is: size, bits, dimensions or period.

    >>> strength(Rounding(3))
    3
    """
    return next(iter(asdict(defence).values()))


def openings(
    model: LanguageModel, length: int, seed: int = 0
) -> Iterator[Int[Tensor, " pos"]]:
    """The first ``length`` tokens of every bundled passage of prose that is long enough: no two from one passage.

    >>> len(next(openings(load(device="cpu"), 12)))
    12
    """
    texts = bundled("prose")
    for i in torch.randperm(
        len(texts), generator=torch.Generator().manual_seed(seed)
    ).tolist():
        ids = model.tokenizer(texts[i], return_tensors="pt", verbose=False)[
            "input_ids"
        ][0, :length]
        if len(ids) == length:
            yield ids.to(model.device)


def study(
    model: LanguageModel,
    count: int = 12,
    length: int = 12,
    layer: int | None = None,
    *,
    progress: bool = False,
) -> dict:
    """Every defence at every strength: recovery on ``count`` openings of passages, extra loss on as many longer ones.

    A quarter as many prompts where states are dropped, since that attack is slow. What ``python -m sipit_lite.experiments.defences
    FILE.json`` writes: a row has the counts of ``Score``, the mean extra loss, and the standard error of that mean.
    The layer is the middle one unless given.
    """
    layer = max(1, model.n_layers // 2) if layer is None else layer
    short, long = (list(islice(openings(model, n), count)) for n in (length, LONG))
    masks = [d for name in ("noise", "rounding", "projection") for d in STRENGTHS[name]]
    scores = dict(
        zip(masks, recovery(model, short, layer, masks, progress=progress), strict=True)
    )
    fewer = short[: -(-count // 4)]
    scores |= {
        d: recovery_of_dropped(model, fewer, layer, d, progress=progress)
        for d in STRENGTHS["dropping"]
    }
    rows = []
    for name, some in STRENGTHS.items():
        for d in some:
            extra = extra_losses(model, long, layer, d).double()
            cost = {
                "extra": round(float(extra.mean()), 4),
                "error": round(float(extra.std() / len(extra) ** 0.5), 4),
            }
            rows.append(
                {"defence": name, "strength": strength(d)} | cost | asdict(scores[d])
            )
    clean = torch.cat(
        [loss(model, ids, model.states(ids, layer), layer) for ids in long]
    )
    told = {
        "model": model.name,
        "layer": layer,
        "count": count,
        "length": length,
        "predicted": len(clean),
    }
    return told | {"loss": round(float(clean.mean()), 4), "rows": rows}


def main(argv: Sequence[str] | None = None) -> int:
    """The defences of chapter 15, recovery and extra loss, into one JSON file; 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m sipit_lite.experiments.defences", description=main.__doc__
    )
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument(
        "--length", type=int, default=12, help="tokens of each prompt that is attacked"
    )
    parser.add_argument("--layer", type=int, help="default: the middle one")
    parser.add_argument(
        "--model",
        help="pocket-gpt2 (default), a folder, or a name on the Hugging Face hub",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--progress", action="store_true")
    asked = parser.parse_args(argv)
    try:
        model = load(asked.model, device=asked.device)
        found = study(
            model, asked.prompts, asked.length, asked.layer, progress=asked.progress
        )
        asked.file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.exit(2, f"defences: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
