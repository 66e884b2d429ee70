"""The detector against a float64 comparison of all pairs, on clouds that are made to mislead it."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sipit_lite import (
    LanguageModel,
    StatesError,
    closest_pairs,
    collisions,
    continuations,
)
from sipit_lite.collisions import CollisionReport, float32_slack

CLOUDS = ["gaussian", "shifted", "clusters", "grid", "all but one equal", "huge axis", "anisotropic", "near ties",
          "tiny", "outlier"]  # fmt: skip


def cloud(kind: str, n: int, d: int, seed: int) -> Tensor:
    """States of one awkward kind, float32."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    if (
        kind == "shifted"
    ):  # norms so large that float32 products lose the small distances
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
    """Oracle: all distances in float64, one row of differences after the other."""
    x = x.double()
    return torch.stack([(row - x).square().sum(1).sqrt() for row in x])


def close_in_torch(x: Tensor) -> Tensor:
    """Oracle: which pairs torch.allclose accepts in either order, in float64."""
    x = x.double()
    pair = torch.stack(
        [torch.isclose(row[None], x, rtol=1e-5, atol=1e-8).all(1) for row in x]
    )
    return pair | pair.T


def agree(report: CollisionReport, x: Tensor) -> None:
    """Minimum, pairs, counts and nearest neighbours are those of the oracle."""
    every, above = (
        distances(x),
        torch.triu(torch.ones(len(x), len(x), dtype=torch.bool), 1),
    )
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
    max_examples=500,
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
    """Five hundred clouds; minimum and pairs are exact in all of them."""
    x = cloud(kind, n, d, seed)
    k = data.draw(st.integers(1, min(12, n * (n - 1) // 2)))
    agree(closest_pairs(x, k, nearest=nearest), x)


@pytest.mark.parametrize("kind", CLOUDS)
@pytest.mark.parametrize("nearest", [False, True])
def test_equal_to_float64_brute_force_at_full_size_leaves(
    kind: str, nearest: bool
) -> None:
    """The constants that are shipped, several leaves, a width beyond the principal axes."""
    x = cloud(kind, 1300, 96, 7)
    agree(closest_pairs(x, 20, nearest=nearest), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_formats(dtype: torch.dtype) -> None:
    """Distances are those of the numbers given, whatever their format."""
    x = cloud("gaussian", 300, 40, 3).to(dtype)
    agree(closest_pairs(x, 5, nearest=True), x)


def test_where_float32_lies() -> None:
    """Two states 10⁻³ apart at norm 80: the obvious float32 formula is far off, the detector is not."""
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
    """A caller who allows bfloat16 products gets the same certificate, and the setting back."""
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


def test_duplicate_prompts_are_left_out_and_counted() -> None:
    """The same prompt twice is no collision; two prompts with the same state are one."""
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


def test_random_pairs_are_distances_of_different_rows() -> None:
    """The sample is seeded, and every value is a distance of the cloud."""
    x = cloud("gaussian", 30, 8, 4)
    sample = closest_pairs(x, 1, sample=100, seed=5).sample
    every = distances(x)[torch.triu(torch.ones(30, 30, dtype=torch.bool), 1)]
    assert (
        len(sample) == 100
        and ((sample[:, None] - every[None]).abs().amin(1) < 1e-12).all()
    )
    assert torch.equal(sample, closest_pairs(x, 1, sample=100, seed=5).sample)


def test_most_pairs_are_never_compared_where_pruning_helps() -> None:
    """Rows along a line: nearly all blocks are skipped, and the answer is that of all pairs."""
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


def test_continuations_against_full_passes(family: tuple, prompt: Tensor) -> None:
    """Every one-token continuation of a prompt, without a cache, gives the same closest pair."""
    _, model = family
    (report,) = continuations(model, [prompt], model.n_layers)
    rows = torch.cat(
        [
            prompt.expand(model.vocab_size, -1),
            torch.arange(model.vocab_size, device=prompt.device)[:, None],
        ],
        1,
    )
    every = distances(model.states(rows, model.n_layers)[:, -1].cpu()).fill_diagonal_(
        torch.inf
    )
    assert report.minimum == pytest.approx(float(every.min()), rel=1e-3)
    assert float(every[tuple(report.pairs[0])]) == pytest.approx(
        report.minimum, rel=1e-3
    )


def test_continuations_give_the_margin(pocket: LanguageModel) -> None:
    """The closest pair of continuations is the separation margin of the prompt as a prefix."""
    prefix = pocket.encode("hidden")
    (report,) = continuations(pocket, [prefix], 3)
    assert report.minimum == pytest.approx(
        collisions.OneStepMap.after(pocket, 3, prefix).margin(), rel=1e-9
    )
