"""Null models and cloud shapes against simulation and closed forms."""

import math

import pytest
import torch

from sipit_lite import StatesError
from sipit_lite.experiments.null_models import (
    anisotropy,
    birthday_count,
    birthday_minimum,
    gaussian_minimum,
    intrinsic_dimension,
)


@pytest.mark.parametrize(("dimension", "n"), [(1, 60), (2, 200), (7, 300)])
def test_birthday_minimum_against_simulation(dimension: int, n: int) -> None:
    """Half of the simulated clouds have a minimum below the median of the formula."""
    generator = torch.Generator().manual_seed(dimension)
    smallest = []
    for _ in range(400):
        x = torch.randn(n, dimension + 1, dtype=torch.float64, generator=generator)
        smallest.append(float(torch.pdist(3 * torch.nn.functional.normalize(x)).min()))
    median = birthday_minimum(n, dimension, 3.0)
    below = sum(value < median for value in smallest) / 400
    assert abs(below - 0.5) < 4 * 0.5 / 20, "four standard errors of a share of 400"


def test_birthday_minimum_grows_with_dimension_and_shrinks_with_n() -> None:
    """More room, farther apart; more points, closer."""
    assert birthday_minimum(1000, 5) < birthday_minimum(1000, 20) < math.sqrt(2)
    assert birthday_minimum(10**6, 20) < birthday_minimum(1000, 20)


@pytest.mark.parametrize("dimension", [1.0, 2.5, 9.0])
@pytest.mark.parametrize("n", [50, 10_000])
def test_birthday_count_is_the_inverse_of_the_minimum(n: int, dimension: float) -> None:
    """There and back."""
    minimum = birthday_minimum(n, dimension, 3.0)
    assert birthday_count(minimum, dimension, 3.0) == pytest.approx(n, rel=1e-6)


def test_birthday_count_on_a_circle_in_closed_form() -> None:
    """On a circle two points are within an angle φ with probability φ/π."""
    share = 2 * math.asin(0.5e-6) / math.pi
    wanted = (1 + math.sqrt(1 + 8 * math.log(2) / share)) / 2
    assert birthday_count(1e-6, 1.0) == pytest.approx(wanted)


def test_birthday_minimum_on_the_sphere_in_closed_form() -> None:
    """The cap is a disc whose radius is the chord (Archimedes)."""
    for n in (3, 1000, 10**9):
        wanted = 2 * 5 * math.sqrt(2 * math.log(2) / (n * (n - 1)))
        assert birthday_minimum(n, 2, 5) == pytest.approx(wanted, rel=1e-12)


def test_gaussian_minimum_has_the_covariance_of_the_states() -> None:
    """Seeded, and equal in size to the minimum of a cloud that was drawn that way."""
    x = torch.randn(3000, 6, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([9.0, 5, 3, 2, 1, 0.5]) + 70
    drawn = [gaussian_minimum(x, seed) for seed in range(5)]
    assert drawn[0] == gaussian_minimum(x, 0) != drawn[1]
    assert min(drawn) / 2 < float(torch.pdist(x.double()).min()) < 2 * max(drawn)


@pytest.mark.parametrize("dimension", [1, 2, 5, 10])
def test_intrinsic_dimension_of_a_flat_cloud_that_was_turned(dimension: int) -> None:
    """A cloud of known dimension inside forty others."""
    generator = torch.Generator().manual_seed(dimension)
    drawn = torch.randn(40, 40, dtype=torch.float64, generator=generator)
    turn = torch.linalg.qr(drawn).Q
    flat = torch.randn(3000, dimension, dtype=torch.float64, generator=generator)
    # TwoNN is biased downwards by a few per cent.
    dimensions = intrinsic_dimension(flat @ turn[:dimension])
    assert dimensions == pytest.approx(dimension, rel=0.12)


def test_anisotropy_between_round_and_flat() -> None:
    """The share of the leading axis, from a known covariance."""
    x = torch.tensor([[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]])
    assert anisotropy(x) == pytest.approx(18 / 20)
    assert anisotropy(x + 100) == pytest.approx(18 / 20)


def test_bad_input() -> None:
    """Each refusal quotes what came."""
    for arguments in ((2, 3.0), (10, 0.0), (10, 3.0, -1.0), (10, math.nan)):
        with pytest.raises(StatesError, match="expected n ≥ 3"):
            birthday_minimum(*arguments)
    for arguments in ((0.0, 3.0), (1.5, 3.0), (0.1, 0.0), (math.nan, 2.0)):
        with pytest.raises(StatesError, match="expected 0 < distance"):
            birthday_count(*arguments)
    with pytest.raises(StatesError, match="got 2 rows"):
        intrinsic_dimension(torch.zeros(2, 4))
    with pytest.raises(StatesError, match="equal rows"):
        intrinsic_dimension(torch.ones(5, 4))
