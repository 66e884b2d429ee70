"""Language models as maps from a prompt to hidden states, cut at any layer.

One path for every Hugging Face decoder: its blocks and its final norm are found by structure, not by name.
States are taken after block ``layer`` and before the final norm, as in the paper (its §3 and official code).
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from numbers import Integral

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sipit_lite.memory import advised


class SipItError(ValueError):
    """Whatever this package refuses: every error of its own is one."""


class StatesError(SipItError):
    """Observed states that no prompt of this model can have: wrong width, format, length, or not finite."""


class ModelError(SipItError):
    """A model that cannot be loaded, or a question that the loaded model cannot answer."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A decoder-only transformer as the paper sees it: the map s ↦ H^(ℓ)(s) from a prompt to its hidden states.

    ``decoder`` is the untouched ``transformers`` model without its unembedding; ``embeddings`` holds the rows
    E_v that it feeds to its first block, shape (vocab_size, d_model), any embedding scale included.

    >>> from sipit_lite import load

    >>> model = load(device="cpu")
    >>> model.n_layers, model.d_model, model.vocab_size
    (6, 256, 4096)
    """

    name: str
    decoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    embeddings: Float[Tensor, "vocab d_model"]

    @property
    def n_layers(self) -> int:
        """Number of blocks L; layers run from 0 (embeddings) to L."""
        return self.decoder.config.num_hidden_layers

    @property
    def d_model(self) -> int:
        """Width d of a hidden state."""
        return self.embeddings.shape[1]

    @property
    def vocab_size(self) -> int:
        """Number of tokens |V|, counted as rows of the embedding table."""
        return self.embeddings.shape[0]

    @property
    def n_positions(self) -> int:
        """Context length K: prompts have 1 to K tokens."""
        return self.decoder.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point format the model computes in."""
        return self.embeddings.dtype

    @property
    def fingerprint(self) -> str:
        """SHA-256 over name, shape and up to 1024 evenly spread numbers of every weight: which model this is.

        >>> from sipit_lite import load

        >>> load(device="cpu").fingerprint == load(device="cpu").fingerprint
        True
        """
        digest = sha256()
        for name, weight in self.decoder.named_parameters():
            spread = torch.linspace(
                0, weight.numel() - 1, min(weight.numel(), 1024), dtype=torch.float64
            ).long()
            some = weight.detach().flatten()[spread.to(weight.device)].double().cpu()
            digest.update(
                f"{name}{tuple(weight.shape)}{weight.dtype}".encode()
                + some.numpy().tobytes()
            )
        return digest.hexdigest()

    @cached_property
    def begin(self) -> int | None:
        """The begin-of-text token that the tokenizer puts before every text, or None where it puts none.

        >>> from sipit_lite import load

        >>> load(device="cpu").begin is None
        True
        """
        return begin_token(self.tokenizer)

    @cached_property
    def _parts(self) -> tuple[str, str]:
        return landmarks(self.decoder)

    def encode(self, text: str) -> Int[Tensor, " pos"]:
        """Token ids of a text, special tokens included where the tokenizer adds them.

        Raises ``ModelError`` for an empty text, or where the model came without a tokenizer or with another model's.

        >>> from sipit_lite import load

        >>> model = load(device="cpu")
        >>> model.decode(model.encode("hidden states"))
        'hidden states'
        """
        if self.tokenizer is None:
            raise ModelError(
                f"{self.name} came without a readable tokenizer: got text, expected token ids"
            )
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ModelError(
                f"got the text {text!r} with lone surrogates; expected text that UTF-8 can write"
            )
        ids = self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        if ids.numel() == 0:
            raise ModelError(
                f"got the text {text!r} of 0 tokens; a prompt has at least one"
            )
        if int(ids.max()) >= self.vocab_size:
            raise ModelError(
                f"got token {int(ids.max())} from the tokenizer; {self.name} has embeddings for tokens 0 to "
                f"{self.vocab_size - 1}: tokenizer and model disagree"
            )
        return ids.to(self.device)

    def decode(self, ids: Int[Tensor, " pos"]) -> str:
        """The text of token ids, without the begin-of-text token that ``encode`` would put back at its start.

        Without a tokenizer, the ids themselves, written out.
        """
        if self.tokenizer is None:
            return " ".join(map(str, ids.tolist()))
        ids = ids[1:] if len(ids) and int(ids[0]) == self.begin else ids
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def check_layer(self, layer: int) -> None:
        """Raise ``ModelError`` unless 0 ≤ layer ≤ L."""
        if (
            isinstance(layer, bool)
            or not isinstance(layer, Integral)
            or not 0 <= layer <= self.n_layers
        ):
            raise ModelError(
                f"got layer {layer!r}; {self.name} has layers 0 (embeddings) to {self.n_layers}"
            )

    def check_ids(self, ids: Tensor) -> None:
        """Raise ``ModelError`` unless the ids are integers below |V| in rows of 1 to K tokens."""
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ModelError(f"got ids of {ids.dtype}; token ids are integers")
        if ids.ndim == 0 or ids.numel() == 0 or ids.shape[-1] > self.n_positions:
            raise ModelError(
                f"got ids of shape {tuple(ids.shape)}; a prompt has 1 to {self.n_positions} tokens"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise ModelError(
                f"got ids from {ids.min()} to {ids.max()}; tokens are 0 to {self.vocab_size - 1}"
            )

    def states(
        self, prompt: str | Tensor, layer: int
    ) -> Float[Tensor, "*batch pos d_model"]:
        """Hidden states H^(ℓ) of a text or of token ids at every position, before the final norm.

        ``prompt`` is a text, or ids of shape (T,) or, for a batch of equal lengths, (..., T).
        Layer 0 is the input of the first block (embeddings, with absolute positions where the model has them);
        layer ℓ is the output of block ℓ. Only the first ℓ blocks run, and never the unembedding.
        Raises ``ModelError`` for a layer outside 0..L, an empty or too long prompt, ids outside 0..|V|−1, or a batch
        that does not fit into memory.

        >>> from sipit_lite import load

        >>> load(device="cpu").states("hidden states", layer=3).shape[-1]
        256
        """
        self.check_layer(layer)
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt.to(self.device)
        self.check_ids(ids)
        rows = ids.reshape(-1, ids.shape[-1])
        with (
            torch.no_grad(),
            advised(
                f"{len(rows)} prompts of {ids.shape[-1]} tokens", self.dtype, ModelError
            ),
        ):
            found = self.cut(layer)(
                inputs_embeds=self.embeddings[rows], use_cache=False
            ).last_hidden_state
        return found.to(self.device).reshape(*ids.shape, self.d_model)

    def cut(self, layer: int) -> nn.Module:
        """The decoder with its first ``layer`` blocks and no final norm; it shares all weights.

        >>> from sipit_lite import load

        >>> model = load(device="cpu")
        >>> len(model.cut(2).h), len(model.decoder.h)
        (2, 6)
        """
        self.check_layer(layer)
        shortened = copy.copy(self.decoder)
        shortened._modules = dict(
            self.decoder._modules
        )  # a shallow copy: the model itself must stay whole
        blocks, norm = self._parts
        setattr(shortened, blocks, getattr(self.decoder, blocks)[:layer])
        setattr(shortened, norm, nn.Identity())
        for hooked in (
            "forward",
            "_old_forward",
            "_hf_hook",
        ):  # with a device map, these are bound to the whole model
            shortened.__dict__.pop(hooked, None)
        return shortened

    @contextmanager
    def tapped(self, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
        """Keep the states of several layers while the decoder or a cut of it runs: layer → its latest states.

        The option ``output_hidden_states`` of ``transformers`` is not for this: it leaves hooks in the blocks, which
        all cuts share, so from the second cut on it returns some layers twice.

        >>> from sipit_lite import load

        >>> model = load(device="cpu")
        >>> with torch.no_grad(), model.tapped([0, 2]) as states:
        ...     _ = model.cut(2)(inputs_embeds=model.embeddings[None, :3])
        >>> {layer: kept.shape[1] for layer, kept in states.items()}
        {0: 3, 2: 3}
        """
        states: dict[int, Tensor] = {}
        with tap(self.decoder, layers, states.__setitem__):
            yield states


def begin_token(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The begin-of-text token that a tokenizer puts before every text; None where it puts none, or there is none.

    >>> from sipit_lite import load

    >>> begin_token(load(device="cpu").tokenizer) is None
    True
    """
    alone = tokenizer("")["input_ids"] if tokenizer is not None else []
    return int(alone[0]) if alone else None


@contextmanager
def tap(
    decoder: PreTrainedModel, layers: Iterable[int], keep: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """While the decoder or a cut of it runs, ``keep`` gets each layer's number and its states, pass by pass."""
    blocks = getattr(decoder, landmarks(decoder)[0])

    def before(block: nn.Module, args: tuple, kwargs: dict) -> None:
        keep(0, args[0] if args else kwargs["hidden_states"])

    def after(layer: int) -> Callable:
        return lambda block, args, output: keep(
            layer, output if isinstance(output, Tensor) else output[0]
        )

    handles = [
        blocks[0].register_forward_pre_hook(before, with_kwargs=True) if layer == 0
        else blocks[layer - 1].register_forward_hook(after(layer))
        for layer in set(layers)
    ]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def embedding_rows(decoder: PreTrainedModel) -> Float[Tensor, "vocab d_model"]:
    """The rows E_v as the first block sees them, shape (vocab_size, d_model), any embedding scale included."""
    table = decoder.get_input_embeddings()
    if type(table) is nn.Embedding:
        return table.weight
    with torch.no_grad():  # some families scale their embeddings (Gemma)
        return table(torch.arange(table.weight.shape[0], device=table.weight.device))


def landmarks(decoder: PreTrainedModel) -> tuple[str, str]:
    """Names of the list of blocks and of the final norm, found by structure."""
    config, children = decoder.config, dict(decoder.named_children())
    depth, width = (
        getattr(config, "num_hidden_layers", None),
        getattr(config, "hidden_size", None),
    )
    blocks = [
        name
        for name, child in children.items()
        if isinstance(child, nn.ModuleList) and len(child) == depth
    ]
    norms = [name for name, child in children.items() if _is_norm(child, width)]
    wanted = {
        f"one torch.nn.ModuleList of config.num_hidden_layers = {depth} blocks": len(
            blocks
        )
        == 1,
        f"a norm of config.hidden_size = {width} numbers": bool(norms),
        "config.max_position_embeddings": hasattr(config, "max_position_embeddings"),
    }
    if not all(wanted.values()):
        lacking = [what for what, there in wanted.items() if not there]
        raise ModelError(
            f"got {type(decoder).__name__} with parts {list(children)} and without {' and '.join(lacking)}; expected a "
            f"decoder-only language model, which has among its own parts {', '.join(wanted)}"
        )
    return blocks[0], norms[
        -1
    ]  # a norm of the embeddings comes first, the final norm last


def _is_norm(child: nn.Module, width: int | None) -> bool:
    return {tuple(p.shape) for p in child.parameters()} == {(width,)} and not list(
        child.children()
    )
