"""The detector against float64 on clouds made to mislead it; margins at their edge."""

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import margins
from torch import Tensor
from transformers import PreTrainedModel

from sipit_lite import (
    LanguageModel,
    NotVerified,
    OneStepMap,
    StatesError,
    closest_pairs,
    collisions,
    continuations,
    invert,
)
from sipit_lite.bounds import CUT, Bounds, float32_slack
from sipit_lite.collisions import CollisionReport
from sipit_lite.io.text import prompts

Family = tuple[PreTrainedModel, LanguageModel]
CLOUDS = [
    "gaussian", "shifted", "clusters", "grid", "all but one equal", "huge axis",
    "anisotropic", "near ties", "tiny", "outlier",
]  # fmt: skip


def cloud(kind: str, n: int, d: int, seed: int) -> Tensor:
    """States of one awkward kind, float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    if kind == "shifted":
        # Norms so large that float32 products lose the small distances.
        x += 1e4 * torch.randn(1, d, generator=generator)
    elif kind == "clusters":
        x[: n // 2] = x[0] + 1e-5 * torch.randn(n // 2, d, generator=generator)
    elif kind == "grid":  # many equal rows and many equal distances
        x = x.round()
    elif kind == "all but one equal":
        x = torch.ones(n, d)
        x[0] = 2.0
    elif kind == "huge axis":
        x[:, 0] *= 1e15
    elif kind == "anisotropic":
        x *= torch.logspace(-6, 3, d)
    elif kind == "near ties":
        x = torch.nn.functional.normalize(x, dim=1).mul(1e-3).add(100.0)
    elif kind == "tiny":
        x *= 1e-18
    elif kind == "outlier":
        x[-1] *= 1e12
    return x


def distances(x: Tensor) -> Tensor:
    """Oracle: all distances in float64, each from the differences of two rows."""
    x = x.double()
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")


def close_in_torch(x: Tensor) -> Tensor:
    """Oracle: which pairs torch.allclose accepts in either order, in float64."""
    x = x.double()
    near = {"rtol": 1e-5, "atol": 1e-8}
    # Column by column, since few pairs agree in the first.
    i, j = torch.isclose(x[:, None, 0], x[:, 0], **near).nonzero().T
    for column in x.T[1:]:
        agreed = torch.isclose(column[i], column[j], **near)
        i, j = i[agreed], j[agreed]
    pair = torch.zeros(len(x), len(x), dtype=torch.bool)
    pair[i, j] = True
    return pair | pair.T


def agree(report: CollisionReport, x: Tensor) -> None:
    """Minimum, pairs, counts and nearest neighbours are those of the oracle."""
    every = distances(x)
    above = torch.triu(torch.ones(len(x), len(x), dtype=torch.bool), 1)
    torch.testing.assert_close(
        report.distances,
        every[above].sort().values[: len(report.distances)],
        rtol=1e-12,
        atol=0,
    )
    i, j = report.pairs.T
    assert (i < j).all() and len(
        {tuple(pair) for pair in report.pairs.tolist()}
    ) == len(report.pairs)
    torch.testing.assert_close(every[i, j], report.distances, rtol=1e-12, atol=0)
    assert report.collisions == int((every[above] < 1e-6).sum())
    assert report.practical == int(close_in_torch(x)[above].sum())
    assert report.compared == int(above.sum())
    if report.nearest is not None:
        torch.testing.assert_close(
            report.nearest, every.fill_diagonal_(torch.inf).amin(1), rtol=1e-12, atol=0
        )


@pytest.fixture
def small_leaves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leaves, axes and columns small enough that a few dozen rows meet every branch."""
    for name, value in {
        "LEAF": 8,
        "AXES": 4,
        "COLUMNS": 32,
        "CHUNK": 128,
        "SAMPLE": 16,
    }.items():
        monkeypatch.setattr(collisions, name, value)
    yield


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(CLOUDS),
    st.integers(2, 90),
    st.integers(1, 24),
    st.integers(0, 10**6),
    st.booleans(),
    st.data(),
)
def test_equal_to_float64_brute_force(
    small_leaves: None,
    kind: str,
    n: int,
    d: int,
    seed: int,
    nearest: bool,
    data: st.DataObject,
) -> None:
    """A hundred clouds; minimum and pairs are exact in all of them."""
    x = cloud(kind, n, d, seed)
    k = data.draw(st.integers(1, min(12, n * (n - 1) // 2)))
    agree(closest_pairs(x, k, nearest=nearest), x)


@pytest.mark.parametrize("number", range(len(CLOUDS)))
def test_equal_to_float64_brute_force_at_full_size_leaves(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The constants that are shipped, several leaves, more columns than axes.

    And the filter of a GPU, emulated: its sizes, float16, the same certificate.
    """
    x = cloud(CLOUDS[number], 1040, 18, 7)
    # Neighbours of every other cloud: the test above has all combinations.
    nearest = number % 2 == 0
    expected = closest_pairs(x, 20, nearest=nearest)
    agree(expected, x)
    monkeypatch.setattr(collisions, "ROOM", {"cpu": 4})
    report = closest_pairs(x, 20, nearest=nearest)
    for name in ("distances", "compared", "collisions", "practical", "nearest"):
        values = (getattr(report, name), getattr(expected, name))
        if isinstance(values[0], Tensor):
            torch.testing.assert_close(*values, rtol=1e-12, atol=0)
        else:
            assert values[0] == values[1], name
    # Of pairs as far apart as the last one, those that are met first.
    certain = expected.distances < expected.distances[-1]
    rows = [set(map(tuple, r.pairs[certain].tolist())) for r in (report, expected)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_formats(dtype: torch.dtype) -> None:
    """Distances are those of the numbers given, whatever their format."""
    x = cloud("gaussian", 300, 40, 3).to(dtype)
    agree(closest_pairs(x, 5, nearest=True), x)


def test_where_float32_lies() -> None:
    """Two states 10⁻³ apart at norm 80: the obvious float32 formula is far off."""
    x = cloud("gaussian", 400, 256, 1) + 5.0
    x[17] = x[42] + 1e-3 / 16
    squares = x.square().sum(1)
    naive = (squares[17] + squares[42] - 2 * x[17] @ x[42]).clamp_min(0).sqrt()
    true = float(torch.linalg.vector_norm(x[17].double() - x[42].double()))
    report = closest_pairs(x, 1)
    assert abs(float(naive) - true) > 0.5 * true and report.minimum == pytest.approx(
        true, rel=1e-12
    )
    assert report.pairs.tolist() == [[17, 42]]


def test_products_are_in_full_precision_whatever_the_caller_set() -> None:
    """Who allows bfloat16 products gets the same certificate, and the setting back."""
    x = cloud("gaussian", 1200, 96, 5) + 3.0
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        agree(closest_pairs(x, 3), x)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@given(
    st.integers(1, 64),
    st.integers(0, 10**6),
    st.sampled_from([1e-3, 1.0, 1e3]),
    st.sampled_from([0.0, 1e-4, 1.0]),
)
@settings(deadline=None, derandomize=True)
def test_slack_covers_what_float32_loses(
    axes: int, seed: int, size: float, apart: float
) -> None:
    """The computed square never exceeds the true one by more than the stated slack."""
    generator = torch.Generator().manual_seed(seed)
    a = size * torch.randn(50, axes, generator=generator)
    b = a + apart * size * torch.randn(50, axes, generator=generator)
    s, t = (rows.double().square().sum(1).float() for rows in (a, b))
    computed = (a * -2 @ b.T + t + s[:, None]).double()
    a, b = a.double(), b.double()
    true = (a[:, None] - b[None]).square().sum(2)
    norms = a.square().sum(1)[:, None] + b.square().sum(1)[None]
    assert ((computed - true).abs() <= float32_slack(axes) * norms).all()


def rationals(x: Tensor) -> list[list[Fraction]]:
    """Oracle: the very numbers, as fractions."""
    return [[Fraction(number) for number in row] for row in x.double().tolist()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [*CLOUDS, "alternating"])
def test_bounds_in_16_bits_never_lie(kind: str, dtype: torch.dtype) -> None:
    """A pair r apart has a bound of (r + moved)² at most: in exact arithmetic."""
    x = cloud(kind, 12, 40, 3).double()  # not even centred
    if kind == "alternating":
        x = torch.ones(12, 40).double() * torch.tensor([3001.0, -3001.0]).repeat(20)
        x += torch.arange(12)[:, None] / 4
    x *= 2.0**14 / torch.linalg.vector_norm(x, dim=1).max()
    bounds = Bounds([x[:5], x[5:]], dtype)
    every = torch.arange(12)
    low = rationals(bounds.between(every, every))
    rows = rationals(x)
    moved = Fraction(bounds.moved)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            square = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
            # low ≤ (r + m)² = r² + 2rm + m², without a root of r².
            left = low[i][j] - square - moved**2
            assert left <= 0 or left**2 <= 4 * square * moved**2
    # Of a format as fine as the numbers nothing is moved.
    assert Bounds([x.to(dtype).double()], dtype).moved == 0


def aligned(addends: list[Fraction]) -> Fraction:
    """The sum of numbers cut towards zero, 24 bits from the first bit of the largest."""
    largest = max(map(abs, addends))
    exponent = np.frexp(float(largest))[1]  # largest < 2^exponent, in float64 exactly
    unit = Fraction(2) ** (int(exponent) - 24)
    return sum(int(number / unit) * unit for number in addends)


def tensor_core(a: list[Fraction], b: list[Fraction], step: int) -> Fraction:
    """Oracle: sums as tensor cores make them, aligned to the largest, cut to 24 bits.

    ``step`` products at a time, as measured on such hardware by Fasi et al. (2021).
    """
    total = Fraction(0)
    for first in range(0, len(a), step):
        part = zip(a[first : first + step], b[first : first + step], strict=True)
        addends = [total, *(p * q for p, q in part)]
        total = aligned(addends)
        total = aligned([total])
    return total


@pytest.mark.parametrize("step", [2, 4, 16])
def test_cut_covers_sums_that_are_cut(step: int) -> None:
    """Where small products are cut off, float32's slack lies and that of CUT holds."""
    x = torch.full((2, 128), 2.0**-11.5 * 0.998).half().double()
    x[:, 0] = 1.0  # beside which the squares of the others are below the last digit
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(6, 128, generator=generator).abs().half().double()
    lies = 0
    for rows in map(rationals, (x, drawn)):
        norms = [sum(p * p for p in row) for row in rows]
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                product = tensor_core(a, b, step)
                true = norms[i] + norms[j] - 2 * sum(map(Fraction.__mul__, a, b))
                above = norms[i] + norms[j] - 2 * product - true
                assert above <= Fraction(float32_slack(128, CUT)) * (
                    norms[i] + norms[j]
                )
                lies += above > Fraction(float32_slack(128)) * (norms[i] + norms[j])
    assert lies >= 4  # all pairs of the first two rows


def test_float16_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lets through as few pairs as float32; where it lets through all, it is left."""
    counts = {}
    for kind in ("gaussian", "shifted", "outlier"):
        x = cloud(kind, 600, 64, 2)
        plain = closest_pairs(x, 1)
        monkeypatch.setattr(collisions, "ROOM", {"cpu": 1})
        fast = closest_pairs(x, 1)
        monkeypatch.undo()
        assert torch.equal(fast.pairs, plain.pairs)
        assert fast.slack == float32_slack(64, CUT) > plain.slack == float32_slack(64)
        counts[kind] = fast.recomputed / plain.recomputed
    # One row far out sets the scale, and all others are moved by more than they differ.
    assert max(counts.values()) < 1.2


def test_out_of_memory_takes_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, the same answer; where even the usual sizes fail, the error."""
    x = cloud("gaussian", 3000, 24, 7)
    expected = closest_pairs(x, 5, nearest=True)
    honest = Bounds.between
    room = 1500**2

    def small(self: Bounds, a: Tensor, b: Tensor) -> Tensor:
        if len(a) * len(b) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return honest(self, a, b)

    monkeypatch.setattr(collisions, "ROOM", {"cpu": 4})
    monkeypatch.setattr(Bounds, "between", small)
    with pytest.warns(UserWarning, match="out of memory: fewer rows at a time"):
        report = closest_pairs(x, 5, nearest=True)
    for name in ("pairs", "distances", "nearest", "compared", "collisions"):
        assert_same = torch.testing.assert_close
        assert_same(getattr(report, name), getattr(expected, name), rtol=0, atol=0)
    room = 0
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError):
        closest_pairs(x, 5)


def test_duplicate_prompts_are_left_out_and_counted() -> None:
    """The same prompt twice is no collision; two prompts with one state are."""
    x = cloud("gaussian", 6, 8, 2)
    x[4], x[5] = x[0], x[1]
    prompts = [torch.tensor(ids) for ids in ([1], [2], [3], [4], [1], [9, 9])]
    report = closest_pairs(x, 2, prompts=prompts, nearest=True)
    assert (report.duplicates, report.collisions, report.compared) == (1, 1, 10)
    assert (
        report.rows.tolist() == [0, 1, 2, 3, 5]
        and report.pairs[0].tolist() == [1, 5]
        and report.minimum == 0
    )
    assert (
        report.nearest.tolist()[1]
        == report.nearest.tolist()[4]
        == 0
        < report.nearest.min(0).values + 1
    )
    kept = x[report.rows]
    torch.testing.assert_close(
        report.nearest, distances(kept).fill_diagonal_(torch.inf).amin(1)
    )


def test_minus_zero_equals_zero() -> None:
    """Two rows that differ in the sign of a zero alone are equal."""
    report = closest_pairs(torch.tensor([[0.0, 1.0], [-0.0, 1.0], [5.0, 5.0]]), 1)
    assert (report.minimum, report.collisions) == (0.0, 1)


def test_most_pairs_are_never_compared_where_pruning_helps() -> None:
    """Rows along a line: nearly all blocks are skipped, with the same answer."""
    x = torch.zeros(4000, 64)
    x[:, 0] = (
        torch.randperm(4000, generator=torch.Generator().manual_seed(0))
        .double()
        .sqrt()
        .float()
        * 100
    )
    report = closest_pairs(x, 1)
    assert (
        report.bounded < report.compared / 4
        and report.recomputed < report.compared / 500
    )
    assert report.minimum == pytest.approx(
        float(x[:, 0].double().sort().values.diff().min()), rel=1e-12
    )


@pytest.mark.parametrize(
    ("states", "options", "words"),
    [
        (torch.zeros(1, 4), {}, "at least 2 rows"),
        (torch.zeros(0, 4), {}, "at least 2 rows"),
        (torch.zeros(3, 0), {}, "at least 1 number"),
        (torch.zeros(3), {}, "shape (3,)"),
        (torch.zeros(3, 4, dtype=torch.long), {}, "torch.int64"),
        ([[1.0, 2.0]], {}, "list"),
        (np.zeros((3, 4), dtype=np.float32), {}, "got ndarray; expected a tensor"),
        (torch.zeros(3, 4).to(torch.float8_e4m3fn), {}, "torch.float8_e4m3fn"),
        (
            torch.tensor([[1.0], [float("nan")], [2.0], [float("inf")]]),
            {},
            "2 of 4 rows (1, 3)",
        ),
        (torch.full((3, 2), 1e200, dtype=torch.float64), {}, "overflow"),
        (torch.eye(3), {"k": 4}, "k=4 and 3 rows of distinct prompts; expected 1 to 3"),
        (torch.eye(3), {"k": 0}, "k=0"),
        (torch.eye(3), {"k": True}, "k=True"),
        (
            torch.eye(3),
            {"k": 1, "prompts": [torch.tensor([1])]},
            "1 prompts for 3 rows",
        ),
        (
            torch.eye(3),
            {"k": 1, "prompts": [torch.tensor([1])] * 3},
            "1 rows of distinct prompts",
        ),
    ],
)
def test_bad_input_is_refused_by_name(
    states: Tensor, options: dict, words: str
) -> None:
    """Each refusal quotes what came and what was expected."""
    with pytest.raises(StatesError) as refused:
        closest_pairs(states, **{"k": 1} | options)
    assert words in str(refused.value)


def test_repeated_prompts() -> None:
    """Their rows are left out; prompts of different lengths are different."""
    prompts = [torch.tensor(ids) for ids in ([1, 2], [1], [1, 2], [1, 2, 3], [1])]
    report = closest_pairs(cloud("gaussian", 5, 4, 0), 1, prompts=prompts)
    assert report.rows.tolist() == [0, 1, 3] and report.duplicates == 2


def test_nothing_of_the_caller_changes() -> None:
    """The global generator is left alone, also where axes and samples are drawn."""
    x = cloud("gaussian", 300, 64, 8)
    before = torch.random.get_rng_state()
    closest_pairs(x, 2, nearest=True)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("setting", ["inference", "autocast", "dtype", "device"])
def test_whatever_the_caller_has_set(setting: str) -> None:
    """Inference mode, autocast, default type and default device do not matter."""
    x = cloud("gaussian", 1200, 40, 9) + 3.0
    expected = closest_pairs(x, 3, nearest=True, prompts=torch.arange(1200)[:, None])
    prompts = torch.arange(1200)[:, None]
    modes = {
        "inference": torch.inference_mode(),
        "autocast": torch.autocast("cpu", dtype=torch.bfloat16),
        "device": torch.device("meta"),
    }
    if setting == "dtype":
        torch.set_default_dtype(torch.bfloat16)
        try:
            report = closest_pairs(x, 3, nearest=True, prompts=prompts)
        finally:
            torch.set_default_dtype(torch.float32)
    else:
        with modes[setting]:
            report = closest_pairs(x, 3, nearest=True, prompts=prompts)
    for name in ("pairs", "distances", "nearest", "rows"):
        assert torch.equal(getattr(report, name), getattr(expected, name)), name


def test_numbers_at_the_end_of_float64() -> None:
    """One column of denormal numbers: distances are right, and all pairs collide."""
    x = torch.tensor([[1.0], [4.0], [2.5]], dtype=torch.float64) * 1e-310
    report = closest_pairs(x, 3, nearest=True)
    assert report.distances.tolist() == pytest.approx([1.5e-310, 1.5e-310, 3e-310])
    assert (report.collisions, report.practical) == (3, 3)


def test_continuations_against_full_passes(family: Family, prompt: Tensor) -> None:
    """Every one-token continuation of a prompt, without a cache: the same pair."""
    model = family[1]
    (report,) = continuations(model, [prompt], model.n_layers)
    last = model.vocabulary[:, None]
    rows = torch.cat([prompt.expand(model.vocab_size, -1), last], 1)
    every = distances(model.states(rows, model.n_layers)[:, -1].cpu())
    every.fill_diagonal_(torch.inf)
    assert report.minimum == pytest.approx(float(every.min()), rel=1e-3)
    pair = tuple(report.pairs[0])
    assert float(every[pair]) == pytest.approx(report.minimum, rel=1e-3)


def test_margins_equal_to_all_pairs(family: Family, prompt: Tensor) -> None:
    """Every token through all layers after every prefix; all pairs in float64."""
    model = family[1]
    scanned = margins(model, prompt[:3], 2)
    for t in range(3):
        start = prompt[:t].expand(model.vocab_size, -1)
        rows = torch.cat([start, model.vocabulary[:, None]], 1)
        apart = distances(model.states(rows, 2)[:, -1].cpu())
        apart.fill_diagonal_(torch.inf)
        token = apart[prompt[t]]
        assert float(scanned.prefix[t]) == pytest.approx(float(apart.min()), rel=1e-3)
        assert float(scanned.token[t]) == pytest.approx(float(token.min()), rel=1e-3)
        assert int(scanned.rival[t]) == int(token.argmin())


def test_one_margin_whoever_computes_it(pocket: LanguageModel) -> None:
    """By definition, as the closest continuations, in a scan and in a certificate."""
    ids = pocket.encode("hidden")
    states = pocket.states(ids, 2)
    step = OneStepMap.after(pocket, 2, ids[:-1])
    brute = float(torch.pdist(step.tokens(pocket.vocabulary).double()).min())
    (report,) = continuations(pocket, [ids[:-1]], 2)
    assert report.minimum == pytest.approx(brute, rel=1e-9)
    scanned = margins(pocket, ids, 2)
    assert float(scanned.prefix[-1]) == pytest.approx(brute, rel=1e-5)
    recovery = invert(states, pocket, 2, certify=True)
    # A certificate speaks of the accepted token alone.
    assert torch.allclose(recovery.margin.double(), scanned.token.cpu().double())
    assert recovery.certified
    headroom = recovery.margin / 2 - recovery.distance
    assert torch.allclose(recovery.headroom, headroom)
    plain = invert(states, pocket, 2)
    assert plain.margin.isnan().all() and not plain.certified


def test_half_the_margin_is_the_edge(pocket: LanguageModel) -> None:
    """Noise towards the rival: at 0.49 of the margin recovered, at 0.51 the rival."""
    layer = 1
    ids = next(prompts(pocket.tokenizer, "prose", 2, seed=1)).to(pocket.device)
    states = pocket.states(ids, layer).double()
    scanned = margins(pocket, ids, layer)
    tables = []
    for t in range(len(ids)):
        step = OneStepMap.after(pocket, layer, ids[:t])
        tables.append(step.tokens(pocket.vocabulary).double())
    rivals = torch.stack([tables[t][v] for t, v in enumerate(scanned.rival)])
    moved = {}
    for share, nearest in ((0.49, ids.cpu()), (0.51, scanned.rival)):
        moved[share] = (states + share * (rivals - states)).float()
        for t, table in enumerate(tables):
            apart = torch.linalg.vector_norm(table - moved[share][t], dim=1)
            assert int(apart.argmin()) == int(nearest[t])
    epsilon = 0.495 * scanned.token
    recovery = invert(moved[0.49], pocket, layer, epsilon=epsilon)
    assert torch.equal(recovery.tokens, ids.cpu())
    with pytest.raises(NotVerified):
        invert(moved[0.51], pocket, layer, epsilon=epsilon)


@pytest.mark.parametrize("kind", CLOUDS)
def test_within_a_distance(kind: str) -> None:
    """Neighbours within it are those of all pairs; other rows have no nearer one."""
    x = cloud(kind, 300, 24, 5)
    exact = distances(x).fill_diagonal_(torch.inf).amin(1)
    within = float(exact.quantile(0.3))
    report = closest_pairs(x, 1, nearest=True, within=within)
    expected = exact.clamp(max=within)
    torch.testing.assert_close(report.nearest, expected, rtol=1e-9, atol=1e-12)
    # Nothing is as near as this: no row has a neighbour, and that is no error.
    nothing = closest_pairs(x, 1, nearest=True, within=float(exact.min()) / 2)
    assert (nothing.nearest >= float(exact.min()) / 2).all()
