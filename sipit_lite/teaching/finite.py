"""States in finite precision: how many there are, and how routes to one differ.

A theorem about real numbers says nothing about floats, of which there are finitely
many. Here they are counted exactly (pigeonholes), prompts are listed exhaustively, and
states are computed by several routes (``limits``).
"""

import copy
import math
from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.linalg import vector_norm

from sipit_lite.model import LanguageModel, SipItError
from sipit_lite.onestep import OneStepMap

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
CHUNK = 4096  # prompts of one forward pass
BATCH = 32  # rows of the batch in which a prompt is computed once more


class CountError(SipItError):
    """Sizes of which nothing can be counted."""


def finite_values(dtype: torch.dtype) -> int:
    """How many different finite numbers a format has; 0 and −0 are one.

    Raises ``CountError`` for a format that is not of real numbers of either sign.

    >>> finite_values(torch.bfloat16), finite_values(torch.int8)
    (65279, 256)
    """
    if dtype.is_complex or dtype == torch.bool or dtype.itemsize not in INTEGERS:
        raise CountError(f"got {dtype}; expected a format of real numbers")
    if not dtype.is_floating_point:
        return torch.iinfo(dtype).max - torch.iinfo(dtype).min + 1
    limits = torch.finfo(dtype)
    if limits.min != -limits.max:
        raise CountError(f"got {dtype}, from {limits.min}; expected one of either sign")
    # Positive floats are ordered as their bit patterns are: that of the largest counts.
    largest = torch.tensor(limits.max, dtype=dtype).view(INTEGERS[dtype.itemsize])
    return 2 * int(largest) + 1


def pigeonhole_length(d_model: int, bits: int, vocab_size: int) -> int:
    """The first T above T* = d·b/log₂|V|: two prompts must share their last state.

    Raises ``CountError`` for sizes below one, or a vocabulary of one token.

    >>> pigeonhole_length(768, 32, 50257)  # GPT-2 small, whose context is 1024
    1574
    """
    if d_model < 1 or bits < 1:
        raise CountError(f"got d_model={d_model}, bits={bits}; expected one or more")
    return crowded_length(vocab_size, 2 ** (d_model * bits))


def crowded_length(vocab_size: int, states: int) -> int:
    """The smallest T with |V|^T > states: more prompts of T tokens than states. Exact.

    Raises ``CountError`` for a vocabulary of one token, or no state.

    >>> crowded_length(2, 1024), crowded_length(4, 15**4)
    (11, 8)
    """
    if vocab_size < 2 or states < 1:
        raise CountError(
            f"got vocab_size={vocab_size}, states={states}; "
            "expected two tokens or more, one state or more"
        )
    # A float may be off by rounding: start surely below, then count up in integers.
    below = (states.bit_length() - 1) / math.log2(vocab_size) * (1 - 1e-12) - 1
    length = max(0, int(below))
    while vocab_size**length <= states:
        length += 1
    return length


def every_prompt(vocab_size: int, longest: int) -> list[Int[Tensor, "count pos"]]:
    """All prompts of 1 to ``longest`` tokens in order: a tensor (|V|^T, T) for each T.

    Raises ``CountError`` for a vocabulary or a length below one.

    >>> [prompts.tolist() for prompts in every_prompt(2, 2)]
    [[[0], [1]], [[0, 0], [0, 1], [1, 0], [1, 1]]]
    """
    if vocab_size < 1 or longest < 1:
        raise CountError(
            f"got vocab_size={vocab_size}, longest={longest}; expected one or more"
        )
    powers = vocab_size ** torch.arange(longest).flip(0)  # of |V|, the largest first
    batches = []
    for length in range(1, longest + 1):
        # The digits of 0, 1, 2, ... in base |V|.
        numbers = torch.arange(vocab_size**length)[:, None]
        batches.append(numbers // powers[-length:] % vocab_size)
    return batches


def every_last_state(
    model: LanguageModel, layer: int, prompts: Sequence[Int[Tensor, "_ _"]]
) -> Float[Tensor, "n d_model"]:
    """The last-token states of prompts in batches of one length each.

    Raises what ``LanguageModel.states`` raises.

    >>> from sipit_lite import load
    >>> every_last_state(load(device="cpu"), 1, every_prompt(3, 2)).shape
    torch.Size([12, 256])
    """
    states = []
    for batch in prompts:
        states += [model.states(chunk, layer)[:, -1] for chunk in batch.split(CHUNK)]
    return torch.cat(states)


def routes(
    model: LanguageModel, ids: Int[Tensor, " pos"], layer: int
) -> dict[str, Float64[Tensor, "pos d_model"]]:
    """The states of one prompt by routes that exact arithmetic would not tell apart.

    One pass; token by token over a cache; inside a batch; with one thread; in float64;
    and, where there is CUDA, on the other device. All as float64 numbers on the CPU.

    >>> from sipit_lite import load
    >>> list(routes(load(device="cpu"), torch.tensor([1, 2, 3]), 2))[:5]
    ['one pass', 'token by token', 'in a batch', 'one thread', 'float64']
    """
    states = {"one pass": model.states(ids, layer)}
    step = OneStepMap.after(model, layer)
    rows = []
    for token in ids.to(model.device).split(1):
        row, step = step.follow(token)
        rows.append(row)
    states["token by token"] = torch.cat(rows)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(model.vocab_size, (BATCH, len(ids)), generator=generator)
    batch[-1] = ids  # larger products are summed in another order
    states["in a batch"] = model.states(batch, layer)[-1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        states["one thread"] = model.states(ids, layer)
    finally:
        torch.set_num_threads(threads)
    double = LanguageModel(copy.deepcopy(model.decoder).double())
    states["float64"] = double.states(ids, layer)
    if torch.cuda.is_available():  # the device that the model is not on
        other = "cpu" if model.device.type == "cuda" else "cuda"
        moved = LanguageModel(copy.deepcopy(model.decoder).to(other))
        states[f"on {other}"] = moved.states(ids, layer)
    return {name: rows.cpu().double() for name, rows in states.items()}


def route_spread(
    states: dict[str, Float64[Tensor, "pos d_model"]],
) -> Float64[Tensor, " pos"]:
    """The largest distance between two routes at each position, over the first's norm.

    >>> one, two = torch.tensor([[[3.0, 4.0]], [[3.0, 4.5]]]).double()
    >>> route_spread({"one": one, "two": two}).tolist()
    [0.1]
    """
    gaps = [vector_norm(a - b, dim=1) for a, b in combinations(states.values(), 2)]
    first = next(iter(states.values()))
    return torch.stack(gaps).amax(0) / vector_norm(first, dim=1)
