"""Last-token states of many prompts, in one pass each, and their shards on disk."""

from collections.abc import Sequence
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sipit_lite.memory import advised
from sipit_lite.model import LanguageModel, ModelError, StatesError

SHARD = 4096  # prompts in a file
TOKENS = 2048  # tokens in a pass: enough for the matrix products, few enough to stay in cache


def last_states(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    layers: Sequence[int],
    *,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Float[Tensor, "layers prompts d_model"]:
    """Last-token states of many prompts of any lengths at the layers asked for, on the CPU, in one pass each.

    Prompts of one length share a batch. With ``folder``, every ``SHARD`` prompts are written to a safetensors file as
    soon as they are done, so a run that was interrupted goes on where it stopped; a shard that is damaged, or of
    another model, other layers or other prompts, is computed again.
    Raises ``ModelError`` for a bad layer or prompt, or a pass that does not fit into memory, ``StatesError`` for no
    prompt or layer, or a folder that cannot be written to (the shards finished by then stay).

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> last_states(model, [model.encode("hidden"), model.encode("hidden states")], [1, 6]).shape[::2]
    torch.Size([2, 256])
    """
    if len(prompts) == 0 or len(layers) == 0:
        raise StatesError(
            f"got {len(prompts)} prompts and {len(layers)} layers; expected at least one of each"
        )
    for layer in layers:
        model.check_layer(layer)
    for prompt in prompts:
        model.check_ids(prompt)
    if folder is not None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StatesError(
                f"got the folder {str(folder)!r}, which cannot be made ({error})"
            ) from error
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    found = torch.empty(len(layers), len(prompts), model.d_model, dtype=model.dtype)
    bar = tqdm(
        total=len(prompts), desc="last states", disable=None if progress else True
    )
    for number, first in enumerate(range(0, len(prompts), SHARD)):
        rows = by_length[first : first + SHARD]
        shard = [prompts[row] for row in rows]
        if folder is None:
            found[:, rows] = _last_states(model, shard, layers)
        else:
            found[:, rows] = _shard(
                Path(folder) / f"shard-{number:05d}.safetensors", model, shard, layers
            )
        bar.update(len(rows))
    return found


def _last_states(
    model: LanguageModel, prompts: Sequence[Tensor], layers: Sequence[int]
) -> Float[Tensor, "layers prompts d_model"]:
    """The states of prompts sorted by length."""
    cut, found = (
        model.cut(max(*layers, 1)),
        [],
    )  # layer 0 is what enters the first block, so that one has to run
    for length, group in groupby(prompts, key=len):
        for ids in torch.stack(list(group)).split(max(1, TOKENS // length)):
            fits = advised(
                f"{len(ids)} prompts of {length} tokens", model.dtype, ModelError
            )
            with fits, torch.inference_mode(), model.tapped(layers) as states:
                cut(
                    inputs_embeds=model.embeddings[ids.to(model.device)],
                    use_cache=False,
                )
                found.append(
                    torch.stack([states[layer][:, -1] for layer in layers]).cpu()
                )
    return torch.cat(found, 1)


def _shard(
    path: Path, model: LanguageModel, prompts: Sequence[Tensor], layers: Sequence[int]
) -> Float[Tensor, "layers prompts d_model"]:
    """A shard from the disk where it is whole and the right one, else computed and written."""
    asked = _digest([*prompts, torch.tensor(layers)]) + model.fingerprint
    try:
        with safe_open(path, framework="pt") as stored:
            states, told = stored.get_tensor("states"), stored.metadata() or {}
        if told.get("of") == asked and told.get("digest") == _digest([states]):
            return states
    except (OSError, SafetensorError):
        pass  # not there yet, or damaged: it is made anew
    states = _last_states(model, prompts, layers).contiguous()
    half = path.with_suffix(
        ".part"
    )  # a name that is never read: only a whole file gets the name of a shard
    try:
        save_file({"states": states}, half, {"of": asked, "digest": _digest([states])})
        half.replace(path)
    except (OSError, SafetensorError) as error:
        if half.exists():
            half.unlink()
        raise StatesError(
            f"got the folder {str(path.parent)!r}, where {path.name} cannot be written ({error})"
        ) from error
    return states


def _digest(tensors: Sequence[Tensor]) -> str:
    """SHA-256 of tensors' shapes and bytes."""
    digest = sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
