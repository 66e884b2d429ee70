"""Language models as maps from a prompt to hidden states, cut at any layer.

One path for every Hugging Face decoder, whose parts are recognised by their structure.
States are taken after a block and before the final norm, as in the paper (§3).
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

PRODUCTS = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
LOCK = threading.RLock()
USERS: dict[object, tuple] = {}  # of plain settings, in all threads: what was before


class SipItError(ValueError):
    """Whatever this package refuses: every error of its own is one."""


class StatesError(SipItError):
    """States that no prompt can have: their width, format or length, not finite."""


class ModelError(SipItError):
    """A model that cannot be loaded, or a question that it cannot answer."""


@contextmanager
def plain_settings() -> Iterator[None]:
    """No TF32 in products, autocast, inference mode, default format or device."""
    user = object()
    gradients = None if USERS else torch.is_grad_enabled()  # inner ones may end late
    casting = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    try:
        _share(user, True)
        # No context of its own: one that Ctrl-C leaves open keeps stale casts for good.
        for kind in casting:
            torch.set_autocast_enabled(kind, False)
        with ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
                stack.enter_context(torch.no_grad())  # which that turns on
            if torch.get_default_device().type != "cpu":  # else slower for nothing
                stack.enter_context(torch.device("cpu"))
            yield
    finally:
        try:
            _share(user, False)
        finally:  # once more, since Ctrl-C may come amid it, or as no_grad ends
            if user in USERS:
                _share(user, False)
            for kind in casting:
                torch.set_autocast_enabled(kind, True)
            if gradients is not None:
                torch.set_grad_enabled(gradients)


def _share(user: object, enters: bool) -> None:
    """Set what threads share: plain while one of them is a user, then as before."""
    with LOCK:
        usual = (torch.get_default_dtype(), *(x.fp32_precision for x in PRODUCTS))
        before = next(iter(USERS.values()), usual)  # the same of all
        USERS.update({user: before} if enters else {})
        plain = enters or USERS.keys() - {user}
        dtype, *precisions = (torch.float32, "ieee", "ieee") if plain else before
        torch.set_default_dtype(dtype)
        for product, precision in zip(PRODUCTS, precisions, strict=True):
            product.fp32_precision = precision
        if not enters:
            USERS.pop(user, None)


def is_oom(error: BaseException) -> bool:
    """Whether an error says that no memory could be had, on CUDA or on the CPU."""
    exhausted = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return exhausted or "can't allocate memory" in str(error)


class LanguageModel:
    """A decoder-only transformer as the paper sees it: the map s ↦ H^(ℓ)(s).

    Parameters
    ----------
    hf_model: a causal model of ``transformers``, LoRA and all; build anew if it changes
    tokenizer, name: without the first, prompts are ids; messages call it ``name``

    Raises
    ------
    ModelError: another model, or blocks and final norm that cannot be told apart

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> model = LanguageModel(GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2)))
    >>> model.states(torch.tensor([5, 6, 7]), layer=1).shape
    torch.Size([3, 8])
    """

    what = "states"  # that leak; others with Leaked

    def __init__(self, hf_model, tokenizer=None, *, name: str | None = None):
        if hasattr(hf_model, "get_base_model"):  # PEFT: its adapters stay in place
            hf_model = hf_model.get_base_model()
        if not isinstance(hf_model, PreTrainedModel):
            expected = "expected a model of transformers; load takes names"
            raise ModelError(f"got an object {type(hf_model).__name__}; {expected}")
        self.decoder = decoder = hf_model.get_decoder()
        if any(weight.is_inference() for weight in decoder.parameters()):
            raise ModelError("got weights made in inference mode; load it outside")
        self.parts = parts_of(decoder)
        self.tokenizer = tokenizer
        self.name = name or decoder.config._name_or_path or type(decoder).__name__
        self.begin, self._end = edge_tokens(tokenizer) if tokenizer else (None, None)
        self.measured: dict[tuple, Any] = {}  # once, by what and layer: ("noise", 3)
        table = decoder.get_input_embeddings()
        self.hf_model = hf_model  # with the head; None where blocks were left out
        # Token ids, shape (|V|,), and what they give the first block, shape (|V|, d).
        self.vocabulary = torch.arange(len(table.weight), device=table.weight.device)
        self.embeddings = table.weight.detach()  # shared, not copied
        if type(table) is not nn.Embedding:  # Gemma scales the rows, LoRA may add
            self.embeddings = table(self.vocabulary).detach()
        self.vocab_size, self.d_model = self.embeddings.shape
        self.device = self.embeddings.device
        self.dtype = self.embeddings.dtype
        self.sixteen_bits = self.dtype.itemsize <= 2
        self.n_layers = decoder.config.num_hidden_layers  # L: layers run from 0 to L
        self.n_positions = decoder.config.max_position_embeddings  # the context length

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {self.n_layers} blocks, {self.dtype})"

    def encode(self, text: str) -> Int[Tensor, " pos"]:
        """Token ids of a text, special tokens included; ``ModelError`` for no token."""
        if self.tokenizer is None:
            raise ModelError(f"got text; {self.name} came without a readable tokenizer")
        quoted = repr(text if len(text) <= 40 else text[:39] + "…")  # it may be secret
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ModelError(f"got the text {quoted} with lone surrogates, not UTF-8")
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        if len(ids) == 0:
            raise ModelError(f"got the text {quoted} of 0 tokens; expected one or more")
        if max(ids) >= self.vocab_size:
            known = f"{self.name} has {self.vocab_size}: tokenizer and model disagree"
            raise ModelError(f"got token {max(ids)}; {known}")
        return torch.tensor(ids, device=self.device)

    def decode(self, ids: Int[Tensor, " pos"]) -> str:
        """The text that ``encode`` turned into these ids, or the ids themselves."""
        ids = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        ids = ids[1:] if ids[:1] == [self.begin] else ids
        ids = ids[:-1] if ids[-1:] == [self._end] else ids
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def check_layer(self, layer: int) -> None:
        """Raise ``ModelError`` unless 0 ≤ layer ≤ L, or L + 1: after the final norm."""
        integral = isinstance(layer, Integral) and not isinstance(layer, bool)
        if not integral or not 0 <= layer <= self.n_layers + 1:
            there = f"{self.name} has layers 0 (embeddings) to {self.n_layers}"
            raise ModelError(f"got layer {layer!r}; {there}, and one after the norm")

    def check_ids(self, ids: Tensor) -> None:
        """Raise ``ModelError`` unless the ids are below |V|, in rows of 1 to K."""
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ModelError(f"got ids of {ids.dtype}; token ids are integers")
        if ids.ndim == 0 or ids.numel() == 0 or ids.shape[-1] > self.n_positions:
            expected = f"a prompt has 1 to {self.n_positions} tokens"
            raise ModelError(f"got ids of shape {tuple(ids.shape)}; {expected}")
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            expected = f"tokens are 0 to {self.vocab_size - 1}"
            raise ModelError(f"got ids from {ids.min()} to {ids.max()}; {expected}")

    @plain_settings()
    def states(self, prompt: str | Tensor, layer: int) -> Float[Tensor, "*batch pos d"]:
        """Hidden states H^(ℓ) at every position, before the final norm for ℓ ≤ L.

        Of a text, or token ids of shape (T,) or, for equal lengths, (..., T). Layer 0
        is what enters the first block, ℓ what leaves block ℓ, L + 1 what leaves the
        norm. Raises ``ModelError`` for a bad layer or prompt, or too little memory.
        """
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt
        self.check_ids(ids)
        size = f"{ids[..., 0].numel()} prompts of {ids.shape[-1]} tokens"
        with torch.no_grad(), self.advised(size):
            rows = self.embeddings[ids.reshape(-1, ids.shape[-1]).to(self.device)]
            output = self.cut(layer)(inputs_embeds=rows, use_cache=False)
        return output.last_hidden_state.to(self.device).reshape(*ids.shape, -1)

    @contextmanager
    def advised(self, what: str) -> Iterator[None]:
        """Turn running out of memory into a ``ModelError`` that says what may fit."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_oom(error):
                raise
            got = f"got {what}, which do not fit into memory; expected fewer or shorter"
            got += " ones at a time, or a lower layer"
            coarser = f", or torch.bfloat16 in place of {self.dtype}"
            raise ModelError(got + coarser * (not self.sixteen_bits)) from error

    def cut(self, layer: int) -> nn.Module:
        """The decoder with its first blocks, no final norm; all weights shared."""
        self.check_layer(layer)
        cut = copy.copy(self.decoder)
        cut._modules = dict(cut._modules)  # else the cut would cut the decoder
        blocks, norm = self.parts
        setattr(cut, blocks, getattr(cut, blocks)[:layer])
        getattr(cut, blocks).training = False  # a new list; its blocks are as they were
        if layer <= self.n_layers:
            setattr(cut, norm, nn.Identity().eval())
        # With a device map, these are bound to the decoder before the cut.
        for hooked in ("forward", "_old_forward", "_hf_hook"):
            cut.__dict__.pop(hooked, None)
        return _evaluating(cut) if any(part.training for part in cut.modules()) else cut


def edge_tokens(tokenizer: Any) -> tuple[int | None, int | None]:
    """The special tokens that a tokenizer puts first and last, None for none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    begin = int(ids[0]) if ids[:1] != bare[:1] else None
    return begin, int(ids[-1]) if bare and ids[-1:] != bare[-1:] else None


def parts_of(decoder: PreTrainedModel) -> tuple[str, str]:
    """Names of the list of blocks and of the final norm, recognised by structure."""
    depth = getattr(decoder.config, "num_hidden_layers", None)
    width = getattr(decoder.config, "hidden_size", None)
    blocks = []
    norms = []
    for name, child in decoder.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == depth:
            blocks.append(name)
        shapes = {tuple(weight.shape) for weight in child.parameters()}
        if shapes == {(width,)} and not list(child.children()):
            norms.append(name)
    limited = hasattr(decoder.config, "max_position_embeddings")
    if len(blocks) != 1 or not norms or not limited:
        got = f"got {type(decoder).__name__} with {len(blocks)} lists of {depth} blocks"
        limit = f"{'a' if limited else 'no'} max_position_embeddings"
        parts = f"{len(norms)} norms of width {width} and {limit}"
        raise ModelError(f"{got}, {parts}; expected a decoder-only language model")
    return blocks[0], norms[-1]  # a norm of the embeddings comes first


def _evaluating(module: nn.Module) -> nn.Module:
    """A twin of a module in evaluation mode, which shares its weights and hooks."""
    twin = copy.copy(module)
    twin.training = False
    twin._modules = {k: m and _evaluating(m) for k, m in module._modules.items()}
    return twin
