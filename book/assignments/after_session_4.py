"""Assignment 1: what the claim says, and why it holds."""

# %% introduction
# # Assignment 1: what the claim says, and why it holds
#
# After session 4: 20 points.
# Write your answers where the dots are, and run the cell below each of them: it shows the public tests, and prints `right` or the reason why not.
# Hidden tests come with the grading; they check the same statements on other inputs.
# No network is needed, and no other file.

# %% setup
from itertools import combinations, product
from math import comb

import sympy as sp
import torch
from sipit_lite import load
from sipit_lite.teaching.exercises import attempt

theta = sp.Symbol("theta", real=True)
model = load("pocket-gpt2", device="cpu")

# %% question exceptional, 4 points: The exceptional parameters
# A prompt of tokens $s_0, \dots, s_{T-1}$, which are positive integers, has the state $r(s; \theta) = \sum_t s_t \theta^{2t+1}$, one real number: odd powers alone, unlike the toy of the chapter *The claim*.
#
# Write `exceptional(tokens, longest)`: the set of all real $\theta$, as sympy numbers, at which two different prompts of 1 to `longest` tokens have the same state.
#
# The theorem says that this set is null; here it is finite, and you can list it.


# %% solution
def exceptional(tokens, longest):
    """All real θ with a collision, as a set of sympy numbers."""
    # BEGIN SOLUTION
    states = []
    for length in range(1, longest + 1):
        for s in product(tokens, repeat=length):
            states.append(sum(v * theta ** (2 * t + 1) for t, v in enumerate(s)))
    bad = set()
    for one, other in combinations(states, 2):
        bad |= set(sp.real_roots(sp.Poly(one - other, theta)))
    return bad
    # END SOLUTION


# %% public 1
assert exceptional((1, 2), 1) == {0}

# %% hidden 1
bad = exceptional((1, 2), 2)
assert {-1, 0, 1} <= bad and len(bad) == 5

# %% hidden 2
bad = exceptional((1, 3), 3)
assert len(bad) == 27 and 1 in bad and 2 not in bad
for root in bad:
    values = set()
    for T in (1, 2, 3):
        for s in product((1, 3), repeat=T):
            value = sum(v * root.evalf(60) ** (2 * t + 1) for t, v in enumerate(s))
            values.add(round(value, 40))
    assert len(values) < 14


# %% mistake
def exceptional(tokens, longest):
    """Prompts of one length alone are compared."""
    bad = set()
    for length in range(1, longest + 1):
        for s, other in combinations(product(tokens, repeat=length), 2):
            gap = [a - b for a, b in zip(s, other, strict=True)]
            terms = [c * theta ** (2 * t + 1) for t, c in enumerate(gap)]
            bad |= set(sp.real_roots(sp.Poly(sum(terms), theta)))
    return bad


# %% question pigeonhole, 3 points: Where floats must collide
# A state has $d$ numbers of $b$ bits.
# Write `sure(d, bits, vocab)`: the smallest $K$ such that among all prompts of *at most* $K$ tokens, the empty one left out, two must share a state.
#
# Note that *The claim* counts the prompts of one length.
# Integers of Python are exact; logarithms are not.


# %% solution
def sure(d, bits, vocab):
    """The smallest K with more prompts of 1 to K tokens than states."""
    # BEGIN SOLUTION
    states = 2 ** (d * bits)
    prompts, longest = 0, 0
    while prompts <= states:
        longest += 1
        prompts += vocab**longest
    return longest
    # END SOLUTION


# %% public 1
assert sure(1, 1, 3) == 1
assert sure(1, 3, 3) == 2

# %% hidden 2
assert sure(1, 2, 2) == 2
assert sure(10, 1, 2) == 10
assert sure(256, 16, 2048) == 373
assert sure(2, 2, 16) == 2  # 16 prompts fit into 16 states


# %% mistake
def sure(d, bits, vocab):
    """Counts the prompts of exactly K tokens."""
    longest = 1
    while vocab**longest <= 2 ** (d * bits):
        longest += 1
    return longest


# %% question bump, 4 points: Another flat function
# Let $\varphi(x) = e^{-1/x}$ for $x > 0$ and 0 elsewhere.
# The proof that $\varphi$ is smooth and not analytic needs one step: for $x > 0$ its $k$-th derivative is $p_k(1/x)\, e^{-1/x}$ with a polynomial $p_k$ in $u = 1/x$, and $p_0 = 1$.
#
# 1. Write `following(p, u)`, which gives $p_{k+1}$ from $p_k$.
# 2. Give the degree of $p_k$ for $k \ge 1$ as a function `degree(k)`.


# %% solution
def following(p, u):
    """The polynomial p_{k+1}(u) that follows p = p_k(u)."""
    # BEGIN SOLUTION
    return sp.expand(u**2 * (p - sp.diff(p, u)))
    # END SOLUTION


def degree(k):
    """The degree of p_k, for k ≥ 1."""
    # BEGIN SOLUTION
    return 2 * k
    # END SOLUTION


# %% public 1
u = sp.Symbol("u", positive=True)
assert sp.expand(following(sp.Integer(1), u) - u**2) == 0

# %% hidden 2
u, x = sp.symbols("u x", positive=True)
p = sp.Integer(1)
for k in range(1, 6):
    p = following(p, u)
    ratio = sp.diff(sp.exp(-1 / x), x, k) * sp.exp(1 / x)
    assert sp.simplify(ratio - p.subs(u, 1 / x)) == 0

# %% hidden 1
assert [degree(k) for k in (1, 2, 5, 30)] == [2, 4, 10, 60]


# %% mistake
def following(p, u):
    """Forgets that p is differentiated as well."""
    return sp.expand(u**2 * p)


def degree(k):
    """Right for the first alone."""
    return k + 1


# %% question narrow, 3 points: LayerNorm in two dimensions
# LayerNorm with gain 1 and bias 0 subtracts the mean of its input and divides by $\sqrt{\mathrm{var} + \epsilon}$, where var is the mean of the squared deviations.
# In two dimensions its output for $(x, y)$ is $(g, -g)$, and $g$ depends on $w = x - y$ alone: it is not injective on $\mathbb{R}^2$.
#
# Give $g$ as a sympy expression in `w` and `eps`, and its limit for $\epsilon \to 0$ at $w > 0$: with $\epsilon = 0$ all points on one side of the diagonal share an output.

# %% solution
w = sp.Symbol("w", real=True)
eps = sp.Symbol("epsilon", positive=True)
g = (w / 2) / sp.sqrt(w**2 / 4 + eps)  # SOLUTION
side = 1  # SOLUTION

# %% public 1
assert g.subs(w, 0) == 0
assert g.free_symbols == {w, eps}

# %% hidden 2
for point in ((3.0, 1.0), (-2.0, 5.0), (0.1, 0.0)):
    row = torch.tensor([point], dtype=torch.float64)
    normed = torch.nn.functional.layer_norm(row, (2,), eps=0.01)
    mine = float(g.subs({w: point[0] - point[1], eps: sp.Float("0.01")}))
    assert abs(mine - float(normed[0, 0])) < 1e-9, point
assert side == 1

# %% mistake
w = sp.Symbol("w", real=True)
eps = sp.Symbol("epsilon", positive=True)
g = (w / 2) / sp.sqrt(w**2 / 2 + eps)  # the variance of a sample, by n - 1
side = 1

# %% question embeddings, 3 points: Before the first block
# At layer 0 a state is the embedding of the last token plus that of its position: nothing before the last token is seen.
# Take all $v^T$ prompts of length $T$ over $v$ tokens with different embeddings.
#
# 1. Write `at_zero(v, T)`: how many pairs of these prompts share their last state at layer 0?
# 2. Count such pairs on pocket-gpt2: `shared(tokens, T, layer)` is the number of pairs of prompts of length `T` over a list of token ids whose last states are equal, number by number.


# %% solution
def at_zero(v, T):
    """Pairs of prompts of T tokens that end in the same token."""
    # BEGIN SOLUTION
    return v * comb(v ** (T - 1), 2)
    # END SOLUTION


def shared(tokens, T, layer):
    """Pairs of prompts with equal last states."""
    # BEGIN SOLUTION
    prompts = torch.tensor(list(product(tokens, repeat=T)))
    ends = model.states(prompts, layer)[:, -1]
    return sum(torch.equal(a, b) for a, b in combinations(ends, 2))
    # END SOLUTION


# %% public 1
assert at_zero(2, 2) == 2
assert shared([5, 9], 2, 0) == 2

# %% hidden 1
assert at_zero(3, 3) == 108 and at_zero(7, 4) == 7 * comb(343, 2)

# %% hidden 1
assert shared([11, 400, 1500], 3, 0) == 108
assert shared([11, 400, 1500], 3, 1) == 0


# %% mistake
def at_zero(v, T):
    """Pairs that differ in the first token alone."""
    return v ** (T - 1) * comb(v, 2)


def shared(tokens, T, layer):
    """The formula, at every layer."""
    return at_zero(len(tokens), T)


# %% question rotary, 3 points: A head that turns
# One rotary head of dimension 2 reads rows $x_0, \dots, x_{T-1} \in \mathbb{R}^2$; queries and keys are the rows themselves, turned by the angle $t$ at position $t$, and values are the rows, not turned.
# The score of position $j$ is the inner product of the turned $x_{T-1}$ and the turned $x_j$, divided by $\sqrt 2$.
#
# Write `last_output(x)` for a tensor `x` of shape $(T, 2)$ in float64: the average of the values by the softmax of the scores, for the last position.
# Then all constant prompts give one output, which is the heart of the theorem on collisions in rotary models.


# %% solution
def last_output(x):
    """The head's output at the last position, shape (2,)."""
    # BEGIN SOLUTION
    t = torch.arange(len(x), dtype=x.dtype)
    cos, sin = t.cos(), t.sin()
    turned = torch.stack(
        [cos * x[:, 0] - sin * x[:, 1], sin * x[:, 0] + cos * x[:, 1]], dim=1
    )
    scores = turned @ turned[-1] / 2**0.5
    return scores.softmax(0) @ x
    # END SOLUTION


# %% public 1
row = torch.tensor([0.3, -1.2], dtype=torch.float64)
for T in (1, 2, 7):
    assert torch.allclose(last_output(row.repeat(T, 1)), row)

# %% hidden 2
x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
z = torch.view_as_complex(x)
turns = torch.polar(torch.ones(5, dtype=torch.float64), torch.arange(5.0).double())
scores = ((z * turns).conj() * (z * turns)[-1]).real / 2**0.5
assert torch.allclose(last_output(x), scores.softmax(0) @ x)


# %% mistake
def last_output(x):
    """Turns the query, and not the keys."""
    t = torch.tensor(float(len(x) - 1), dtype=x.dtype)
    turn = torch.stack(
        [torch.stack([t.cos(), -t.sin()]), torch.stack([t.sin(), t.cos()])]
    )
    return (x @ (turn @ x[-1]) / 2**0.5).softmax(0) @ x
