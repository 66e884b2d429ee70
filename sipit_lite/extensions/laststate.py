"""The prompt from one vector: the state of its last token at one layer, all others withheld (chapter 17).

The paper proves that the last-token state determines the prompt and leaves an algorithm open. This one keeps a belief,
a probability for every token at every position, and sharpens it: draw prompts from the belief, linearise the model at
one of them, measure on all how wrong the linear model is, and score every token against what is left of the state.
Then blocks of positions are forgotten and found again while the rest stays fixed. Whatever is returned was read by the
model once more and agrees with the state within the noise floor; else the search ends in an error.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm
from transformers import DynamicCache

from sipit_lite.acceptance import Observation
from sipit_lite.extensions.lens import Moments, regressors
from sipit_lite.model import LanguageModel, StatesError
from sipit_lite.onestep import ROWS
from sipit_lite.recovery import Recovery
from sipit_lite.sipit import SALT

LONGEST = 16  # tokens of the longest prompt looked for, where no length is given
FEATURES, TOKENS = 512, 20_000  # of the regression that reads last token and length
DRAWN = 96  # prompts drawn from the belief in a round; the error of the linear model is measured on them
DAMPING = 0.5  # share of the log-belief that a round replaces
WHOLE, BLOCK = 6, 5  # rounds over all positions, and over a block that was forgotten
SURE = 0.9  # a belief that keeps its likeliest tokens, all of at least this probability, is not sharpened any further
BLOCKS = 3  # blocks tried in a row before a search gives way to the next restart
RESTARTS = 16  # how often a search may begin
NEIGHBOURS = 0.5  # share of the law of a token that the token before it has; the rest is the law anywhere
LARGEST = 16_384  # tokens of the largest vocabulary whose table of neighbours, a gigabyte then, is made
TRUST = 0.5  # share of the log-likelihood of the regression that is believed: its residuals are not normal
CALM = 0.16  # and of that, the share believed of the last token: where held-out last tokens are likeliest
TILT = 1.0  # standard deviation by which a restart tilts the logarithm of its prior
FAR = 8.0  # distance that a length is taken to have before its first step
RIVALS = 8  # tokens with the nearest embeddings that are put in the place of each token found
HOPE = 1e-3  # least share of the prior in any belief about the last token
_FITTED: WeakKeyDictionary[LanguageModel, dict[tuple[int, int], "Ends"]] = (
    WeakKeyDictionary()
)
_FOLLOWERS: WeakKeyDictionary[LanguageModel, Tensor | None] = WeakKeyDictionary()


class LastStateError(ValueError):
    """A question about a last state that has no answer: a length beyond the context, no budget, a prior of no law."""


class NotRecovered(LastStateError):
    """The budget is spent and no prompt re-encodes to the state; ``best`` is the closest one, not verified."""

    def __init__(self, message: str, best: Recovery):
        super().__init__(message)
        self.best = best

    def __reduce__(self) -> tuple:
        # Errors with two arguments cannot be pickled as they come, and outcomes have to travel between processes.
        return type(self), (str(self), self.best)


class Collision(NotRecovered):
    """Several prompts re-encode to the state within the radius; ``best`` is one of them, ``other`` another."""

    def __init__(self, message: str, best: Recovery, other: Int[Tensor, " pos"]):
        super().__init__(message, best)
        self.other = other

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.best, self.other)


class Stopped(KeyboardInterrupt):
    """Ctrl-C during the search; ``best`` is the closest prompt so far, not verified."""

    def __init__(self, best: Recovery):
        super().__init__(
            f"stopped with {best.text!r} at distance {float(best.distance[-1]):.3g}, not verified"
        )
        self.best = best


def invert_last(
    state: Tensor,
    model: LanguageModel,
    layer: int | None = None,
    length: int | None = None,
    *,
    prior: Tensor | None = None,
    epsilon: float | None = None,
    ends: "Ends | None" = None,
    longest: int | None = None,
    chains: int = 1,
    restarts: int = RESTARTS,
    seconds: float = 300.0,
    seed: int = 0,
    progress: bool = False,
) -> Recovery:
    """Recover the exact prompt from its last-token state alone, shape (d_model,), at one layer (the last by default).

    ``length`` is T where it is known; else up to ``longest`` (16, or the context), and it is found too, as the last
    token is. ``prior`` is the probability of each token anywhere in the prompt; the default is half the ``followers``
    of the token before, a quarter uniform, a quarter how often the model itself writes the token. ``epsilon`` bounds
    noise that was added to the state on purpose. ``ends`` was fitted before for this model and layer; without it, it is
    fitted now and kept. ``chains`` searches of a length run as one batch, each begun ``restarts`` times at most, for
    ``seconds`` in all.

    The prompt returned was read by the model once more, alone: its ``distance`` is inside the ``radius`` at the last
    position, the only one that was observed (NaN at the others); ``runner_up`` is the distance of the closest prompt
    that has one other token in it, of those with near embeddings, or, where the length was not given, its first token
    once less or once more; ``tested`` counts the prompts read. Nothing is known of prompts that were not read: an
    ``epsilon`` as large as half the distance to one of them may hide it.

    Raises ``StatesError`` for a state that no prompt has by its shape, format or numbers, ``ModelError`` for a bad
    layer, ``LastStateError`` for a bad length, prior or budget, ``NotRecovered`` where no prompt is found that
    re-encodes to the state, ``Collision`` where more than one is, ``Stopped`` on Ctrl-C; the last three carry the
    closest prompt. There is no guarantee that a prompt is found, and nothing returned is a guess (chapter 17).

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> invert_last(model.states("hidden states", 6)[-1], model, 6, length=2).text
    'hidden states'
    """
    begun, layer = time.perf_counter(), model.n_layers if layer is None else layer
    if isinstance(state, Tensor) and state.ndim != 1:
        raise StatesError(
            f"got a state of shape {tuple(state.shape)}; expected one position's, ({model.d_model},)"
        )
    observed = Observation.of(
        state[None] if isinstance(state, Tensor) else state, model, layer, epsilon
    )
    longest = min(LONGEST, model.n_positions) if longest is None else longest
    check_asked(model, layer, length, prior, longest, chains, restarts, seconds)
    ends = ends or fitted_ends(model, layer, max(longest, length or 1))
    ends.check(model, layer, length or longest)
    law = (
        Law.of(model, ends)
        if prior is None
        else Law((prior / prior.sum()).to(model.embeddings))
    )
    problem = Problem(
        LastMap.of(model, layer),
        observed,
        law,
        torch.Generator().manual_seed(seed + SALT),
    )
    joint = ends.read(observed.states[0])[:, : length or longest].to(model.dtype)
    told = joint.logsumexp(0)
    lengths = [length] if length else list(range(1, longest + 1))
    likely = {n: max(float(told[n - 1].exp()), 1e-9) for n in lengths}
    laws = {n: law.ending(joint[:, n - 1]) for n in lengths}
    best = Closest(torch.zeros(1, dtype=torch.long), torch.inf)
    try:
        with tqdm(
            desc="inverting", total=None, disable=None if progress else True
        ) as bar:
            for best in problem.closest(laws, likely, chains, restarts):
                bar.set_postfix_str(
                    f"distance {best.distance:.3g}, {len(best.ids)} tokens"
                )
                bar.update()
                if (
                    best.distance <= float(observed.radius)
                    or time.perf_counter() - begun > seconds
                ):
                    break
        return checked(
            problem, recovery(problem, best, begun), None if length else longest
        )
    except KeyboardInterrupt:
        raise Stopped(recovery(problem, best, begun)) from None


@dataclass(frozen=True, eq=False)
class LastMap:
    """F(e_1, …, e_T) = h_T: the last-token state of one layer as a function of all input embeddings.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> last = LastMap.of(model, 6)
    >>> torch.allclose(last.tokens(torch.tensor([[5, 6, 7]]))[0], model.states(torch.tensor([5, 6, 7]), 6)[-1])
    True
    """

    model: LanguageModel
    layer: int
    cut: nn.Module

    @classmethod
    def of(cls, model: LanguageModel, layer: int) -> "LastMap":
        """The map of one layer. Raises ``ModelError`` for a layer outside 0..L."""
        return cls(model, layer, model.cut(layer))

    def embeddings(
        self, e: Float[Tensor, "row pos d_model"]
    ) -> Float[Tensor, "row d_model"]:
        """The state of each row of embeddings; differentiable in e."""
        return (
            self.cut(inputs_embeds=e, use_cache=False)
            .last_hidden_state[:, -1]
            .to(self.model.device)
        )

    def tokens(self, ids: Int[Tensor, "row pos"]) -> Float[Tensor, "row d_model"]:
        """The state of each row of token ids."""
        with torch.no_grad():
            return torch.cat(
                [
                    self.embeddings(self.model.embeddings[rows])
                    for rows in ids.split(ROWS)
                ]
            )

    def linear(
        self, e: Float[Tensor, "chain pos d_model"], blocks: Int[Tensor, "chain block"]
    ) -> tuple[
        Float[Tensor, "chain d_model"], Float[Tensor, "chain block d_model d_model"]
    ]:
        """F(e), and ∂F/∂e_t for the positions t of each row's block: one batched reverse pass for all rows.

        >>> from sipit_lite import load
        >>> model = load(device="cpu")
        >>> state, slope = LastMap.of(model, 0).linear(model.embeddings[None, 5:7], torch.tensor([[0, 1]]))
        >>> bool(slope[0, 0].any()), slope[0, 1].equal(torch.eye(256))  # layer 0 sees the last token alone
        (False, True)
        """
        rows = torch.arange(len(e), device=e.device)[:, None]
        with torch.enable_grad():
            free = e[rows, blocks].detach().clone().requires_grad_()
            states = self.embeddings(e.detach().index_put((rows, blocks), free))
            each = torch.eye(e.shape[-1]).to(states)[:, None].expand(-1, len(e), -1)
            (slopes,) = torch.autograd.grad(
                states, free, each, is_grads_batched=True, materialize_grads=True
            )
        return states.detach(), slopes.permute(1, 2, 0, 3)


@dataclass(frozen=True, eq=False)
class Ends:
    """What a last-token state says of the last token and of the length T, by one regression for both.

    Fitted once for a model and a layer, on random prompts and on prompts that the model wrote itself; ``frequency``
    holds how often it wrote each token. Like a lens, it only proposes.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> ends = Ends.fit(model, 6, longest=4, tokens=4000, features=0)
    >>> likely = ends.read(model.states("hidden states", 6)[-1])
    >>> tuple(likely.shape), model.decode(likely.logsumexp(1).argmax()[None])
    ((4096, 4), ' states')
    """

    layer: int
    directions: Float[Tensor, "d_model features"]
    slope: Float[Tensor, "inputs outputs"]
    intercept: Float[Tensor, " outputs"]
    whiten: Float[Tensor, "outputs outputs"]
    table: Float[Tensor, "vocab d_model"]
    frequency: Float[Tensor, " vocab"]

    @property
    def longest(self) -> int:
        """The length of the longest prompt that it knows."""
        return len(self.intercept) - self.table.shape[1]

    @classmethod
    def fit(
        cls,
        model: LanguageModel,
        layer: int,
        longest: int = LONGEST,
        *,
        tokens: int = TOKENS,
        features: int = FEATURES,
        seed: int = 0,
    ) -> "Ends":
        """Fit on so many tokens in prompts of up to ``longest``. Raises ``ModelError`` for a bad layer."""
        generator = torch.Generator().manual_seed(seed)
        rows = max(1, tokens // longest // 2)
        drawn = torch.randint(
            model.vocab_size, (rows, longest), generator=generator
        ).to(model.device)
        own = written(model, rows, longest, generator)
        directions = (
            torch.randn(model.d_model, features, generator=generator)
            / model.d_model**0.5
        ).to(model.device)
        moments = Moments.zero(
            2 * model.d_model + features + 1, model.d_model + longest, model.device
        )
        for ids in torch.cat([drawn, own]).split(ROWS):
            length = torch.eye(longest, device=model.device).repeat(len(ids), 1)
            goal = torch.cat([model.embeddings[ids.flatten()].float(), length], 1)
            moments.add(
                regressors(model.states(ids, layer).flatten(0, 1), directions), goal
            )
        seen = torch.bincount(own.flatten(), minlength=model.vocab_size).float() + 0.5
        return cls(
            layer, directions, *moments.solve(), model.embeddings, seen / seen.sum()
        )

    def check(self, model: LanguageModel, layer: int, length: int) -> None:
        """Raise ``LastStateError`` unless it was fitted on this model and layer, for prompts of that length."""
        if (
            self.table is not model.embeddings
            or self.layer != layer
            or self.longest < length
        ):
            raise LastStateError(
                f"got a fit for layer {self.layer} and up to {self.longest} tokens of "
                f"{'this' if self.table is model.embeddings else 'another'} model; expected one for layer {layer} of "
                f"{model.name} and {length} tokens"
            )

    def read(self, state: Float[Tensor, " d_model"]) -> Float[Tensor, "vocab longest"]:
        """The logarithm of the probability of each last token and length, together, shape (|V|, longest)."""
        # The lengths sum to one, so one direction has hardly any residual: its huge terms cancel, but not in float32.
        table, lengths = self.whiten.double().split([self.table.shape[1], self.longest])
        left = (
            regressors(state, self.directions) @ self.slope + self.intercept
        ).double() @ self.whiten.double()
        rows = self.table.double() @ table - left
        far = (
            rows.square().sum(1)[:, None]
            + 2 * rows @ lengths.T
            + lengths.square().sum(1)
        )
        return (-TRUST / 2 * far).flatten().log_softmax(0).view(far.shape).float()


def fitted_ends(model: LanguageModel, layer: int, longest: int) -> Ends:
    """``Ends.fit`` with its defaults, once for a model, a layer and a length."""
    known = _FITTED.setdefault(model, {})
    if (layer, longest) not in known:
        known[layer, longest] = Ends.fit(model, layer, longest)
    return known[layer, longest]


def written(
    model: LanguageModel, count: int, length: int, generator: torch.Generator
) -> Int[Tensor, "{count} {length}"]:
    """Prompts that the model writes itself: a first token at random, the others drawn from its next-token law.

    A model whose unembedding is not its table of embeddings, and so not kept, gives random tokens.

    >>> from sipit_lite import load
    >>> written(load(device="cpu"), 2, 5, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 5])
    """
    first = torch.randint(model.vocab_size, (count, length), generator=generator).to(
        model.device
    )
    if not model.decoder.config.tie_word_embeddings:
        return first
    ids, cache, table = (
        first[:, :1],
        DynamicCache(),
        model.decoder.get_input_embeddings().weight,
    )
    with torch.no_grad():
        for _ in range(length - 1):
            out = model.decoder(
                inputs_embeds=model.embeddings[ids[:, -1:]],
                past_key_values=cache,
                use_cache=True,
            )
            law = (out.last_hidden_state[:, -1] @ table.T).float().softmax(-1).cpu()
            ids = torch.cat(
                [ids, torch.multinomial(law, 1, generator=generator).to(ids)], 1
            )
    return ids


def followers(model: LanguageModel) -> Float[Tensor, "vocab vocab"] | None:
    """How likely the model thinks each token after each single token, a row for the one before; made once for a model.

    None for a vocabulary beyond ``LARGEST``, or an unembedding that is not the table of embeddings, and so not kept.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> model.decode(followers(model)[model.encode(" such")[0]].argmax()[None])
    ' as'
    """
    if model not in _FOLLOWERS:
        kept = model.decoder.config.tie_word_embeddings and model.vocab_size <= LARGEST
        _FOLLOWERS[model] = torch.cat(list(_read_followers(model))) if kept else None
    return _FOLLOWERS[model]


def _read_followers(model: LanguageModel) -> Iterator[Float[Tensor, "row vocab"]]:
    table = model.decoder.get_input_embeddings().weight
    for rows in model.embeddings[:, None].split(ROWS):
        with torch.no_grad():
            out = model.decoder(inputs_embeds=rows, use_cache=False).last_hidden_state[
                :, -1
            ]
            yield (out @ table.T).softmax(-1)


@dataclass(frozen=True, eq=False)
class Law:
    """What is expected of a prompt before its state is looked at: a chain, each token given the one before it.

    ``anywhere`` holds the probability of each token; ``after`` is None where tokens are independent, or the law of a
    token by the one before it, of which ``NEIGHBOURS`` is believed; ``last`` is log-evidence about the last token.
    """

    anywhere: Float[Tensor, " vocab"]
    after: Float[Tensor, "vocab vocab"] | None = None
    last: Float[Tensor, " vocab"] | None = None

    @classmethod
    def of(cls, model: LanguageModel, ends: Ends) -> "Law":
        """The ``followers`` of tokens, and anywhere half uniform, half how often the model itself writes a token."""
        return cls(
            (ends.frequency / 2 + 1 / (2 * model.vocab_size)).to(model.embeddings),
            followers(model),
        )

    def log_probability(self, ids: Int[Tensor, " pos"]) -> float:
        """The logarithm of the probability of a prompt, without what is known of its last token.

        >>> round(Law(torch.tensor([0.5, 0.5])).log_probability(torch.tensor([0, 1, 0])) / math.log(0.5), 4)
        3.0
        """
        if self.after is None:
            return float(self.anywhere[ids].log().sum())
        later = (
            NEIGHBOURS * self.after[ids[:-1], ids[1:]]
            + (1 - NEIGHBOURS) * self.anywhere[ids[1:]]
        )
        return float(self.anywhere[ids[0]].log() + later.log().sum())

    def ending(self, last_token: Float[Tensor, " vocab"]) -> "Law":
        """The same with the log-probabilities that ``Ends`` gives the last token: ``CALM`` of them, and a floor."""
        told = (CALM * last_token).log_softmax(0) + math.log1p(-HOPE)
        return replace(
            self, last=torch.logaddexp(told, self.anywhere.log() + math.log(HOPE))
        )

    def step(
        self, law: Float[Tensor, "chain vocab"], back: bool = False
    ) -> Float[Tensor, "chain vocab"]:
        """The law of the next token if this is the law of one; backward, the likelihood of the one before."""
        law = law / law.sum(-1, keepdim=True)
        if self.after is None:
            return torch.ones_like(law) if back else self.anywhere.expand_as(law)
        flat = law @ self.anywhere[:, None] if back else self.anywhere
        return (
            NEIGHBOURS * (law @ (self.after.T if back else self.after))
            + (1 - NEIGHBOURS) * flat
        )

    def given(
        self,
        ids: Int[Tensor, "chain pos"],
        blocks: Int[Tensor, "chain block"],
        evidence: Float[Tensor, "chain block vocab"],
    ) -> Float[Tensor, "chain block vocab"]:
        """Log-probabilities of the tokens of a block of neighbours, given log-evidence on each, and all other tokens.

        Evidence is multiplied along the chain, forward and backward.

        >>> law = Law(torch.tensor([0.5, 0.5]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> blocks = torch.tensor([[1]])
        >>> law.given(torch.tensor([[0, 1, 0]]), blocks, torch.zeros(1, 1, 2)).exp().mul(10).round().tolist()
        [[[1.0, 9.0]]]
        """
        before, behind = blocks[:, 0] - 1, blocks[:, -1] + 1
        if self.last is not None:
            evidence = evidence + torch.where(
                (blocks == ids.shape[1] - 1)[..., None], self.last, 0.0
            )
        weight = (evidence - evidence.amax(-1, keepdim=True)).exp()
        known = nn.functional.one_hot(ids, len(self.anywhere)).to(self.anywhere)
        rows = torch.arange(len(ids), device=ids.device)
        start = self.step(known[rows, before.clamp_min(0)])
        end = self.step(known[rows, behind.clamp_max(ids.shape[1] - 1)], back=True)
        forward = [torch.where(before[:, None] < 0, self.anywhere, start)]
        backward = [torch.where(behind[:, None] == ids.shape[1], 1.0, end)]
        for k in range(blocks.shape[1] - 1):
            forward.append(self.step(forward[-1] * weight[:, k]))
            backward.append(self.step(backward[-1] * weight[:, -1 - k], back=True))
        both = torch.stack(forward, 1).log() + torch.stack(backward[::-1], 1).log()
        return (evidence + both).log_softmax(-1)


@dataclass(frozen=True, eq=False)
class Belief:
    """What is believed of a block of positions of each chain: log-probabilities of every token, (chain, block, vocab).

    ``blocks`` says which positions; the others are those of ``ids``, shape (chain, pos).
    """

    log: Float[Tensor, "chain block vocab"]
    ids: Int[Tensor, "chain pos"]
    blocks: Int[Tensor, "chain block"]

    def draw(
        self, count: int, generator: torch.Generator
    ) -> Int[Tensor, "chain {count} pos"]:
        """Prompts drawn from the belief, position by position; the first takes the likeliest token everywhere.

        For a block of one position they are the likeliest tokens, each once.
        """
        chains, block, vocab = self.log.shape
        if block == 1 and count <= vocab:
            drawn = self.log.topk(count).indices
        else:
            law = self.log.exp().flatten(0, 1).cpu()
            drawn = torch.multinomial(law, count, replacement=True, generator=generator)
            drawn = drawn.to(self.ids).view(chains, block, count)
            drawn[..., 0] = self.log.argmax(-1)
        prompts = self.ids[:, None].repeat(1, count, 1)
        return prompts.scatter(
            2, self.blocks[:, None].expand(-1, count, -1), drawn.transpose(1, 2)
        )

    def moments(
        self, table: Float[Tensor, "vocab d_model"]
    ) -> tuple[
        Float[Tensor, "chain block d_model"],
        Float[Tensor, "chain block d_model d_model"],
    ]:
        """Mean and covariance of the embedding at each position."""
        law = self.log.exp()
        mean = law @ table
        square = torch.stack(
            [
                torch.stack([(table * q[:, None]).T @ table for q in chain])
                for chain in law
            ]
        )
        return mean, square - mean[..., :, None] * mean[..., None, :]


def sharpened(
    belief: Belief,
    law: Law,
    observed: Float[Tensor, " d_model"],
    last: LastMap,
    drawn: Int[Tensor, "chain draw pos"],
    states: Float[Tensor, "chain draw d_model"],
) -> Belief:
    """One round: the belief after the state is compared with a linear model of the map.

    With J_t the Jacobian at position t, taken at the second of the drawn prompts, m_t and C_t mean and covariance of
    the embedding there, c + Σ J_t (e_t − m_t) the linear model that is right on average on the drawn prompts, and R the
    covariance of its error on them, what the state says of position t is a normal law whose covariance is
    R + Σ J_u C_u J_uᵀ over the other positions u. The logarithm of its density at each token is evidence; what it makes
    of the law of prompts is the new belief, of which ``DAMPING`` is taken. J is not taken at the means: no prompt comes
    near them, and the linear model there is worse than a constant (chapter 17).
    """
    table = last.model.embeddings
    mean, spread = belief.moments(table)
    _, slopes = last.linear(table[drawn[:, 1]], belief.blocks)
    away = (
        table[drawn.gather(2, belief.blocks[:, None].expand(-1, drawn.shape[1], -1))]
        - mean[:, None]
    )
    error = states - torch.einsum("cnij,csnj->csi", slopes, away)
    centre = error.mean(1)
    parts, residual = slopes @ spread @ slopes.mT, observed - centre
    noise = error_covariance(error - centre[:, None], residual, parts.sum(1))
    others = noise[:, None] + parts.sum(1, keepdim=True) - parts
    left = residual[:, None] + (slopes @ mean[..., None])[..., 0]
    solved = torch.cholesky_solve(
        torch.cat([slopes, left[..., None]], -1), torch.linalg.cholesky(others)
    )
    projected = slopes.mT @ solved  # J_tᵀ S⁻¹ [J_t, y]
    linear, quadratic = (
        table @ projected[..., -1:],
        (table @ projected[..., :-1] * table).sum(-1),
    )
    new = law.given(belief.ids, belief.blocks, linear[..., 0] - quadratic / 2)
    return replace(
        belief, log=((1 - DAMPING) * belief.log + DAMPING * new).log_softmax(-1)
    )


def error_covariance(
    error: Float[Tensor, "chain draw d_model"],
    residual: Float[Tensor, "chain d_model"],
    explained: Float[Tensor, "chain d_model d_model"],
) -> Float[Tensor, "chain d_model d_model"]:
    """Covariance of the error of a linear model, from fewer samples than dimensions: half way to a multiple of I.

    Where the state is further from the mean than error and spread explain, all directions get what is missing: a belief
    that has settled on the wrong tokens is not certain any more.

    >>> found = error_covariance(torch.zeros(1, 3, 2), torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2, 2))
    >>> found.diagonal(dim1=1, dim2=2).tolist()
    [[12.5, 12.5]]
    """
    width = error.shape[-1]
    sample = error.mT @ error / error.shape[1]
    size = sample.diagonal(dim1=1, dim2=2).mean(-1) / 2
    told = 2 * size * width + explained.diagonal(dim1=1, dim2=2).sum(-1)
    missing = (residual.square().sum(-1) - told) / width
    least = residual.square().sum(-1).clamp_min(torch.finfo(residual.dtype).tiny) * 1e-6
    extra = size + torch.maximum(missing, least)
    return sample / 2 + extra[:, None, None] * torch.eye(width).to(error)


class Step(NamedTuple):
    """What one step of a search gives: the current prompt of each chain, its distance, how many prompts were read."""

    ids: Int[Tensor, "chain pos"]
    distances: Float[Tensor, " chain"]
    tested: int


class Closest(NamedTuple):
    """A prompt, the distance of its last state from the observed one, and how many prompts were read so far."""

    ids: Int[Tensor, " pos"]
    distance: float
    tested: int = 0


@dataclass(frozen=True, eq=False)
class Problem:
    """What is to be explained, and what is expected: an observed last state, and a law of prompts."""

    last: LastMap
    observed: Observation
    law: Law
    generator: torch.Generator

    def closest(
        self, laws: dict[int, Law], likely: dict[int, float], chains: int, restarts: int
    ) -> Iterator[Closest]:
        """The closest prompt so far, after each step of the search of some length.

        Time is shared out over the lengths in proportion to √(probability of the length) / distance, so that what comes
        close is followed up; a step of a length is taken to cost as much as it has tokens.
        """
        best = Closest(torch.zeros(1, dtype=torch.long), torch.inf)
        searches = {
            n: self.search(law, n, chains, restarts) if n > 1 else self.single()
            for n, law in laws.items()
        }
        spent, nearest = dict.fromkeys(searches, 0), dict.fromkeys(searches, FAR)
        while searches:
            n = min(
                searches,
                key=lambda n: n * (spent[n] + 1) * nearest[n] / likely[n] ** 0.5,
            )
            step = next(searches[n], None)
            if step is None:
                del searches[n]
                continue
            ids, distances, tested = step
            far, chain = distances.min(0)
            nearest[n] = min(float(far), nearest[n]) if spent[n] else float(far)
            spent[n] += 1
            closer = (
                Closest(ids[chain], float(far)) if float(far) < best.distance else best
            )
            best = closer._replace(tested=best.tested + tested)
            yield best

    def rounds(self, belief: Belief, law: Law, count: int) -> Step:
        """Sharpen a belief so often, or until it is sure; the closest prompt that each chain has read."""
        chains, settled = len(belief.ids), None
        ids, nearest = (
            belief.ids,
            torch.full((chains,), torch.inf, device=belief.ids.device),
        )
        for k in range(count + 1):
            drawn = belief.draw(DRAWN, self.generator)
            states = self.last.tokens(drawn.flatten(0, 1))
            far, which = self.observed.distance(0, states).view(chains, -1).min(1)
            closer = drawn[torch.arange(chains, device=drawn.device), which]
            ids = torch.where((far < nearest)[:, None], closer, ids)
            nearest = torch.minimum(far, nearest)
            sure, likeliest = belief.log.max(-1)
            stuck = (
                settled is not None
                and likeliest.equal(settled)
                and bool((sure.exp() > SURE).all())
            )
            if k == count or stuck or bool((nearest <= self.observed.radius).any()):
                break
            settled, states = likeliest, states.view(chains, DRAWN, -1)
            belief = sharpened(
                belief, law, self.observed.states[0], self.last, drawn, states
            )
        return Step(ids, nearest, (k + 1) * chains * DRAWN)

    def single(self) -> Iterator[Step]:
        """All |V| prompts of one token."""
        states = self.last.tokens(
            torch.arange(len(self.law.anywhere), device=self.law.anywhere.device)[
                :, None
            ]
        )
        far, token = self.observed.distance(0, states).min(0)
        yield Step(token[None, None], far[None], len(states))

    def search(
        self, law: Law, length: int, chains: int, restarts: int
    ) -> Iterator[Step]:
        """Prompts of one length: all positions at once, then blocks forgotten and found again; then anew.

        Yields the current prompts of all chains, and their distances, after each step; ends after the restarts.
        """
        device = law.anywhere.device
        everywhere = torch.arange(length, device=device).expand(chains, -1)
        for restart in range(restarts):
            nothing = torch.zeros_like(everywhere)
            current = self.rounds(
                self.tilted(law, nothing, everywhere, TILT * (restart > 0)), law, WHOLE
            )
            yield current
            for k in range(BLOCKS):
                size = int(
                    torch.randint(
                        min(2, length - 1), length, (1,), generator=self.generator
                    )
                )
                first = torch.randint(
                    length - size + 1, (chains, 1), generator=self.generator
                ).to(device)
                blocks = first + torch.arange(size, device=device)
                tilt = TILT * float(torch.rand(1, generator=self.generator)) * (k > 0)
                found = self.rounds(
                    self.tilted(law, current.ids, blocks, tilt), law, BLOCK
                )
                closer = found.distances < current.distances
                ids = torch.where(closer[:, None], found.ids, current.ids)
                current = Step(
                    ids, torch.minimum(found.distances, current.distances), found.tested
                )
                yield current

    def tilted(
        self,
        law: Law,
        ids: Int[Tensor, "chain pos"],
        blocks: Int[Tensor, "chain block"],
        tilt: float,
    ) -> Belief:
        """What the law says of a block when all else is known, as if there were random evidence of a size ``tilt``."""
        noise = torch.randn(
            *blocks.shape, len(law.anywhere), generator=self.generator
        ).to(law.anywhere)
        return Belief(law.given(ids, blocks, tilt * noise), ids, blocks)


def recovery(problem: Problem, best: Closest, begun: float) -> Recovery:
    """A prompt as a ``Recovery``, not verified; only the last position was observed, so the others have NaN."""
    ids, length = best.ids.cpu(), len(best.ids)

    def at_the_end(value: float) -> Float[Tensor, " pos"]:
        return torch.tensor([torch.nan] * (length - 1) + [value])

    return Recovery(
        tokens=ids,
        text=problem.last.model.decode(ids),
        distance=at_the_end(best.distance),
        runner_up=at_the_end(torch.inf),
        radius=at_the_end(float(problem.observed.radius)),
        tested=torch.tensor([0] * (length - 1) + [best.tested]),
        verified=torch.zeros(length, dtype=torch.bool),
        margin=torch.full((length,), torch.nan),
        seconds=time.perf_counter() - begun,
        layer=problem.last.layer,
    )


def checked(problem: Problem, found: Recovery, longest: int | None) -> Recovery:
    """Read the prompt once more, alone, and its rivals, those of other lengths too unless ``longest`` is None.

    Raises ``NotRecovered`` where the prompt is outside the radius, ``Collision`` where a rival is inside too.
    """
    model, radius = problem.last.model, float(problem.observed.radius)
    ids = found.tokens.to(model.device)
    distance = float(
        problem.observed.distance(0, model.states(ids, problem.last.layer)[-1:])
    )
    told = f"{found.text!r} ({len(ids)} tokens) is {distance:.3g} away, radius {radius:.3g}"
    if not (distance <= radius and float(found.distance[-1]) <= radius):
        raise NotRecovered(
            f"no prompt was found whose last state is the observed one: the closest of {int(found.tested[-1])} read, "
            f"{told}, after {found.seconds:.0f} s",
            found,
        )
    others = [rivals(model, ids), *([] if longest is None else resized(ids, longest))]
    far, which = torch.cat(
        [problem.observed.distance(0, problem.last.tokens(rows)) for rows in others]
    ).min(0)
    end = torch.arange(len(ids)) == len(ids) - 1
    found = replace(
        found,
        distance=torch.where(end, distance, torch.nan),
        runner_up=torch.where(end, float(far), torch.nan),
    )
    if float(far) <= radius:
        other = [row for rows in others for row in rows][int(which)].cpu()
        raise Collision(
            f"{told}; so is {model.decode(other)!r} ({len(other)} tokens), {float(far):.3g} away",
            found,
            other,
        )
    return replace(found, verified=torch.ones_like(found.verified))


def rivals(model: LanguageModel, ids: Int[Tensor, " pos"]) -> Int[Tensor, "rival pos"]:
    """The prompts that differ from one in a single token, each token changed for ``RIVALS`` of nearest embedding.

    >>> from sipit_lite import load
    >>> rivals(load(device="cpu"), torch.tensor([5, 6])).shape
    torch.Size([16, 2])
    """
    table, count = model.embeddings.float(), min(RIVALS, model.vocab_size - 1)
    apart = torch.cdist(table[ids], table).scatter(1, ids[:, None], torch.inf)
    near = apart.topk(count, largest=False).indices
    prompts = ids.repeat(len(ids), count, 1)
    prompts[torch.arange(len(ids)), :, torch.arange(len(ids))] = near
    return prompts.flatten(0, 1)


def resized(ids: Int[Tensor, " pos"], longest: int) -> list[Int[Tensor, "1 _"]]:
    """A prompt without its first token, and with that token twice, where they have 1 to ``longest`` tokens.

    A model that knows relative positions alone cannot tell how often one token was repeated, and one with a window not
    how long the run before it was (chapter 5).

    >>> [rows.tolist() for rows in resized(torch.tensor([5, 6]), 3)]
    [[[6]], [[5, 5, 6]]]
    """
    return [
        rows[None]
        for rows in (ids[1:], torch.cat([ids[:1], ids]))
        if 1 <= len(rows) <= longest
    ]


def check_asked(
    model: LanguageModel,
    layer: int,
    length: int | None,
    prior: Tensor | None,
    longest: int,
    chains: int,
    restarts: int,
    seconds: float,
) -> None:
    """Raise ``LastStateError`` for a question that cannot be answered, ``ModelError`` for a bad layer."""
    model.check_layer(layer)
    if torch.finfo(model.dtype).bits <= 16:
        raise LastStateError(
            f"got a model that computes in {model.dtype}; expected torch.float32 or torch.float64, whatever the state's"
        )
    for name, value in (("length", length), ("longest", longest)):
        if value is not None and not 1 <= value <= model.n_positions:
            raise LastStateError(
                f"got {name}={value}; {model.name} reads 1 to {model.n_positions} tokens"
            )
    if layer == 0 and length != 1:
        raise LastStateError(
            "got layer 0, whose last state knows the last token alone; expected length=1, or layer 1"
        )
    for name, value in (
        ("chains", chains),
        ("restarts", restarts),
        ("seconds", seconds),
    ):
        if not value > 0:
            raise LastStateError(f"got {name}={value}; expected a budget above 0")
    if prior is None:
        return
    if prior.shape != (model.vocab_size,) or not bool(
        (prior.isfinite() & (prior > 0)).all()
    ):
        raise LastStateError(
            f"got a prior of shape {tuple(prior.shape)} with {int((~(prior > 0)).sum())} numbers that are not above 0; "
            f"expected {model.vocab_size} finite numbers above 0"
        )
