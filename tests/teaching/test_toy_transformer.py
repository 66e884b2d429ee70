"""The symbolic transformer against transformers' GPT-2; witnesses of Theorem 2.2."""

import math
from itertools import combinations, product

import numpy as np
import pytest
import sympy as sp
import torch
from transformers import GPT2Config, GPT2Model

from sipit_lite.teaching.toy_transformer import (
    discrepancy,
    gelu,
    separating_entries,
    toy_parameters,
    toy_state,
    toy_symbols,
)

VOCAB, POSITIONS, WIDTH, INNER = 3, 4, 4, 3
Numbers = dict[str, torch.Tensor]


def gpt2(
    vocab: int,
    positions: int,
    d: int,
    inner: int,
    activation: str = "gelu",
    blocks: int = 1,
    heads: int = 1,
):
    """A GPT-2 in float64 without its final norm, with eager attention: the oracle."""
    config = GPT2Config(
        vocab_size=vocab,
        n_positions=positions,
        n_embd=d,
        n_inner=inner,
        n_layer=blocks,
        n_head=heads,
        activation_function=activation,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    model = GPT2Model(config).double().eval()
    model.ln_f = torch.nn.Identity()
    return model


def drawn(*shape: int, seed: int) -> Numbers:
    """Random numbers for every parameter of the toy of this shape."""
    generator = torch.Generator().manual_seed(seed)
    numbers = {}
    for name, letters in toy_symbols(*shape).items():
        size = letters.shape
        numbers[name] = torch.randn(size, generator=generator, dtype=torch.float64)
    return numbers


def load(model: GPT2Model, numbers: Numbers) -> GPT2Model:
    """The model with these numbers; every parameter has to be among them."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(numbers[name].reshape(weight.shape))
    return model


def as_matrices(numbers: Numbers) -> dict[str, sp.Matrix]:
    """The same numbers for sympy."""
    return {name: sp.Matrix(value.tolist()) for name, value in numbers.items()}


def as_numbers(theta: dict[str, sp.Matrix]) -> Numbers:
    """The matrices of sympy for torch."""
    arrays = {name: np.array(matrix, dtype=float) for name, matrix in theta.items()}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def gelu_in_floats(x: sp.Expr) -> sp.Expr:
    """GELU without an exact root, which would keep sympy from evaluating as it goes."""
    return gelu(x).evalf(20)


def gelu_new(x: sp.Expr) -> sp.Expr:
    """GPT-2's own approximation of GELU."""
    return x * (1 + sp.tanh(sp.sqrt(2 / sp.pi).evalf(20) * (x + 0.044715 * x**3))) / 2


@pytest.mark.parametrize(
    ("activation", "symbolic"), [("gelu", gelu_in_floats), ("gelu_new", gelu_new)]
)
@pytest.mark.parametrize("ids", [(0,), (2, 0), (1, 1), (0, 2, 1, 1)])
def test_state_is_that_of_gpt2(activation: str, symbolic, ids: tuple[int, ...]) -> None:
    """The oracle is the implementation of transformers with the same numbers."""
    numbers = drawn(VOCAB, POSITIONS, WIDTH, INNER, seed=len(ids))
    model = load(gpt2(VOCAB, POSITIONS, WIDTH, INNER, activation), numbers)
    expected = model(torch.tensor([ids])).last_hidden_state[0, -1]
    found = toy_state(ids, as_matrices(numbers), activation=symbolic).evalf()
    torch.testing.assert_close(
        torch.tensor([float(v) for v in found], dtype=torch.float64),
        expected,
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.fixture(scope="module")
def lettered():
    """The discrepancy of two prompts in all symbols, and as a function of numbers."""
    theta = toy_symbols(2, 2, d=2, inner=1)
    letters = [letter for matrix in theta.values() for letter in matrix]
    first, second = (
        sp.lambdify(
            letters,
            list(toy_state(ids, theta)),
            modules=[{"erf": math.erf}, "math"],
            cse=True,
        )
        for ids in ((0, 1), (1, 1))
    )
    return discrepancy(
        (0, 1), (1, 1), theta
    ), lambda *numbers: math.dist(first(*numbers), second(*numbers)) ** 2


def test_discrepancy_has_the_gradient_of_gpt2(lettered) -> None:
    """Central differences of the discrepancy against autograd through transformers."""
    function = lettered[1]
    numbers = drawn(2, 2, 2, 1, seed=0)
    model = load(gpt2(2, 2, 2, 1), numbers)
    first, second = model(torch.tensor([[0, 1], [1, 1]])).last_hidden_state[:, -1]
    value = (first - second).square().sum()
    weights = dict(model.named_parameters())
    gradient = torch.autograd.grad(value, [weights[name] for name in numbers])
    flat, exact = (
        torch.cat([v.flatten() for v in numbers.values()]),
        torch.cat([g.flatten() for g in gradient]),
    )
    assert function(*flat.tolist()) == pytest.approx(value.item(), rel=1e-11)
    step = 1e-5 * torch.eye(len(flat), dtype=torch.float64)
    slopes = [
        (function(*(flat + e).tolist()) - function(*(flat - e).tolist())) / 2e-5
        for e in step
    ]
    torch.testing.assert_close(
        torch.tensor(slopes, dtype=torch.float64), exact, rtol=1e-6, atol=1e-8
    )


def test_discrepancy_counts_its_letters(lettered) -> None:
    """Every parameter occurs, except the last bias: it is the same in both states."""
    assert len(lettered[0].free_symbols) == 47 - 2


PAIRS = [
    # Case A.
    ((0,), (1,)),
    ((0,), (0, 0)),
    ((1, 0), (0, 1)),
    # Case B.
    ((1, 0), (2, 0)),
    ((0, 1), (1, 1)),
    ((1, 1), (0, 1)),
    ((0, 2, 0, 0), (0, 0, 0, 0)),
    ((1, 0, 1, 0), (2, 1, 1, 0)),
]


def planted_distance(model: GPT2Model, s: tuple[int, ...], t: tuple[int, ...]) -> float:
    """Distance of the last-token states of two prompts in a decoder of transformers."""
    with torch.no_grad():
        first, second = (
            model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in (s, t)
        )
    return float(torch.linalg.vector_norm(first - second))


@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_witness_is_as_far_as_the_proof_says(s, t) -> None:
    """1 in case A; in case B (1 − δ)c_ep − δc_e with δ = 1/4, or more.

    Of two heads the first looks; the second head and both other blocks add zero.
    """
    model = gpt2(VOCAB, POSITIONS, 12, INNER, heads=2, blocks=3)
    entries = separating_entries(s, t, 12, 6)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
            for (i, j), value in entries.get(name, {}).items():
                weight[i, j] = float(value)
    c_e, c_ep = ((k / 12 + 1e-5) ** -0.5 for k in (1, 2))
    case_a = len(s) != len(t) or s[-1] != t[-1]
    bound = 1 - 1e-12 if case_a else 0.75 * c_ep - 0.25 * c_e
    assert planted_distance(model, s, t) >= bound > 0


@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_witness_separates_exactly(s, t) -> None:
    """The exact discrepancy is positive, and its root the distance in torch."""
    entries = separating_entries(s, t, WIDTH, WIDTH)
    theta = toy_parameters(entries, VOCAB, POSITIONS, WIDTH, INNER)
    exact = discrepancy(s, t, theta)
    assert exact > 0
    model = load(gpt2(VOCAB, POSITIONS, WIDTH, INNER), as_numbers(theta))
    assert planted_distance(model, s, t) == pytest.approx(
        float(sp.sqrt(exact)), rel=1e-12
    )


def test_witness_without_the_repair_fails_where_the_last_token_stands() -> None:
    """The paper takes the names as they come: it needs another token at the mismatch."""
    prompts = list(product(range(VOCAB), repeat=3))
    for s, t in combinations(prompts, 2):
        if s[-1] == t[-1] and s[:2] in {(0, 1), (1, 0)}:  # all pairs would take long
            theta = toy_parameters(
                separating_entries(s, t, 4, 4, as_named=True), VOCAB, POSITIONS, 4, 1
            )
            mismatch = next(i for i in range(3) if s[i] != t[i])
            collides = discrepancy(s, t, theta) == 0
            assert collides <= (t[mismatch] == s[-1])
            if t[mismatch] == s[-1] and s[mismatch + 1 :] == t[mismatch + 1 :]:
                assert collides


@pytest.mark.parametrize(("s", "t"), [((0,), (0,)), ((), (0,)), ((0,), ())])
def test_witness_refuses_pairs_that_are_none(s, t) -> None:
    """Equal prompts have no witness, empty ones no state."""
    with pytest.raises(ValueError, match=r"got .* expected two different prompts"):
        separating_entries(s, t, 4, 4)


def test_case_b_needs_width_four() -> None:
    """Case A does not."""
    with pytest.raises(ValueError, match="got d = 3; expected 4 or more"):
        separating_entries((0, 1), (1, 1), 3, 3)
    assert separating_entries((0,), (1,), 3, 3)


@pytest.mark.parametrize("ids", [(), (3,), (-1,), (0, 0, 0, 0, 0)])
def test_toy_refuses_prompts_it_cannot_read(ids: tuple[int, ...]) -> None:
    """A negative index would silently count from the end."""
    with pytest.raises(ValueError, match="expected 1 to 4 tokens from 0 to 2"):
        toy_state(ids, toy_symbols(VOCAB, POSITIONS, 2, 1))


@pytest.mark.parametrize(
    "entries", [{"wte.weight": {(9, 0): 1}}, {"lm_head.weight": {(0, 0): 1}}]
)
def test_entries_that_do_not_exist_are_refused(entries) -> None:
    """A row beyond the vocabulary, and a parameter that the toy has not."""
    with pytest.raises(ValueError, match="got an entry at"):
        toy_parameters(entries, VOCAB, POSITIONS, WIDTH, INNER)
