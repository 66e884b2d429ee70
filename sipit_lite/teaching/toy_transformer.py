"""A transformer small enough for sympy, and parameters that separate two prompts."""

from collections.abc import Callable, Sequence

import sympy as sp

from sipit_lite.model import SipItError

EPSILON = sp.Rational(1, 100_000)  # of GPT-2's norms
# By the names of transformers' GPT2Model; vectors are rows.
Parameters = dict[str, sp.Matrix]
# What differs from gains 1 and zeros elsewhere: name → (row, column) → value.
Entries = dict[str, dict[tuple[int, int], sp.Expr | int]]


def toy_symbols(vocab: int, positions: int, d: int, inner: int) -> Parameters:
    """One real symbol for each parameter of the toy transformer.

    >>> toy_symbols(vocab=2, positions=2, d=2, inner=1)["wte.weight"]
    Matrix([
    [wte_0_0, wte_0_1],
    [wte_1_0, wte_1_1]])
    """
    theta = {}
    for name, (rows, columns) in _shapes(vocab, positions, d, inner).items():
        short = name.removeprefix("h.0.").removesuffix(".weight")
        short = short.replace(".bias", "_b").replace(".", "_")
        letters = sp.symbols(f"{short}_:{rows}_:{columns}", real=True)
        theta[name] = sp.Matrix(rows, columns, letters)
    return theta


def toy_parameters(
    entries: Entries, vocab: int, positions: int, d: int, inner: int
) -> Parameters:
    """Exact parameters of the toy transformer: these entries, gains 1, zero elsewhere.

    Raises
    ------
    SipItError
        The toy has no such entry.

    Examples
    --------
    >>> shape = {"vocab": 1, "positions": 1, "d": 2, "inner": 1}
    >>> toy_parameters({"wte.weight": {(0, 0): 5}}, **shape)["wte.weight"]
    Matrix([[5, 0]])
    """
    shapes = _shapes(vocab, positions, d, inner)
    theta = {}
    for name, shape in shapes.items():
        gain = "ln_" in name and name.endswith("weight")
        theta[name] = sp.ones(*shape) if gain else sp.zeros(*shape)
    for name, placed in entries.items():
        rows, columns = shapes.get(name, (0, 0))
        for (i, j), value in placed.items():
            # A negative index would count from the end.
            if not (0 <= i < rows and 0 <= j < columns):
                raise SipItError(
                    f"got an entry at {(i, j)} of {name!r}; expected one of a "
                    f"parameter of shape {(rows, columns)}"
                )
            theta[name][i, j] = value
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
    """Last-token state r(s; θ) of the toy transformer, a row of d (Theorem 2.1).

    Embedding plus position, then one block with the norms in front: causal softmax
    attention with one head, MLP, residuals; no final norm.

    Raises
    ------
    SipItError
        The prompt is empty or too long, or has a token beyond the vocabulary.

    Examples
    --------
    >>> theta = toy_parameters({"wte.weight": {(0, 1): 7}}, 1, 1, d=2, inner=1)
    >>> toy_state([0], theta)
    Matrix([[0, 7]])
    """
    tokens = theta["wte.weight"]
    positions = theta["wpe.weight"]
    known = all(0 <= v < tokens.rows for v in ids)
    if not 1 <= len(ids) <= positions.rows or not known:
        raise SipItError(
            f"got {ids}; expected 1 to {positions.rows} tokens "
            f"from 0 to {tokens.rows - 1}"
        )
    d = tokens.cols
    rows = [tokens.row(v) + positions.row(j) for j, v in enumerate(ids)]
    normed = [_layer_norm(x, theta, "h.0.ln_1", epsilon) for x in rows]
    # Query, key and value of each position side by side, shape (1, 3d).
    heads = [_affine(x, theta, "h.0.attn.c_attn") for x in normed]
    query = heads[-1][:, :d]  # the last position reads all others: no mask is needed
    mixed = sp.zeros(1, d)
    total = 0
    for head in heads:
        weight = sp.exp(query.dot(head[:, d : 2 * d]) / sp.sqrt(d))
        mixed += weight * head[:, 2 * d :]
        total += weight
    state = rows[-1] + _affine(mixed / total, theta, "h.0.attn.c_proj")
    normed = _layer_norm(state, theta, "h.0.ln_2", epsilon)
    inner = _affine(normed, theta, "h.0.mlp.c_fc").applyfunc(activation)
    return state + _affine(inner, theta, "h.0.mlp.c_proj")


def discrepancy(
    s: Sequence[int],
    t: Sequence[int],
    theta: Parameters,
    epsilon: sp.Expr | int = EPSILON,
    activation: Callable[[sp.Expr], sp.Expr] = gelu,
) -> sp.Expr:
    """h(θ) = ‖r(s; θ) − r(t; θ)‖² of the toy transformer (Theorem 2.2).

    >>> theta = toy_parameters({"wte.weight": {(0, 1): 7}}, 2, 1, d=2, inner=1)
    >>> discrepancy([0], [1], theta)
    49
    """
    first = toy_state(s, theta, epsilon, activation)
    second = toy_state(t, theta, epsilon, activation)
    return sum(x**2 for x in first - second)


def separating_entries(
    s: Sequence[int],
    t: Sequence[int],
    d: int,
    head_width: int,
    epsilon: sp.Expr = EPSILON,
    as_named: bool = False,
) -> Entries:
    """Parameters at which two prompts have different states (witness of Theorem 2.2).

    Case A (other length, or other last token) makes every block the identity; case B
    lets head 1 of block 1 look at the first mismatch.

    Parameters
    ----------
    as_named
        Case B as in the paper: without an exchange of the names where t has the common
        last token at the mismatch. Then the entries need not separate the prompts.

    Raises
    ------
    SipItError
        The prompts are equal, one is empty, or d < 4 in case B.

    Examples
    --------
    >>> separating_entries([2], [0, 2], d=4, head_width=4)
    {'wpe.weight': {(0, 0): 1}}
    """
    s = list(s)
    t = list(t)
    if not s or not t or s == t:
        raise SipItError(
            f"got {s} and {t}; expected two different prompts of one token or more"
        )
    if len(s) != len(t):
        # Only s ends at this position.
        return {"wpe.weight": {(len(s) - 1, 0): sp.Integer(1)}}
    if s[-1] != t[-1]:
        return {"wte.weight": {(s[-1], 0): sp.Integer(1)}}
    if d < 4:
        raise SipItError(
            f"got d = {d}; expected 4 or more, for three orthonormal vectors "
            "orthogonal to the ones"
        )
    mismatch = next(i for i in range(len(s)) if s[i] != t[i])
    if t[mismatch] == s[-1] and not as_named:
        s = t  # of the two, only s enters the construction
    return _looking_head(s, mismatch, d, head_width, epsilon)


def _looking_head(
    s: list[int], mismatch: int, d: int, head_width: int, epsilon: sp.Expr
) -> Entries:
    """The head of case B: queries read e, keys p, values e (lemma of the chapter)."""
    # Rows of a Hadamard matrix: orthonormal, orthogonal to the ones, and rational.
    e = sp.Matrix([1, -1, 1, -1]) / 2
    p = sp.Matrix([1, 1, -1, -1]) / 2
    q = sp.Matrix([1, -1, -1, 1]) / 2
    squared_gain = 1 / (sp.Rational(2, d) + epsilon)  # of the norm on e + p
    score = sp.log(3 * (len(s) - 1))  # δ = 1/4 is small enough for every d and ε
    key = score * sp.sqrt(head_width) / squared_gain  # attention divides by the root
    tokens = {}
    places = {}
    head = {}
    for i in range(4):
        tokens[s[mismatch], i] = e[i]
        tokens[s[-1], i] = e[i]
        places[mismatch, i] = p[i]
        places[len(s) - 1, i] = q[i]
        head[i, 0] = e[i]
        head[i, d] = key * p[i]  # columns: queries, then keys from d, values from 2d
        head[i, 2 * d] = e[i]
    return {
        "wte.weight": tokens,
        "wpe.weight": places,
        "h.0.attn.c_attn.weight": head,
        "h.0.attn.c_proj.weight": {(0, 0): sp.Integer(1)},
    }


def _affine(x: sp.Matrix, theta: Parameters, name: str) -> sp.Matrix:
    """The affine map of this name, x W + b."""
    return x * theta[f"{name}.weight"] + theta[f"{name}.bias"]


def _layer_norm(
    x: sp.Matrix, theta: Parameters, name: str, epsilon: sp.Expr | int
) -> sp.Matrix:
    """LayerNorm of a row, with the gains and biases of this name."""
    centred = x - sp.ones(1, x.cols) * (sum(x) / x.cols)
    variance = sum(v**2 for v in centred) / x.cols
    normed = centred / sp.sqrt(variance + epsilon)
    return normed.multiply_elementwise(theta[f"{name}.weight"]) + theta[f"{name}.bias"]


def _shapes(
    vocab: int, positions: int, d: int, inner: int
) -> dict[str, tuple[int, int]]:
    """Shapes of the parameters; ``inner`` is the width of the MLP."""
    return {
        "wte.weight": (vocab, d), "wpe.weight": (positions, d),
        "h.0.ln_1.weight": (1, d), "h.0.ln_1.bias": (1, d),
        "h.0.attn.c_attn.weight": (d, 3 * d), "h.0.attn.c_attn.bias": (1, 3 * d),
        "h.0.attn.c_proj.weight": (d, d), "h.0.attn.c_proj.bias": (1, d),
        "h.0.ln_2.weight": (1, d), "h.0.ln_2.bias": (1, d),
        "h.0.mlp.c_fc.weight": (d, inner), "h.0.mlp.c_fc.bias": (1, inner),
        "h.0.mlp.c_proj.weight": (inner, d), "h.0.mlp.c_proj.bias": (1, d),
    }  # fmt: skip
