"""The one-step map F(·; π, t): what the next hidden state would be, for every candidate token, over one prefix.

The prefix is read once into a key-value cache, so a candidate costs one token instead of t,
and candidates go through the model together, as rows of one batch.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from sipit_lite.memory import advised, is_out_of_memory
from sipit_lite.model import LanguageModel, ModelError

ROWS = 256  # candidates per pass: enough to keep the matrix products busy, small enough for the copied prefix cache
EXACT = "donot_use_mm_for_euclid_dist"
FLOAT_ROOM = 2**27  # and never more than 512 MiB of copied cache in float32


@dataclass(frozen=True, eq=False)
class OneStepMap:
    """F(v; π, t) = h_t(π ⊕ v) at one layer, for a fixed prefix π of t − 1 tokens (paper §3, chapter 9).

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> step = OneStepMap.after(model, 3, model.encode("hidden"))
    >>> step.tokens(torch.tensor([5, 6, 7])).shape
    torch.Size([3, 256])
    """

    model: LanguageModel
    layer: int
    position: int
    cut: nn.Module
    past: tuple[
        tuple[Float[Tensor, "1 heads pos d_head"], Float[Tensor, "1 heads pos d_head"]],
        ...,
    ]

    @classmethod
    def after(
        cls, model: LanguageModel, layer: int, prefix: Int[Tensor, " pos"] | None = None
    ) -> "OneStepMap":
        """The map over a prefix of token ids; no prefix means the first position.

        Raises ``ModelError`` for a layer outside 0..L, a bad prefix, or one that fills the whole context.
        """
        start = cls(model, layer, 0, model.cut(layer), ())
        if prefix is None or prefix.numel() == 0:
            return start
        model.check_ids(prefix)
        return start.follow(prefix.to(model.device))[1]

    def extend(self, token: int) -> "OneStepMap":
        """The map one position further, with ``token`` appended to the prefix."""
        return self.follow(torch.tensor([token], device=self.model.device))[1]

    def follow(
        self, ids: Int[Tensor, " pos"]
    ) -> tuple[Float[Tensor, "pos d_model"], "OneStepMap"]:
        """The states of further tokens in one pass over the cache, and the map after them.

        >>> from sipit_lite import load
        >>> model, ids = load(device="cpu"), torch.tensor([5, 6, 7, 8])
        >>> states, step = OneStepMap.after(model, 3, ids[:1]).follow(ids[1:])
        >>> torch.allclose(states, model.states(ids, 3)[1:], atol=1e-3), step.position
        (True, 4)
        """
        states, (step,) = self.branch(ids[None])
        return states[0], step

    def branch(
        self, rows: Int[Tensor, "row pos"]
    ) -> tuple[Float[Tensor, "row pos d_model"], list["OneStepMap"]]:
        """The states of several continuations of the prefix, of one length, in one pass, and the map after each.

        >>> from sipit_lite import load
        >>> model, rows = load(device="cpu"), torch.tensor([[5, 6], [7, 8]])
        >>> states, steps = OneStepMap.after(model, 3).branch(rows)
        >>> states.shape, torch.allclose(states[1], model.states(rows[1], 3), atol=1e-3), steps[1].position
        (torch.Size([2, 2, 256]), True, 2)
        """
        cache, position = self._cache(len(rows)), self.position + rows.shape[1]
        with (
            torch.no_grad(),
            self._advised(f"{len(rows)} prompts of {position} tokens"),
        ):
            states = self._run(self.model.embeddings[rows], cache)
        pasts = (
            tuple((x.keys[i : i + 1], x.values[i : i + 1]) for x in cache.layers)
            for i in range(len(rows))
        )
        return states, [replace(self, position=position, past=past) for past in pasts]

    def crop(self, position: int) -> "OneStepMap":
        """The map over the first ``position`` tokens of the prefix."""
        return replace(
            self,
            position=position,
            past=tuple((k[:, :, :position], v[:, :, :position]) for k, v in self.past),
        )

    def tokens(self, tokens: Int[Tensor, " cand"]) -> Float[Tensor, "cand d_model"]:
        """F(v) for each candidate token, shape (candidates, d_model).

        Raises ``ModelError`` where not even one candidate fits into memory.
        """
        size = self._rows()
        with (
            torch.no_grad(),
            self._advised(f"one candidate after {self.position} tokens"),
        ):
            while True:
                try:
                    return torch.cat(
                        [
                            self.embedding(self.model.embeddings[rows])
                            for rows in tokens.split(size)
                        ]
                    )
                except (RuntimeError, MemoryError) as error:
                    if size == 1 or not is_out_of_memory(error):
                        raise
                    size //= 2  # the device is fuller than expected: fewer candidates a pass say the same

    def embedding(
        self, e: Float[Tensor, "cand d_model"]
    ) -> Float[Tensor, "cand d_model"]:
        """F(e) with the t-th input embedding replaced by each row of e; differentiable in e.

        Raises ``ModelError`` where the prefix already fills the context.
        """
        if self.position >= self.model.n_positions:
            raise ModelError(
                f"got a prefix of {self.position} tokens; {self.model.name} reads {self.model.n_positions}"
            )
        cache = self._cache(len(e))
        return self._run(e[:, None], cache)[:, 0]

    def jacobian(
        self, e: Float[Tensor, " d_model"]
    ) -> Float[Tensor, "d_model d_model"]:
        """∂F/∂e at one embedding, rows by number of the state, by one batched reverse pass over the prefix cache.

        Raises ``ModelError`` where the prefix already fills the context, or the rows do not fit into memory.

        >>> from sipit_lite import load
        >>> model = load(device="cpu")
        >>> OneStepMap.after(model, 0).jacobian(model.embeddings[5]).equal(torch.eye(256))
        True
        """
        with (
            torch.enable_grad(),
            self._advised(f"a Jacobian of {len(e)} rows after {self.position} tokens"),
        ):
            e = (
                e.detach().clone().requires_grad_()
            )  # a view of the table would drag the whole table along
            state = self.embedding(e[None])[0]
            return torch.autograd.grad(
                state, e, torch.eye(len(e)).to(state), is_grads_batched=True
            )[0]

    def margin(self) -> float:
        """Δ_{π,t}: the smallest distance between the states of two different tokens, in float64 (paper §3).

        The definition itself, all |V|² pairs one by one, to check others by; ``margins`` says the same much sooner.
        """
        states = self.tokens(
            torch.arange(self.model.vocab_size, device=self.model.device)
        ).double()
        smallest = torch.inf
        for first in range(0, len(states) - 1, ROWS):
            # Rows against all later ones: the differences themselves, since |a|² + |b|² − 2ab loses small distances.
            pairs = torch.cdist(
                states[first : first + ROWS], states[first:], compute_mode=EXACT
            )
            smallest = min(
                smallest,
                float(pairs[torch.ones_like(pairs, dtype=torch.bool).triu(1)].min()),
            )
        return smallest

    def _advised(self, what: str) -> AbstractContextManager:
        return advised(what, self.model.dtype, ModelError)

    def _rows(self) -> int:
        per_row = sum(k.numel() + v.numel() for k, v in self.past)
        return max(1, min(ROWS, FLOAT_ROOM // max(per_row, 1)))

    def _cache(self, rows: int) -> DynamicCache:
        # No config is given to the cache: every layer then keeps the whole prefix, and a sliding window is only a mask.
        cache = DynamicCache(self.past or None)
        for stored in cache.layers:
            stored.keys, stored.values = (
                x.expand(rows, -1, -1, -1) for x in (stored.keys, stored.values)
            )
        return cache

    def _run(
        self, embeds: Float[Tensor, "row pos d_model"], cache: DynamicCache
    ) -> Float[Tensor, "row pos d_model"]:
        positions = (
            torch.arange(embeds.shape[1], device=embeds.device)[None] + self.position
        )
        found = self.cut(
            inputs_embeds=embeds,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return found.last_hidden_state.to(self.model.device)
