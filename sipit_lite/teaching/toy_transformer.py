"""A transformer small enough for sympy, and the parameters that separate two prompts (chapter 4)."""

from collections.abc import Callable, Sequence

import sympy as sp
import torch
from torch import nn

Coefficient = int | float | sp.Expr


EPSILON = sp.Rational(1, 100_000)  # of GPT-2's norms
Parameters = dict[
    str, sp.Matrix
]  # under the names of transformers' GPT2Model; vectors are rows
Entries = dict[
    str, dict[tuple[int, int], sp.Expr | int]
]  # what differs from gains 1 and zeros elsewhere


def toy_shapes(
    vocab: int, positions: int, d: int, inner: int
) -> dict[str, tuple[int, int]]:
    """Shapes of the parameters of a GPT-2 with one block, one head and an MLP of width ``inner`` (chapter 4).

    >>> sum(rows * columns for rows, columns in toy_shapes(2, 2, d=2, inner=1).values())
    47
    """
    return {
        "wte.weight": (vocab, d), "wpe.weight": (positions, d),
        "h.0.ln_1.weight": (1, d), "h.0.ln_1.bias": (1, d),
        "h.0.attn.c_attn.weight": (d, 3 * d), "h.0.attn.c_attn.bias": (1, 3 * d),
        "h.0.attn.c_proj.weight": (d, d), "h.0.attn.c_proj.bias": (1, d),
        "h.0.ln_2.weight": (1, d), "h.0.ln_2.bias": (1, d),
        "h.0.mlp.c_fc.weight": (d, inner), "h.0.mlp.c_fc.bias": (1, inner),
        "h.0.mlp.c_proj.weight": (inner, d), "h.0.mlp.c_proj.bias": (1, d),
    }  # fmt: skip


def toy_symbols(vocab: int, positions: int, d: int, inner: int) -> Parameters:
    """One real symbol for each parameter of the toy transformer (chapter 4).

    >>> toy_symbols(2, 2, d=2, inner=1)["wte.weight"]
    Matrix([
    [wte_0_0, wte_0_1],
    [wte_1_0, wte_1_1]])
    """
    short = {name: name.removeprefix("h.0.").removesuffix(".weight").replace(".bias", "_b").replace(".", "_")
             for name in toy_shapes(vocab, positions, d, inner)}  # fmt: skip
    return {
        name: sp.Matrix(
            *shape,
            lambda i, j, name=name: sp.Symbol(f"{short[name]}_{i}_{j}", real=True),
        )
        for name, shape in toy_shapes(vocab, positions, d, inner).items()
    }


def toy_parameters(
    entries: Entries, vocab: int, positions: int, d: int, inner: int
) -> Parameters:
    """Exact parameters of the toy transformer: the given entries, gains 1, zero elsewhere (chapter 4).

    Raises ``ValueError`` for an entry that the toy does not have.

    >>> toy_parameters({"wte.weight": {(0, 0): 5}}, 1, 1, d=2, inner=1)["wte.weight"]
    Matrix([[5, 0]])
    """
    shapes = toy_shapes(vocab, positions, d, inner)
    theta = {
        name: (sp.ones if _is_gain(name) else sp.zeros)(*shape)
        for name, shape in shapes.items()
    }
    for name, placed in entries.items():
        for index, value in placed.items():
            _check_entry(name, index, shapes.get(name))
            theta[name][index] = value
    return theta


def gelu(x: sp.Expr) -> sp.Expr:
    """GELU with the error function, x(1 + erf(x/√2))/2.

    >>> gelu(sp.Integer(0))
    0
    """
    return x * (1 + sp.erf(x / sp.sqrt(2))) / 2


def toy_state(
    ids: Sequence[int],
    theta: Parameters,
    epsilon: sp.Expr | int = EPSILON,
    activation: Callable[[sp.Expr], sp.Expr] = gelu,
) -> sp.Matrix:
    """Last-token state r(s; θ) of the toy transformer as a row of d expressions (Theorem 2.1, chapter 4).

    Embedding plus position, then one pre-norm block: causal softmax attention with one head, MLP, residuals.
    Raises ``ValueError`` for an empty or too long prompt and for tokens that are not in the vocabulary.

    >>> toy_state([0], toy_parameters({"wte.weight": {(0, 1): 7}}, 1, 1, d=2, inner=1))
    Matrix([[0, 7]])
    """
    tokens, positions = theta["wte.weight"], theta["wpe.weight"]
    if not 1 <= len(ids) <= positions.rows or not all(
        0 <= v < tokens.rows for v in ids
    ):
        raise ValueError(
            f"got {ids}; expected 1 to {positions.rows} tokens from 0 to {tokens.rows - 1}"
        )
    rows, d = [tokens.row(v) + positions.row(j) for j, v in enumerate(ids)], tokens.cols
    seen = [
        _affine(_layer_norm(x, theta, "h.0.ln_1", epsilon), theta, "h.0.attn.c_attn")
        for x in rows
    ]
    weights = [
        sp.exp((seen[-1][:, :d] * x[:, d : 2 * d].T)[0] / sp.sqrt(d)) for x in seen
    ]
    mixed = sum(
        (w * x[:, 2 * d :] for w, x in zip(weights, seen, strict=True)), sp.zeros(1, d)
    ) / sum(weights)
    state = rows[-1] + _affine(mixed, theta, "h.0.attn.c_proj")
    inner = _affine(
        _layer_norm(state, theta, "h.0.ln_2", epsilon), theta, "h.0.mlp.c_fc"
    ).applyfunc(activation)
    return state + _affine(inner, theta, "h.0.mlp.c_proj")


def discrepancy(
    s: Sequence[int],
    t: Sequence[int],
    theta: Parameters,
    epsilon: sp.Expr | int = EPSILON,
    activation: Callable[[sp.Expr], sp.Expr] = gelu,
) -> sp.Expr:
    """h(θ) = ‖r(s; θ) − r(t; θ)‖² of the toy transformer (Theorem 2.2, chapter 4). Raises as ``toy_state``.

    >>> discrepancy([0], [1], toy_parameters({"wte.weight": {(0, 1): 7}}, 2, 1, d=2, inner=1))
    49
    """
    return sum(
        x**2
        for x in toy_state(s, theta, epsilon, activation)
        - toy_state(t, theta, epsilon, activation)
    )


def analytic_by_construction(expression: sp.Expr) -> bool:
    """Whether the expression is visibly real-analytic in its real symbols: the induction of Theorem 2.1 (chapter 4).

    True only for sums, products, exp, erf, tanh, natural powers, and other real powers of a base that sympy proves
    positive. False means "not shown": the expression may still be analytic.

    >>> x = sp.Symbol("x", real=True)
    >>> analytic_by_construction(1 / (1 + sp.exp(x))), analytic_by_construction(abs(x))
    (True, False)
    """
    shown: dict[
        sp.Basic, bool
    ] = {}  # an expression shares its parts: as a tree it would be far too large

    def visit(part: sp.Basic) -> bool:
        if part not in shown:
            shown[part] = all(
                [visit(argument) for argument in part.args]
            ) and _analytic_head(part)
        return shown[part]

    return visit(expression)


def _analytic_head(part: sp.Basic) -> bool:
    if part.is_Symbol or part.is_Number or part.is_NumberSymbol:
        return bool(part.is_real)
    if isinstance(part, sp.Pow) and not (part.exp.is_Integer and part.exp >= 0):
        return bool(part.exp.is_number and part.exp.is_real and part.base.is_positive)
    return isinstance(part, sp.Add | sp.Mul | sp.Pow | sp.exp | sp.erf | sp.tanh)


def separating_entries(
    s: Sequence[int],
    t: Sequence[int],
    d: int,
    head_width: int,
    epsilon: sp.Expr = EPSILON,
    as_named: bool = False,
) -> Entries:
    """Parameters of a GPT-2 at which two prompts have different states: a witness of Theorem 2.2 (chapter 4).

    What is not listed is zero, except the gains, which are one. Case A (other length, or other last token) makes every
    block the identity; case B lets head 1 of block 1 look at the first mismatch. There the prompts are renamed so that
    the token of t at the mismatch is not the common last token; ``as_named`` leaves that out, as the paper does, and
    then the entries need not separate. Raises ``ValueError`` for equal or empty prompts, and in case B for d < 4.

    >>> separating_entries([2], [0, 2], d=4, head_width=4)
    {'wpe.weight': {(0, 0): 1}}
    """
    s, t = list(s), list(t)
    if not s or not t or s == t:
        raise ValueError(
            f"got {s} and {t}; expected two different prompts of one token or more"
        )
    if len(s) != len(t):
        return {"wpe.weight": {(len(s) - 1, 0): sp.Integer(1)}}
    if s[-1] != t[-1]:
        return {"wte.weight": {(s[-1], 0): sp.Integer(1)}}
    if d < 4:
        raise ValueError(
            f"got d = {d}; expected 4 or more, for three orthonormal vectors orthogonal to the ones"
        )
    mismatch = next(i for i, (v, w) in enumerate(zip(s, t, strict=True)) if v != w)
    if t[mismatch] == s[-1] and not as_named:
        s, t = t, s
    return _looking_head(s, mismatch, d, head_width, epsilon)


def _looking_head(
    s: list[int], mismatch: int, d: int, head_width: int, epsilon: sp.Expr
) -> Entries:
    # Rows of a Hadamard matrix: orthonormal, orthogonal to the ones, and rational.
    e, p, q = (
        [sp.Rational(sign, 2) for sign in signs]
        for signs in ((1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))
    )
    squared_gain = 1 / (sp.Rational(2, d) + epsilon)  # of the norm on e + p
    score = sp.log(3 * (len(s) - 1))  # δ = 1/4 is small enough for every d and ε
    key = score * sp.sqrt(head_width) / squared_gain
    head = {
        (i, column): value
        for i in range(4)
        for column, value in ((0, e[i]), (d, key * p[i]), (2 * d, e[i]))
    }
    return {
        "wte.weight": {
            (token, i): e[i] for token in {s[mismatch], s[-1]} for i in range(4)
        },
        "wpe.weight": {
            (place, i): row[i]
            for place, row in ((mismatch, p), (len(s) - 1, q))
            for i in range(4)
        },
        "h.0.attn.c_attn.weight": head,
        "h.0.attn.c_proj.weight": {(0, 0): sp.Integer(1)},
    }


def plant_entries(decoder: nn.Module, entries: Entries) -> None:
    """Set all parameters of a transformers GPT-2 in place: the given entries, gains 1, zero elsewhere (chapter 4).

    Raises ``ValueError`` for an entry that the decoder does not have.

    >>> from transformers import GPT2Config, GPT2Model
    >>> decoder = GPT2Model(GPT2Config(vocab_size=2, n_positions=2, n_embd=4, n_layer=1, n_head=1))
    >>> plant_entries(decoder, {"wte.weight": {(1, 0): sp.Integer(5)}})
    >>> decoder.wte.weight.tolist()
    [[0.0, 0.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]]
    """
    weights = {
        name: weight[None] if weight.ndim == 1 else weight
        for name, weight in decoder.named_parameters()
    }
    for name, placed in entries.items():
        for index in placed:
            _check_entry(
                name, index, tuple(weights[name].shape) if name in weights else None
            )
    with torch.no_grad():
        for name, weight in weights.items():
            weight.fill_(1.0 if _is_gain(name) else 0.0)
            for index, value in entries.get(name, {}).items():
                weight[index] = float(value)


def _is_gain(name: str) -> bool:
    return "ln_" in name and name.endswith("weight")


def _check_entry(
    name: str, index: tuple[int, int], shape: tuple[int, ...] | None
) -> None:
    if shape is None or not all(
        0 <= i < size for i, size in zip(index, shape, strict=True)
    ):
        raise ValueError(
            f"got an entry at {index} of {name!r}; expected one of a parameter of shape {shape}"
        )


def _affine(x: sp.Matrix, theta: Parameters, name: str) -> sp.Matrix:
    return x * theta[f"{name}.weight"] + theta[f"{name}.bias"]


def _layer_norm(
    x: sp.Matrix, theta: Parameters, name: str, epsilon: sp.Expr | int
) -> sp.Matrix:
    centred = x - sp.ones(1, x.cols) * (sum(x) / x.cols)
    variance = sum(v**2 for v in centred) / x.cols
    normed = centred / sp.sqrt(variance + epsilon)
    return normed.multiply_elementwise(theta[f"{name}.weight"]) + theta[f"{name}.bias"]
