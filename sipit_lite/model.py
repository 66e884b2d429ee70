"""Language models as maps from a prompt to hidden states, cut at any layer.

One path for every Hugging Face decoder: its blocks and its final norm are recognised by
structure, not by name. States are taken after block ``layer`` and before the final
norm, as in the paper (its §3 and official code).
"""

import copy
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sipit_lite.memory import advised

# Fields of a configuration that change no state: names, formats, what is returned.
_ASIDE = (
    "architectures transformers_version dtype torch_dtype use_cache "
    "output_hidden_states output_attentions return_dict"
).split()


class SipItError(ValueError):
    """Whatever this package refuses: every error of its own is one."""


class StatesError(SipItError):
    """States that no prompt of this model can have: width, format, length, not finite."""


class ModelError(SipItError):
    """A model that cannot be loaded, or a question that it cannot answer."""


class LanguageModel:
    """A decoder-only transformer as the paper sees it: the map s ↦ H^(ℓ)(s).

    States are computed without gradients and in evaluation mode, whatever mode the
    model is in. The model itself is neither copied nor changed: same weights, same
    mode, same ``requires_grad``. Change its weights, and build this anew.

    Parameters
    ----------
    hf_model
        Any causal model of ``transformers`` in memory: with or without its
        unembedding, or wrapped by PEFT (LoRA). ``load`` takes names and folders.
    tokenizer
        Its tokenizer; without one, prompts are token ids.
    name
        What messages and files call it; by default what its configuration says.

    Attributes
    ----------
    decoder
        The model without its unembedding, untouched.
    measured
        What was measured of this model once, by what and layer: ``("noise", 3)``.

    Raises
    ------
    ModelError
        For anything but a model whose blocks and final norm can be told apart.

    Examples
    --------
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> sizes = GPT2Config(vocab_size=50, n_embd=8, n_layer=2, n_head=2)
    >>> LanguageModel(GPT2LMHeadModel(sizes), name="tiny")
    LanguageModel('tiny': 2 blocks, width 8, 50 tokens, torch.float32 on cpu)
    """

    def __init__(
        self,
        hf_model: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        name: str | None = None,
    ):
        decoder = decoder_of(hf_model)
        self._parts = landmarks(decoder)
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.name = name or decoder.config._name_or_path or type(decoder).__name__
        self.measured: dict[tuple, Any] = {}

    def __repr__(self) -> str:
        size = f"{self.n_layers} blocks, width {self.d_model}, {self.vocab_size} tokens"
        return f"LanguageModel({self.name!r}: {size}, {self.dtype} on {self.device})"

    @cached_property
    def embeddings(self) -> Float[Tensor, "vocab d_model"]:
        """The rows E_v that enter the first block, any embedding scale included."""
        table = self.decoder.get_input_embeddings()
        if type(table) is nn.Embedding:
            return table.weight.detach()  # the weights themselves, not a copy
        # Gemma scales its embeddings, LoRA may add to them.
        everything = torch.arange(len(table.weight), device=table.weight.device)
        with torch.no_grad():
            return table(everything)

    @property
    def vocabulary(self) -> Int[Tensor, " vocab"]:
        """All token ids, 0 to |V| − 1, on the device of the model."""
        return torch.arange(self.vocab_size, device=self.device)

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
        """Where the embeddings are."""
        return self.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point format the model computes in."""
        return self.embeddings.dtype

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every bit of every weight and all of the configuration.

        Two models of one fingerprint compute the same states, up to rounding: what does
        not change the computation (``_ASIDE``) is left out.

        Examples
        --------
        >>> from sipit_lite import load
        >>> load(device="cpu").fingerprint == load(device="cpu").fingerprint
        True
        """
        digest = sha256(_computing(self.decoder.config).encode())
        for name, weight in self.decoder.state_dict().items():
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            # As bytes: bfloat16 and the 8-bit formats have no NumPy counterpart.
            bits = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(bits.numpy())
        return digest.hexdigest()

    @cached_property
    def begin(self) -> int | None:
        """The begin-of-text token that the tokenizer puts before every text, or None."""
        return begin_token(self.tokenizer)

    def encode(self, text: str) -> Int[Tensor, " pos"]:
        """Token ids of a text, with the special tokens that the tokenizer adds.

        Raises
        ------
        ModelError
            For an empty text, and where the model came without a tokenizer or with that
            of another model.

        Examples
        --------
        >>> from sipit_lite import load
        >>> model = load(device="cpu")
        >>> model.decode(model.encode("hidden states"))
        'hidden states'
        """
        if self.tokenizer is None:
            raise ModelError(
                f"{self.name} came without a readable tokenizer: got text, expected "
                "token ids"
            )
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ModelError(
                f"got the text {shortly(text)} with lone surrogates; expected text that "
                "UTF-8 can write"
            )
        ids = self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        if ids.numel() == 0:
            raise ModelError(
                f"got the text {shortly(text)} of 0 tokens; a prompt has at least one"
            )
        if int(ids.max()) >= self.vocab_size:
            raise ModelError(
                f"got token {int(ids.max())} from the tokenizer; {self.name} has "
                f"embeddings for tokens 0 to {self.vocab_size - 1}: tokenizer and model "
                "disagree"
            )
        return ids.to(self.device)

    def decode(self, ids: Int[Tensor, " pos"]) -> str:
        """The text of token ids, without the begin-of-text token at its start.

        Without a tokenizer, the ids themselves, written out.
        """
        if self.tokenizer is None:
            return " ".join(map(str, ids.tolist()))
        if len(ids) and int(ids[0]) == self.begin:
            ids = ids[1:]  # ``encode`` would put it back
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def check_layer(self, layer: int) -> None:
        """Raise ``ModelError`` unless 0 ≤ layer ≤ L."""
        integral = isinstance(layer, Integral) and not isinstance(layer, bool)
        if not integral or not 0 <= layer <= self.n_layers:
            raise ModelError(
                f"got layer {layer!r}; {self.name} has layers 0 (embeddings) to "
                f"{self.n_layers}"
            )

    def check_ids(self, ids: Tensor) -> None:
        """Raise ``ModelError`` unless the ids are below |V|, in rows of 1 to K."""
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ModelError(f"got ids of {ids.dtype}; token ids are integers")
        if ids.ndim == 0 or ids.numel() == 0 or ids.shape[-1] > self.n_positions:
            raise ModelError(
                f"got ids of shape {tuple(ids.shape)}; a prompt has 1 to "
                f"{self.n_positions} tokens"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise ModelError(
                f"got ids from {ids.min()} to {ids.max()}; tokens are 0 to "
                f"{self.vocab_size - 1}"
            )

    def states(
        self, prompt: str | Tensor, layer: int
    ) -> Float[Tensor, "*batch pos d_model"]:
        """Hidden states H^(ℓ) at every position, before the final norm.

        Only the first ℓ blocks run, and never the unembedding.

        Parameters
        ----------
        prompt
            A text, or token ids of shape (T,) or, for a batch of equal lengths,
            (..., T).
        layer
            0 for the input of the first block (embeddings, with absolute positions
            where the model has them), ℓ for the output of block ℓ.

        Returns
        -------
        Tensor
            States of shape (..., T, d).

        Raises
        ------
        ModelError
            For a layer outside 0..L, an empty or too long prompt, ids outside 0..|V|−1,
            or a batch that does not fit into memory.

        Examples
        --------
        >>> from sipit_lite import load
        >>> load(device="cpu").states("hidden states", layer=3).shape[-1]
        256
        """
        self.check_layer(layer)
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt.to(self.device)
        self.check_ids(ids)
        rows = ids.reshape(-1, ids.shape[-1])
        size = f"{len(rows)} prompts of {ids.shape[-1]} tokens"
        with torch.no_grad(), advised(size, self.dtype, ModelError):
            output = self.cut(layer)(
                inputs_embeds=self.embeddings[rows], use_cache=False
            )
        states = output.last_hidden_state.to(self.device)
        return states.reshape(*ids.shape, self.d_model)

    def cut(self, layer: int) -> nn.Module:
        """The decoder with its first ``layer`` blocks and no final norm, for inference.

        It shares all weights with the decoder, which stays as it is.

        Examples
        --------
        >>> from sipit_lite import load
        >>> model = load(device="cpu")
        >>> len(model.cut(2).h), len(model.decoder.h)
        (2, 6)
        """
        self.check_layer(layer)
        cut = copy.copy(self.decoder)
        cut._modules = dict(self.decoder._modules)  # else the cut would cut the decoder
        blocks, norm = self._parts
        setattr(cut, blocks, getattr(self.decoder, blocks)[:layer])
        setattr(cut, norm, nn.Identity())
        # With a device map, these are bound to the model before the cut.
        for hooked in ("forward", "_old_forward", "_hf_hook"):
            cut.__dict__.pop(hooked, None)
        training = any(part.training for part in self.decoder.modules())
        return _evaluating(cut) if training else cut

    @contextmanager
    def tapped(self, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
        """While the decoder or a cut of it runs in this thread: layer → latest states.

        The option ``output_hidden_states`` of ``transformers`` is not for this: it
        leaves hooks in the blocks, which all cuts share, so from the second cut on it
        returns layers twice.

        Examples
        --------
        >>> from sipit_lite import load
        >>> model = load(device="cpu")
        >>> with torch.no_grad(), model.tapped([0, 2]) as states:
        ...     _ = model.cut(2)(inputs_embeds=model.embeddings[None, :3])
        >>> {layer: h.shape[1] for layer, h in states.items()}
        {0: 3, 2: 3}
        """
        states: dict[int, Tensor] = {}
        thread = threading.get_ident()

        def keep(layer: int, h: Tensor) -> None:
            # All cuts share the blocks: passes of other threads come by here as well.
            if threading.get_ident() == thread:
                states[layer] = h

        with tap(self.decoder, layers, keep):
            yield states


def shortly(text: str) -> str:
    """A text as messages quote it: 40 characters at most, since it may be a secret."""
    return repr(text if len(text) <= 40 else text[:39] + "…")


def decoder_of(model: Any) -> PreTrainedModel:
    """The decoder inside a model in memory; ``ModelError`` where there is none."""
    if hasattr(model, "get_base_model"):  # PEFT, with its adapters left in place
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        hint = "load(name) takes names and folders" if isinstance(model, str) else ""
        raise ModelError(
            f"got an object of type {type(model).__name__}; expected a model of "
            f"transformers in memory{hint and ': '}{hint}"
        )
    return model.get_decoder()


def begin_token(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The begin-of-text token that a tokenizer puts before every text, or None."""
    alone = tokenizer("")["input_ids"] if tokenizer is not None else []
    return int(alone[0]) if alone else None


@contextmanager
def tap(
    decoder: PreTrainedModel, layers: Iterable[int], keep: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """While the decoder or a cut runs, ``keep`` gets each layer and its states."""
    blocks = getattr(decoder, landmarks(decoder)[0])
    handles = []

    def before(block: nn.Module, args: tuple, kwargs: dict) -> None:
        keep(0, args[0] if args else kwargs["hidden_states"])

    def after(layer: int) -> Callable:
        def keep_output(block: nn.Module, args: tuple, output: Any) -> None:
            keep(layer, output if isinstance(output, Tensor) else output[0])

        return keep_output

    try:
        for layer in set(layers):
            if layer == 0:
                handle = blocks[0].register_forward_pre_hook(before, with_kwargs=True)
            else:
                handle = blocks[layer - 1].register_forward_hook(after(layer))
            handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


def landmarks(decoder: PreTrainedModel) -> tuple[str, str]:
    """Names of the list of blocks and of the final norm, recognised by structure."""
    config = decoder.config
    depth = getattr(config, "num_hidden_layers", None)
    width = getattr(config, "hidden_size", None)
    children = dict(decoder.named_children())
    blocks = []
    norms = []
    for name, child in children.items():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            blocks.append(name)
        shapes = {tuple(weight.shape) for weight in child.parameters()}
        if shapes == {(width,)} and not list(child.children()):
            norms.append(name)
    there = {
        f"one torch.nn.ModuleList of config.num_hidden_layers = {depth} blocks": len(
            blocks
        )
        == 1,
        f"a norm of config.hidden_size = {width} numbers": bool(norms),
        "config.max_position_embeddings": hasattr(config, "max_position_embeddings"),
    }
    lacking = [part for part, present in there.items() if not present]
    if lacking:
        raise ModelError(
            f"got {type(decoder).__name__} with parts {list(children)} and without {' and '.join(lacking)}; expected a "
            f"decoder-only language model, which has among its parts {', '.join(there)}"
        )
    return blocks[0], norms[-1]  # a norm of the embeddings comes first


def _evaluating(module: nn.Module) -> nn.Module:
    """A twin of a module in evaluation mode: the same weights and hooks."""
    twin = copy.copy(module)
    twin.training = False
    twin._modules = {
        name: child and _evaluating(child) for name, child in module._modules.items()
    }
    return twin


def _computing(config: PreTrainedConfig) -> str:
    """The configuration as text, without what changes no state."""
    fields = {}
    for name, value in config.to_dict().items():
        if name not in _ASIDE and not name.startswith("_"):
            fields[name] = value
    return json.dumps(fields, sort_keys=True, default=str)
