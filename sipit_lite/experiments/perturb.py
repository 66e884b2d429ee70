"""What is done to states and models on purpose: rounding, noise, planted collisions."""

import copy

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Embedding
from torch.nn.functional import pad

from sipit_lite.model import LanguageModel, StatesError

FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS |= {"float8": torch.float8_e4m3fn}  # sign, 4 bits of exponent, 3 of fraction
BITS = {"int8": 8, "int4": 4}
FP4 = (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)  # e2m1
BLOCK = 64  # numbers in FP4 that share one scale
Rows = Float[Tensor, "*rows d_model"]


def rounded(states: Rows, form: str) -> Rows:
    """States as they come back from a smaller format, in the format they came in.

    ``form`` is float16, bfloat16 or float8 (e4m3), rounded to the nearest; int8 or int4
    with one scale a row, its largest size; or fp4 (e2m1) with one for every 64 numbers.
    Raises ``StatesError`` for another format, or a number that it cannot hold.

    >>> rounded(torch.tensor([[1.0, -0.3, 0.04]]), "int4").mul(7).round().tolist()
    [[7.0, -2.0, 0.0]]
    """
    if form in BITS:  # half as many steps on either side of zero
        scale = states.abs().amax(-1, keepdim=True) / (2 ** (BITS[form] - 1) - 1)
        return (states / scale.where(scale > 0, 1.0)).round() * scale
    if form == "fp4":
        blocks = pad(states.flatten(), (0, -states.numel() % BLOCK)).view(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True) / max(FP4)
        levels = torch.tensor(FP4).to(states)
        # A number goes to the next level where it passes the middle between two.
        middles = (levels[1:] + levels[:-1]) / 2
        near = torch.bucketize(blocks / scale.where(scale > 0, 1.0), middles)
        return (levels[near] * scale).flatten()[: states.numel()].view_as(states)
    if form not in FORMATS:
        raise StatesError(f"got the format {form!r}; expected {[*FORMATS, *BITS]}, fp4")
    result = states.to(FORMATS[form]).to(states.dtype)
    if not result.isfinite().all():
        raise StatesError(f"{form} cannot hold numbers up to {states.abs().max():.3g}")
    return result


def noisy(states: Rows, size: float | Tensor, seed: int = 0) -> Rows:
    """States with noise of ℓ2 norm ``size`` added to each row, directions uniform.

    Raises ``StatesError`` for a size, one or one a row, negative or not finite.

    >>> noisy(torch.zeros(2, 3).double(), torch.tensor([1.0, 2.0])).norm(dim=1).tolist()
    [1.0, 2.0]
    """
    sizes = torch.as_tensor(size, dtype=torch.float64)
    if not bool(((sizes >= 0) & sizes.isfinite()).all()):
        raise StatesError(f"got size={size}; expected finite sizes, not negative")
    generator = torch.Generator().manual_seed(seed)  # of the CPU: the same everywhere
    drawn = torch.randn(states.shape, generator=generator, dtype=torch.float64)
    noise = drawn / drawn.norm(dim=-1, keepdim=True) * sizes[..., None]
    return states + noise.to(states)


def quantised(model: LanguageModel, form: str, name: str = "") -> LanguageModel:
    """A copy of the model whose matrices, embeddings aside, went through ``rounded``.

    >>> from sipit_lite import load
    >>> small = quantised(load(device="cpu"), "int4")
    >>> small.decoder.h[0].mlp.c_fc.weight[0].unique().numel() <= 15
    True
    """
    decoder = copy.deepcopy(model.decoder)  # the weights of the original stay
    tables = {part.weight for part in decoder.modules() if isinstance(part, Embedding)}
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.ndim == 2 and weight not in tables:
                weight.copy_(rounded(weight, form))
    name = name or f"{model.name}, {form} weights"
    return LanguageModel(decoder, model.tokenizer, name=name)


def twins(
    model: LanguageModel, first: int, second: int, *, apart: float = 0.0, seed: int = 0
) -> LanguageModel:
    """A copy in which two tokens share an embedding, up to a shift of norm ``apart``.

    Without a shift, prompts that differ in these tokens alone collide at all layers.
    Raises ``ModelError`` for tokens outside 0 to |V| − 1.
    """
    model.check_ids(torch.tensor([first, second]))
    decoder = copy.deepcopy(model.decoder)
    table = decoder.get_input_embeddings().weight
    with torch.no_grad():
        table[second] = noisy(table[first], apart, seed)
    return LanguageModel(decoder, model.tokenizer, name=model.name)
