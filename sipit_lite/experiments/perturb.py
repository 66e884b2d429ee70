"""What is done to states and models on purpose: noise, rounding, and collisions made by hand."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from sipit_lite.model import LanguageModel

FORMATS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float8_e4m3fn,
}
BITS = {"int8": 8, "int4": 4}
FP4, FP4_BLOCK = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), 64


def rounded(
    states: Float[Tensor, "*rows d_model"], form: str
) -> Float[Tensor, "*rows d_model"]:
    """States as they come back from a smaller format: float16, bfloat16, float8 (e4m3), or int8 and int4.

    The integers use one scale a row, its largest absolute value. Shape and dtype stay.
    Raises ``ValueError`` for an unknown format, or a state that the format cannot hold.

    >>> rounded(torch.tensor([[1.0, -0.3, 0.04]]), "int4").mul(7).round().tolist()
    [[7.0, -2.0, 0.0]]
    """
    if form not in FORMATS and form not in BITS:
        raise ValueError(
            f"got the format {form!r}; expected one of {[*FORMATS, *BITS]}"
        )
    if form in BITS:
        scale = states.abs().amax(-1, keepdim=True) / (2 ** (BITS[form] - 1) - 1)
        return (states / scale.where(scale > 0, 1.0)).round() * scale
    found = states.to(FORMATS[form]).to(states.dtype)
    if not found.isfinite().all():
        raise ValueError(
            f"got states up to {float(states.abs().max()):.3g}, which {form} cannot hold"
        )
    return found


def noisy(
    states: Float[Tensor, "*rows d_model"], size: float | Tensor, seed: int = 0
) -> Float[Tensor, "*rows d_model"]:
    """States with noise of ℓ2 norm ``size`` added to each row, in directions drawn uniformly.

    ``size`` is one number, or one for each row. Raises ``ValueError`` for a size that is negative or not finite.

    >>> states = torch.zeros(2, 3, dtype=torch.float64)
    >>> noisy(states, torch.tensor([1.0, 2.0])).norm(dim=1).tolist()
    [1.0, 2.0]
    """
    sizes = torch.as_tensor(size, dtype=torch.float64)
    if not bool(((sizes >= 0) & sizes.isfinite()).all()):
        raise ValueError(f"got size={size}; expected finite sizes, not negative")
    direction = torch.randn(
        states.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    direction = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
    return states + (direction * sizes[..., None]).to(states)


def quantised(model: LanguageModel, form: str) -> LanguageModel:
    """A copy of the model whose blocks' matrices went through a smaller format: float16, ..., int8, int4, or fp4.

    int8 and int4 as in ``rounded``, one scale a row; ``"fp4"`` (e2m1) with one scale for each 64 numbers. The weights
    come back as float32 numbers, so this shows what the rounding does, not what it saves. Raises ``ValueError`` for
    an unknown format.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> quantised(model, "fp4").decoder.h[0].mlp.c_fc.weight[0].unique().numel() <= 15 * 16
    True
    """
    decoder = copy.deepcopy(model.decoder)
    tables = {
        id(part.weight)
        for part in decoder.modules()
        if isinstance(part, torch.nn.Embedding)
    }
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.ndim == 2 and id(weight) not in tables:
                weight.copy_(_fp4(weight) if form == "fp4" else rounded(weight, form))
    name = f"{model.name}, {form} weights"
    return LanguageModel(decoder, model.tokenizer, name=name)


def _fp4(weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The nearest of ±{0, ½, 1, 1½, 2, 3, 4, 6} times a scale for each 64 numbers in a row of memory."""
    flat = torch.nn.functional.pad(
        weight.flatten(), (0, -weight.numel() % FP4_BLOCK)
    ).view(-1, FP4_BLOCK)
    scale = flat.abs().amax(1, keepdim=True) / FP4[-1]
    levels = torch.tensor(FP4).to(flat)
    size = (flat / scale.where(scale > 0, 1.0)).abs()
    nearest = levels[torch.bucketize(size, (levels[1:] + levels[:-1]) / 2)]
    return (nearest * flat.sign() * scale).flatten()[: weight.numel()].view_as(weight)


def twins(
    model: LanguageModel, first: int, second: int, *, apart: float = 0.0, seed: int = 0
) -> LanguageModel:
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
    shift = torch.randn(
        model.d_model,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    shift = (apart * shift / torch.linalg.vector_norm(shift)).to(table)
    with torch.no_grad():
        table[second] = table[first] + shift
    return LanguageModel(decoder, model.tokenizer, name=model.name)
