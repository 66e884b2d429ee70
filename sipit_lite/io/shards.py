"""Last-token states of many prompts, in one pass each, and their shards on disk."""

import random
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sipit_lite.io.capture import tapped
from sipit_lite.io.files import digest, fingerprint, read, replacing
from sipit_lite.model import LanguageModel, StatesError, plain_settings

SHARD = 4096  # prompts in a file
TOKENS = 2048  # tokens in a pass: enough for the matrix products, and still in cache


@plain_settings()
def last_states(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    layers: Sequence[int],
    *,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Float[Tensor, "layers prompts d_model"]:
    """Last-token states of many prompts of any lengths, on the CPU, in one pass each.

    Parameters
    ----------
    prompts, layers: token ids of each, shape (T,); from 0 to L + 1
    folder: keeps states in files, which processes share and a stopped run goes on
        from; those of another model, layer or prompt are made anew

    Returns
    -------
    In the order of ``layers`` and ``prompts``, in the format of the model

    Raises
    ------
    ModelError, StatesError: a bad layer or prompt, no memory; none, or a bad folder
    """
    if len(prompts) == 0 or len(layers) == 0:
        raise StatesError("got no prompt or no layer; expected at least one of each")
    for layer in layers:
        model.check_layer(layer)
    for prompt in prompts:
        model.check_ids(prompt)
    # Neighbours in this order can share a batch.
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    starts = range(0, len(prompts), SHARD)
    states = torch.empty(len(layers), len(prompts), model.d_model, dtype=model.dtype)
    bar = tqdm(total=len(prompts), desc="last states", disable=not progress or None)
    # Shuffled: processes that share a folder seldom compute the same shard.
    for start in random.Random().sample(starts, len(starts)):
        rows = by_length[start : start + SHARD]
        part = [prompts[row] for row in rows]
        if folder is None:
            states[:, rows] = _last_states(model, part, layers)
        else:
            path = Path(folder) / f"shard-{start // SHARD:05d}.safetensors"
            states[:, rows] = _shard(path, model, part, layers)
        bar.update(len(rows))
    return states


def _last_states(
    model: LanguageModel, prompts: Sequence[Tensor], layers: Sequence[int]
) -> Float[Tensor, "layers prompts d_model"]:
    # Layer 0 is what enters the first block, so that one has to run.
    cut = model.cut(max(*layers, 1))
    parts = []
    for length, group in groupby(prompts, key=len):
        for ids in torch.stack(list(group)).split(max(1, TOKENS // length)):
            size = f"{len(ids)} prompts of {length} tokens"
            fits = model.advised(size)
            with fits, torch.inference_mode(), tapped(model, layers) as states:
                rows = model.embeddings[ids.to(model.device)]
                cut(inputs_embeds=rows, use_cache=False)
                last = [states[layer][:, -1] for layer in layers]
                parts.append(torch.stack(last).cpu())
    return torch.cat(parts, 1)


def _shard(
    path: Path, model: LanguageModel, prompts: Sequence[Tensor], layers: Sequence[int]
) -> Float[Tensor, "layers prompts d_model"]:
    """A shard from the disk if it is intact and the right one, else a new one."""
    of = digest([*prompts, torch.tensor(layers)], fingerprint(model))
    with suppress(OSError, SafetensorError):  # not there yet, or damaged: made anew
        stored, metadata = read(path)
        if metadata == {"of": of, "digest": digest(list(stored.values()))}:
            return stored["states"]
    # Before the work, so that a folder that cannot be made costs no time.
    with replacing(path, StatesError) as part:
        states = _last_states(model, prompts, layers).contiguous()
        save_file({"states": states}, part, {"of": of, "digest": digest([states])})
    return states
