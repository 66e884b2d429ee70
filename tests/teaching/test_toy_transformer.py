"""The symbolic transformer of chapter 4 against transformers' GPT-2, and the witnesses of Theorem 2.2."""

import math
from itertools import combinations, product

import pytest
import sympy as sp
import torch
from transformers import GPT2Config, GPT2Model

from sipit_lite.teaching.toy_transformer import (
    analytic_by_construction,
    discrepancy,
    gelu,
    plant_entries,
    separating_entries,
    toy_parameters,
    toy_shapes,
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
        vocab_size=vocab, n_positions=positions, n_embd=d, n_inner=inner, n_layer=blocks, n_head=heads,
        activation_function=activation, bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = GPT2Model(config).double().eval()
    model.ln_f = torch.nn.Identity()
    return model


def drawn(shapes: dict[str, tuple[int, int]], seed: int) -> Numbers:
    """Random numbers for every parameter of the toy."""
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(shape, generator=generator, dtype=torch.float64)
        for n, shape in shapes.items()
    }


def load(model: GPT2Model, numbers: Numbers) -> GPT2Model:
    """The model with these numbers; every parameter has to be among them."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(numbers[name].reshape(weight.shape))
    return model


def as_matrices(numbers: Numbers) -> dict[str, sp.Matrix]:
    """The same numbers for sympy."""
    return {name: sp.Matrix(value.tolist()) for name, value in numbers.items()}


def gelu_in_floats(x: sp.Expr) -> sp.Expr:
    """GELU without an exact root in it, which would keep sympy from evaluating as it goes."""
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
    numbers = drawn(toy_shapes(VOCAB, POSITIONS, WIDTH, INNER), seed=len(ids))
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
    """Central differences of the symbolic discrepancy against autograd through transformers."""
    function = lettered[1]
    numbers = drawn(toy_shapes(2, 2, 2, 1), seed=0)
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


def test_discrepancy_is_analytic_and_counts_its_letters(lettered) -> None:
    """The induction of Theorem 2.1 goes through with ε > 0 and GELU."""
    assert analytic_by_construction(lettered[0])
    # Every parameter occurs, except the last bias: it is the same in both states.
    assert len(lettered[0].free_symbols) == 47 - 2


@pytest.mark.parametrize(
    "spoilt", [{"epsilon": 0}, {"activation": lambda x: (x + abs(x)) / 2}]
)
def test_induction_stops_where_a_hypothesis_is_missing(spoilt) -> None:
    """Without ε, or with an activation that is not analytic, nothing is claimed."""
    assert not analytic_by_construction(
        discrepancy((0, 1), (1, 1), toy_symbols(2, 2, d=2, inner=1), **spoilt)
    )


@pytest.mark.parametrize(
    "text",
    [
        "1/x",
        "sqrt(x)",
        "log(x)",
        "sign(x)",
        "x**x",
        "floor(x)",
        "1/(1+x)",
        "sqrt(1-x**2)",
    ],
)
def test_induction_refuses(text: str) -> None:
    """Poles, branch points and jumps on the real line are not let through."""
    assert not analytic_by_construction(
        sp.sympify(text, {"x": sp.Symbol("x", real=True)})
    )


def test_induction_refuses_symbols_that_may_be_complex() -> None:
    """1 + z² has zeros where z is complex."""
    assert not analytic_by_construction(1 / (1 + sp.Symbol("z") ** 2))
    assert analytic_by_construction(1 / (1 + sp.Symbol("x", real=True) ** 2))


PAIRS = [
    ((0,), (1,)), ((0,), (0, 0)), ((1, 0), (0, 1)),
    ((1, 0), (2, 0)), ((0, 1), (1, 1)), ((1, 1), (0, 1)), ((0, 2, 0, 0), (0, 0, 0, 0)), ((1, 0, 1, 0), (2, 1, 1, 0)),
]  # fmt: skip


def planted_distance(model: GPT2Model, s: tuple[int, ...], t: tuple[int, ...]) -> float:
    """Distance of the last-token states of two prompts in a decoder of transformers."""
    with torch.no_grad():
        first, second = (
            model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in (s, t)
        )
    return float(torch.linalg.vector_norm(first - second))


@pytest.mark.parametrize(("s", "t"), PAIRS)
@pytest.mark.parametrize(("d", "heads", "blocks"), [(4, 1, 1), (12, 2, 3)])
def test_witness_separates_in_gpt2(s, t, d: int, heads: int, blocks: int) -> None:
    """The distance is 1 in case A, and at least the paper's (1 − δ)c_ep − 2δc_e with δ = 1/4 in case B."""
    model = gpt2(VOCAB, POSITIONS, d, INNER, heads=heads, blocks=blocks)
    plant_entries(model, separating_entries(s, t, d, d // heads))
    c_e, c_ep = ((k / d + 1e-5) ** -0.5 for k in (1, 2))
    case_a = len(s) != len(t) or s[-1] != t[-1]
    bound = 1 - 1e-12 if case_a else 0.75 * c_ep - 0.5 * c_e
    assert planted_distance(model, s, t) >= bound > 0


@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_witness_separates_exactly(s, t) -> None:
    """The exact discrepancy is positive, and its root is the distance that torch computes."""
    entries = separating_entries(s, t, WIDTH, WIDTH)
    exact = discrepancy(s, t, toy_parameters(entries, VOCAB, POSITIONS, WIDTH, INNER))
    assert exact > 0
    model = gpt2(VOCAB, POSITIONS, WIDTH, INNER)
    plant_entries(model, entries)
    assert planted_distance(model, s, t) == pytest.approx(
        float(sp.sqrt(exact)), rel=1e-12
    )


def test_witness_without_the_repair_fails_exactly_where_the_mismatch_is_the_last_token() -> (
    None
):
    """The paper's construction takes the names as they come; not all of them work."""
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
    """Before anything is set."""
    model = gpt2(VOCAB, POSITIONS, WIDTH, INNER)
    before = model.wte.weight.clone()
    with pytest.raises(ValueError, match="got an entry at"):
        plant_entries(model, entries)
    assert torch.equal(model.wte.weight, before)
    with pytest.raises(ValueError, match="got an entry at"):
        toy_parameters(entries, VOCAB, POSITIONS, WIDTH, INNER)
