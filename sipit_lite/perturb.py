"""What is done to states and models on purpose: rounding, and collisions made by hand."""

import copy
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sipit_lite.models import LanguageModel, embedding_rows

FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.float8_e4m3fn}
BITS = {"int8": 8, "int4": 4}


def rounded(states: Float[Tensor, "*rows d_model"], form: str) -> Float[Tensor, "*rows d_model"]:
    """States as they come back from a smaller format: float16, bfloat16, float8 (e4m3), or int8 and int4.

    The integers use one scale a row, its largest absolute value. Shape and dtype stay.
    Raises ``ValueError`` for an unknown format, or a state that the format cannot hold.

    >>> rounded(torch.tensor([[1.0, -0.3, 0.04]]), "int4").mul(7).round().tolist()
    [[7.0, -2.0, 0.0]]
    """
    if form not in FORMATS and form not in BITS:
        raise ValueError(f"got the format {form!r}; expected one of {[*FORMATS, *BITS]}")
    if form in BITS:
        scale = states.abs().amax(-1, keepdim=True) / (2 ** (BITS[form] - 1) - 1)
        return (states / scale.where(scale > 0, 1.0)).round() * scale
    found = states.to(FORMATS[form]).to(states.dtype)
    if not found.isfinite().all():
        raise ValueError(f"got states up to {float(states.abs().max()):.3g}, which {form} cannot hold")
    return found


def twins(model: LanguageModel, first: int, second: int, *, apart: float = 0.0, seed: int = 0) -> LanguageModel:
    """A copy of the model in which two tokens share one embedding row, up to a random shift of norm ``apart``.

    With ``apart`` = 0 prompts that differ in these tokens alone collide at every layer: the paper's first failure case.
    Raises ``ModelError`` for tokens outside 0..|V|−1.

    >>> from sipit_lite import load
    >>> model = twins(load(device="cpu"), 5, 6)
    >>> torch.equal(model.embeddings[5], model.embeddings[6])
    True
    """
    model.check_ids(torch.tensor([first, second]))
    decoder = copy.deepcopy(model.decoder)
    table = decoder.get_input_embeddings().weight
    shift = torch.randn(model.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shift = (apart * shift / torch.linalg.vector_norm(shift)).to(table)
    with torch.no_grad():
        table[second] = table[first] + shift
    return replace(model, decoder=decoder, embeddings=embedding_rows(decoder))
