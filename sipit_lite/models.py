"""Language models as maps from a prompt to hidden states, cut at any layer.

One path for every Hugging Face decoder: its blocks and its final norm are found by structure, not by name.
States are taken after block ``layer`` and before the final norm, as in the paper (its §3 and official code).
"""

import copy
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.resources import files
from numbers import Integral
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

import huggingface_hub
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from sipit_lite.memory import Footprint, advised, is_out_of_memory

POCKET = "pocket-gpt2"


class ModelError(ValueError):
    """A model that cannot be loaded, or a question that the loaded model cannot answer."""


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A decoder-only transformer as the paper sees it: the map s ↦ H^(ℓ)(s) from a prompt to its hidden states.

    ``decoder`` is the untouched ``transformers`` model without its unembedding; ``embeddings`` holds the rows
    E_v that it feeds to its first block, shape (vocab_size, d_model), any embedding scale included.

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

        >>> load(device="cpu").fingerprint == load(device="cpu").fingerprint
        True
        """
        digest = sha256()
        for name, weight in self.decoder.named_parameters():
            spread = torch.linspace(0, weight.numel() - 1, min(weight.numel(), 1024), dtype=torch.float64).long()
            some = weight.detach().flatten()[spread.to(weight.device)].double().cpu()
            digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode() + some.numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def begin(self) -> int | None:
        """The begin-of-text token that the tokenizer puts before every text, or None where it puts none.

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

        >>> model = load(device="cpu")
        >>> model.decode(model.encode("hidden states"))
        'hidden states'
        """
        if self.tokenizer is None:
            raise ModelError(f"{self.name} came without a readable tokenizer: got text, expected token ids")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ModelError(f"got the text {text!r} with lone surrogates; expected text that UTF-8 can write")
        ids = self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        if ids.numel() == 0:
            raise ModelError(f"got the text {text!r} of 0 tokens; a prompt has at least one")
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
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer <= self.n_layers:
            raise ModelError(f"got layer {layer!r}; {self.name} has layers 0 (embeddings) to {self.n_layers}")

    def check_ids(self, ids: Tensor) -> None:
        """Raise ``ModelError`` unless the ids are integers below |V| in rows of 1 to K tokens."""
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ModelError(f"got ids of {ids.dtype}; token ids are integers")
        if ids.ndim == 0 or ids.numel() == 0 or ids.shape[-1] > self.n_positions:
            raise ModelError(f"got ids of shape {tuple(ids.shape)}; a prompt has 1 to {self.n_positions} tokens")
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise ModelError(f"got ids from {ids.min()} to {ids.max()}; tokens are 0 to {self.vocab_size - 1}")

    def states(self, prompt: str | Tensor, layer: int) -> Float[Tensor, "*batch pos d_model"]:
        """Hidden states H^(ℓ) of a text or of token ids at every position, before the final norm.

        ``prompt`` is a text, or ids of shape (T,) or, for a batch of equal lengths, (..., T).
        Layer 0 is the input of the first block (embeddings, with absolute positions where the model has them);
        layer ℓ is the output of block ℓ. Only the first ℓ blocks run, and never the unembedding.
        Raises ``ModelError`` for a layer outside 0..L, an empty or too long prompt, ids outside 0..|V|−1, or a batch
        that does not fit into memory.

        >>> load(device="cpu").states("hidden states", layer=3).shape[-1]
        256
        """
        self.check_layer(layer)
        ids = self.encode(prompt) if isinstance(prompt, str) else prompt.to(self.device)
        self.check_ids(ids)
        rows = ids.reshape(-1, ids.shape[-1])
        with torch.no_grad(), advised(f"{len(rows)} prompts of {ids.shape[-1]} tokens", self.dtype, ModelError):
            found = self.cut(layer)(inputs_embeds=self.embeddings[rows], use_cache=False).last_hidden_state
        return found.to(self.device).reshape(*ids.shape, self.d_model)

    def cut(self, layer: int) -> nn.Module:
        """The decoder with its first ``layer`` blocks and no final norm; it shares all weights.

        >>> model = load(device="cpu")
        >>> len(model.cut(2).h), len(model.decoder.h)
        (2, 6)
        """
        self.check_layer(layer)
        shortened = copy.copy(self.decoder)
        shortened._modules = dict(self.decoder._modules)  # a shallow copy: the model itself must stay whole
        blocks, norm = self._parts
        setattr(shortened, blocks, getattr(self.decoder, blocks)[:layer])
        setattr(shortened, norm, nn.Identity())
        for hooked in ("forward", "_old_forward", "_hf_hook"):  # with a device map, these are bound to the whole model
            shortened.__dict__.pop(hooked, None)
        return shortened

    @contextmanager
    def tapped(self, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
        """Keep the states of several layers while the decoder or a cut of it runs: layer → its latest states.

        The option ``output_hidden_states`` of ``transformers`` is not for this: it leaves hooks in the blocks, which
        all cuts share, so from the second cut on it returns some layers twice.

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

    >>> begin_token(load(device="cpu").tokenizer) is None
    True
    """
    alone = tokenizer("")["input_ids"] if tokenizer is not None else []
    return int(alone[0]) if alone else None


@contextmanager
def tap(decoder: PreTrainedModel, layers: Iterable[int], keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While the decoder or a cut of it runs, ``keep`` gets each layer's number and its states, pass by pass."""
    blocks = getattr(decoder, landmarks(decoder)[0])

    def before(block: nn.Module, args: tuple, kwargs: dict) -> None:
        keep(0, args[0] if args else kwargs["hidden_states"])

    def after(layer: int) -> Callable:
        return lambda block, args, output: keep(layer, output if isinstance(output, Tensor) else output[0])

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


def load(
    name: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
    device_map: str | dict | None = None,
    quantization_config: QuantizationConfigMixin | None = None,
    random_init: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> LanguageModel:
    """Load pocket-gpt2 (no name), a model of the Hugging Face hub, or one in a local folder.

    The environment variable ``SIPIT_LITE_MODEL`` replaces the default. ``layers`` keeps the first so many blocks: the
    others are neither read nor put on the device, and states of the layers left are the same. ``device="auto"`` takes
    CUDA where there is one; ``device_map`` and ``quantization_config`` go to ``transformers`` as they are, and need the
    extra ``sipit-lite[quantised]``. ``random_init`` draws the weights from the architecture's own initialisation
    instead (the object of Theorem 2.2, chapter 4); ``"gpt2"`` then needs no download, and comes without a tokenizer
    where none is at hand. ``progress`` says on standard error what the weights will take, before any is read.
    Raises ``ModelError`` where no such model is in reach, where it is gated, not causal, or not a decoder by its
    structure, or where its weights do not fit into the memory that is free.

    >>> load(device="cpu").name
    'pocket-gpt2'
    >>> load(device="cpu", layers=2).n_layers
    2
    """
    name = str(name if name is not None else os.environ.get("SIPIT_LITE_MODEL") or POCKET)
    place = str(files("sipit_lite") / "pocket_gpt2") if name == POCKET else name
    target, local = pick_device(device), os.path.isdir(place) or not hub_in_reach()
    placed = {"device_map": device_map, "quantization_config": quantization_config}
    placed = {option: value for option, value in placed.items() if value is not None}
    try:
        with _quiet():
            config = shortened(_config(name, place, local, random_init), layers)
            if name != POCKET:  # its 47 MB are not worth the look
                _fits(name, config, dtype, target, placed, progress)
            decoder = (
                _at_random(config, seed).to(dtype) if random_init else _stored(place, config, dtype, local, placed)
            )
            decoder, tokenizer = decoder.get_decoder().eval().requires_grad_(False), _tokenizer(place, local)
        landmarks(decoder)
        decoder = decoder if placed else decoder.to(target)
    except ModelError:
        raise
    except (
        OSError, ValueError, KeyError, RuntimeError, AttributeError, ImportError, SafetensorError, MemoryError
    ) as error:  # fmt: skip
        if is_out_of_memory(error):
            needed = footprint(config, dtype, target)
            raise ModelError(
                f"got {name!r}, out of memory: {needed}; expected one that fits: {needed.advice}"
            ) from error
        raise ModelError(_reason(name, error)) from error
    name += f" at random initialisation, seed {seed}" if random_init else ""
    model = LanguageModel(name, decoder, tokenizer, embedding_rows(decoder))
    _check_causal(model)
    return model


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device of that name; ``"auto"`` is CUDA where there is one, else the CPU. TF32 stays off.

    Raises ``ModelError`` for a device that torch does not know or cannot reach.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    torch.set_float32_matmul_precision("highest")
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"got device {str(device)!r}; expected 'auto', 'cpu', or a CUDA device in reach") from error
    if torch.device(device).type == "mps":
        warnings.warn("MPS has computed wrong GPT-2 states elsewhere: compare with the CPU", stacklevel=2)
    return torch.device(device)


def hub_in_reach() -> bool:
    """Whether the Hugging Face hub has an address here, or a proxy is set; says so at once, and sends nothing.

    >>> isinstance(hub_in_reach(), bool)
    True
    """
    # Without this look-up, transformers retries for half a minute before it says that there is no network.
    try:
        socket.getaddrinfo(urlparse(huggingface_hub.constants.ENDPOINT).hostname, 443)
    except OSError:
        return bool(getproxies())
    return True


def _config(name: str, place: str, local: bool, random_init: bool) -> PreTrainedConfig:
    # The defaults of GPT2Config are GPT-2 124M, so this one architecture needs no file at all.
    if random_init and name == "gpt2":
        return GPT2Config()
    config = AutoConfig.from_pretrained(place, local_files_only=local)
    if config.is_encoder_decoder:
        raise ModelError(
            f"got {name!r}, a sequence-to-sequence model ({config.model_type}); expected a decoder-only language model"
        )
    return config


def shortened(config: PreTrainedConfig, layers: int | None) -> PreTrainedConfig:
    """The configuration of the same model with its first ``layers`` blocks alone, at least one; None keeps all.

    Raises ``ModelError`` for more layers than there are.

    >>> shortened(GPT2Config(), 3).num_hidden_layers
    3
    """
    text = config.get_text_config(decoder=True)
    depth = getattr(text, "num_hidden_layers", None)
    if layers is None or depth is None:
        return config
    if isinstance(layers, bool) or not isinstance(layers, Integral) or not 0 <= layers <= depth:
        raise ModelError(f"got layer {layers!r} as the last to keep; the model has layers 0 (embeddings) to {depth}")
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = max(layers, 1)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: max(layers, 1)]
    return config


def footprint(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, bits: int | None = None) -> Footprint:
    """What the weights of a model will take, worked out from its configuration alone; ``bits`` if quantised.

    >>> footprint(GPT2Config(), torch.bfloat16, torch.device("cpu")).parameters
    124439808
    """
    with torch.device("meta"):  # shapes without numbers
        model = AutoModel.from_config(config, dtype=dtype)
    decoder = model.get_decoder()
    blocks = getattr(decoder, landmarks(decoder)[0])
    small = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2) if bits else 0
    width = dtype.itemsize * 8
    total = sum(p.numel() for p in model.parameters())
    per_block = sum(p.numel() for p in blocks[0].parameters()) * ((bits or width) / width)
    return Footprint.of(total, total - small + small * (bits or 0) / width, per_block, len(blocks), dtype, device)


def _fits(
    name: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, placed: dict, progress: bool
) -> None:
    quantised = placed.get("quantization_config")
    bits = {"load_in_8bit": 8, "load_in_4bit": 4}
    small = next((n for option, n in bits.items() if getattr(quantised, option, False)), None)
    needed = footprint(config, dtype, device, small)
    if progress:
        print(f"{name}: {needed}", file=sys.stderr, flush=True)
    if not needed.fits and "device_map" not in placed:  # a device map spreads the weights, to the disk if need be
        raise ModelError(f"got {name!r}: {needed}; expected one that fits: {needed.advice}")


def _reason(name: str, error: Exception) -> str:
    """Why a model could not be loaded, in one line."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    if any(isinstance(cause, huggingface_hub.errors.GatedRepoError) for cause in causes):
        return (
            f"got model {name!r}, which is gated; expected an account that has accepted its licence on the page of "
            f"the model on the Hugging Face hub, and its token in HF_TOKEN "
            f"({'a token was sent' if huggingface_hub.get_token() else 'not set'})"
        )
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, ImportError) or "accelerate" in reason or "bitsandbytes" in reason:
        return (
            f"got model {name!r} with options that need more packages: pip install 'sipit-lite[quantised]' ({reason})"
        )
    return (
        f"got model {name!r}; expected {POCKET!r}, a folder with config.json and weights, or a model of the "
        f"Hugging Face hub that is downloaded or in reach ({reason})"
    )


def _at_random(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModel.from_config(config)


def _stored(place: str, config: PreTrainedConfig, dtype: torch.dtype, local: bool, placed: dict) -> PreTrainedModel:
    decoder, told = AutoModel.from_pretrained(
        place, config=config, dtype=dtype, local_files_only=local, output_loading_info=True, **placed
    )
    if told["missing_keys"]:  # transformers would draw these at random and go on
        missing = sorted(told["missing_keys"])
        raise ModelError(f"got {place!r} without {len(missing)} of its weights, among them {missing[0]!r}")
    return decoder


def _check_causal(model: LanguageModel) -> None:
    # An encoder may have the parts of a decoder; what it lacks shows when a later token changes an earlier state.
    ids = torch.tensor([[0, 0], [0, model.vocab_size - 1]])
    if model.vocab_size > 1 and model.n_positions > 1:
        one, other = model.states(ids, 1)[:, 0].double()
        apart = float((one - other).norm() / one.norm())
        if apart > torch.finfo(model.dtype).eps ** 0.5:
            raise ModelError(
                f"got {model.name}, whose first state moves by {apart:.1e} of its norm when the second token changes; "
                "expected a causal decoder, whose states depend on earlier tokens alone (this may be an encoder)"
            )


def _tokenizer(place: str, local: bool) -> PreTrainedTokenizerBase | None:
    try:
        found = AutoTokenizer.from_pretrained(place, local_files_only=local)
    except (OSError, ValueError):
        return None  # ids still work; a text is then refused with its own message
    # A folder without tokenizer files gives a tokenizer of special tokens alone.
    return found if len(found) > len(found.all_special_ids) else None


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
    depth, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    blocks = [name for name, child in children.items() if isinstance(child, nn.ModuleList) and len(child) == depth]
    norms = [name for name, child in children.items() if _is_norm(child, width)]
    wanted = {
        f"one torch.nn.ModuleList of config.num_hidden_layers = {depth} blocks": len(blocks) == 1,
        f"a norm of config.hidden_size = {width} numbers": bool(norms),
        "config.max_position_embeddings": hasattr(config, "max_position_embeddings"),
    }
    if not all(wanted.values()):
        lacking = [what for what, there in wanted.items() if not there]
        raise ModelError(
            f"got {type(decoder).__name__} with parts {list(children)} and without {' and '.join(lacking)}; expected a "
            f"decoder-only language model, which has among its own parts {', '.join(wanted)}"
        )
    return blocks[0], norms[-1]  # a norm of the embeddings comes first, the final norm last


def _is_norm(child: nn.Module, width: int | None) -> bool:
    return {tuple(p.shape) for p in child.parameters()} == {(width,)} and not list(child.children())


@contextmanager
def _quiet():
    # Loading messages of transformers go to stderr, which would end up on the pages of the book.
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
