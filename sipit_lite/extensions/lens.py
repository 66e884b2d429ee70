"""The lens: one regression from hidden states back to embeddings, which drafts a whole prompt without any search.

Ridge regression on the model's own states (chapter 12): the embedding of a token is predicted from its state, the state
normalised, and a few thousand fixed random features of it. Tokens are ranked by the Mahalanobis distance of what
each would leave unexplained. A lens only proposes: what it drafts is verified like any other candidate.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, cycle, islice, zip_longest
from pathlib import Path

import torch
from jaxtyping import Float, Float64, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from tqdm import tqdm

from sipit_lite.extensions.newton import Newton
from sipit_lite.io.text import prompts as prompts_of
from sipit_lite.model import LanguageModel, ModelError
from sipit_lite.onestep import ROWS, OneStepMap

FORMAT = "sipit-lite lens 1"
LENGTHS = (
    64,
    16,
    4,
)  # tokens of the prompts that the lens is fitted on, in turn: first positions are unlike the rest
PASS = 2048  # tokens in a pass
RIDGE = 1e-5  # relative to each feature's own sum of squares
HELD = 2**24  # numbers held at once while tokens are ranked: 64 MiB
FLOOR = 1e-6  # smallest variance of a residual, relative to that of the embeddings
FIRST = (
    16,
    112,
)  # candidates in the first batches of the policy: few misses of a lens rank further down


class LensError(ModelError):
    """A lens of another model or layer, a file that holds no lens, or settings that cannot fit one."""


@dataclass(frozen=True, eq=False)
class Lens:
    """A regression from the states of one layer of one model to its embeddings; also a policy, ``lens.proposals``.

    ``directions`` are the random features' weights, shape (d_model, features); ``slope`` and ``intercept`` the
    regression; ‖(E_v − ê) ``whiten``‖ is the Mahalanobis distance of a token; ``table`` holds the model's embeddings.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> lens = Lens.fit(model, 1, tokens=4000, features=0)
    >>> states = model.states("hidden states", 1)
    >>> model.decode(lens.draft(states))
    'hidden states'
    """

    model: str
    fingerprint: str
    layer: int
    directions: Float[Tensor, "d_model features"]
    slope: Float[Tensor, "inputs d_model"]
    intercept: Float[Tensor, " d_model"]
    whiten: Float[Tensor, "d_model d_model"]
    table: Float[Tensor, "vocab d_model"]

    @classmethod
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
        """Fit on the states of so many tokens: half random, half installed text (training split), unless given.

        Raises ``ModelError`` for a bad layer or prompt, ``LensError`` for fewer tokens than d_model or no prompts.
        """
        model.check_layer(layer)
        if tokens < model.d_model or features < 0:
            raise LensError(
                f"got tokens={tokens}, features={features}; expected at least {model.d_model} and 0"
            )
        generator = torch.Generator().manual_seed(seed)
        directions = (
            torch.randn(model.d_model, features, generator=generator)
            / model.d_model**0.5
        ).to(model.device)
        moments = Moments.zero(
            2 * model.d_model + features + 1, model.d_model, model.device
        )
        bar = tqdm(total=tokens, desc="lens", disable=None if progress else True)
        for ids in same_lengths(
            prompts if prompts is not None else own_prompts(model, seed)
        ):
            states, embeddings = (
                model.states(ids, layer).flatten(0, 1),
                model.embeddings[ids.to(model.device).flatten()],
            )
            moments.add(regressors(states, directions), embeddings.float())
            bar.update(ids.numel())
            if moments.count >= tokens:
                break
        bar.close()
        if moments.count < model.d_model:
            raise LensError(
                f"got prompts of {moments.count} tokens in all; expected at least {model.d_model}"
            )
        return cls(
            model.name,
            model.fingerprint,
            layer,
            directions,
            *moments.solve(),
            model.embeddings,
        )

    def embeddings(
        self, states: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """The embeddings ê that the regression predicts for states of any leading shape."""
        return regressors(states, self.directions) @ self.slope + self.intercept

    def rank(
        self, states: Float[Tensor, "*rows d_model"], count: int
    ) -> Int[Tensor, "*rows {count}"]:
        """The ``count`` likeliest tokens for each state, likeliest first."""
        table, squares = self._whitened
        found = []
        for rows in states.reshape(-1, states.shape[-1]).split(
            max(1, HELD // len(table))
        ):
            nearness = torch.addmm(
                -squares / 2, self.embeddings(rows) @ self.whiten, table.T
            )  # up to a constant
            found.append(
                nearness.topk(count).indices
                if count > 1
                else nearness.argmax(-1, keepdim=True)
            )
        return torch.cat(found).reshape(*states.shape[:-1], count)

    def draft(self, states: Float[Tensor, "*rows d_model"]) -> Int[Tensor, "*rows"]:
        """The likeliest token for each state, by itself: no prefix, no search, nothing verified."""
        return self.rank(states, 1)[..., 0]

    def proposals(
        self,
        step: OneStepMap,
        observed: Float[Tensor, " d_model"],
        generator: torch.Generator,
    ) -> Iterator[Int[Tensor, " cand"]]:
        """Yield the whole vocabulary in the order of the lens. Raises ``LensError`` for another model or layer."""
        self.check(step.model, step.layer)
        few, more, rest = self.rank(observed, len(self.table)).tensor_split(
            (FIRST[0], sum(FIRST))
        )
        yield from (batch for batch in (few, more, *rest.split(ROWS)) if len(batch))

    def search(self) -> Newton:
        """Newton's method, from the embedding that the lens expects."""
        return Newton(lens=self)

    def check(self, model: LanguageModel, layer: int) -> None:
        """Raise ``LensError`` unless the lens was fitted on this model and layer."""
        if self.layer != layer:
            raise LensError(
                f"got a lens for layer {self.layer}; expected one for layer {layer}"
            )
        if self.table is not model.embeddings and self.fingerprint != model.fingerprint:
            raise LensError(
                f"got a lens that was fitted on {self.model}, other weights; expected one for {model.name}"
            )

    def save(self, path: str | Path) -> None:
        """Write the lens to a safetensors file. Raises ``LensError`` where no file can be written."""
        tensors = {name: getattr(self, name).cpu().contiguous() for name in _TENSORS}
        told = {
            "format": FORMAT,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "layer": str(self.layer),
        }
        try:
            save_file(tensors, path, told)
        except (OSError, SafetensorError) as error:
            raise LensError(
                f"got the path {str(path)!r}, where no file can be written ({error})"
            ) from error

    @classmethod
    def load(cls, path: str | Path, model: LanguageModel) -> "Lens":
        """Read a lens that ``save`` wrote. Raises ``LensError`` for another file, or a lens of another model."""
        try:
            with safe_open(path, framework="pt") as stored:
                told, names = stored.metadata() or {}, set(stored.keys())
                if told.get("format") != FORMAT or names != set(_TENSORS):
                    raise LensError(
                        f"got {str(path)!r} with tensors {sorted(names)}; expected a file of {FORMAT!r}"
                    )
                tensors = {
                    name: stored.get_tensor(name).to(model.device) for name in _TENSORS
                }
        except (OSError, SafetensorError) as error:
            raise LensError(
                f"got {str(path)!r}, which is not a whole safetensors file ({error})"
            ) from error
        lens = cls(
            told["model"],
            told["fingerprint"],
            int(told["layer"]),
            **tensors,
            table=model.embeddings,
        )
        if lens.fingerprint != model.fingerprint:
            raise LensError(
                f"got a lens that was fitted on {lens.model}, other weights; expected one for {model.name}"
            )
        return lens

    @cached_property
    def _whitened(
        self,
    ) -> tuple[Float[Tensor, "vocab d_model"], Float[Tensor, " vocab"]]:
        table = self.table.float() @ self.whiten
        return table, table.square().sum(1)


_TENSORS = ("directions", "slope", "intercept", "whiten")


def own_prompts(model: LanguageModel, seed: int) -> Iterator[Int[Tensor, " pos"]]:
    """Prompts that a lens is fitted on: random tokens, and prose and code of the installed training split between them.

    Their lengths take turns, a pass each, so that the first positions are seen often: attention averages over few
    tokens there, and the states look different.

    >>> from sipit_lite import load
    >>> prompts = own_prompts(load(device="cpu"), 0)
    >>> [len(next(prompts)) for _ in range(33)][-2:]
    [64, 16]
    """
    longest = min(LENGTHS[0], model.n_positions)
    windows = _windows(model, seed, longest)
    for length in cycle(LENGTHS):
        some = list(islice(windows, PASS // longest))
        if not some:
            return
        yield from (ids for window in some for ids in window.split(length))


def _windows(
    model: LanguageModel, seed: int, length: int
) -> Iterator[Int[Tensor, " pos"]]:
    if model.tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randint(model.vocab_size, (length,), generator=generator)
    text = {"source": "installed", "split": "train"}
    prose, code = (
        prompts_of(model.tokenizer, kind, length, **text) for kind in ("prose", "code")
    )
    first, second = (
        prompts_of(model.tokenizer, "random", length, seed=seed + i) for i in (0, 1)
    )
    rows = chain.from_iterable(zip_longest(prose, first, code, second))
    yield from (ids for ids in rows if ids is not None)


def same_lengths(prompts: Iterable[Tensor]) -> Iterator[Int[Tensor, "row pos"]]:
    """Consecutive prompts of equal length together, up to ``PASS`` tokens."""
    batch: list[Tensor] = []
    for ids in prompts:
        if batch and (len(ids) != len(batch[0]) or len(ids) * (len(batch) + 1) > PASS):
            yield torch.stack(batch)
            batch = []
        batch.append(ids)
    if batch:
        yield torch.stack(batch)


def regressors(
    states: Float[Tensor, "*rows d_model"],
    directions: Float[Tensor, "d_model features"],
) -> Float[Tensor, "*rows inputs"]:
    """What the regression sees: the state, the state normalised, and GELU features of that."""
    states = states.float()
    normal = layer_norm(states, states.shape[-1:])
    return torch.cat([states, normal, gelu(normal @ directions)], -1)


@dataclass(eq=False)
class Moments:
    """Sums of products in float64: all that a least-squares fit needs, in one pass over the states."""

    xx: Float64[Tensor, "inputs inputs"]
    xy: Float64[Tensor, "inputs outputs"]
    yy: Float64[Tensor, "outputs outputs"]
    count: int

    @classmethod
    def zero(cls, inputs: int, outputs: int, device: torch.device) -> "Moments":
        """Nothing seen yet; ``inputs`` counts the intercept."""
        shapes = (inputs, inputs), (inputs, outputs), (outputs, outputs)
        return cls(
            *(
                torch.zeros(shape, dtype=torch.float64, device=device)
                for shape in shapes
            ),
            0,
        )

    def add(
        self, x: Float[Tensor, "rows features"], y: Float[Tensor, "rows outputs"]
    ) -> None:
        """See more rows of inputs, without the intercept, and outputs."""
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.T @ y
        self.count += len(x)

    def solve(
        self,
    ) -> tuple[
        Float[Tensor, "inputs outputs"],
        Float[Tensor, " outputs"],
        Float[Tensor, "outputs outputs"],
    ]:
        """Slope, intercept, and the whitening of the residuals.

        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> moments = Moments.zero(2, 1, torch.device("cpu"))
        >>> moments.add(x, 3 * x + 1)
        >>> slope, intercept, _ = moments.solve()
        >>> round(slope.item(), 3), round(intercept.item(), 3)
        (3.0, 1.0)
        """
        scale = self.xx.diagonal()
        damped = self.xx + RIDGE * torch.diag(scale + RIDGE * scale.mean())
        weight = torch.linalg.solve(damped, self.xy)
        cross = weight.T @ self.xy
        residual = (
            self.yy - cross - cross.T + weight.T @ self.xx @ weight
        ) / self.count
        values, vectors = torch.linalg.eigh((residual + residual.T) / 2)
        # A direction without any residual would outweigh all others, and below this it is rounding.
        values = values.clamp(min=FLOOR * self.yy.diagonal().mean() / self.count)
        whiten = vectors / values.sqrt()
        return weight[:-1].float(), weight[-1].float(), whiten.float()
