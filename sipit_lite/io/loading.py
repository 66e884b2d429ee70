"""Names, folders and architectures become models, and what they will take in memory is said before."""

import copy
import os
import socket
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from numbers import Integral
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

import huggingface_hub
import psutil
import torch
from safetensors import SafetensorError
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

from sipit_lite.memory import GIB, is_out_of_memory
from sipit_lite.model import LanguageModel, ModelError, landmarks

POCKET = "pocket-gpt2"


@dataclass(frozen=True)
class Footprint:
    """Weights and memory, in bytes: of all weights, of one block, and what is free on the device.

    >>> print(Footprint(10**9, 4 * GIB, GIB, 3, torch.float32, "cpu", 2 * GIB))
    1,000,000,000 parameters, 3 blocks, take 4.00 GiB in float32 on cpu, where 2.00 GiB are free
    """

    parameters: int
    bytes: int
    bytes_per_block: int
    n_layers: int
    dtype: torch.dtype
    device: str
    free: int

    @classmethod
    def of(
        cls,
        parameters: int,
        stored: float,
        per_block: float,
        n_layers: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Footprint":
        """From numbers of the format ``dtype``: ``stored`` of them in all, ``per_block`` in a block."""
        size = dtype.itemsize
        return cls(
            parameters,
            round(stored * size),
            round(per_block * size),
            n_layers,
            dtype,
            str(device),
            free_bytes(device),
        )

    @property
    def fits(self) -> bool:
        """Whether the weights alone are no larger than what is free."""
        return self.bytes <= self.free

    @property
    def advice(self) -> str:
        """What would fit: a coarser format, fewer layers, quantised weights.

        >>> Footprint(10**9, 4 * GIB, GIB, 3, torch.float32, "cpu", 2 * GIB).advice
        "dtype=torch.bfloat16 takes 2.00 GiB; layers=1 of 3 takes 2.00 GiB; device_map='auto' spreads it"
        """
        ways, rest = [], self.bytes - self.n_layers * self.bytes_per_block
        half = self.bytes * 2 // self.dtype.itemsize
        if self.dtype.itemsize > 2 and half <= self.free:
            ways.append(f"dtype=torch.bfloat16 takes {half / GIB:.2f} GiB")
        layers = (self.free - rest) // max(self.bytes_per_block, 1)
        if layers >= 1:
            ways.append(
                f"layers={layers} of {self.n_layers} takes {(rest + layers * self.bytes_per_block) / GIB:.2f} GiB"
            )
        return "; ".join([*ways, "device_map='auto' spreads it"])

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.parameters:,} parameters, {self.n_layers} blocks, take {self.bytes / GIB:.2f} GiB in {name} on "
            f"{self.device}, where {self.free / GIB:.2f} GiB are free"
        )


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a device.

    >>> free_bytes(torch.device("cpu")) > 0
    True
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


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
    name = str(
        name if name is not None else os.environ.get("SIPIT_LITE_MODEL") or POCKET
    )
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
                _at_random(config, seed).to(dtype)
                if random_init
                else _stored(place, config, dtype, local, placed)
            )
            decoder, tokenizer = (
                decoder.get_decoder().eval().requires_grad_(False),
                _tokenizer(place, local),
            )
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
    model = LanguageModel(decoder, tokenizer, name=name)
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
        raise ModelError(
            f"got device {str(device)!r}; expected 'auto', 'cpu', or a CUDA device in reach"
        ) from error
    if torch.device(device).type == "mps":
        warnings.warn(
            "MPS has computed wrong GPT-2 states elsewhere: compare with the CPU",
            stacklevel=2,
        )
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
    if (
        isinstance(layers, bool)
        or not isinstance(layers, Integral)
        or not 0 <= layers <= depth
    ):
        raise ModelError(
            f"got layer {layers!r} as the last to keep; the model has layers 0 (embeddings) to {depth}"
        )
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = max(layers, 1)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: max(layers, 1)]
    return config


def footprint(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    bits: int | None = None,
) -> Footprint:
    """What the weights of a model will take, worked out from its configuration alone; ``bits`` if quantised.

    >>> footprint(GPT2Config(), torch.bfloat16, torch.device("cpu")).parameters
    124439808
    """
    with torch.device("meta"):  # shapes without numbers
        model = AutoModel.from_config(config, dtype=dtype)
    decoder = model.get_decoder()
    blocks = getattr(decoder, landmarks(decoder)[0])
    small = (
        sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2)
        if bits
        else 0
    )
    width = dtype.itemsize * 8
    total = sum(p.numel() for p in model.parameters())
    per_block = sum(p.numel() for p in blocks[0].parameters()) * (
        (bits or width) / width
    )
    return Footprint.of(
        total,
        total - small + small * (bits or 0) / width,
        per_block,
        len(blocks),
        dtype,
        device,
    )


def _fits(
    name: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    placed: dict,
    progress: bool,
) -> None:
    quantised = placed.get("quantization_config")
    bits = {"load_in_8bit": 8, "load_in_4bit": 4}
    small = next(
        (n for option, n in bits.items() if getattr(quantised, option, False)), None
    )
    needed = footprint(config, dtype, device, small)
    if progress:
        print(f"{name}: {needed}", file=sys.stderr, flush=True)
    if (
        not needed.fits and "device_map" not in placed
    ):  # a device map spreads the weights, to the disk if need be
        raise ModelError(
            f"got {name!r}: {needed}; expected one that fits: {needed.advice}"
        )


def _reason(name: str, error: Exception) -> str:
    """Why a model could not be loaded, in one line."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    if any(
        isinstance(cause, huggingface_hub.errors.GatedRepoError) for cause in causes
    ):
        return (
            f"got model {name!r}, which is gated; expected an account that has accepted its licence on the page of "
            f"the model on the Hugging Face hub, and its token in HF_TOKEN "
            f"({'a token was sent' if huggingface_hub.get_token() else 'not set'})"
        )
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if (
        isinstance(error, ImportError)
        or "accelerate" in reason
        or "bitsandbytes" in reason
    ):
        return f"got model {name!r} with options that need more packages: pip install 'sipit-lite[quantised]' ({reason})"
    return (
        f"got model {name!r}; expected {POCKET!r}, a folder with config.json and weights, or a model of the "
        f"Hugging Face hub that is downloaded or in reach ({reason})"
    )


def _at_random(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModel.from_config(config)


def _stored(
    place: str, config: PreTrainedConfig, dtype: torch.dtype, local: bool, placed: dict
) -> PreTrainedModel:
    decoder, told = AutoModel.from_pretrained(
        place,
        config=config,
        dtype=dtype,
        local_files_only=local,
        output_loading_info=True,
        **placed,
    )
    if told["missing_keys"]:  # transformers would draw these at random and go on
        missing = sorted(told["missing_keys"])
        raise ModelError(
            f"got {place!r} without {len(missing)} of its weights, among them {missing[0]!r}"
        )
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
