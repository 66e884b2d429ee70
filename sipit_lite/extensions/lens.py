"""The lens: a regression from hidden states back to embeddings; drafts without search.

Ridge regression (chapter 9) predicts a token's embedding from its state; tokens are
ranked by the Mahalanobis distance of what each leaves. Drafts are verified elsewhere.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count, cycle, islice
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, pad
from tqdm import tqdm

from sipit_lite.acceptance import States, Tokens
from sipit_lite.extensions.reading import Reading, calibrated
from sipit_lite.io.files import fingerprint, read, replacing
from sipit_lite.io.text import prompts as text_prompts
from sipit_lite.model import LanguageModel, SipItError, plain_settings
from sipit_lite.onestep import ROWS, OneStepMap
from sipit_lite.policies import Batches, State

FORMAT = "sipit-lite lens 3"
_TENSORS = ("directions", "slope", "intercept", "whiten")
LENGTHS = (64, 16, 4)  # of the prompts it is fitted on, in turn
PASS = 2048  # tokens in a pass
RIDGE = 1e-5  # relative to the sum of squares of each regressor
HELD = 2**24  # numbers held at once while tokens are ranked: 64 MiB
OTHERS = 32  # prompts to calibrate on
FLOOR = 1e-6  # smallest variance of a residual, relative to that of the goals
FEW = 128  # coordinates of a whitened embedding, those of the largest weight first
GROUP = 64  # tokens of which the best is looked at first; they may leave one in each
FIRST = (16, 112)  # candidates in the first batches: few misses rank further down

Rows = Float[Tensor, "*rows d_model"]
Pairs = Iterable[tuple[Tensor, Tensor]]  # states and goals, (rows, d) and (rows, out)


class LensError(SipItError):
    """A lens of another model or layer, a file without one, or too little to fit on."""


@dataclass(frozen=True, eq=False)
class Regression:
    """A linear map of ``regressors`` of states, and how to weigh what it leaves."""

    directions: Float[Tensor, "d_model features"]  # of the random features
    slope: Float[Tensor, "inputs outputs"]
    intercept: Float[Tensor, " outputs"]
    whiten: Float[Tensor, "outputs outputs"]  # ‖(y − ŷ) whiten‖ is Mahalanobis's

    def predict(self, states: Rows) -> Float[Tensor, "*rows outputs"]:
        """The prediction ŷ for states of any leading shape."""
        return regressors(states, self.directions) @ self.slope + self.intercept


@dataclass(frozen=True, eq=False)
class Lens(Regression):
    """From states of one layer to embeddings; a drafter (``draft``) and a policy.

    >>> from sipit_lite import load
    >>> from sipit_lite.io.text import prompts
    >>> model = load(device="cpu")
    >>> text = prompts(model.tokenizer, "prose", 32)
    >>> lens = Lens.fit(model, 1, prompts=text, features=0)
    >>> model.decode(lens.draft(model.states("hidden states", 1)))
    'hidden states'
    """

    model: LanguageModel
    layer: int
    weight: float = 0.0  # of the prior beside it, see ``reading``; 0 for none
    hits: float = 1.0  # share of tokens of other prompts that it reads right
    fitted: ClassVar[bool] = True

    @classmethod
    @plain_settings()
    def fit(
        cls,
        model: LanguageModel,
        layer: int,
        *,
        prompts: Iterable[Tensor] | None = None,
        tokens: int = 100_000,
        features: int = 2048,
        seed: int = 0,
        progress: bool = False,
    ) -> "Lens":
        """Fit on the first ``tokens`` of ``prompts``, in one pass.

        ``prompts`` are by default ``training_prompts``; ``seed`` is theirs, and that of
        the random ``features`` of a state. Raises ``ModelError`` for a bad layer or
        prompt, ``LensError`` for fewer tokens than d_model. Prompts behind the first
        ``tokens`` calibrate ``weight`` and ``hits``.
        """
        model.check_layer(layer)
        key = ("prompts of a lens", tokens, seed)
        if prompts is not None:
            batches, others = _divided(prompts, tokens)
        else:
            # The same for all layers: text takes longer to prepare than to read.
            if key not in model.measured:
                model.measured[key] = _divided(training_prompts(model, seed), tokens)
            batches, others = model.measured[key]
        seen = min(tokens, sum(ids.numel() for ids in batches))
        if seen < model.d_model or features < 0:
            got = f"got {seen} tokens and features={features}"
            raise LensError(f"{got}; expected at least {model.d_model} and 0")

        def pairs() -> Pairs:
            for ids in tqdm(batches, "lens", disable=None if progress else True):
                states = model.states(ids, layer).flatten(0, 1)
                yield states, model.embeddings[ids.to(model.device).flatten()]

        fields = vars(ridge(pairs(), features, torch.Generator().manual_seed(seed)))
        lens = cls(**fields, model=model, layer=layer, weight=1.0)
        weight, hits = calibrated(lens, others)
        return replace(lens, weight=weight, hits=hits)

    embeddings = Regression.predict

    def nearness(self, states: States) -> Float[Tensor, "rows vocab"]:
        """−½ ‖(E_v − ê) ``whiten``‖² of each token v."""
        white, table, half, *_ = self._whitened
        return torch.addmm(half, white.predict(states), table.T)

    @plain_settings()
    def draft(self, states: Rows) -> Int[Tensor, "*rows"]:
        """The likeliest token of each state: no prefix, no search, nothing verified."""
        flat = states.reshape(-1, states.shape[-1])
        batches = flat.split(max(1, HELD // self.model.vocab_size))  # rows of scores
        tokens = torch.cat([self._nearest(rows) for rows in batches])
        return tokens.reshape(states.shape[:-1])

    def _nearest(self, states: Rows) -> Int[Tensor, " rows"]:
        """The token of largest ``nearness``, from few coordinates where these decide.

        What the others add to a distance is never negative, which bounds every score.
        """
        white, table, half, few, first = self._whitened
        if len(table) <= GROUP**2:  # so few tokens that all take less time
            return self.nearness(states).max(1).indices
        expected = white.predict(states)
        bound = torch.addmm(first, expected[:, :FEW], few).unflatten(1, (-1, GROUP))
        rest = expected[:, FEW:].square().sum(1) / 2  # at most, what the others add
        draft = bound.flatten(1).max(1).indices
        reached = (expected * table[draft]).sum(1) + half[draft]
        # Rounding may drop a token all but as near: drafts are verified elsewhere.
        least = (reached - rest)[:, None]
        row, group = (bound.amax(2) >= least).nonzero(as_tuple=True)
        near, inside = (bound[row, group] >= least[row]).nonzero(as_tuple=True)
        row = row[near]
        token = GROUP * group[near] + inside
        if len(token) > len(states) * len(table) / GROUP:
            return self.nearness(states).max(1).indices
        score = (expected[row] * table[token]).sum(1) + half[token]
        ahead = score == reached.scatter_reduce(0, row, score, "amax")[row]
        draft[row[ahead]] = token[ahead]
        return draft

    def proposals(
        self, step: OneStepMap, observed: State, generator: torch.Generator
    ) -> Batches:
        """Yield all tokens, likeliest first; raises as ``check``."""
        self.check(step.model, step.layer)
        order = self.nearness(observed[None])[0].argsort(descending=True)
        few, more, rest = order.tensor_split((FIRST[0], sum(FIRST)))
        yield from filter(len, (few, more, *rest.split(ROWS)))

    def read(self, prompts: Sequence[Tensor]) -> list[tuple[Tensor, Reading]]:
        """A draft of each prompt, and a search for what it has wrong."""
        # Of many prompts the scores of all tokens would not fit into memory.
        readings = [Reading(self, states, len(prompts) == 1) for states in prompts]
        drafts = [reading.posterior() for reading in readings]
        # What the lens drafts alone is one product for all prompts.
        pairs = list(zip(drafts, readings, strict=True))
        alone = [reading.states for draft, reading in pairs if draft is None]
        rows = self.draft(torch.cat(alone)) if alone else torch.zeros(0)
        left = iter(rows.split([len(states) for states in alone]))
        return [(next(left) if draft is None else draft, r) for draft, r in pairs]

    def check(self, model: LanguageModel, layer: int) -> None:
        """Raise ``LensError`` unless it was fitted on this model and layer."""
        if self.layer != layer:
            got = f"got a lens for layer {self.layer}"
            raise LensError(f"{got}; expected one for layer {layer}")
        if self.model is not model and fingerprint(self.model) != fingerprint(model):
            got = f"got a lens that was fitted on {self.model.name}, other weights"
            raise LensError(f"{got}; expected one for {model.name}")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; ``LensError`` where that cannot be."""
        metadata = {"format": FORMAT, "layer": str(self.layer)}
        metadata |= {"model": self.model.name, "fingerprint": fingerprint(self.model)}
        metadata |= {"weight": str(self.weight), "hits": str(self.hits)}
        tensors = {name: getattr(self, name).cpu().contiguous() for name in _TENSORS}
        with replacing(path, LensError) as part:
            save_file(tensors, part, metadata)

    @classmethod
    def load(cls, path: str | Path, model: LanguageModel) -> "Lens":
        """Read what ``save`` wrote; ``LensError`` for all else, and other models."""
        try:
            stored, metadata = read(path)
            if metadata.get("format") != FORMAT:
                raise LensError(f"expected a file of {FORMAT!r}")
            tensors = {name: stored[name] for name in _TENSORS}
            layer = int(metadata["layer"])
            model.check_layer(layer)
            width = model.d_model
            d = model.embeddings.shape[1]
            inputs = len(tensors["slope"])  # a state, its normal form, the features
            shapes = [(width, inputs - 2 * width), (inputs, d), (d,), (d, d)]
            forms = [(x.dtype, *x.shape) for x in tensors.values()]
            if forms != [(torch.float32, *shape) for shape in shapes]:
                raise LensError(f"{_TENSORS}: {forms}, expected {shapes} in float32")
            learned = {name: float(metadata[name]) for name in ("weight", "hits")}
            if not all(0 <= value < math.inf for value in learned.values()):
                raise LensError(f"{learned}, expected finite numbers, none negative")
            if metadata.get("fingerprint") != fingerprint(model):
                raise LensError(f"fitted on {metadata.get('model')}, other weights")
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            reason = str(error).partition("\n")[0]  # safetensors quotes whole headers
            line = f"got {str(path)!r}, which holds no lens of {model.name} ({reason})"
            raise LensError(line) from error
        tensors = {name: x.to(model.device) for name, x in tensors.items()}
        return cls(**tensors, model=model, layer=layer, **learned)

    @cached_property
    def _whitened(self) -> tuple[Regression, Tensor, Tensor, Tensor, Tensor]:
        """A map to whitened embeddings; these, −½ of squared norms; of few columns."""
        parts = (self.slope @ self.whiten, self.intercept @ self.whiten)
        white = Regression(self.directions, *parts, self.whiten)
        table = self.model.embeddings.float() @ self.whiten
        # Row by row, few are multiplied in half of the time; what fills up is no token.
        space = (0, -len(table) % GROUP)
        few = pad(table[:, :FEW].T, space).contiguous()
        first = pad(-table[:, :FEW].square().sum(1) / 2, space, value=-torch.inf)
        return white, table, -table.square().sum(1) / 2, few, first


def training_prompts(model: LanguageModel, seed: int = 0) -> Iterator[Tokens]:
    """Yield prompts for ever: half random, half prose and code (``io.text``)."""
    longest = min(LENGTHS[0], model.n_positions)
    generator = torch.Generator().manual_seed(seed)
    vocab = model.vocab_size
    draws = (torch.randint(vocab, (longest,), generator=generator) for _ in count())
    turns = cycle([draws])
    if model.tokenizer is not None:
        options = {"length": longest, "source": "installed", "split": "train"}
        text = partial(text_prompts, model.tokenizer, **options)
        turns = cycle([text("prose"), draws, text("code"), draws])
    # Lengths take turns, since states look different at the first positions.
    for length in cycle(LENGTHS):
        for stream in islice(turns, PASS // longest):
            # Text ends, random tokens do not.
            for window in islice(stream, 1):
                yield from window.split(length)


def batched(prompts: Iterable[Tensor], tokens: int) -> list[Int[Tensor, "row pos"]]:
    """Prompts up to so many tokens, those of one length together, ``PASS`` at most."""
    by_length: dict[int, list[Tensor]] = {}  # one pass needs prompts of one length
    for ids in prompts:
        by_length.setdefault(len(ids), []).append(ids)
        tokens -= len(ids)
        if tokens <= 0:
            break
    batches = []
    for length, rows in by_length.items():
        batches += torch.stack(rows).split(max(1, PASS // length))
    return batches


def _divided(prompts: Iterable[Tensor], tokens: int) -> tuple[list, list]:
    """Batches to fit on, and prompts behind them, not too short, to calibrate on."""
    stream = iter(prompts)
    batches = batched(stream, tokens)
    longer = (ids for ids in islice(stream, PASS) if len(ids) >= LENGTHS[1])
    return batches, list(islice(longer, OTHERS))


def regressors(states: Rows, directions: Tensor) -> Float[Tensor, "*rows inputs"]:
    """What is regressed on: the state, the state normalised, GELU features of that."""
    states = states.float()  # whatever the model computes in
    normal = layer_norm(states, states.shape[-1:])
    return torch.cat([states, normal, gelu(normal @ directions)], -1)


def ridge(pairs: Pairs, features: int, generator: torch.Generator) -> Regression:
    """Least squares with an intercept, in one pass over batches of states and goals."""
    sums: list[Tensor] = []
    rows = 0
    for states, goals in pairs:
        if not sums:
            width = states.shape[1]
            directions = torch.randn(width, features, generator=generator) / width**0.5
            directions = directions.to(states.device)
        x = regressors(states, directions)
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        y = goals.float()
        # Summed in float64: rounding adds up over hundreds of batches.
        products = [product.double() for product in (x.T @ x, x.T @ y, y.T @ y)]
        sums = list(map(torch.add, sums, products)) if sums else products
        rows += len(x)
    xx, xy, yy = sums
    scale = xx.diagonal()
    # By each regressor's own size, so that units do not matter.
    damped = xx + RIDGE * torch.diag(scale + RIDGE * scale.mean())
    weight = torch.linalg.solve(damped, xy)
    cross = weight.T @ xy
    residual = (yy - cross - cross.T + weight.T @ xx @ weight) / rows
    values, vectors = torch.linalg.eigh((residual + residual.T) / 2)
    # Without any residual a direction would outweigh all others; below is rounding.
    values = values.clamp(min=FLOOR * yy.diagonal().mean() / rows)
    # Row by row, as files keep them: other layouts round their products differently.
    slope, whiten = (x.float().contiguous() for x in (weight, vectors / values.sqrt()))
    return Regression(directions, slope[:-1], slope[-1], whiten)
