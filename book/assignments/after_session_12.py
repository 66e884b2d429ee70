"""Assignment 3: reading prompts back."""

# %% introduction
# # Assignment 3: reading prompts back
#
# After session 12: 20 points.
# Write your answers where the dots are, and run the cell below each of them: it shows the public tests, and prints `right` or the reason why not.
# Hidden tests come with the grading; they check the same statements on other inputs.
# No network is needed, and no other file.

# %% setup
from math import atan, exp

import sympy as sp
import torch
from sipit_lite import OneStepMap, load
from sipit_lite.teaching.exercises import attempt
from torch.linalg import vector_norm

model = load("pocket-gpt2", device="cpu")

# %% question read, 4 points: Read it back, or refuse
# Write `read(states, layer, epsilon)`: the list of token ids whose states at this layer are the rows of `states`, one position after the other.
# At each position it takes the token whose state after the prefix is nearest, and raises `ValueError` where that is farther away than `epsilon`.
#
# `OneStepMap.after(model, layer)` is the map before the first token, `step.tokens(model.vocabulary)` the states of all tokens, and `step.follow(ids)[1]` the map after further tokens.


# %% solution
def read(states, layer, epsilon):
    """Token ids, or ValueError at the first row that no token explains."""
    # BEGIN SOLUTION
    step = OneStepMap.after(model, layer)
    tokens = []
    for position, state in enumerate(states):
        distance = vector_norm(step.tokens(model.vocabulary) - state, dim=1)
        token = int(distance.argmin())
        if distance[token] > epsilon:
            raise ValueError(f"no token at position {position}")
        tokens.append(token)
        step = step.follow(torch.tensor([token]))[1]
    return tokens
    # END SOLUTION


# %% public 1
ids = model.encode("The key is")
assert read(model.states(ids, 2), 2, 0.01) == ids.tolist()

# %% hidden 1
ids = torch.tensor([3, 1999, 3, 3, 700])
assert read(model.states(ids, 1), 1, 0.01) == ids.tolist()

# %% hidden 2
ids = model.encode("The key is")
states = model.states(ids, 2)
states[1] += 1
try:
    back = read(states, 2, 0.01)
except ValueError:
    back = "refused"
assert back == "refused"


# %% mistake
def read(states, layer, epsilon):
    """Takes the nearest, however far."""
    step = OneStepMap.after(model, layer)
    tokens = []
    for state in states:
        distance = vector_norm(step.tokens(model.vocabulary) - state, dim=1)
        tokens.append(int(distance.argmin()))
        step = step.follow(torch.tensor(tokens[-1:]))[1]
    return tokens


# %% question tests, 3 points: A guess first
# A policy names one token first, which is the true one with probability $a$; the other $n - 1$ tokens follow in a uniformly random order.
# Give the expected number of tests at one position: `mean_tests(n, a)`, exact for sympy numbers.
# How large must $a$ be, for $n = 2048$, to bring it to 10?
# Give `accuracy` as a `sp.Rational`.


# %% solution
def mean_tests(n, a):
    """Expected number of tests until the true token is named."""
    # BEGIN SOLUTION
    return a + (1 - a) * sp.Rational(n + 2, 2)
    # END SOLUTION


accuracy = sp.Rational(1015, 1024)  # SOLUTION

# %% public 1
assert mean_tests(50, sp.Integer(1)) == 1
assert 0 < accuracy < 1

# %% hidden 1
for n in (2, 10, 2048):
    # A guess that is no better than chance changes nothing.
    assert mean_tests(n, sp.Rational(1, n)) == sp.Rational(n + 1, 2)
assert mean_tests(3, sp.Rational(1, 2)) == sp.Rational(7, 4)

# %% hidden 1
assert accuracy + (1 - accuracy) * 1025 == 10


# %% mistake
def mean_tests(n, a):
    """As if the first token came once more among the others."""
    return a + (1 - a) * sp.Rational(n + 1, 2)


accuracy = sp.Rational(99, 100)

# %% question verdict, 3 points: Accepted, and certified
# After some prefix each token has a state, a row of `table`; `observed` is a state with noise.
# Write `verdict(table, observed, epsilon)`, which gives two things:
#
# - the sorted list of all tokens within `epsilon` of the observed state;
# - whether the answer is certified: exactly one token is accepted, and its distance is below half of *its own* margin, the distance to the nearest other row.


# %% solution
def verdict(table, observed, epsilon):
    """Accepted tokens, and whether the one answer is certified."""
    # BEGIN SOLUTION
    distance = vector_norm(table - observed, dim=1)
    accepted = (distance <= epsilon).nonzero()[:, 0].tolist()
    if len(accepted) != 1:
        return accepted, False
    [token] = accepted
    apart = vector_norm(table - table[token], dim=1)
    apart[token] = torch.inf
    return accepted, bool(distance[token] < apart.min() / 2)
    # END SOLUTION


# %% public 1
table = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 8.0]])
assert verdict(table, torch.tensor([3.0, 0.0]), 3.0) == ([0, 1], False)
assert verdict(table, torch.tensor([3.0, 9.0]), 0.5) == ([], False)

# %% hidden 2
table = torch.tensor([[0.0, 0.0], [6.0, 0.0], [0.0, 8.0]])
assert verdict(table, torch.tensor([0.0, 4.5]), 3.5) == ([2], True)
assert verdict(table, torch.tensor([2.5, -2.0]), 3.5) == ([0], False)
table = OneStepMap.after(model, 3, model.encode("My secret")).tokens(model.vocabulary)
assert verdict(table, table[77] + 1e-4, 0.01) == ([77], True)


# %% mistake
def verdict(table, observed, epsilon):
    """Half the margin of the prefix, the smallest of all, in place of the token's own."""
    distance = vector_norm(table - observed, dim=1)
    accepted = (distance <= epsilon).nonzero()[:, 0].tolist()
    certified = len(accepted) == 1 and distance.min() < torch.pdist(table[:3]).min() / 2
    return accepted, bool(certified)


# %% question noise, 3 points: Noise in a random direction
# The state $F(v)$ is moved by $x u$, where $u$ is uniform on the unit sphere of $\mathbb{R}^d$, and the rivals of $v$ are at the distances $\delta_1, \delta_2, \dots$ from it.
# A coordinate $a$ of $u$ has $P(a \ge b) \le e^{-d b^2/2}$ for $b \ge 0$.
#
# Write `loss_bound(distances, d, x)`: the bound that follows for the probability that some rival is at least as close to the moved state as $F(v)$; at most 1.
# First find the $b$ of one rival: it wins if the noise reaches half the way.


# %% solution
def loss_bound(distances, d, x):
    """A bound of the probability that the token is lost."""
    # BEGIN SOLUTION
    return min(1, sum(exp(-d * (delta / (2 * x)) ** 2 / 2) for delta in distances))
    # END SOLUTION


# %% public 1
assert loss_bound([1.0, 2.0], 256, 1e-3) < 1e-9
assert loss_bound([1.0] * 50, 4, 100.0) == 1

# %% hidden 1
assert abs(loss_bound([1.0], 16, 2.0) - exp(-0.5)) < 1e-12
assert abs(loss_bound([3.0, 4.0], 8, 3.0) - exp(-1) - exp(-16 / 9)) < 1e-12

# %% hidden 1
generator = torch.Generator().manual_seed(0)
u = torch.randn(20_000, 3, generator=generator)
u = u / vector_norm(u, dim=1, keepdim=True)
rivals = torch.tensor([[2.0, 0.0, 0.0], [0.0, -3.0, 0.0]])
for x in (1.2, 2.0, 4.0):
    moved = x * u
    won = (
        vector_norm(moved[:, None] - rivals, dim=2)
        <= vector_norm(moved, dim=1)[:, None]
    )
    share = float(won.any(1).double().mean())
    assert share <= loss_bound([2.0, 3.0], 3, x) <= 1


# %% mistake
def loss_bound(distances, d, x):
    """The noise would have to reach the rival itself."""
    return min(1, sum(exp(-d * (delta / x) ** 2 / 2) for delta in distances))


# %% question shuffled, 4 points: A secret order of coordinates
# Before states are logged, a client puts their $d$ coordinates into a secret order, drawn anew for each prompt.
# The order hides nothing from somebody who has the model: numbers that are sorted do not depend on it.
#
# Write `read_shuffled(states, layer)`: the token ids of the prompt, from states whose columns were permuted by one unknown permutation.


# %% solution
def read_shuffled(states, layer):
    """Token ids, from states in an unknown order of coordinates."""
    # BEGIN SOLUTION
    step = OneStepMap.after(model, layer)
    tokens = []
    for state in states:
        table = step.tokens(model.vocabulary).sort(dim=1).values
        distance = vector_norm(table - state.sort().values, dim=1)
        tokens.append(int(distance.argmin()))
        step = step.follow(torch.tensor(tokens[-1:]))[1]
    return tokens
    # END SOLUTION


# %% public 1
ids = model.encode("A secret")
assert read_shuffled(model.states(ids, 3), 3) == ids.tolist()

# %% hidden 3
ids = model.encode("Known to nobody")
for seed, layer in ((0, 1), (1, 2)):
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(model.d_model, generator=generator)
    assert read_shuffled(model.states(ids, layer)[:, order], layer) == ids.tolist()


# %% mistake
def read_shuffled(states, layer):
    """As if the order were the usual one."""
    step = OneStepMap.after(model, layer)
    tokens = []
    for state in states:
        distance = vector_norm(step.tokens(model.vocabulary) - state, dim=1)
        tokens.append(int(distance.argmin()))
        step = step.follow(torch.tensor(tokens[-1:]))[1]
    return tokens


# %% question basin, 3 points: How far Newton can start
# For $F(e) = \arctan e$ and the observed state 0, the undamped Newton iteration is $e \mapsto e - (1 + e^2) \arctan e$.
# It converges exactly for $\lvert e \rvert < e_0$, where a start at $e_0$ jumps to $-e_0$ and back for ever.
#
# Give `newton(e)`, one step, and `edge`, the number $e_0$ to at least eight digits.


# %% solution
def newton(e):
    """One undamped step."""
    # BEGIN SOLUTION
    return e - (1 + e * e) * atan(e)
    # END SOLUTION


# BEGIN SOLUTION
low, high = 1.0, 2.0
for _ in range(60):
    middle = (low + high) / 2
    if abs(newton(middle)) < middle:
        low = middle
    else:
        high = middle
# END SOLUTION
edge = low  # SOLUTION

# %% public 1
assert abs(newton(1.0) - (1 - 2 * atan(1.0))) < 1e-12
assert 1.3 < edge < 1.5

# %% hidden 2
assert abs(newton(edge) + edge) < 1e-7
start = edge * 0.999
for _ in range(40):
    start = newton(start)
assert abs(start) < 1e-12


# %% mistake
def newton(e):
    """Right."""
    return e - (1 + e * e) * atan(e)


edge = 1.39  # by trial
