"""Files that are complete or not there, what they hold, and of which model."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sipit_lite.model import LanguageModel

ASIDE = ("architectures", "transformers_version", "dtype", "use_cache")  # no state


@contextmanager
def replacing(
    path: str | Path, kind: type[Exception], *, folders: bool = True
) -> Iterator[Path]:
    """A new path, which takes the place of ``path`` if all goes well; else ``kind``."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError("not a file")  # a rename would do away with /dev/null
        if folders:
            path.parent.mkdir(parents=True, exist_ok=True)
        # Beside it, where a rename is atomic; no two processes share this name.
        part = path.with_name(f"{path.name}.{uuid4().hex}.part")
        try:
            part.touch()  # before the work, if nothing can be written there
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        refusal = f"got {str(path)!r}, where no file can be written ({reason})"
        raise kind(refusal) from error


def check_path(
    path: str | Path, kind: type[Exception], *, folders: bool = False
) -> None:
    """Raise ``kind`` where ``replacing`` could not write; nothing is changed there."""
    with suppress(LookupError), replacing(path, kind, folders=folders):
        raise LookupError  # leaves without the rename


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        return tensors, stored.metadata() or {}


def arrays(path: Path) -> tuple[dict[Any, Tensor], dict[str, str]]:
    """What ``read`` gives, also of a ``.npy`` file and of tensors in a ``.pt`` file."""
    if path.suffix == ".npy":
        return {"": torch.from_numpy(np.load(path))}, {}
    if path.suffix not in (".pt", ".pth"):
        return read(path)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    stored = [stored] if isinstance(stored, Tensor) else stored
    return stored if isinstance(stored, dict) else dict(enumerate(stored)), {}


def digest(tensors: Iterable[Tensor], about: str = "") -> str:
    """SHA-256 of what they are about, and of tensors' formats, shapes and bytes."""
    hashed = sha256(about.encode())
    for tensor in tensors:
        hashed.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        # As bytes, since bfloat16 and 8-bit formats have no NumPy counterpart.
        hashed.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()


def fingerprint(model: LanguageModel) -> str:
    """SHA-256 of a model: every bit of its weights, its configuration, what leaks."""
    key = ("fingerprint",)
    if key not in model.measured:
        config = model.decoder.config.to_dict()
        fields = {k: config[k] for k in config if k not in ASIDE and k[0] != "_"}
        weights = model.decoder.state_dict()
        text = json.dumps([model.what, fields, [*weights]], sort_keys=True, default=str)
        model.measured[key] = digest(weights.values(), text)
    return model.measured[key]
