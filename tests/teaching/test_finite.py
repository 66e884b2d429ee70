"""Counting against enumeration, routes to a state against each other."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sipit_lite import LanguageModel, ModelError, load
from sipit_lite.teaching.finite import (
    CountError,
    crowded_length,
    every_last_state,
    every_prompt,
    finite_values,
    pigeonhole_length,
    route_spread,
    routes,
)

EIGHT = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]


@pytest.mark.parametrize("dtype", [*EIGHT, torch.float16, torch.bfloat16])
def test_finite_values_are_counted_one_by_one(dtype: torch.dtype) -> None:
    """Every pattern of the format, written out as a Python number."""
    patterns = torch.arange(2 ** (8 * dtype.itemsize)).to(
        {1: torch.uint8, 2: torch.uint16}[dtype.itemsize]
    )
    numbers = patterns.view(dtype).double().tolist()
    assert finite_values(dtype) == len({x for x in numbers if math.isfinite(x)})


@pytest.mark.parametrize(
    ("dtype", "exponent", "fraction"), [(torch.float32, 8, 23), (torch.float64, 11, 52)]
)
def test_finite_values_of_wide_formats(
    dtype: torch.dtype, exponent: int, fraction: int
) -> None:
    """IEEE 754: all exponents but one, all fractions, both signs, one zero."""
    assert finite_values(dtype) == 2 * (2**exponent - 1) * 2**fraction - 1


@pytest.mark.parametrize(
    ("dtype", "count"), [(torch.int8, 256), (torch.uint8, 256), (torch.int16, 65536)]
)
def test_finite_values_of_integers(dtype: torch.dtype, count: int) -> None:
    """All patterns."""
    assert finite_values(dtype) == count


@given(st.integers(1, 6000), st.integers(1, 64), st.integers(2, 300_000))
@settings(max_examples=60, deadline=None)
def test_pigeonhole_length_is_the_first(
    d_model: int, bits: int, vocab_size: int
) -> None:
    """At T there are more prompts than patterns, at T − 1 not; T follows T*."""
    length = pigeonhole_length(d_model, bits, vocab_size)
    assert vocab_size ** (length - 1) <= 2 ** (d_model * bits) < vocab_size**length
    assert abs(length - d_model * bits / math.log2(vocab_size)) < 1 + 1e-6


@given(st.integers(2, 40), st.integers(1, 10**30))
def test_crowded_length_by_counting_up(vocab_size: int, states: int) -> None:
    """The same by multiplication, from nothing."""
    length = 0
    prompts = 1
    while prompts <= states:
        length += 1
        prompts *= vocab_size
    assert crowded_length(vocab_size, states) == length


@given(st.integers(1, 5), st.integers(1, 5))
def test_every_prompt_is_there_once(vocab_size: int, longest: int) -> None:
    """The same tuples in the same order as from itertools."""
    found = [
        tuple(ids)
        for batch in every_prompt(vocab_size, longest)
        for ids in batch.tolist()
    ]
    assert found == [
        ids
        for n in range(1, longest + 1)
        for ids in product(range(vocab_size), repeat=n)
    ]


def test_every_last_state_is_that_of_the_prompt(
    family: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt at a time, in every architecture; also in several chunks."""
    monkeypatch.setattr("sipit_lite.teaching.finite.CHUNK", 7)
    model = family[1]
    prompts = every_prompt(3, 3)
    found = every_last_state(model, 2, prompts)
    alone = torch.stack(
        [model.states(ids, 2)[-1] for batch in prompts for ids in batch]
    )
    assert torch.allclose(found, alone, atol=1e-4)


def test_routes_agree_up_to_rounding(pocket: LanguageModel) -> None:
    """All are the states of the same prompt, and the model stays as it was."""
    ids = torch.randint(
        pocket.vocab_size, (12,), generator=torch.Generator().manual_seed(5)
    )
    threads = torch.get_num_threads()
    found = routes(pocket, ids, 3)
    assert torch.get_num_threads() == threads
    assert {"one pass", "token by token", "in a batch", "one thread", "float64"} <= set(
        found
    )
    assert all(
        torch.allclose(x, found["one pass"], atol=1e-3, rtol=1e-4)
        for x in found.values()
    )
    spread = route_spread(found)
    assert spread.shape == (12,) and 0 < float(spread.max()) < 1e-4
    assert torch.equal(found["one pass"].float(), pocket.states(ids, 3).cpu())
    assert pocket.dtype == torch.float32, "the model is as it was"


def test_route_spread_by_hand() -> None:
    """Three routes, two positions: the largest distance over the first's norm."""
    found = {
        "a": torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64),
        "b": torch.tensor([[3.0, 4.0], [1.5, 0.0]], dtype=torch.float64),
        "c": torch.tensor([[0.0, 0.0], [0.5, 0.0]], dtype=torch.float64),
    }
    assert route_spread(found).tolist() == [1.0, 1.0]


def test_bad_input() -> None:
    """Each refusal quotes what came."""
    for dtype in (torch.bool, torch.complex64, torch.float8_e8m0fnu):
        with pytest.raises(CountError, match=f"got {dtype}"):
            finite_values(dtype)
    with pytest.raises(CountError, match="got d_model=0, bits=32"):
        pigeonhole_length(0, 32, 50257)
    with pytest.raises(CountError, match="got vocab_size=1, states=1024"):
        pigeonhole_length(10, 1, 1)
    with pytest.raises(CountError, match="got vocab_size=3, longest=0"):
        every_prompt(3, 0)
    with pytest.raises(ModelError, match="got layer 8"):
        every_last_state(load(device="cpu"), 8, every_prompt(2, 1))
