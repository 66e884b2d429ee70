"""States in finite precision: how many a number format has, which collisions that forces, and how routes differ.

A theorem about real numbers says nothing about floats, of which there are finitely many. Here they are counted exactly
(pigeonholes), searched exhaustively in models that are small enough, and computed by several routes (chapter 16).
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

import torch
from jaxtyping import Float, Float64, Int, Shaped
from torch import Tensor

from sipit_lite.model import LanguageModel
from sipit_lite.onestep import OneStepMap

PATTERNS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # integers as wide as a float, in bytes
CHUNK = 4096  # prompts of one forward pass
CROWD = 32  # rows of the batch in which a prompt is computed once more


def finite_values(dtype: torch.dtype) -> int:
    """How many different finite numbers a format has; 0 and −0 are one, infinities and NaN none.

    Positive floats are ordered as their bit patterns are, so the pattern of the largest one says how many there are.
    Raises ``ValueError`` for a format that is not of real numbers of either sign.

    >>> finite_values(torch.float32) == 2**32 - 2**24 - 1, finite_values(torch.bfloat16), finite_values(torch.int8)
    (True, 65279, 256)
    """
    if dtype.is_complex or dtype == torch.bool or dtype.itemsize not in PATTERNS:
        raise ValueError(f"got {dtype}; expected a format of real numbers")
    if not dtype.is_floating_point:
        return torch.iinfo(dtype).max - torch.iinfo(dtype).min + 1
    limits = torch.finfo(dtype)
    if limits.min != -limits.max:
        raise ValueError(
            f"got {dtype}, from {limits.min} to {limits.max}; expected a format of either sign"
        )
    return (
        2 * int(torch.tensor(limits.max, dtype=dtype).view(PATTERNS[dtype.itemsize]))
        + 1
    )


def pigeonhole_length(d_model: int, bits: int, vocab_size: int) -> int:
    """The first whole number above T* = d·b/log₂|V|: from that length on, two prompts must share their last state.

    Exact, in whole numbers: the smallest T with |V|^T > 2^(d·b). Raises ``ValueError`` for sizes below one, or a
    vocabulary of one token.

    >>> pigeonhole_length(768, 32, 50257), pigeonhole_length(768, 16, 50257)  # GPT-2 small, context 1024
    (1574, 787)
    """
    if d_model < 1 or bits < 1:
        raise ValueError(
            f"got d_model={d_model}, bits={bits}; expected one or more of both"
        )
    return crowded_length(vocab_size, 2 ** (d_model * bits))


def crowded_length(vocab_size: int, states: int) -> int:
    """The smallest T with |V|^T > states: so many tokens, and there are more prompts of that length than states.

    Raises ``ValueError`` for a vocabulary of one token, or no state.

    >>> crowded_length(2, 1024), crowded_length(4, 15**4)
    (11, 8)
    """
    if vocab_size < 2 or states < 1:
        raise ValueError(
            f"got vocab_size={vocab_size}, states={states}; expected two tokens or more, one state or more"
        )
    length = max(
        0, int((states.bit_length() - 1) / math.log2(vocab_size) * (1 - 1e-12)) - 1
    )  # a float: start below
    while vocab_size**length <= states:
        length += 1
    return length


def forced_pairs(prompts: int, states: int) -> int:
    """The number of pairs with equal states that no map of so many prompts into so many states can avoid.

    The least is reached where the prompts are spread evenly (chapter 16). Raises ``ValueError`` for a negative number
    of prompts, or no state.

    >>> forced_pairs(5, 5), forced_pairs(7, 3)  # the latter: groups of 3, 2 and 2
    (0, 5)
    """
    if prompts < 0 or states < 1:
        raise ValueError(
            f"got prompts={prompts}, states={states}; expected none or more, and one state or more"
        )
    each, fuller = divmod(prompts, states)
    return fuller * math.comb(each + 1, 2) + (states - fuller) * math.comb(each, 2)


def chance_pairs(prompts: int, states: int) -> Fraction:
    """The expected number of equal pairs if every prompt drew its state at random, all states being equally likely.

    Raises ``ValueError`` for a negative number of prompts, or no state.

    >>> chance_pairs(23, 365)  # the birthdays of 23 people
    Fraction(253, 365)
    """
    if prompts < 0 or states < 1:
        raise ValueError(
            f"got prompts={prompts}, states={states}; expected none or more, and one state or more"
        )
    return Fraction(math.comb(prompts, 2), states)


def every_prompt(vocab_size: int, longest: int) -> list[Int[Tensor, "count pos"]]:
    """All prompts of 1 to ``longest`` tokens, in order, one tensor of shape (|V|^T, T) for each length T.

    Raises ``ValueError`` for a vocabulary or a length below one.

    >>> [p.tolist() for p in every_prompt(2, 2)]
    [[[0], [1]], [[0, 0], [0, 1], [1, 0], [1, 1]]]
    """
    if vocab_size < 1 or longest < 1:
        raise ValueError(
            f"got vocab_size={vocab_size}, longest={longest}; expected one or more of both"
        )
    powers = vocab_size ** torch.arange(longest).flip(0)
    return [
        torch.arange(vocab_size**n)[:, None] // powers[-n:] % vocab_size
        for n in range(1, longest + 1)
    ]


def every_last_state(
    model: LanguageModel, layer: int, prompts: Sequence[Int[Tensor, "_ _"]]
) -> Float[Tensor, "n d_model"]:
    """The last-token states of prompts that come in batches of equal length, as ``every_prompt`` gives them.

    Raises what ``LanguageModel.states`` raises.

    >>> from sipit_lite import load
    >>> every_last_state(load(device="cpu"), 1, every_prompt(3, 2)).shape
    torch.Size([12, 256])
    """
    chunks = [chunk for batch in prompts for chunk in batch.split(CHUNK)]
    return torch.cat([model.states(chunk, layer)[:, -1] for chunk in chunks])


@dataclass(frozen=True, eq=False)
class Coincidences:
    """Which of n states are equal as vectors of numbers.

    ``label`` numbers the different states, one entry a row; ``sizes`` says how many rows have each of them.
    """

    label: Int[Tensor, " n"]
    sizes: Int[Tensor, " different"]

    @property
    def pairs(self) -> int:
        """Number of pairs of equal rows."""
        return int((self.sizes * (self.sizes - 1) // 2).sum())

    def groups(self) -> list[Int[Tensor, " rows"]]:
        """The rows that share a state with another, one tensor for each shared state, the largest group first."""
        shared = (self.sizes > 1).nonzero()[:, 0]
        shared = shared[self.sizes[shared].argsort(descending=True, stable=True)]
        return [(self.label == state).nonzero()[:, 0] for state in shared.tolist()]

    def different(self, first: int) -> int:
        """How many different states the first so many rows have."""
        return len(self.label[:first].unique())


def coincidences(states: Float[Tensor, "n d_model"]) -> Coincidences:
    """Find all equal rows; 0 and −0 are equal. Exact for formats up to float64.

    Raises ``ValueError`` for numbers that are not finite.

    >>> found = coincidences(torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, -0.0]]))
    >>> found.pairs, [group.tolist() for group in found.groups()], found.different(2)
    (1, [[0, 2]], 2)
    """
    rows = (
        states.double() + 0.0
    )  # every smaller format fits exactly; adding zero turns −0 into 0
    if not bool(rows.isfinite().all()):
        raise ValueError(
            f"got {int((~rows.isfinite()).any(1).sum())} states with NaN or Inf; expected finite numbers"
        )
    _, label, sizes = rows.unique(dim=0, return_inverse=True, return_counts=True)
    return Coincidences(label, sizes)


def same_bits(a: Shaped[Tensor, "*shape"], b: Shaped[Tensor, "*shape"]) -> bool:
    """Whether two tensors of one format agree bit for bit.

    >>> same_bits(torch.ones(2), torch.ones(2)), same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    (True, False)
    """
    pattern = PATTERNS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(pattern), b.contiguous().view(pattern)
    )


def routes(
    model: LanguageModel, ids: Int[Tensor, " pos"], layer: int
) -> dict[str, Float64[Tensor, "pos d_model"]]:
    """The states of one prompt at one layer, computed in several ways that exact arithmetic would not tell apart.

    One pass; token by token over a cache; inside a batch; with one thread; in float64; and, where there is CUDA, on the
    other device. Each comes back as float64 numbers on the CPU. Raises what ``LanguageModel.states`` raises.

    >>> from sipit_lite import load
    >>> list(routes(load(device="cpu"), torch.tensor([1, 2, 3]), 2))[:5]
    ['one pass', 'token by token', 'in a batch', 'one thread', 'float64']
    """
    found = {"one pass": model.states(ids, layer)}
    step, rows = OneStepMap.after(model, layer), []
    for token in ids.to(model.device).split(1):
        row, step = step.follow(token)
        rows.append(row)
    found["token by token"] = torch.cat(rows)
    crowd = torch.randint(
        model.vocab_size, (CROWD, len(ids)), generator=torch.Generator().manual_seed(0)
    )
    crowd[-1] = ids
    found["in a batch"] = model.states(crowd, layer)[-1]
    with _threads(1):
        found["one thread"] = model.states(ids, layer)
    found["float64"] = _moved(model, dtype=torch.float64).states(ids, layer)
    if torch.cuda.is_available():  # the device that the model is not on
        other = "cpu" if model.device.type == "cuda" else "cuda"
        found[f"on {other}"] = _moved(model, device=other).states(ids, layer)
    return {name: states.cpu().double() for name, states in found.items()}


def route_spread(
    found: dict[str, Float64[Tensor, "pos d_model"]],
) -> Float64[Tensor, " pos"]:
    """The largest distance between two routes at each position, over the norm of the state by the first route.

    >>> route_spread({"one": torch.tensor([[3.0, 4.0]]).double(), "two": torch.tensor([[3.0, 4.5]]).double()}).tolist()
    [0.1]
    """
    gaps = [
        torch.linalg.vector_norm(a - b, dim=1)
        for a, b in combinations(found.values(), 2)
    ]
    return torch.stack(gaps).amax(0) / torch.linalg.vector_norm(
        next(iter(found.values())), dim=1
    )


def _moved(model: LanguageModel, **where: object) -> LanguageModel:
    """A copy of the model in another format or on another device."""
    decoder = copy.deepcopy(model.decoder).to(**where)
    return LanguageModel(decoder, model.tokenizer, name=model.name)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
