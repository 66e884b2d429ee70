"""Hidden states on disk: one safetensors file with the states of one layer and what is needed to invert them.

Tensor ``states`` of shape (T, d_model) in the format it was captured in; metadata ``format``, ``model``, ``layer``.
The prompt itself is written only when asked for: metadata ``text`` and tensor ``ids``.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sipit_lite.models import LanguageModel
from sipit_lite.verify import StatesError

FORMAT = "sipit-lite states 1"


@dataclass(frozen=True, eq=False)
class Captured:
    """What a file of states holds: the states, the name of their model, their layer, the text where it was kept.

    ``states`` has shape (T, d_model) where ``write_states`` wrote it; ``invert`` checks what comes from elsewhere.
    """

    states: Tensor
    model: str
    layer: int
    text: str | None = None


def write_states(
    path: str | Path,
    model: LanguageModel,
    text: str,
    layer: int,
    *,
    dtype: torch.dtype | None = None,
    keep_text: bool = False,
) -> Captured:
    """Capture the hidden states of a text at one layer into a safetensors file; ``dtype`` rounds them first.

    Raises ``ModelError`` for an empty or too long text or a bad layer, ``StatesError`` where the file cannot be
    written or ``dtype`` is no floating-point format.

    >>> import tempfile; from sipit_lite import load
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = write_states(f"{folder}/states.safetensors", load(device="cpu"), "hidden states", 3)
    ...     captured = read_states(f"{folder}/states.safetensors")
    >>> captured.model, captured.layer, captured.states.shape[1], captured.text
    ('pocket-gpt2', 3, 256, None)
    """
    if dtype is not None and not dtype.is_floating_point:
        raise StatesError(f"got dtype {dtype}; states are stored in a floating-point format such as torch.float32")
    ids = model.encode(text)
    states = model.states(ids, layer).to("cpu", dtype or model.dtype)
    tensors = {"states": states.contiguous()} | ({"ids": ids.cpu()} if keep_text else {})
    metadata = {"format": FORMAT, "model": model.name, "layer": str(layer)} | ({"text": text} if keep_text else {})
    try:
        save_file(tensors, path, metadata)
    except (OSError, SafetensorError) as error:
        raise StatesError(f"got the path {str(path)!r}, where no file can be written ({error})") from error
    return Captured(states, model.name, layer, text if keep_text else None)


def read_states(path: str | Path) -> Captured:
    """Read a file that ``write_states`` wrote.

    Raises ``StatesError`` for a file that is missing, truncated, not safetensors, or without the fields.
    """
    if not Path(path).is_file():
        raise StatesError(f"got the path {str(path)!r}, where there is no file; expected a safetensors file of states")
    try:
        with safe_open(path, framework="pt") as stored:
            metadata, names = stored.metadata() or {}, set(stored.keys())
            if metadata.get("format") != FORMAT or "states" not in names or not {"model", "layer"} <= set(metadata):
                raise StatesError(
                    f"got {str(path)!r} with tensors {sorted(names)} and metadata {sorted(metadata)}; expected the "
                    f"tensor 'states' and metadata 'format' ({FORMAT!r}), 'model', 'layer'"
                )
            layer = metadata["layer"]
            if not layer.isdecimal() or len(layer) > 6:
                raise StatesError(f"got layer {layer[:20]!r} in {str(path)!r}; expected a whole number")
            return Captured(stored.get_tensor("states"), metadata["model"], int(layer), metadata.get("text"))
    except (SafetensorError, OSError) as error:
        raise StatesError(f"got {str(path)!r}, which is not a whole safetensors file ({error})") from error
