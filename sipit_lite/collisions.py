"""The collision detector: the closest pairs of N states among all N(N − 1)/2, certified, without N² distances.

A cheap float32 lower bound decides which pairs deserve an exact distance (chapter 6). States are projected onto their
leading principal axes, and the norm of what is left becomes one more coordinate: distances there never exceed
the true ones. The points are cut into the leaves of a k-d tree; leaves and points too far from a leaf's box are
skipped; of the pairs that remain, those whose lower bound, with everything that float32 can have lost given back,
exceeds the best found so far; all others are recomputed in float64. So no skipped pair is closer than those reported.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice, product

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int
from torch import Tensor
from tqdm import tqdm

from sipit_lite.model import LanguageModel, StatesError
from sipit_lite.onestep import EXACT, OneStepMap

COLLISION = 1e-6  # the paper's threshold on the ℓ2 distance
RTOL, ATOL = 1e-5, 1e-8  # the paper's practical collision: torch.allclose
AXES = 16  # principal axes of the lower bound: more prune better and cost more
LEAF = 1024  # rows of a leaf of the k-d tree
SAMPLE = 2048  # rows that the axes are taken from, and rows projected at once: they stay in cache
CHUNK = 2**22  # float64 numbers held at once while distances are recomputed: 32 MiB
COLUMNS = 8192  # columns of one matrix of lower bounds: with 1024 rows, 32 MiB
CROWDED = 256  # one candidate in so many pairs, and the whole width as a filter is cheaper than recomputing
U = 2.0**-24  # unit roundoff of float32
ETA = (
    2.0**-23
)  # 2u; a projected point is off by at most 3/4 of it, relatively: float32 rounding, and float64 before it
TOP = (
    2.0**40
)  # largest norm after scaling: squares stay far from float32's overflow and underflow


@dataclass(frozen=True, eq=False)
class CollisionReport:
    """The closest pairs of states, and what was done to be sure of them.

    ``pairs`` are indices i < j into the rows given, ``distances`` their float64 ℓ2 distances, sorted. ``compared``
    counts all pairs of distinct prompts, ``bounded`` those whose lower bound was computed, ``recomputed`` those whose
    distance was computed in float64; no other pair is closer than the last one reported.
    ``collisions`` counts pairs closer than 1e-6, ``practical`` pairs that are ``torch.allclose`` (rtol 1e-5,
    atol 1e-8, in float64) in either order. ``slack`` bounds what float32 can lose: the computed square of a distance
    ‖a − b‖ is lowered by ``slack`` · (‖a‖² + ‖b‖²), norms taken from the centre. ``rows`` are the rows compared;
    ``duplicates`` counts those left out because their prompt had occurred before; ``nearest`` holds the distance of
    each row in ``rows`` to its nearest neighbour, where asked for; ``sample`` distances of random pairs.
    """

    pairs: Int[Tensor, "k 2"]
    distances: Float64[Tensor, " k"]
    compared: int
    bounded: int
    recomputed: int
    collisions: int
    practical: int
    slack: float
    rows: Int[Tensor, " n"]
    duplicates: int
    nearest: Float64[Tensor, " n"] | None
    sample: Float64[Tensor, " m"]
    seconds: float

    @property
    def minimum(self) -> float:
        """The smallest distance of all."""
        return float(self.distances[0])


def closest_pairs(
    states: object,
    k: int = 10,
    *,
    prompts: Sequence[Tensor] | Tensor | None = None,
    nearest: bool = False,
    sample: int = 0,
    seed: int = 0,
    progress: bool = False,
) -> CollisionReport:
    """Find the k closest pairs among the rows of ``states``, shape (N, d_model), any floating-point format, any device.

    Exact and certified: equal to comparing all pairs in float64 (chapter 6). With ``prompts``, one for each row, a row
    whose prompt occurred before is left out and counted; equal states of different prompts are collisions.
    ``nearest`` adds the nearest neighbour of every row, ``sample`` the distances of so many random pairs.
    Raises ``StatesError`` for rows that are not finite (and says which), fewer than two rows, integers, a number
    of prompts that is not that of the rows, or a k that is not between 1 and the number of pairs.

    >>> report = closest_pairs(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.5]]), k=2)
    >>> report.pairs.tolist(), report.distances.tolist()
    ([[1, 2], [0, 1]], [0.5, 5.0])
    """
    begun = time.perf_counter()
    states = _check_rows(states)
    kept = (
        torch.arange(len(states))
        if prompts is None
        else _first_occurrences(prompts, len(states))
    )
    n, possible = len(kept), len(kept) * (len(kept) - 1) // 2
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= possible:
        raise StatesError(
            f"got k={k!r} and {n} rows of distinct prompts; expected 1 to {possible}, the number of pairs"
        )
    chosen = states if n == len(states) else states[kept.to(states.device)]
    with torch.no_grad(), _full_precision():
        groups = _Groups.of(chosen)
        search = groups.search(chosen, k, nearest)
        if search is not None:
            search.run(progress)
        pairs, distances = groups.closest(search, k)
    equal = groups.equal_pairs
    return CollisionReport(
        pairs=kept[pairs],
        distances=distances,
        compared=possible,
        bounded=search.bounded if search else 0,
        recomputed=search.recomputed if search else 0,
        collisions=equal + (search.collisions if search else 0),
        practical=equal + (search.practical if search else 0),
        slack=search.slack if search else 0.0,
        rows=kept,
        duplicates=len(states) - n,
        nearest=groups.nearest(search) if nearest else None,
        sample=_random_pairs(chosen, sample, seed),
        seconds=time.perf_counter() - begun,
    )


def continuations(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    layer: int,
    k: int = 1,
    *,
    progress: bool = False,
) -> Iterator[CollisionReport]:
    """For each prompt, the closest pairs among its |V| one-token continuations: the paper's exhaustive test (Fig. 4).

    Rows of each report are the tokens; all continuations of a prompt share one prefix cache. The last
    distance of a report with k = 1 is the separation margin Δ_{π,t} of the prompt as a prefix.
    Raises ``ModelError`` for a bad layer or prompt, ``StatesError`` for a bad k.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> [report.compared for report in continuations(model, [model.encode("hidden")], 1)] == [4096 * 4095 // 2]
    True
    """
    everything = torch.arange(model.vocab_size, device=model.device)
    for prompt in tqdm(prompts, "continuations", disable=None if progress else True):
        yield closest_pairs(
            OneStepMap.after(model, layer, prompt).tokens(everything), k
        )


@dataclass(frozen=True, eq=False)
class _Filter:
    """Points no farther apart than the states they stand for, and what float32 may lose on them."""

    points: Float32[Tensor, "n axes"]
    lowered: Float32[Tensor, " n"]  # (1 − slack) times the squared norms
    slack: float

    @classmethod
    def of(cls, points: Float32[Tensor, "n axes"]) -> "_Filter":
        slack = float32_slack(points.shape[1])
        squares = torch.cat(
            [rows.double().square().sum(1) for rows in points.split(COLUMNS)]
        )
        return cls(points, ((1 - slack) * squares).float(), slack)

    def bounds(
        self, a: Int[Tensor, " rows"], b: Int[Tensor, " cols"]
    ) -> Float32[Tensor, "rows cols"]:
        """Lower bounds of the squared distances between two sets of points, by one matrix product."""
        # The norms are added after the product: a sum that started from them (addmm may) could lose twice the slack.
        return (
            (self.points[a] * -2 @ self.points[b].T)
            .add_(self.lowered[b])
            .add_(self.lowered[a][:, None])
        )


def float32_slack(axes: int) -> float:
    """What ‖a‖² + ‖b‖² − 2a·b can lose in float32, relative to ‖a‖² + ‖b‖², for a, b of so many coordinates.

    The rounding of the product (Higham's γ for ``axes`` + 6 operations, its terms added in any order) and of the points
    themselves, for norms that were computed in float64 and are added after the product. Chapter 6 proves it.

    >>> float32_slack(33) < 1e-5
    True
    """
    return (axes + 6) * U / (1 - (axes + 6) * U) + 3 * ETA


class _Search:
    """One run of the detector over distinct rows; the pairs found so far are its state."""

    def __init__(
        self, x: Tensor, weights: Int[Tensor, " n"], k: int, nearest: bool
    ) -> None:
        self.x, self.k, self.n = x, k, len(x)
        self.centre, self.scale = _centre_and_scale(x)
        points = _project(x, self.centre, self.scale)
        self.leaves = _leaves(points, torch.arange(self.n, device=x.device))
        self.order = torch.cat(self.leaves)
        self.coarse = _Filter.of(points[self.order])
        self.weights = weights[self.order]
        # torch.allclose(a, b) implies ‖a − b‖ ≤ √d·atol + rtol·‖b‖: pairs that close must be looked at.
        norms = torch.linalg.vector_norm(
            x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32)
        )[self.order]
        self.floor = (
            x.shape[1] ** 0.5 * ATOL + RTOL * norms.double() * (1 + 2**-10)
        ).clamp_min_(COLLISION)
        self.pairs = torch.zeros(0, 2, dtype=torch.long, device=x.device)
        self.distances = torch.zeros(0, dtype=torch.float64, device=x.device)
        self.bounded = self.recomputed = self.collisions = self.practical = 0
        self._first_bounds(nearest)
        self._set_limits()

    @cached_property
    def full(self) -> _Filter:
        """The filter of the whole width, for blocks where the principal axes do not separate."""
        rows = (
            (self.x[part].double() - self.centre) * self.scale
            for part in self.order.split(COLUMNS)
        )
        return _Filter.of(torch.cat([row.float() for row in rows]))

    @property
    def slack(self) -> float:
        """The slack of the widest filter that was used."""
        return self.full.slack if "full" in self.__dict__ else self.coarse.slack

    def run(self, progress: bool) -> "_Search":
        """Look at every pair of leaves whose boxes are close enough; each leaf by itself first, for a good bound."""
        spans = list(
            torch.arange(self.n, device=self.x.device).split(
                [len(leaf) for leaf in self.leaves]
            )
        )
        for span in spans:
            self.filter = self.coarse
            self._visit(span, span)
        self.filter, boxes = self.coarse, _Boxes.of(self.coarse.points, spans)
        for i, span in enumerate(
            tqdm(spans, "closest pairs", disable=None if progress else True)
        ):
            close = boxes.close_boxes(i, self.limits * self.scale)
            if close:
                parts = torch.cat([spans[j] for j in close]).split(COLUMNS)
                inside = [
                    boxes.close_points(
                        i, self.coarse.points, part, self.limits * self.scale
                    )
                    for part in parts
                ]
                for columns in torch.cat(inside).split(COLUMNS):
                    self._visit(span, columns)
        return self

    def nearest(self) -> Float64[Tensor, " n"]:
        """Distance of every row to its nearest neighbour, in the order of the rows given."""
        return torch.empty_like(self.near).index_copy_(0, self.order, self.near)

    def _first_bounds(self, nearest: bool) -> None:
        # No two rows are farther apart than this; some neighbours in the order of the tree give a better bound.
        self.kth, self.near = 2 * TOP / self.scale * (1 + 2**-40), None
        rows = torch.arange(
            self.n - 1 if nearest else min(self.n - 1, max(self.k, COLUMNS)),
            device=self.x.device,
        )
        beside = self._exact(rows, rows + 1)
        if nearest:
            end = beside.new_full((1,), self.kth)
            self.near = torch.minimum(
                torch.cat([beside, end]), torch.cat([end, beside])
            )
        if len(beside) >= self.k:
            self.kth = float(beside.kthvalue(self.k).values) * (1 + 2**-40)

    def _set_limits(self) -> None:
        """Up to which distance a row's pairs matter; and the same squared and scaled, rounded upwards, finite."""
        limits = self.floor.clamp_min(self.kth)
        self.limits = limits if self.near is None else torch.maximum(limits, self.near)
        squares = (self.limits * self.scale).square() * (1 + 2**-20) + 2.0**-100
        self.thresholds = squares.clamp_max(4 * TOP**2).float()

    def _visit(self, a: Int[Tensor, " rows"], b: Int[Tensor, " cols"]) -> None:
        """Recompute all pairs of two sets of rows that the filters let through."""
        self.bounded += len(a) * len(b) if a is not b else len(a) * (len(a) - 1) // 2
        low = self._bounds(a, b)
        if low.numel() == 0 or low.min() > max(
            self.thresholds[a].max(), self.thresholds[b].max()
        ):
            return
        kept = self._kept(low, a, b)
        if (
            self.filter.points.shape[1] < self.x.shape[1]
            and int(kept.sum()) * CROWDED > low.numel()
        ):
            self.filter = self.full  # and stays it: where the axes do not separate one leaf, they seldom do the next
            low = self._bounds(a, b)
            kept = self._kept(low, a, b)
        values, (i, j) = low[kept], kept.nonzero(as_tuple=True)
        for part in values.argsort().split(max(1, CHUNK // self.x.shape[1])):
            rows, columns = a[i[part]], b[j[part]]
            still = values[part] <= torch.maximum(
                self.thresholds[rows], self.thresholds[columns]
            )
            self._recompute(rows[still], columns[still])

    def _bounds(self, a: Tensor, b: Tensor) -> Float32[Tensor, "rows cols"]:
        low = self.filter.bounds(a, b)
        if a is b:
            low.masked_fill_(torch.ones_like(low, dtype=torch.bool).tril(), torch.inf)
        return low

    def _kept(
        self, low: Float32[Tensor, "rows cols"], a: Tensor, b: Tensor
    ) -> Bool[Tensor, "rows cols"]:
        if (
            self.near is not None
        ):  # the best-looking partner of each row first: it lowers the row's own limit
            self._recompute_near(a, b[low.argmin(1)], low.amin(1))
            self._recompute_near(b, a[low.argmin(0)], low.amin(0))
            self._set_limits()
        return low <= torch.maximum(
            self.thresholds[a][:, None], self.thresholds[b][None]
        )

    def _recompute_near(
        self, rows: Tensor, partners: Tensor, low: Float32[Tensor, " rows"]
    ) -> None:
        worth = low <= self.thresholds[rows]
        rows, partners = rows[worth], partners[worth]
        found = self._exact(rows, partners)
        self.recomputed += len(found)
        self._lower_near(rows, partners, found)

    def _lower_near(self, i: Tensor, j: Tensor, found: Float64[Tensor, " m"]) -> None:
        self.near.scatter_reduce_(0, i, found, "amin").scatter_reduce_(
            0, j, found, "amin"
        )

    def _exact(
        self, i: Int[Tensor, " m"], j: Int[Tensor, " m"]
    ) -> Float64[Tensor, " m"]:
        """Float64 distances between rows in the order of the tree."""
        step = max(1, CHUNK // self.x.shape[1])
        parts = zip(self.order[i].split(step), self.order[j].split(step), strict=True)
        found = [
            torch.linalg.vector_norm(self.x[a].double() - self.x[b].double(), dim=1)
            for a, b in parts
        ]
        return torch.cat(found)

    def _recompute(self, i: Int[Tensor, " m"], j: Int[Tensor, " m"]) -> None:
        if len(i) == 0:
            return
        found = self._exact(i, j)
        self.recomputed += len(found)
        if self.near is not None:
            self._lower_near(i, j, found)
        self._count(i, j, found)
        closer = found <= self.kth
        rows = (
            torch.stack([self.order[i[closer]], self.order[j[closer]]], 1)
            .sort(1)
            .values
        )
        self.pairs, self.distances = (
            torch.cat([self.pairs, rows]),
            torch.cat([self.distances, found[closer]]),
        )
        best = self.distances.argsort(stable=True)[: self.k]
        self.pairs, self.distances = self.pairs[best], self.distances[best]
        if len(best) == self.k:
            self.kth = min(self.kth, float(self.distances[-1]))
        self._set_limits()

    def _count(self, i: Tensor, j: Tensor, found: Float64[Tensor, " m"]) -> None:
        weights = self.weights[i] * self.weights[j]
        self.collisions += int(weights[found < COLLISION].sum())
        near = found <= torch.maximum(self.floor[i], self.floor[j])
        a, b = (
            self.x[self.order[i[near]]].double(),
            self.x[self.order[j[near]]].double(),
        )
        gap = (a - b).abs()
        close = (gap <= ATOL + RTOL * b.abs()).all(1) | (
            gap <= ATOL + RTOL * a.abs()
        ).all(1)
        self.practical += int(weights[near][close].sum())


@dataclass(frozen=True, eq=False)
class _Boxes:
    """The boxes of the leaves: what lies in a box is at least as far away as the box."""

    low: Float64[Tensor, "leaves axes"]
    high: Float64[Tensor, "leaves axes"]
    norm: Float64[
        Tensor, " leaves"
    ]  # largest norm inside, for what float32 may have lost
    leaf: Int[Tensor, " n"]

    @classmethod
    def of(cls, points: Float32[Tensor, "n axes"], spans: list[Tensor]) -> "_Boxes":
        low = torch.stack([points[span].amin(0) for span in spans]).double()
        high = torch.stack([points[span].amax(0) for span in spans]).double()
        sizes = torch.tensor([len(span) for span in spans], device=points.device)
        norm = torch.linalg.vector_norm(torch.maximum(low.abs(), high.abs()), dim=1)
        return cls(
            low,
            high,
            norm,
            torch.arange(len(spans), device=points.device).repeat_interleave(sizes),
        )

    def close_boxes(self, i: int, limits: Float64[Tensor, " n"]) -> list[int]:
        """Later boxes that may hold a partner within the limit of either row, the nearest box first."""
        limit = torch.zeros_like(self.norm).scatter_reduce_(
            0, self.leaf, limits, "amax"
        )
        apart = (self.low - self.high[i]).clamp_min(0) + (
            self.low[i] - self.high
        ).clamp_min(0)
        gap = torch.linalg.vector_norm(apart, dim=1)
        later = (
            gap <= self._reach(torch.maximum(limit, limit[i]), self.norm + self.norm[i])
        )[i + 1 :].nonzero()[:, 0]
        return (later[gap[i + 1 :][later].argsort()] + i + 1).tolist()

    def close_points(
        self,
        i: int,
        points: Float32[Tensor, "n axes"],
        rows: Int[Tensor, " rows"],
        limits: Float64[Tensor, " n"],
    ) -> Int[Tensor, " some"]:
        """Those of the rows whose distance to box i is within the limit of either side."""
        some = points[rows]
        outside = some - torch.clamp(some, self.low[i].float(), self.high[i].float())
        limit = torch.maximum(limits[rows], limits[self.leaf == i].max())
        norms = self.norm[self.leaf[rows]] + self.norm[i]
        return rows[
            torch.linalg.vector_norm(outside, dim=1) <= self._reach(limit, norms)
        ]

    def _reach(
        self, limit: Float64[Tensor, " m"], norms: Float64[Tensor, " m"]
    ) -> Float64[Tensor, " m"]:
        # The points are off by η of their norms, their differences by a few units in the last place.
        return limit * (1 + 2**-16) + 2 * ETA * norms + 2.0**-50


def _centre_and_scale(x: Tensor) -> tuple[Float64[Tensor, " d_model"], float]:
    """Any centre is valid, so that of a sample will do; the scale keeps the norms of all rows below ``TOP``."""
    centre = _sample(x).mean(0)
    widest = torch.maximum(x.amax(0).double() - centre, centre - x.amin(0).double())
    largest = float(torch.linalg.vector_norm(widest))
    return centre, TOP / largest if largest > 0 else 1.0


def _sample(x: Tensor) -> Float64[Tensor, "some d_model"]:
    spread = torch.linspace(
        0, len(x) - 1, min(len(x), SAMPLE), device=x.device, dtype=torch.float64
    ).long()
    return x[spread].double()


def _project(
    x: Tensor, centre: Float64[Tensor, " d_model"], scale: float
) -> Float32[Tensor, "n axes"]:
    """The leading principal axes of a sample of rows, and the norm of the rest as one more coordinate."""
    if x.shape[1] <= AXES + 1:
        return torch.cat(
            [((rows.double() - centre) * scale).float() for rows in x.split(SAMPLE)]
        )
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(
            0
        )  # any axes are valid, so the draw decides about speed alone
        axes = torch.linalg.qr(
            torch.svd_lowrank((_sample(x) - centre) * scale, AXES)[2]
        ).Q
    found = []
    for rows in x.split(SAMPLE):
        centred = (rows.double() - centre) * scale
        projected = centred @ axes
        rest = torch.linalg.vector_norm(
            centred - projected @ axes.T, dim=1, keepdim=True
        )
        found.append(torch.cat([projected, rest], 1).float())
    return torch.cat(found)


def _leaves(
    points: Float32[Tensor, "n axes"], rows: Int[Tensor, " rows"]
) -> list[Tensor]:
    """Split rows in halves along their widest axis, until a part has at most ``LEAF`` rows."""
    inside = points[rows]
    along = inside[:, (inside.amax(0) - inside.amin(0)).argmax()].argsort()
    if len(rows) <= LEAF:
        return [rows[along]]
    half = len(rows) // 2
    return _leaves(points, rows[along[:half]]) + _leaves(points, rows[along[half:]])


@dataclass(frozen=True, eq=False)
class _Groups:
    """Rows that are equal number for number: they collide without a search, and the first of each takes part in it."""

    twin: Int[Tensor, " n"]  # the first row that is equal to a row
    first: Int[Tensor, " groups"]
    sizes: Int[Tensor, " groups"]

    @classmethod
    def of(cls, x: Tensor) -> "_Groups":
        twin = torch.arange(len(x), device=x.device)
        # Rows that differ in a few coordinates need no closer look: only those that agree there are compared whole.
        group, counts = _hash(x[:, :: max(1, x.shape[1] // 16)]).unique(
            return_inverse=True, return_counts=True
        )[1:]
        suspects = (counts[group] > 1).nonzero()[:, 0]
        if len(suspects):
            group = torch.unique(x[suspects], dim=0, return_inverse=True)[1]
            twin[suspects] = torch.full_like(suspects, len(x)).scatter_reduce_(
                0, group, suspects, "amin"
            )[group]
        return cls(twin, *twin.unique(return_counts=True))

    @property
    def equal_pairs(self) -> int:
        """Number of pairs of equal rows."""
        return int((self.sizes * (self.sizes - 1) // 2).sum())

    def search(self, x: Tensor, k: int, nearest: bool) -> "_Search | None":
        """The search over the first row of each group, where there is more than one group."""
        n = len(self.first)
        distinct = x if n == len(x) else x[self.first]
        return (
            _Search(distinct, self.sizes, min(k, n * (n - 1) // 2), nearest)
            if n > 1
            else None
        )

    def closest(
        self, search: "_Search | None", k: int
    ) -> tuple[Int[Tensor, "k 2"], Float64[Tensor, " k"]]:
        """The k closest pairs of rows: equal ones first, then what the search found, for all rows of its groups."""
        several = self.first[self.sizes > 1].tolist()
        equal = (
            pair for row in several for pair in combinations(self._members(row), 2)
        )
        found = [(0.0, *pair) for pair in islice(equal, k)]
        if search is not None and len(found) < k:
            for distance, pair in zip(
                search.distances.tolist(),
                self.first[search.pairs].tolist(),
                strict=True,
            ):
                rows = islice(product(*map(self._members, pair)), k)
                found += [(distance, *sorted(row)) for row in rows]
        found = sorted(found)[:k]
        return torch.tensor([pair for _, *pair in found]), torch.tensor(
            [d for d, *_ in found], dtype=torch.float64
        )

    def nearest(self, search: "_Search | None") -> Float64[Tensor, " n"]:
        """Distance of every row to its nearest neighbour: zero for a row that has an equal one."""
        found = torch.zeros(
            len(self.first), dtype=torch.float64, device=self.twin.device
        )
        if search is not None:
            found = search.nearest().where(self.sizes == 1, 0.0)
        return found[torch.searchsorted(self.first, self.twin)].cpu()

    def _members(self, row: int) -> list[int]:
        return (self.twin == row).nonzero()[:, 0].tolist()


def _hash(x: Tensor) -> Int[Tensor, " n"]:
    """One integer for each row, the same for equal rows (so −0 counts as 0)."""
    odd = (
        torch.randint(2**62, (x.shape[1],), generator=torch.Generator().manual_seed(0))
        * 2
        + 1
    )
    bits = (rows.double().add(0.0).view(torch.int64) for rows in x.split(COLUMNS))
    return torch.cat([(rows * odd.to(x.device)).sum(1) for rows in bits])


def _check_rows(states: object) -> Float[Tensor, "n d_model"]:
    if (
        not isinstance(states, Tensor)
        or not states.is_floating_point()
        or states.ndim != 2
    ):
        got = (
            f"{states.dtype} of shape {tuple(states.shape)}"
            if isinstance(states, Tensor)
            else type(states).__name__
        )
        raise StatesError(
            f"got {got}; expected a floating-point tensor of shape (N, d_model)"
        )
    if len(states) < 2 or states.shape[1] == 0:
        raise StatesError(
            f"got states of shape {tuple(states.shape)}; pairs need at least 2 rows of at least 1 number"
        )
    bad = (
        torch.cat([~rows.isfinite().all(1) for rows in states.split(COLUMNS)])
        .nonzero()[:, 0]
        .tolist()
    )
    if bad:
        named = f"{', '.join(map(str, bad[:10]))}{', …' if len(bad) > 10 else ''}"
        raise StatesError(
            f"got NaN or Inf in {len(bad)} of {len(states)} rows ({named}); expected finite states"
        )
    if states.dtype == torch.float64 and float(states.abs().max()) > 1e150:
        raise StatesError(
            f"got numbers up to {float(states.abs().max()):.1e}; their squares overflow above 1e150"
        )
    return states


def _first_occurrences(
    prompts: Sequence[Tensor] | Tensor, rows: int
) -> Int[Tensor, " n"]:
    """Rows whose prompt has not occurred before."""
    if len(prompts) != rows:
        raise StatesError(
            f"got {len(prompts)} prompts for {rows} rows of states; expected one prompt for each row"
        )
    first: dict[tuple[int, ...], int] = {}
    for row, prompt in enumerate(prompts):
        first.setdefault(tuple(prompt.tolist()), row)
    return torch.tensor(list(first.values()))


def _random_pairs(x: Tensor, count: int, seed: int) -> Float64[Tensor, " m"]:
    """Distances of pairs of different rows drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    i = torch.randint(len(x), (count,), generator=generator)
    j = (i + torch.randint(1, len(x), (count,), generator=generator)) % len(x)
    parts = zip(i.split(COLUMNS), j.split(COLUMNS), strict=True)
    found = [
        torch.linalg.vector_norm(x[a].double() - x[b].double(), dim=1).cpu()
        for a, b in parts
    ]
    return torch.cat(found)


@contextmanager
def _full_precision() -> Iterator[None]:
    # The certificate is about float32 products: TF32 or bfloat16 inside them would break it.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True, eq=False)
class Margins:
    """The margins of one prompt at one layer, one entry a position, float64 on the CPU.

    ``prefix`` is Δ_{π,t}, the smallest distance between the states of any two tokens after the prefix π; ``token`` the
    distance from the prompt's own token to the nearest other one, the ``rival``, which is never smaller. Noise below
    Δ_{π,t}/2 harms no token (Theorem 3.2), noise below ``token``/2 does not harm this one.
    """

    prefix: Float64[Tensor, " pos"]
    token: Float64[Tensor, " pos"]
    rival: Int[Tensor, " pos"]


def margins(
    model: LanguageModel,
    ids: Int[Tensor, " pos"],
    layer: int,
    *,
    progress: bool = False,
) -> Margins:
    """Scan the vocabulary after every prefix of a prompt: T·|V| one-token steps, and all pairs of their states.

    Raises ``ModelError`` for a layer outside 0..L or ids that are no prompt.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> found = margins(model, model.encode("hidden states"), 3)
    >>> bool((found.token >= found.prefix).all() and (found.prefix > 0).all())
    True
    """
    model.check_ids(ids)
    step, rows = OneStepMap.after(model, layer), []
    for token in tqdm(ids.tolist(), "margins", disable=None if progress else True):
        states = step.tokens(torch.arange(model.vocab_size, device=model.device))
        apart = torch.cdist(
            states[token, None].double(), states.double(), compute_mode=EXACT
        )[0]
        apart[token] = torch.inf
        rows.append(
            (closest_pairs(states, 1).minimum, float(apart.min()), int(apart.argmin()))
        )
        step = step.extend(token) if len(rows) < len(ids) else step
    prefix, own, rival = zip(*rows, strict=True)
    return Margins(
        torch.tensor(prefix, dtype=torch.float64),
        torch.tensor(own, dtype=torch.float64),
        torch.tensor(rival),
    )
