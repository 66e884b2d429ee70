"""The survey against brute force over small clouds, and its one command."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from sipit_lite import LanguageModel, StatesError, last_states
from sipit_lite.experiments.null_models import birthday_minimum
from sipit_lite.experiments.survey import (
    QUANTILES,
    birthday_count,
    different,
    equal_pairs,
    main,
    null_models,
    short,
    spread,
    survey,
    survey_layer,
    survey_lengths,
    survey_rounding,
    windows,
)


def cloud(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Normal points."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_survey_counts_duplicates_and_equals_brute_force(pocket: LanguageModel) -> None:
    """Minimum, nearest neighbours and texts against numpy, pair by pair."""
    asked = windows(pocket.tokenizer, 40, 6)
    found = survey(pocket, [*asked, asked[3]], layers=[1, 3, 6])
    distinct = different(asked)
    assert (found["distinct"], found["pairs"]) == (40, 780)
    assert found["duplicates"] == len(asked) + 1 - 40
    states = last_states(pocket, distinct, [1, 3, 6])
    for row, x in zip(found["layers"], states.double().numpy(), strict=True):
        table = np.array(
            [
                [math.dist(a, b) if i != j else math.inf for j, b in enumerate(x)]
                for i, a in enumerate(x)
            ]
        )
        assert row["minimum"] == pytest.approx(table.min(), rel=1e-5), (
            "six digits are kept"
        )
        assert row["nearest"] == pytest.approx(
            np.quantile(table.min(1), QUANTILES).tolist(), rel=1e-5
        )
        i, j = np.unravel_index(table.argmin(), table.shape)
        assert sorted(row["closest"][0]["texts"]) == sorted(
            pocket.decode(distinct[row]) for row in (i, j)
        )
        assert row["collisions"] == row["practical"] == 0


def test_survey_reports_a_collision_that_is_there(pocket: LanguageModel) -> None:
    """Layer 0 of the last token knows nothing of the tokens before it."""
    row = survey(
        pocket,
        [torch.tensor([1, 5]), torch.tensor([2, 5]), torch.tensor([3, 6])],
        layers=[0, 1],
    )["layers"][0]
    assert (row["collisions"], row["minimum"], row["dimension"]) == (1, 0.0, None)


def test_survey_is_resumable_and_json(pocket: LanguageModel, tmp_path: Path) -> None:
    """The shards give the same numbers, and nothing in it is more than JSON can write."""
    asked = windows(pocket.tokenizer, 30, 5, kinds=["code"])
    first, again = (survey(pocket, asked, folder=tmp_path) for _ in range(2))
    for rows in (first, again):
        for row in rows["layers"]:
            del row["seconds"]
    assert first == again == json.loads(json.dumps(first))


def test_null_models_of_a_sphere_predict_its_minimum() -> None:
    """On points that are what the null model supposes, observed and predicted minima agree in size."""
    x = torch.nn.functional.normalize(cloud(3000, 4).double()) * 5
    found = null_models(x)
    assert found["radius"] == pytest.approx(5, rel=1e-2)
    assert found["dimension"] == pytest.approx(3, rel=0.1)
    assert 0.3 < float(torch.pdist(x).min()) / found["birthday"] < 3
    assert found["gaussian"]["rows"] == 3000
    assert found["gaussian"]["observed"] == pytest.approx(float(torch.pdist(x).min()))


@pytest.mark.parametrize("dimension", [1.0, 2.5, 9.0])
@pytest.mark.parametrize("n", [50, 10_000])
def test_birthday_count_is_the_inverse_of_the_minimum(n: int, dimension: float) -> None:
    """There and back."""
    assert birthday_count(
        birthday_minimum(n, dimension, 3.0), dimension, 3.0
    ) == pytest.approx(n, rel=1e-6)


def test_birthday_count_on_a_circle_in_closed_form() -> None:
    """On a circle two points are within an angle φ with probability φ/π."""
    share = 2 * math.asin(0.5e-6) / math.pi
    assert birthday_count(1e-6, 1.0) == pytest.approx(
        (1 + math.sqrt(1 + 8 * math.log(2) / share)) / 2
    )


def test_lengths_against_single_prompts(pocket: LanguageModel) -> None:
    """Nested beginnings, distinct ones only; distances against numpy."""
    long = torch.stack(different(windows(pocket.tokenizer, 12, 9)))
    long[1, :4] = long[0, :4]
    found = survey_lengths(pocket, long, [4, 9], layers=[2])
    assert [row["distinct"] for row in found["rows"]] == [11, 12]
    x = torch.stack([pocket.states(ids, 2)[-1] for ids in long]).cpu()
    distances = torch.pdist(x.double())
    wanted = {
        "minimum": distances.min(),
        "mean": distances.mean(),
        "maximum": distances.max(),
    }
    assert found["rows"][1]["2"] == pytest.approx(
        {k: float(v) for k, v in wanted.items()}, rel=1e-4
    )


def test_spread_of_more_rows_than_a_block() -> None:
    """Blocks of 256 rows: the sum goes over each pair once."""
    x = cloud(601, 3)
    distances = torch.pdist(x.double())
    found = spread(x)
    assert (found["minimum"], found["maximum"]) == pytest.approx(
        (float(distances.min()), float(distances.max()))
    )
    assert found["mean"] == pytest.approx(float(distances.mean()))


def test_equal_pairs_against_all_pairs() -> None:
    """Few values, many ties; and growing sizes never lose one."""
    x = torch.randint(3, (60, 3), generator=torch.Generator().manual_seed(0)).float()
    wanted = [
        sum(bool((x[i] == x[j]).all()) for i in range(n) for j in range(i))
        for n in range(1, 61)
    ]
    assert equal_pairs(x, range(1, 61)) == wanted


def test_rounding_makes_collisions_and_more_bits_fewer() -> None:
    """Two clusters far finer than a format become one state each."""
    x = torch.cat([cloud(20, 8) * 1e-5 + 1.1, cloud(20, 8, 1) * 1e-5 + 2.3])
    found = survey_rounding(x, ["bfloat16", "float8"], [20, 40])
    assert found["pairs"] == {"bfloat16": [190, 380], "float8": [190, 380]}
    spread_out = survey_rounding(cloud(200, 8), ["bfloat16", "int4"])
    assert spread_out["sizes"][-1] == 200
    assert spread_out["pairs"]["bfloat16"][-1] == 0
    assert spread_out["codes"]["int4"][-1] >= spread_out["pairs"]["int4"][-1]


def test_layer_without_structure_has_no_dimension() -> None:
    """Equal rows are collisions, and the null models say that they have nothing to say."""
    row, report = survey_layer(torch.ones(4, 3))
    assert (row["collisions"], row["minimum"], row["birthday"]) == (6, 0.0, None)
    assert report.compared == 6


def test_short_keeps_six_digits() -> None:
    """Integers, texts and nothing stay as they are."""
    assert short([1.23456789, (123456789, "a"), {"b": None}]) == [
        1.23457,
        [123456789, "a"],
        {"b": None},
    ]


def test_one_command(tmp_path: Path) -> None:
    """The file is whole JSON, a second run reads the shards, and bad input leaves it alone."""
    file, shards = tmp_path / "survey.json", tmp_path / "shards"
    common = [
        str(file),
        "--prompts",
        "30",
        "--length",
        "5",
        "--windows",
        "20",
        "--device",
        "cpu",
    ]
    assert main([*common, "--lengths", "2", "8", "--shards", str(shards)]) == 0
    found = json.loads(file.read_text())
    assert found["survey"]["distinct"] == found["rounding"]["sizes"][-1] == 30
    assert [row["length"] for row in found["lengths"]["rows"]] == [2, 8]
    assert len(list(shards.rglob("*.safetensors"))) == 3
    with pytest.raises(SystemExit) as stop:
        main([*common, "--lengths", "0"])
    assert stop.value.code == 2
    assert json.loads(file.read_text()) == found


def test_bad_input(pocket: LanguageModel) -> None:
    """Each refusal quotes what came."""
    with pytest.raises(StatesError, match="got 0 prompts"):
        survey(pocket, [])
    with pytest.raises(ValueError, match="got length 4; expected 1 to 3"):
        survey_lengths(pocket, torch.tensor([[1, 2, 3], [1, 2, 4]]), [4])
    with pytest.raises(ValueError, match="one beginning of 2 tokens"):
        survey_lengths(pocket, torch.tensor([[1, 2, 3], [1, 2, 4]]), [2])
    with pytest.raises(ValueError, match="expected 1 to 5"):
        survey_rounding(cloud(5, 3), ["int8"], [6])
    for arguments in ((0.0, 3.0), (1.5, 3.0), (0.1, 0.0)):
        with pytest.raises(ValueError, match="expected 0 < distance"):
            birthday_count(*arguments)
