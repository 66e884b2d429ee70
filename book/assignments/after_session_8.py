"""Assignment 2: collisions, and how close chance comes."""

# %% introduction
# # Assignment 2: collisions, and how close chance comes
#
# After session 8: 20 points.
# Write your answers where the dots are, and run the cell below each of them: it shows the public tests, and prints `right` or the reason why not.
# Hidden tests come with the grading; they check the same statements on other inputs.
# No network is needed, and no other file.

# %% setup
from itertools import combinations, product
from math import comb, log, sqrt

import sympy as sp
import torch
from sipit_lite import last_states, load
from sipit_lite.io.text import distinct
from sipit_lite.teaching.exercises import attempt
from torch.linalg import vector_norm

eta = sp.Symbol("eta", positive=True)
model = load("pocket-gpt2", device="cpu")
texts = distinct(model.tokenizer, 120, 12, source="bundled")
cloud = last_states(model, texts, [model.n_layers])[0]  # (120, 256), float32

# %% question rates, 3 points: Learning rates that are bad
# Two coordinates of $\theta$ start at $a \ne b$, and each is trained by gradient descent on its own loss $\theta^4/4$, with the same learning rate $\eta > 0$.
# Two prompts collide after training if and only if the coordinates have met.
#
# Write `bad_rates(a, b, steps)`: the set of all $\eta > 0$, as sympy numbers, at which they are equal after so many steps.
# The set is finite, as it has to be: the difference is a polynomial in $\eta$, and not zero at $\eta = 0$.


# %% solution
def bad_rates(a, b, steps):
    """All positive learning rates at which a and b have met after the steps."""
    # BEGIN SOLUTION
    x, y = sp.Integer(a), sp.Integer(b)
    for _ in range(steps):
        x = sp.expand(x - eta * x**3)
        y = sp.expand(y - eta * y**3)
    roots = sp.real_roots(sp.Poly(x - y, eta))
    return {root for root in roots if root > 0}
    # END SOLUTION


# %% public 1
assert bad_rates(1, 2, 1) == {sp.Rational(1, 7)}

# %% hidden 1
assert bad_rates(1, -3, 1) == {sp.Rational(1, 7)}
assert bad_rates(-1, 4, 1) == {sp.Rational(1, 13)}

# %% hidden 1
bad = bad_rates(1, 2, 2)
assert sp.Rational(1, 7) in bad and len(bad) == 2
for rate in bad:
    x, y = sp.Float(1, 50), sp.Float(2, 50)
    for _ in range(2):
        x, y = x - rate.evalf(50) * x**3, y - rate.evalf(50) * y**3
    assert abs(x - y) < 1e-30


# %% mistake
def bad_rates(a, b, steps):
    """Those of the first step, as if a second one could bring no others."""
    return {sp.Rational(1, a * a + a * b + b * b)}


# %% question momentum, 3 points: Momentum and decay keep volume
# Heavy-ball momentum with decoupled weight decay, on the loss $\frac12 \theta^\top A \theta$ with a symmetric $A \in \mathbb{R}^{n \times n}$, is the linear map
#
# $$m' = \beta m + A \theta, \qquad \theta' = (1 - \eta\lambda)\, \theta - \eta m'.$$
#
# The proof that such a step keeps a density needs its determinant on $\mathbb{R}^{2n}$.
# Give it: `determinant(A, eta, lam, beta)`, without forming a matrix of size $2n$ (a formula in one line; $A$ drops out).


# %% solution
def determinant(A, eta, lam, beta):
    """The determinant of (θ, m) ↦ (θ', m')."""
    # BEGIN SOLUTION
    n = A.shape[0]
    return (1 - eta * lam) ** n * beta**n
    # END SOLUTION


# %% public 1
identity = sp.eye(3)
assert determinant(identity, sp.Rational(1, 10), 0, sp.Rational(1, 2)) == sp.Rational(
    1, 8
)

# %% hidden 2
A = sp.Matrix([[2, 1, 0], [1, 3, -1], [0, -1, 5]])
rates = sp.Rational(1, 3), sp.Rational(1, 5), sp.Rational(9, 10)
step, lam, beta = rates
top = ((1 - step * lam) * sp.eye(3) - step * A).row_join(-step * beta * sp.eye(3))
jacobian = top.col_join(A.row_join(beta * sp.eye(3)))
assert determinant(A, *rates) == jacobian.det()


# %% mistake
def determinant(A, eta, lam, beta):
    """Momentum alone."""
    return beta ** A.shape[0]


# %% question interval, 4 points: What a product can promise
# The squared distance of two float32 vectors $a, b \in \mathbb{R}^n$ was computed as $\hat D = \lVert a \rVert^2 + \lVert b \rVert^2 - 2 a \cdot b$.
# By the theorem of *Build the detector* it is off by at most $\gamma_{n+6} (\lVert a \rVert^2 + \lVert b \rVert^2)$, with $\gamma_m = m u/(1 - m u)$ and $u = 2^{-24}$.
#
# 1. Write `interval(product, a_norm, b_norm, n)`, which gives the bounds between which the true *distance* lies (not its square).
# 2. Write `to_compute(cloud)` for float32 rows: the number of pairs $i < j$ whose distance must be computed exactly, once the closest distance among the pairs $(i, i+1)$ is known, to be sure of the closest pair: those with a lower bound not above that distance.
#    Take the products as `cloud @ cloud.T` gives them, and the norms in float64.


# %% solution
def interval(product, a_norm, b_norm, n):
    """Lower and upper bound of the distance."""
    # BEGIN SOLUTION
    m = n + 6
    gamma = m * 2**-24 / (1 - m * 2**-24)
    slack = gamma * (a_norm**2 + b_norm**2)
    return sqrt(max(product - slack, 0)), sqrt(max(product + slack, 0))
    # END SOLUTION


def to_compute(cloud):
    """How many pairs the product leaves open."""
    # BEGIN SOLUTION
    rows = cloud.double()
    best = float(vector_norm(rows[1:] - rows[:-1], dim=1).min())
    norms = vector_norm(rows, dim=1).tolist()
    squares = cloud.square().sum(1)
    products = (squares[:, None] + squares - 2 * cloud @ cloud.T).tolist()
    left = 0
    for i, j in combinations(range(len(cloud)), 2):
        low, _ = interval(products[i][j], norms[i], norms[j], cloud.shape[1])
        left += low <= best
    return left
    # END SOLUTION


# %% public 1
low, high = interval(4.0, 1.0, 1.0, 58)
assert abs(low - 2) < 1e-5 and abs(high - 2) < 1e-5 and low < 2 < high

# %% hidden 2
low, high = interval(0.005, 10, 10, 64)
slack = 200 * 70 * 2**-24 / (1 - 70 * 2**-24)
assert abs(low - sqrt(0.005 - slack)) < 1e-9
assert abs(high - sqrt(0.005 + slack)) < 1e-9
assert interval(1e-6, 10, 10, 64)[0] == 0

# %% hidden 1
exact = torch.pdist(cloud.double())
best = vector_norm(cloud.double()[1:] - cloud.double()[:-1], dim=1).min()
surely = int((exact <= best).sum())
assert surely <= to_compute(cloud) <= surely + 2
assert to_compute(torch.eye(6)) == 15


# %% mistake
def interval(product, a_norm, b_norm, n):
    """A negative bound, and half the slack: the norms are not squared."""
    gamma = (n + 6) * 2**-24
    slack = gamma * (a_norm + b_norm)
    return sqrt(max(product - slack, 0)), sqrt(product + slack)


def to_compute(cloud):
    """As if the closest pair were always a neighbour."""
    return 1


# %% question shadow, 3 points: Shadows with the norm of the rest
# Let $Q \in \mathbb{R}^{d \times k}$ have orthonormal columns, and let $z_a = a - Q Q^\top a$ be the rest of $a$.
# Write `shadow(x, y, Q)` for two vectors in float64: the lower bound $\sqrt{\lVert Q^\top (x - y) \rVert^2 + (\lVert z_x \rVert - \lVert z_y \rVert)^2}$ of their distance, from $k + 1$ numbers of each vector.
# Then `lost(d)`: the bound divided by the distance for $y = -x \ne 0$ with $Q^\top x = 0$, the worst case.


# %% solution
def shadow(x, y, Q):
    """A lower bound of the distance of x and y."""
    # BEGIN SOLUTION
    rest_x = vector_norm(x - Q @ (Q.T @ x))
    rest_y = vector_norm(y - Q @ (Q.T @ y))
    return float(torch.hypot(vector_norm(Q.T @ (x - y)), rest_x - rest_y))
    # END SOLUTION


def lost(d):
    """The bound over the distance, in the worst case."""
    # BEGIN SOLUTION
    return 0
    # END SOLUTION


# %% public 1
rows = cloud[:20].double()
Q = torch.linalg.qr(rows[:8].T)[0]
for i, j in combinations(range(20), 2):
    assert shadow(rows[i], rows[j], Q) <= vector_norm(rows[i] - rows[j]) + 1e-9
assert lost(256) < 1

# %% hidden 2
Q = torch.eye(4, 2, dtype=torch.float64)
x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
y = torch.tensor([0.0, 0.0, 6.0, 8.0], dtype=torch.float64)
assert abs(shadow(x, y, Q) - sqrt(5 + 25)) < 1e-12
assert lost(256) == 0


# %% mistake
def shadow(x, y, Q):
    """The projection alone: a bound, and a weaker one."""
    return float(vector_norm(Q.T @ (x - y)))


def lost(d):
    """A guess."""
    return d**-0.5


# %% question chance, 4 points: The closest of many points on a torus
# $N$ points are independent and uniform on the torus $[0, 1)^m$, with the maximum of the distances along the $m$ circles as their distance.
# Two of them are within $r \le \frac12$ with probability $p(r) = (2r)^m$.
#
# 1. Write `half_radius(N, m)`: the $r$ at which the expected number of close pairs is $\ln 2$.
# 2. Write `needed(r, m)`: the smallest $N$ with `half_radius(N, m) <= r`.
#    How many points does it take to come within $10^{-6}$ in ten dimensions?


# %% solution
def half_radius(N, m):
    """The radius with ln 2 close pairs on average."""
    # BEGIN SOLUTION
    return (log(2) / comb(N, 2)) ** (1 / m) / 2
    # END SOLUTION


def needed(r, m):
    """The smallest number of points that come as close as r."""
    # BEGIN SOLUTION
    low, high = 2, 4
    while half_radius(high, m) > r:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        if half_radius(middle, m) <= r:
            high = middle
        else:
            low = middle + 1
    return low
    # END SOLUTION


# %% public 1
ratio = half_radius(20_000, 1) / half_radius(10_000, 1)
assert abs(ratio - 1 / 4) < 1e-3

# %% hidden 2
assert abs(half_radius(3, 1) - log(2) / 6) < 1e-12
generator = torch.Generator().manual_seed(0)
closest = []
for _ in range(400):
    points = torch.rand(50, 2, generator=generator, dtype=torch.float64)
    gaps = (points[:, None] - points).abs()
    apart = torch.minimum(gaps, 1 - gaps).amax(2).fill_diagonal_(1)
    closest.append(float(apart.min()))
below = sum(r <= half_radius(50, 2) for r in closest) / 400
assert 0.4 < below < 0.6

# %% hidden 1
for r, m in ((0.01, 1), (0.001, 3)):
    N = needed(r, m)
    assert half_radius(N, m) <= r < half_radius(N - 1, m)
assert 1e28 < needed(1e-6, 10) < 1e29


# %% mistake
def half_radius(N, m):
    """Ordered pairs, each of them counted twice."""
    return (log(2) / N**2) ** (1 / m) / 2


def needed(r, m):
    """The square root is forgotten."""
    return round(log(2) / (2 * r) ** m)


# %% question triplets, 3 points: More than twins
# Among the $v$ tokens of a vocabulary, $k \ge 2$ have equal embeddings, so that a model cannot tell them apart.
# Write `merged_pairs(v, T, k)`: the number of unordered pairs of different prompts of $T$ tokens that become equal when the $k$ tokens are merged.
# Count ordered pairs first, position by position; for $k = 2$ the book has the formula.


# %% solution
def merged_pairs(v, T, k):
    """Pairs of prompts that merge."""
    # BEGIN SOLUTION
    return ((v - k + k * k) ** T - v**T) // 2
    # END SOLUTION


# %% public 1
assert merged_pairs(4, 3, 2) == 76

# %% hidden 2
for v, T, k in ((3, 3, 3), (5, 2, 3), (4, 4, 4), (6, 3, 2)):
    merged = [
        tuple(max(token, k - 1) for token in s) for s in product(range(v), repeat=T)
    ]
    counted = sum(one == other for one, other in combinations(merged, 2))
    assert merged_pairs(v, T, k) == counted, (v, T, k)


# %% mistake
def merged_pairs(v, T, k):
    """The formula for twins."""
    return ((v + 2) ** T - v**T) // 2
