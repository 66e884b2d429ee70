"""The collision detector: the closest of all N(N − 1)/2 pairs of states, certified.

Each state becomes a point of few coordinates, its principal components and the norm of
what is left: never farther apart than the states (chapter 6). Skipped is a point too
distant from the box of a leaf of a k-d tree, or a pair whose distance as points, less
what float32 or tensor cores can have lost, exceeds the best. Others: in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, islice, product

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor
from torch.linalg import vector_norm
from tqdm import tqdm

from sipit_lite.bounds import Bounds, U
from sipit_lite.model import StatesError, plain_settings
from sipit_lite.onestep import fitting

COLLISION = 1e-6  # the paper's threshold on the ℓ2 distance
RTOL = 1e-5  # the paper's practical collision: torch.allclose
ATOL = 1e-8
FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AXES = 16  # principal axes of the points: more prune better and cost more
LEAF = 1024  # rows of a leaf
SAMPLE = 256  # rows the axes are taken from, and rows projected at once: fit a cache
CHUNK = 2**22  # float64 numbers held while distances are computed: 32 MiB
COLUMNS = 8192  # columns of a matrix of lower bounds: with 1024 rows, 32 MiB
CROWDED = 256  # with one candidate in so many pairs, bounds of full width are cheaper
TOP = 2.0**14  # largest norm of a point: neither overflows, and float32 no underflow
ROOM = {"cuda": 4}  # with tensor cores: leaves, columns and parts so much larger


@dataclass(frozen=True, eq=False)
class CollisionReport:
    """The closest pairs of states, and what was done to be sure of them.

    ``pairs`` are indices i < j into the rows given, ``distances`` sorted, ``minimum``
    the first; no other pair is closer. ``compared`` counts all pairs of distinct
    prompts, ``bounded`` those with a bound, lowered by ``slack`` · (‖a‖² + ‖b‖²) of
    norms from the centre, ``recomputed`` those let through, ``collisions`` those closer
    than 1e-6, ``practical`` those ``torch.allclose`` in either order. ``rows`` were
    compared; ``duplicates`` repeat a prompt; ``nearest``: how near the next row is.
    """

    pairs: Int[Tensor, "k 2"]
    distances: Float64[Tensor, " k"]
    minimum: float
    compared: int
    bounded: int
    recomputed: int
    collisions: int
    practical: int
    slack: float
    rows: Int[Tensor, " n"]
    duplicates: int
    nearest: Float64[Tensor, " n"] | None


@plain_settings()
@torch.no_grad()
def closest_pairs(
    states: object,
    k: int = 10,
    *,
    prompts: Sequence[Tensor] | Tensor | None = None,
    nearest: bool = False,
    within: float = torch.inf,
    progress: bool = False,
) -> CollisionReport:
    """Find the k closest pairs of rows: those of all pairs compared in float64.

    Parameters
    ----------
    states: (N, d_model), in float16, bfloat16, float32 or float64
    prompts: of each row; those that occurred before are left out and counted, while
        equal states of different ones are collisions
    nearest, within: the nearest of every row too; no pair farther apart is looked for

    Returns
    -------
    The ``CollisionReport``: pairs, distances, and what was compared (chapter 6)

    Raises
    ------
    StatesError: rows that are not finite (it says which), another format, shape or
        number of prompts, or a k that is not between 1 and the number of pairs

    >>> rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.5]])
    >>> report = closest_pairs(rows, k=2)
    >>> report.pairs.tolist(), report.distances.tolist()
    ([[1, 2], [0, 1]], [0.5, 5.0])
    """
    states = _checked(states)
    rows = torch.arange(len(states))
    if prompts is not None:
        if len(prompts) != len(states):
            got = f"got {len(prompts)} prompts for {len(states)} rows"
            raise StatesError(f"{got}; expected one for each row")
        places: dict[tuple[int, ...], int] = {}
        for place, prompt in enumerate(prompts):
            places.setdefault(tuple(prompt.tolist()), place)
        rows = torch.tensor(list(places.values()))
    possible = len(rows) * (len(rows) - 1) // 2
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= possible:
        got = f"got k={k!r} and {len(rows)} rows of distinct prompts"
        raise StatesError(f"{got}; expected 1 to {possible}, the number of pairs")
    x = states if len(rows) == len(states) else states[rows.to(states.device)]
    # Equal rows collide without a search: the first of each group stands for it.
    first, group, sizes = _groups(x)
    x = x if len(first) == len(x) else x[first]
    task = (x, sizes, k, nearest, within)
    room = ROOM.get(x.device.type, 1)
    search = fitting(lambda room: _Search(*task, room).run(progress), room)
    pairs, distances = _pairs_of_rows(search, group)
    equal = int((sizes * (sizes - 1) // 2).sum())
    return CollisionReport(
        pairs=rows[pairs],
        distances=distances,
        minimum=min(distances.tolist(), default=torch.inf),
        compared=possible,
        bounded=search.bounded,
        recomputed=search.recomputed,
        collisions=equal + search.collisions,
        practical=equal + search.practical,
        slack=max(bounds.slack for bounds in search.ladder),
        rows=rows,
        duplicates=len(states) - len(rows),
        nearest=search.near.where(sizes == 1, 0.0)[group].cpu() if nearest else None,
    )


class _Search:
    """One run of the detector over different rows; the best so far is its state."""

    def __init__(
        self, x: Tensor, sizes: Tensor, k: int, nearest: bool, within: float, room: int
    ) -> None:
        n, width = x.shape
        self.x = x
        self.sizes = sizes
        self.k = k
        self.wants_nearest = nearest
        self.room = room
        self.step = max(1, room * CHUNK // width)  # pairs whose differences are held
        self.bounded = self.recomputed = self.collisions = self.practical = 0
        # Any centre and any axes are valid, so those of a sample will do.
        places = torch.linspace(0, n - 1, min(n, SAMPLE), dtype=torch.float64).long()
        sample = x[places.to(x.device)].double()
        self.centre = sample.mean(0)
        widest = torch.stack([x.amax(0), x.amin(0)]).double() - self.centre
        # No norm exceeds TOP; and numbers like 1e-310 do not make the scale infinite.
        self.scale = TOP / max(float(widest.abs().max()) * width**0.5, TOP * 2.0**-1000)
        near_centre = self._scaled(sample)
        weights = torch.linalg.eigh(near_centre @ near_centre.T).eigenvectors
        # The leading principal axes of the sample, orthonormal columns.
        axes = torch.linalg.qr(near_centre.T @ weights[:, -AXES:]).Q
        points = []
        for rows in map(self._scaled, x.split(self.room * SAMPLE)):
            along = rows @ axes
            # The norm of what the axes miss is one more coordinate.
            rest = vector_norm(rows - along @ axes.T, dim=1, keepdim=True)
            points.append(torch.cat([along, rest], 1))
        self.coarse = self.bounds = Bounds(points, torch.float32)
        self.ladder = [self.coarse]  # bounds ever closer to the distances, and dearer
        # float16 has TF32's 11 bits at bfloat16's speed, and TOP keeps it in its range.
        fast = x.device.type in ROOM and not torch.version.hip
        fast = fast and not torch.backends.cuda.matmul.allow_fp16_accumulation
        self.formats = [torch.float16] * fast + [torch.float32]
        every = torch.arange(n, device=x.device)
        self.leaves = _leaves(self.coarse.points, every, room * LEAF)
        self.order = torch.cat(self.leaves)
        # |aᵢ − bᵢ| ≤ ATOL + RTOL·|bᵢ| for all i implies ‖a − b‖ ≤ √d·ATOL + RTOL·‖b‖:
        # pairs that close must be looked at, whatever the k-th best distance is.
        norms = vector_norm(x, dim=1, dtype=torch.float64)
        floor = width**0.5 * ATOL + RTOL * (1 + 2**-10) * norms
        self.floor = floor.clamp_min(COLLISION)
        self.pairs = self.order.new_zeros(0, 2)
        self.distances = self.floor.new_zeros(0)
        self.near = torch.full_like(self.floor, within if nearest else 0.0)
        # Neighbours in the tree are often close, which bounds the k-th best distance.
        count = n - 1 if nearest else min(n - 1, max(k, COLUMNS))
        beside = self._lower_near(self.order[:count], self.order[1 : count + 1])
        self.kth = min([within, *beside.sort().values[k - 1 : k].tolist()])

    def run(self, progress: bool) -> "_Search":
        """Visit every pair of rows that are close enough as points."""
        for leaf in self.leaves:  # each by itself first, which gives a good limit
            self.bounded += len(leaf) * (len(leaf) - 1) // 2
            self._visit(leaf, leaf)
            self.bounds = self.coarse
        stop = 0
        for leaf in tqdm(self.leaves, disable=None if progress else True):
            stop += len(leaf)
            close = self._close(leaf, self.order[stop:])
            for columns in close.split(self.room * COLUMNS):
                self.bounded += len(leaf) * len(columns)
                self._visit(leaf, columns)
        return self

    def _scaled(self, rows: Float[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
        return (rows.double() - self.centre) * self.scale

    def _limits(self, rows: Tensor) -> Float32[Tensor, " m"]:
        """Squares of the scaled distances up to which the pairs of each row matter."""
        limits = torch.maximum(self.floor[rows], self.near[rows]).clamp_min(self.kth)
        # Rounded upwards; finite, and above all bounds, which are 4 · TOP² at most.
        reach = (limits * self.scale + self.bounds.moved).square()
        return (reach * (1 + 2**-20) + 2.0**-100).clamp_max(8 * TOP**2).float()

    def _close(self, leaf: Tensor, later: Tensor) -> Int[Tensor, " cols"]:
        """Later rows whose points may be close enough to the leaf's box."""
        points = self.coarse.points
        norms = self.coarse.lowered.sqrt()
        low, high = torch.aminmax(points[leaf], dim=0)
        close = []
        for rows in later.split(self.room * COLUMNS):
            outside = points[rows] - points[rows].clamp(low, high)
            limits = torch.maximum(self._limits(rows), self._limits(leaf).max())
            # Rounding moved each point by 3u/2 of its norm at most.
            moved = 4 * U * (norms[rows] + norms[leaf].max())
            reach = limits.sqrt() * (1 + 2**-16) + moved
            close.append(rows[vector_norm(outside, dim=1) <= reach])
        return torch.cat(close)

    def _visit(self, a: Tensor, b: Tensor) -> None:
        """Compute the distances of all pairs that the lower bounds let through."""
        low = self.bounds.between(a, b)
        if a is b:  # each pair once, and no row with itself
            low.masked_fill_(torch.ones_like(low, dtype=torch.bool).tril(), torch.inf)
        limits = torch.cat([self._limits(a), self._limits(b)])
        if low.numel() == 0 or low.min() > limits.max():
            return
        if self.wants_nearest:
            # The best-looking partner of every row first: it lowers the row's limit.
            for bounds, rows, columns in ((low, a, b), (low.T, b, a)):
                place = bounds.argmin(1, keepdim=True)
                worth = bounds.gather(1, place)[:, 0] <= self._limits(rows)
                self._lower_near(rows[worth], columns[place[worth, 0]])
        close = low <= torch.maximum(self._limits(a)[:, None], self._limits(b))
        crowded = int(close.count_nonzero()) * CROWDED > low.numel()
        rung = self.ladder.index(self.bounds)
        if crowded and rung < len(self.formats):
            # For good: what does not separate one part seldom does the next.
            if rung + 1 == len(self.ladder):
                full = map(self._scaled, self.x.split(self.room * SAMPLE))
                self.ladder.append(Bounds(full, self.formats[rung]))
            self.bounds = self.ladder[rung + 1]
            return self._visit(a, b)
        i, j = close.nonzero(as_tuple=True)
        self._recompute(a[i], b[j], low[i, j])

    def _recompute(self, i: Tensor, j: Tensor, bounds: Float32[Tensor, " m"]) -> None:
        """Distances of candidate pairs, lowest bounds first; what they change."""
        for part in bounds.argsort().split(self.step):
            # The part before may have lowered the limits.
            limits = torch.maximum(self._limits(i[part]), self._limits(j[part]))
            part = part[bounds[part] <= limits]
            pairs = torch.stack([i[part], j[part]])
            distances = self._lower_near(*pairs)
            self.recomputed += len(part)
            # Collisions are counted for all rows that are equal to these.
            weights = self.sizes[pairs].prod(0)
            self.collisions += int(weights[distances < COLLISION].sum())
            maybe = distances <= self.floor[pairs].amax(0)
            a, b = self.x[pairs[:, maybe]].double()
            alike = torch.isclose(a, b, RTOL, ATOL).all(1)
            alike |= torch.isclose(b, a, RTOL, ATOL).all(1)
            self.practical += int(weights[maybe][alike].sum())
            apart, best = torch.cat([self.distances, distances]).sort(stable=True)
            self.distances = apart[: self.k]
            self.pairs = torch.cat([self.pairs, pairs.T])[best[: self.k]]
            if len(self.distances) == self.k:
                self.kth = min(self.kth, float(self.distances[-1]))

    def _lower_near(self, i: Tensor, j: Tensor) -> Float64[Tensor, " m"]:
        """Float64 distances of pairs, a part at a time; the rows' nearest with them."""
        parts = zip(i.split(self.step), j.split(self.step), strict=True)
        apart = (self.x[a].double() - self.x[b].double() for a, b in parts)
        distances = torch.cat([vector_norm(rows, dim=1) for rows in apart])
        self.near.scatter_reduce_(0, i, distances, "amin")
        self.near.scatter_reduce_(0, j, distances, "amin")
        return distances


def _leaves(points: Tensor, rows: Tensor, most: int) -> list[Tensor]:
    """Rows in halves along their widest axis, until a part has so many at most."""
    inside = points[rows]
    along = rows[inside[:, (inside.amax(0) - inside.amin(0)).argmax()].argsort()]
    if len(rows) <= most:
        return [along]
    half = len(rows) // 2
    return _leaves(points, along[:half], most) + _leaves(points, along[half:], most)


def _groups(x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of equal rows: the first of each, the group of each row, the sizes."""
    # One integer for each row, from the bits of sixteen of its numbers: only rows that
    # share it can be equal, and are compared in full. Adding zero turns −0 into 0.
    bits = (x[:, :: max(1, x.shape[1] // 16)] + 0.0).view(torch.int16)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (bits.shape[1],), generator=generator)
    keys = (bits * factors.to(x.device)).sum(1)
    _, key, counts = keys.unique(return_inverse=True, return_counts=True)
    suspects = (counts[key] > 1).nonzero()[:, 0]
    twin = torch.arange(len(x), device=x.device)  # the first row that equals a row
    if len(suspects):
        _, place = x[suspects].unique(dim=0, return_inverse=True)
        first = torch.full_like(suspects, len(x))
        twin[suspects] = first.scatter_reduce_(0, place, suspects, "amin")[place]
    return twin.unique(return_inverse=True, return_counts=True)


def _pairs_of_rows(search: _Search, group: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """The k closest pairs of rows, and their distances: of equal rows, then others."""
    several = (search.sizes > 1).nonzero()
    ends = torch.cat([several.expand(-1, 2), search.pairs]).tolist()
    distances = [0.0] * len(several) + search.distances.tolist()
    ranked = []
    for distance, (one, other) in list(zip(distances, ends, strict=True))[: search.k]:
        # Whatever equals one end is as far from the other.
        first = (group == one).nonzero()[:, 0].tolist()
        second = (group == other).nonzero()[:, 0].tolist()
        pairs = combinations(first, 2) if one == other else product(first, second)
        ranked += [(distance, *sorted(pair)) for pair in islice(pairs, search.k)]
    numbers = torch.tensor(sorted(ranked)[: search.k], dtype=torch.float64).view(-1, 3)
    return numbers[:, 1:].long(), numbers[:, 0]


def _checked(states: object) -> Float[Tensor, "n d_model"]:
    """The states, if pairs of them can be compared."""
    got = type(states).__name__
    if isinstance(states, Tensor):
        got = f"{states.dtype} of shape {tuple(states.shape)}"
    usable = isinstance(states, Tensor) and states.dtype in FORMATS and states.ndim == 2
    if not usable or len(states) < 2 or states.shape[1] == 0:
        expected = "a tensor of floats (float16 to float64) of shape (N, d_model)"
        rows = "at least 2 rows of at least 1 number"
        raise StatesError(f"got {got}; expected {expected}, {rows}")
    # Numbers whose squares overflow are as useless as NaN.
    sizes = torch.cat([part.detach().abs().amax(1) for part in states.split(COLUMNS)])
    bad = (~(sizes.double() < 1e150)).nonzero()[:, 0].tolist()
    if bad:
        named = ", ".join(map(str, bad[:10])) + ", …" * (len(bad) > 10)
        which = f"{len(bad)} of {len(states)} rows ({named}); expected finite states"
        raise StatesError(f"got NaN, Inf or squares that overflow in {which}")
    return states
