"""The one-step map F(·; π, t): the next state, for every candidate, after a prefix.

The prefix is read once into a key-value cache, so a candidate costs one token, and
candidates go through the model together, as rows of one batch.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from sipit_lite.model import LanguageModel, ModelError, is_oom, plain_settings

ROWS = 256  # candidates a pass; few after a long prefix in parts that caches hold
EXACT = "donot_use_mm_for_euclid_dist"
MOST = 8192  # on a GPU, if twice the cache and 32 widths of each fit into half of it

Rows = Float[Tensor, "rows d_model"]


@dataclass(frozen=True, eq=False)
class OneStepMap:
    """F(v; π, t) = h_t(π ⊕ v) at one layer, for a fixed prefix π (paper §3, chapter 8).

    ``position`` counts the tokens of the prefix, ``past`` holds its keys and values.
    Methods raise ``ModelError`` where the prefix fills the context, or a pass memory.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> OneStepMap.after(model, 3, model.encode("hi")).tokens(model.vocabulary).shape
    torch.Size([4096, 256])
    """

    model: LanguageModel
    layer: int
    position: int
    cut: object  # called like a decoder
    past: tuple[tuple[Tensor, Tensor], ...]  # (1, heads, pos, d_head), block by block

    @classmethod
    def after(
        cls, model: LanguageModel, layer: int, prefix: Int[Tensor, " pos"] | None = None
    ) -> "OneStepMap":
        """The map after a prefix of token ids; no prefix means the first position."""
        step = cls(model, layer, 0, model.cut(layer), ())
        if prefix is not None and prefix.numel() > 0:
            model.check_ids(prefix)
            _, step = step.follow(prefix.to(model.device))
        return step

    def follow(self, ids: Int[Tensor, " rows"]) -> tuple[Rows, "OneStepMap"]:
        """The states of further tokens, read in one pass, and the map after them."""
        states, (step,) = self.branch(ids[None])
        return states[0], step

    @plain_settings()
    def branch(self, rows: Tensor) -> tuple[Tensor, list["OneStepMap"]]:
        """States of continuations, shape (rows, pos, d), and the map after each row."""
        cache = self._cache(*rows.shape) or DynamicCache()
        position = self.position + rows.shape[1]
        size = f"{len(rows)} prompts of {position} tokens"
        with torch.no_grad(), self.model.advised(size):
            states = self._run(self.model.embeddings[rows], cache)
        steps = []
        for i in range(len(rows)):
            past = ((x.keys[i : i + 1], x.values[i : i + 1]) for x in cache.layers)
            steps.append(replace(self, position=position, past=tuple(past)))
        return states, steps

    def crop(self, position: int) -> "OneStepMap":
        """The map after the first ``position`` tokens of the prefix."""
        past = ((k[:, :, :position], v[:, :, :position]) for k, v in self.past)
        return replace(self, position=position, past=tuple(past))

    def tokens(self, tokens: Int[Tensor, " rows"]) -> Rows:
        """F(v) for each candidate token, shape (candidates, d_model)."""
        copied = 1 + sum(keys.numel() + values.numel() for keys, values in self.past)
        most = ROWS if len(tokens) > ROWS else max(96, 2**24 // copied)  # 64 MiB
        cap = max(1, min(most, 2**27 // copied))  # 512 MiB
        if self.model.device.type == "cuda" and len(tokens) > cap:
            free, _ = torch.cuda.mem_get_info(self.model.device)
            row = 2 * (copied + 32 * self.model.d_model) * self.model.dtype.itemsize
            cap = max(cap, min(MOST, free // 2 // row))
        one = f"one candidate after {self.position} tokens"
        with torch.no_grad(), self.model.advised(one):
            e = self.model.embeddings[tokens]
            return fitting(lambda n: self.embedding(e, n), cap)

    @plain_settings()
    def embedding(self, e: Float[Tensor, "rows inputs"], most: int = 2**31) -> Rows:
        """F(e): the next token's embedding replaced by each row; differentiable."""
        if self.position >= self.model.n_positions:
            reads = f"{self.model.name} reads {self.model.n_positions}"
            raise ModelError(f"got a prefix of {self.position} tokens; {reads}")
        cache = self._cache(min(most, len(e)), 1)
        parts = e[:, None].split(most)
        return torch.cat([self._run(x, cache or DynamicCache()) for x in parts])[:, 0]

    def _cache(self, rows: int, ahead: int) -> Cache:
        # In each layer the prefix is complete: a window is only a mask.
        return Cache([_Prefixed(pair, rows, ahead) for pair in self.past])

    def _run(self, embeds: Tensor, cache: Cache) -> Tensor:
        positions = torch.arange(embeds.shape[1], device=embeds.device) + self.position
        inputs = {"inputs_embeds": embeds, "position_ids": positions[None]}
        output = self.cut(**inputs, past_key_values=cache, use_cache=True)
        return output.last_hidden_state.to(self.model.device)


class _Prefixed(DynamicLayer):
    """A prefix before each row, and room behind it, which each pass writes anew."""

    def __init__(self, pair: tuple[Tensor, Tensor], rows: int, ahead: int) -> None:
        super().__init__()
        self.position = pair[0].shape[2]
        self.rooms = [pad(x, (0, 0, 0, ahead)).repeat(rows, 1, 1, 1) for x in pair]

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (room[: len(keys)] for room in self.rooms)
        self.keys[:, :, self.position :] = keys
        self.values[:, :, self.position :] = values
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.position


def fitting(work: Callable[[int], Any], size: int) -> Any:
    """``work(size)``, or of half the size as long as memory runs out: one warning."""
    try:
        return work(size)
    except (RuntimeError, MemoryError) as error:
        if size == 1 or not is_oom(error):
            raise
    warnings.warn("out of memory: fewer rows at a time", stacklevel=2)
    return fitting(work, size // 2)
