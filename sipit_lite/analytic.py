"""Real-analytic functions, zero sets, a symbolic transformer, one gradient step: what the proofs are about, executable.

Symbols are sympy's and exact; what is sampled says so.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import contourpy
import numpy as np
import sympy as sp
import torch
from jaxtyping import Float, Float64
from numpy.typing import ArrayLike
from torch import Tensor, nn

Coefficient = int | float | sp.Expr
SAMPLES = 2**17  # points per call of a function: a few megabytes an array

# ---- Power series and radii (chapter 2)


def taylor(f: sp.Expr, x: sp.Symbol, order: int) -> list[sp.Expr]:
    """Exact coefficients c_0, …, c_order of the Taylor series of f at x = 0 (chapter 2).

    The series need not converge to f: that of exp(−1/x²) is zero. Raises ``ValueError`` for a negative order, or
    where the expansions from the right and from the left differ or are no power series.

    >>> x = sp.Symbol("x")
    >>> taylor(sp.tanh(x), x, 3)
    [0, 1, 0, -1/3]
    """
    if order < 0:
        raise ValueError(f"got order={order}; expected 0 or more")
    # sympy expands from one side at a time: from the right alone, |x| would pass for x.
    right, left = (sp.expand(sp.series(f, x, 0, order + 1, side).removeO()) for side in "+-")
    if right != left or right.has(sp.oo, sp.zoo, sp.nan) or not right.is_polynomial(x):
        raise ValueError(f"got f = {f} with the expansions {right} and {left} at 0; expected one power series in {x}")
    return [right.coeff(x, k) for k in range(order + 1)]


def compose(outer: Sequence[Coefficient], inner: Sequence[Coefficient]) -> list[Coefficient]:
    """Coefficients of outer(inner(x)), as many as there are for both, by Horner's rule on truncated series (chapter 2).

    Numbers of any kind: exact in, exact out. Raises ``ValueError`` unless both have the same length and inner starts
    with 0, since otherwise every coefficient of the result would depend on coefficients that are not there.

    >>> compose([1, 1, 1, 1], [0, 1, 1, 0])  # 1 / (1 − (x + x²)): the Fibonacci numbers
    [1, 1, 2, 3]
    """
    if len(outer) != len(inner) or not len(inner) or inner[0] != 0:
        raise ValueError(
            f"got {len(outer)} outer and {len(inner)} inner coefficients that start with {list(inner[:1])}; "
            "expected two series of the same length, the inner one without a constant term"
        )
    result = [outer[-1]] + [0] * (len(inner) - 1)
    for c in reversed(outer[:-1]):
        result = [sum(result[i] * inner[k - i] for i in range(k + 1)) for k in range(len(inner))]
        result[0] += c
    return result


def root_test(coefficients: Sequence[Coefficient]) -> dict[int, float]:
    """Estimates |c_k|^(−1/k) of the radius of convergence, for each k ≥ 1 with c_k ≠ 0 (Cauchy–Hadamard, chapter 2).

    >>> root_test([1, 0, sp.Rational(1, 4)])
    {2: 2.0}
    """
    return {k: float(sp.N(abs(c)) ** sp.Rational(-1, k)) for k, c in enumerate(coefficients) if k and c != 0}


def ratio_test(coefficients: Sequence[Coefficient]) -> dict[int, float]:
    """Estimates |c_j / c_k|^(1/(k−j)) of the radius from neighbouring non-zero coefficients j < k, by k (chapter 2).

    >>> ratio_test([1, 0, sp.Rational(1, 4)])
    {2: 2.0}
    """
    kept = [(k, c) for k, c in enumerate(coefficients) if c != 0]
    return {k: float(sp.N(abs(b / c)) ** sp.Rational(1, k - j)) for (j, b), (k, c) in pairwise(kept)}


# ---- Zero sets (chapter 3): tube areas and zero contours


@dataclass(frozen=True, eq=False)
class TubeArea:
    """Monte-Carlo estimates of the area (in n dimensions the volume) of {x in the box : |f(x)| < ε}, one a width ε.

    One sample serves all widths, so the estimates never rise as ε falls. ``standard_error`` is √(p(1 − p)/samples)
    times the area of the box, with p = (hits + 1)/(samples + 2), so that no hits at all do not pass for certainty.
    ``zeros`` counts the sampled points where f is exactly 0.
    """

    widths: Float64[np.ndarray, " widths"]
    area: Float64[np.ndarray, " widths"]
    standard_error: Float64[np.ndarray, " widths"]
    box_area: float
    samples: int
    zeros: int

    def exponent(self) -> tuple[float, float]:
        """Slope of log area over log width by least squares, and its standard error (chapter 3).

        The estimates share a sample. For nested sets with probabilities p ≤ q the covariance of the two frequencies is
        p(1 − q)/samples, so that of their logarithms is about (1/q − 1)/samples. Raises ``ValueError`` where some width
        was never hit, or with fewer than two different widths.

        >>> tube_area(lambda x: x, [(-1, 1)], [0.1, 1.0], 10_000, np.random.default_rng(0)).exponent()[0].__round__(1)
        1.0
        """
        if not self.area.all() or len(set(self.widths)) < 2:
            raise ValueError(f"got areas {self.area} at widths {self.widths}; expected two widths or more, all hit")
        x = np.log(self.widths) - np.log(self.widths).mean()
        weights, p = x / (x @ x), self.area / self.box_area
        covariance = (1 / np.maximum(p[:, None], p) - 1) / self.samples
        return float(weights @ np.log(self.area)), float(np.sqrt(weights @ covariance @ weights))


def tube_area(
    f: Callable[..., ArrayLike], box: ArrayLike, widths: ArrayLike, samples: int, generator: np.random.Generator
) -> TubeArea:
    """Estimate the area of the sublevel set |f| < ε in a box, for each width ε, from uniform points (chapter 3).

    ``f`` takes n arrays of one length, the coordinates, and returns an array of that length; ``box`` holds n pairs
    (low, high). With f the distance to a set this is the area of its tube. Raises ``ValueError`` for an empty box,
    widths or samples that are not positive, and values of f that are not finite or of the wrong shape.

    >>> tube_area(lambda x, y: x - y, [(0, 1), (0, 1)], [2.0], 100, np.random.default_rng(0)).area.tolist()
    [1.0]
    """
    (low, high), widths = _corners(box), np.asarray(widths, dtype=float)
    if widths.ndim != 1 or not len(widths) or not (widths > 0).all() or samples < 1:
        raise ValueError(f"got widths {widths} and {samples} samples; expected positive widths and samples")
    hits, zeros = np.zeros(len(widths)), 0
    for first in range(0, samples, SAMPLES):
        shape = (len(low), min(SAMPLES, samples - first))
        values = np.abs(_values(f, generator.uniform(low[:, None], high[:, None], shape)))
        hits += (values < widths[:, None]).sum(axis=1)
        zeros += int((values == 0).sum())
    box_area, p = float(np.prod(high - low)), (hits + 1) / (samples + 2)
    error = box_area * np.sqrt(p * (1 - p) / samples)
    return TubeArea(widths, box_area * hits / samples, error, box_area, samples, zeros)


def zero_contours(
    f: Callable[..., ArrayLike], box: ArrayLike, resolution: int = 200
) -> list[Float64[np.ndarray, "points 2"]]:
    """Curves on which f changes its sign inside a box of the plane, from a grid, as polylines (chapter 3).

    The corners lie on grid lines, placed by linear interpolation: off by about the square of the grid step where f is
    smooth and its gradient is not 0. Zeros where f keeps its sign, as those of x² do, leave no contour. Raises
    ``ValueError`` as ``tube_area``, for a resolution under 2, and for a function that is zero on the whole grid.

    >>> [len(curve) > 100 for curve in zero_contours(lambda x, y: x**2 + y**2 - 1, [(-2, 2), (-2, 2)])]
    [True]
    """
    low, high = _corners(box)
    if len(low) != 2 or resolution < 2:
        raise ValueError(f"got {len(low)} dimensions and resolution {resolution}; expected 2, and 2 or more")
    x, y = np.meshgrid(*np.linspace(low, high, resolution).T)
    values = _values(f, np.stack([x.ravel(), y.ravel()])).reshape(x.shape)
    if not values.any():
        raise ValueError("got a function that is 0 on the whole grid; expected one with zero contours")
    return contourpy.contour_generator(x, y, values).lines(0)


def curve_distance(curves: Sequence[np.ndarray], x: ArrayLike, y: ArrayLike) -> Float64[np.ndarray, " points"]:
    """Distance of each point (x, y) to the nearest of some polylines of shape (corners, 2) in the plane (chapter 3).

    Raises ``ValueError`` where no polyline has a segment.

    >>> curve_distance([np.array([[0.0, 0.0], [2.0, 0.0]])], [1.0, 5.0], [2.0, 4.0]).tolist()
    [2.0, 5.0]
    """
    a, b = (np.concatenate([c[part] for c in curves] or [np.empty((0, 2))]) for part in (slice(-1), slice(1, None)))
    if not len(a):
        raise ValueError(f"got {len(curves)} curves without a segment; expected at least one segment")
    nearest = np.full(np.shape(x), np.inf)
    for start, step in zip(a, b - a, strict=True):
        dx, dy = np.asarray(x) - start[0], np.asarray(y) - start[1]
        along = np.clip((dx * step[0] + dy * step[1]) / ((step @ step) or 1.0), 0, 1)
        nearest = np.minimum(nearest, (dx - along * step[0]) ** 2 + (dy - along * step[1]) ** 2)
    return np.sqrt(nearest)


def _corners(box: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    sides = np.asarray(box, dtype=float)
    if sides.ndim != 2 or sides.shape[1] != 2 or not (np.isfinite(sides).all() and (sides[:, 0] < sides[:, 1]).all()):
        raise ValueError(f"got the box {sides.tolist()}; expected finite pairs (low, high) with low < high")
    return sides[:, 0], sides[:, 1]


def _values(f: Callable[..., ArrayLike], points: np.ndarray) -> np.ndarray:
    values = np.asarray(f(*points), dtype=float)
    if values.shape != points.shape[1:] or not np.isfinite(values).all():
        raise ValueError(
            f"got values of shape {values.shape}, {np.count_nonzero(~np.isfinite(values))} of them not finite; "
            f"expected finite ones of shape {points.shape[1:]}"
        )
    return values


# ---- A symbolic transformer and its discrepancy (chapter 4)

EPSILON = sp.Rational(1, 100_000)  # of GPT-2's norms
Parameters = dict[str, sp.Matrix]  # under the names of transformers' GPT2Model; vectors are rows
Entries = dict[str, dict[tuple[int, int], sp.Expr | int]]  # what differs from gains 1 and zeros elsewhere


def toy_shapes(vocab: int, positions: int, d: int, inner: int) -> dict[str, tuple[int, int]]:
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
        name: sp.Matrix(*shape, lambda i, j, name=name: sp.Symbol(f"{short[name]}_{i}_{j}", real=True))
        for name, shape in toy_shapes(vocab, positions, d, inner).items()
    }


def toy_parameters(entries: Entries, vocab: int, positions: int, d: int, inner: int) -> Parameters:
    """Exact parameters of the toy transformer: the given entries, gains 1, zero elsewhere (chapter 4).

    Raises ``ValueError`` for an entry that the toy does not have.

    >>> toy_parameters({"wte.weight": {(0, 0): 5}}, 1, 1, d=2, inner=1)["wte.weight"]
    Matrix([[5, 0]])
    """
    shapes = toy_shapes(vocab, positions, d, inner)
    theta = {name: (sp.ones if _is_gain(name) else sp.zeros)(*shape) for name, shape in shapes.items()}
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
    if not 1 <= len(ids) <= positions.rows or not all(0 <= v < tokens.rows for v in ids):
        raise ValueError(f"got {ids}; expected 1 to {positions.rows} tokens from 0 to {tokens.rows - 1}")
    rows, d = [tokens.row(v) + positions.row(j) for j, v in enumerate(ids)], tokens.cols
    seen = [_affine(_layer_norm(x, theta, "h.0.ln_1", epsilon), theta, "h.0.attn.c_attn") for x in rows]
    weights = [sp.exp((seen[-1][:, :d] * x[:, d : 2 * d].T)[0] / sp.sqrt(d)) for x in seen]
    mixed = sum((w * x[:, 2 * d :] for w, x in zip(weights, seen, strict=True)), sp.zeros(1, d)) / sum(weights)
    state = rows[-1] + _affine(mixed, theta, "h.0.attn.c_proj")
    inner = _affine(_layer_norm(state, theta, "h.0.ln_2", epsilon), theta, "h.0.mlp.c_fc").applyfunc(activation)
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
    return sum(x**2 for x in toy_state(s, theta, epsilon, activation) - toy_state(t, theta, epsilon, activation))


def analytic_by_construction(expression: sp.Expr) -> bool:
    """Whether the expression is visibly real-analytic in its real symbols: the induction of Theorem 2.1 (chapter 4).

    True only for sums, products, exp, erf, tanh, natural powers, and other real powers of a base that sympy proves
    positive. False means "not shown": the expression may still be analytic.

    >>> x = sp.Symbol("x", real=True)
    >>> analytic_by_construction(1 / (1 + sp.exp(x))), analytic_by_construction(abs(x))
    (True, False)
    """
    shown: dict[sp.Basic, bool] = {}  # an expression shares its parts: as a tree it would be far too large

    def visit(part: sp.Basic) -> bool:
        if part not in shown:
            shown[part] = all([visit(argument) for argument in part.args]) and _analytic_head(part)
        return shown[part]

    return visit(expression)


def _analytic_head(part: sp.Basic) -> bool:
    if part.is_Symbol or part.is_Number or part.is_NumberSymbol:
        return bool(part.is_real)
    if isinstance(part, sp.Pow) and not (part.exp.is_Integer and part.exp >= 0):
        return bool(part.exp.is_number and part.exp.is_real and part.base.is_positive)
    return isinstance(part, sp.Add | sp.Mul | sp.Pow | sp.exp | sp.erf | sp.tanh)


def separating_entries(
    s: Sequence[int], t: Sequence[int], d: int, head_width: int, epsilon: sp.Expr = EPSILON, as_named: bool = False
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
        raise ValueError(f"got {s} and {t}; expected two different prompts of one token or more")
    if len(s) != len(t):
        return {"wpe.weight": {(len(s) - 1, 0): sp.Integer(1)}}
    if s[-1] != t[-1]:
        return {"wte.weight": {(s[-1], 0): sp.Integer(1)}}
    if d < 4:
        raise ValueError(f"got d = {d}; expected 4 or more, for three orthonormal vectors orthogonal to the ones")
    mismatch = next(i for i, (v, w) in enumerate(zip(s, t, strict=True)) if v != w)
    if t[mismatch] == s[-1] and not as_named:
        s, t = t, s
    return _looking_head(s, mismatch, d, head_width, epsilon)


def _looking_head(s: list[int], mismatch: int, d: int, head_width: int, epsilon: sp.Expr) -> Entries:
    # Rows of a Hadamard matrix: orthonormal, orthogonal to the ones, and rational.
    e, p, q = ([sp.Rational(sign, 2) for sign in signs] for signs in ((1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1)))
    squared_gain = 1 / (sp.Rational(2, d) + epsilon)  # of the norm on e + p
    score = sp.log(3 * (len(s) - 1))  # δ = 1/4 is small enough for every d and ε
    key = score * sp.sqrt(head_width) / squared_gain
    head = {(i, column): value for i in range(4) for column, value in ((0, e[i]), (d, key * p[i]), (2 * d, e[i]))}
    return {
        "wte.weight": {(token, i): e[i] for token in {s[mismatch], s[-1]} for i in range(4)},
        "wpe.weight": {(place, i): row[i] for place, row in ((mismatch, p), (len(s) - 1, q)) for i in range(4)},
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
    weights = {name: weight[None] if weight.ndim == 1 else weight for name, weight in decoder.named_parameters()}
    for name, placed in entries.items():
        for index in placed:
            _check_entry(name, index, tuple(weights[name].shape) if name in weights else None)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.fill_(1.0 if _is_gain(name) else 0.0)
            for index, value in entries.get(name, {}).items():
                weight[index] = float(value)


def _is_gain(name: str) -> bool:
    return "ln_" in name and name.endswith("weight")


def _check_entry(name: str, index: tuple[int, int], shape: tuple[int, ...] | None) -> None:
    if shape is None or not all(0 <= i < size for i, size in zip(index, shape, strict=True)):
        raise ValueError(f"got an entry at {index} of {name!r}; expected one of a parameter of shape {shape}")


def _affine(x: sp.Matrix, theta: Parameters, name: str) -> sp.Matrix:
    return x * theta[f"{name}.weight"] + theta[f"{name}.bias"]


def _layer_norm(x: sp.Matrix, theta: Parameters, name: str, epsilon: sp.Expr | int) -> sp.Matrix:
    centred = x - sp.ones(1, x.cols) * (sum(x) / x.cols)
    variance = sum(v**2 for v in centred) / x.cols
    normed = centred / sp.sqrt(variance + epsilon)
    return normed.multiply_elementwise(theta[f"{name}.weight"]) + theta[f"{name}.bias"]


# ---- Relative positions (chapter 4)


@dataclass(frozen=True)
class RotaryWitness:
    """One rotary head that tells two prompts apart, and what it should measure (chapter 4, relative positions).

    The last position scores token ``token`` at distance δ by ``strength``·cos(``rate``·(δ − ``offset``)) and any other
    token by 0; ``shares`` are the attention weights that ``token`` gets in total, in the first and the second prompt.
    """

    token: int
    offset: int
    rate: float
    strength: float
    shares: tuple[float, float]


def rotary_share(prompt: Sequence[int], token: int, offset: int, rate: float, strength: float) -> float:
    """Attention weight that ``token`` gets in total from the last position of the prompt, under the head above.

    >>> rotary_share([0, 1, 1, 0], token=1, offset=0, rate=1.0, strength=0.0)
    0.5
    """
    scores = [strength * math.cos(rate * (d - offset)) if v == token else 0.0 for d, v in enumerate(reversed(prompt))]
    weights = [math.exp(score - max(scores)) for score in scores]
    return sum(w for w, v in zip(weights, reversed(prompt), strict=True) if v == token) / sum(weights)


def rotary_witness(s: Sequence[int], t: Sequence[int], rate: float = 1.0) -> RotaryWitness:
    """The head in the proof of the theorem on relative positions, for one pair of prompts (chapter 4).

    ``rate`` is the angle per position of the plane that the head uses; 1 is in every rotary model with default rates.
    The shares differ as real numbers; in floats both may round to 1 where the prompts are longer than a few tokens.
    Raises ``ValueError`` for an empty prompt, for equal prompts, for constant prompts of one token, which no head
    tells apart, and where the plane turns by a whole number of circles between two occurrences that matter.

    >>> found = rotary_witness([0, 1], [0, 0, 1])
    >>> found.token, found.offset, [round(share, 2) for share in found.shares]
    (0, 2, [0.76, 0.92])
    """
    pair = [list(s), list(t)]
    if not s or not t or pair[0] == pair[1] or len({*s, *t}) == 1:
        raise ValueError(f"got {pair}; expected two different prompts that are not constant prompts of one token")
    offset = next((d for d, (v, w) in enumerate(zip(reversed(s), reversed(t), strict=False)) if v != w), None)
    offset = min(len(s), len(t)) if offset is None else offset
    without, having = pair if len(t) > offset else pair[::-1]  # the token is there in the second, not in the first
    token = having[-1 - offset]
    strength = _separating_strength(without, having, token, offset, rate)
    shares = (rotary_share(s, token, offset, rate, strength), rotary_share(t, token, offset, rate, strength))
    return RotaryWitness(token, offset, rate, strength, shares)


def _separating_strength(without: list[int], having: list[int], token: int, offset: int, rate: float) -> float:
    # Odds of the token: at least e^β / others in one prompt, at most e^(βγ)·copies / others in the other one.
    copies = [d for d, v in enumerate(reversed(without)) if v == token]
    others = len(without) - len(copies), len(having) - having.count(token)
    if not copies or 0 in others:
        return 0.0  # one of the shares is exactly 0 or 1 and the other is not
    gap = 1 - max(math.cos(rate * (d - offset)) for d in copies)
    if gap < 1e-12:
        raise ValueError(f"got rate {rate}; expected one whose multiples by 1, 2, … are not whole circles")
    return max(0.0, (1 + math.log(others[1] * len(copies) / others[0])) / gap)


def plant_rotary_head(decoder: nn.Module, witness: RotaryWitness) -> None:
    """Set all parameters of a rotary decoder so that its first block holds the head of the witness, in place.

    For Llama, Mistral, Qwen 3 and Gemma 3 with rates that start at 1, and width 4 or more. The share of the token
    becomes coordinate 3 of the states; Gemma's norm behind attention x ↦ x/√(x²/d + ε) then acts on it.
    Raises ``ValueError`` for a witness with another rate.
    """
    if witness.rate != 1.0:
        raise ValueError(f"got a witness with rate {witness.rate}; expected 1.0, the rate of the first plane")
    attention = decoder.layers[0].self_attn
    half = attention.head_dim // 2  # the plane of rate 1 has the coordinates 0 and half
    with torch.no_grad():
        scale = _indicator_rows(decoder, witness.token)
        size = witness.strength / attention.scaling
        if hasattr(attention, "q_norm"):  # it gives queries and keys a fixed length: its gain carries the strength
            length = (1 / attention.head_dim + decoder.config.rms_norm_eps) ** -0.5
            _set_gain(attention.q_norm, 1 / length)
            _set_gain(attention.k_norm, size / length)
            size = 1.0
        attention.q_proj.weight[0, 0] = scale
        attention.k_proj.weight[0, 1] = scale * size * math.cos(witness.offset)
        attention.k_proj.weight[half, 1] = scale * size * math.sin(witness.offset)
        attention.v_proj.weight[0, 1] = scale
        attention.o_proj.weight[3, 0] = 1.0


def _indicator_rows(decoder: nn.Module, token: int) -> float:
    # Rows u + f for the token and u + g for the others, of equal norm; returns what undoes the scale of the first norm.
    for weight in decoder.parameters():
        weight.zero_()
    for norm in (part for part in decoder.modules() if type(part).__name__.endswith("RMSNorm")):
        _set_gain(norm, 1.0)
    table = decoder.get_input_embeddings()
    table.weight[:, [0, 2]] = 1.0
    table.weight[token, [1, 2]] = table.weight.new_tensor([1.0, 0.0])
    return 1 / float(decoder.layers[0].input_layernorm(table(torch.tensor([0])))[0, 0])


def _set_gain(norm: nn.Module, gain: float) -> None:
    # Gemma multiplies by one plus its weight.
    norm.weight.fill_(gain - 1 if type(norm).__name__.startswith("Gemma") else gain)


# ---- One gradient step (chapter 5): the Hessian at the witness and the Jacobian of the step


def gradient_step(loss: sp.Expr, parameters: Sequence[sp.Symbol], eta: Coefficient) -> sp.Matrix:
    """The map φ(θ) = θ − η∇L(θ) as a column of expressions (Theorem 2.3, chapter 5).

    Raises ``ValueError`` for no parameters, or for one that is listed twice.

    >>> x = sp.Symbol("x")
    >>> gradient_step(x**4 / 4, [x], sp.Rational(1, 3))
    Matrix([[-x**3/3 + x]])
    """
    if not parameters or len(set(parameters)) < len(parameters):
        raise ValueError(f"got the parameters {list(parameters)}; expected at least one, and none twice")
    return sp.Matrix([theta - eta * sp.diff(loss, theta) for theta in parameters])


def witness_hessian(target: Sequence[Coefficient], d: int) -> sp.Matrix:
    """Hessian of the cross-entropy of the logits Uβ at U = 0, β = 0, by differentiation (Theorem 2.3, chapter 5).

    U has the n rows of the target and d columns; the order is U column by column, then β, so the result should be
    [[0, I_d⊗w], [I_d⊗wᵀ, 0]] with w = (1/n)1 − target, which is not used here. Raises ``ValueError`` for fewer than
    two classes, a width below 1, or a target that does not sum to 1.

    >>> witness_hessian([1, 0], 1)
    Matrix([
    [   0,   0, -1/2],
    [   0,   0,  1/2],
    [-1/2, 1/2,    0]])
    """
    n = len(target)
    if n < 2 or d < 1 or sp.expand(sum(target)) != 1:
        raise ValueError(f"got the target {list(target)} and width {d}; expected 2 classes or more, sum 1, width >= 1")
    rows = sp.Matrix(n, d, lambda i, j: sp.Symbol(f"U{i}_{j}", real=True))
    bias = sp.Matrix(d, 1, lambda j, _: sp.Symbol(f"beta{j}", real=True))
    logits, theta = list(rows * bias), [*rows.T, *bias]
    loss = sp.log(sum(map(sp.exp, logits))) - sum(p * z for p, z in zip(target, logits, strict=True))
    gradient, origin = [sp.diff(loss, a) for a in theta], dict.fromkeys(theta, 0)
    second = {(i, j): sp.diff(gradient[i], theta[j]).xreplace(origin) for j in range(len(theta)) for i in range(j + 1)}
    return sp.Matrix(len(theta), len(theta), lambda i, j: sp.expand(second[min(i, j), max(i, j)]))


def step_determinant(hessian: sp.Matrix, eta: Coefficient, decay: Coefficient = 0) -> sp.Expr:
    """det Dφ = det((1 − ηλ)I − ηH), factored, for φ(θ) = θ − η∇L(θ) − ηλθ with weight decay λ (chapter 5).

    Exact, by way of the characteristic polynomial of the Hessian H. Raises ``ValueError`` unless H is symmetric.

    >>> step_determinant(sp.Matrix([[0, -1], [-1, 0]]), sp.Symbol("eta"))
    -(eta - 1)*(eta + 1)
    """
    if not hessian.is_square or not (hessian - hessian.T).applyfunc(sp.expand).is_zero_matrix:
        raise ValueError(f"got a matrix of shape {hessian.shape}; expected a symmetric one")
    powers = hessian.charpoly(sp.Dummy("x")).terms()  # det(xI − H), taken at x = (1 − ηλ)/η and multiplied by η^p
    return sp.factor(sum(c * (1 - eta * decay) ** k * eta ** (hessian.rows - k) for (k,), c in powers))


def parameter_hessian(loss: Tensor, parameters: Sequence[Tensor]) -> Float[Tensor, "p p"]:
    """All second derivatives of a loss by the parameters, in their order, flattened (chapter 5).

    By automatic differentiation; the memory is of order p². Raises ``ValueError`` unless the loss is one number that
    depends on something that requires gradients.

    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> parameter_hessian(x[0] * x[1] ** 2, [x]).tolist()
    [[0.0, 4.0], [4.0, 2.0]]
    """
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"got a loss of {loss.numel()} numbers, requires_grad={loss.requires_grad}; expected 1, and True"
        )
    by_tensor = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    gradient = torch.cat([part.reshape(-1) for part in by_tensor])
    p = len(gradient)
    if not gradient.requires_grad:  # the loss is linear
        return gradient.new_zeros(p, p)
    units = torch.eye(p, dtype=gradient.dtype, device=gradient.device)
    rows = torch.autograd.grad(gradient, parameters, units, is_grads_batched=True, materialize_grads=True)
    # The zeros of a parameter that the gradient does not reach come without the dimension of the batch.
    shapes = [theta.shape for theta in parameters]
    return torch.cat([part.expand(p, *shape).reshape(p, -1) for part, shape in zip(rows, shapes, strict=True)], dim=1)
