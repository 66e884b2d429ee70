"""The survey against brute force over small clouds."""

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from sipit_lite import LanguageModel, StatesError, last_states
from sipit_lite.experiments.survey import (
    QUANTILES,
    null_models,
    short,
    spread,
    survey,
    survey_layer,
    survey_lengths,
)
from sipit_lite.io.text import different, windows


def cloud(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Normal points."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_survey_counts_duplicates_and_equals_brute_force(pocket: LanguageModel) -> None:
    """Minimum, nearest neighbours and texts against numpy, pair by pair."""
    prompts = windows(pocket.tokenizer, 40, 6)
    summary = survey(pocket, [*prompts, prompts[3]], layers=[1, 3, 6])
    distinct = different(prompts)
    assert (summary["distinct"], summary["pairs"]) == (40, 780)
    assert summary["duplicates"] == len(prompts) + 1 - 40
    states = last_states(pocket, distinct, [1, 3, 6])
    for row, x in zip(summary["layers"], states.double().numpy(), strict=True):
        table = np.full((40, 40), math.inf)
        for i, j in zip(*np.triu_indices(40, 1), strict=True):
            table[i, j] = table[j, i] = math.dist(x[i], x[j])
        # Six digits are kept.
        assert row["minimum"] == pytest.approx(table.min(), rel=1e-5)
        wanted = np.quantile(table.min(1), QUANTILES).tolist()
        assert row["nearest"] == pytest.approx(wanted, rel=1e-5)
        pair = np.unravel_index(table.argmin(), table.shape)
        texts = [pocket.decode(distinct[i]) for i in pair]
        assert sorted(row["closest"][0]["texts"]) == sorted(texts)
        assert row["collisions"] == row["practical"] == 0


def test_survey_reports_a_collision_that_is_there(pocket: LanguageModel) -> None:
    """Layer 0 of the last token knows nothing of the tokens before it."""
    prompts = list(torch.tensor([[1, 5], [2, 5], [3, 6]]))
    row = survey(pocket, prompts, layers=[0, 1])["layers"][0]
    assert (row["collisions"], row["minimum"], row["dimension"]) == (1, 0.0, None)


def test_survey_is_resumable_and_json(pocket: LanguageModel, tmp_path: Path) -> None:
    """The shards give the same numbers, and JSON can write all of it."""
    prompts = windows(pocket.tokenizer, 30, 5, kinds=["code"])
    first, again = (survey(pocket, prompts, folder=tmp_path) for _ in range(2))
    assert first == again == json.loads(json.dumps(first))


def test_null_models_of_a_sphere_predict_its_minimum() -> None:
    """On points that are what the null model supposes, the minima agree in size."""
    x = torch.nn.functional.normalize(cloud(3000, 4).double()) * 5
    row = null_models(x)
    assert row["radius"] == pytest.approx(5, rel=1e-2)
    assert row["dimension"] == pytest.approx(3, rel=0.1)
    minimum = float(torch.pdist(x).min())
    assert 0.3 < minimum / row["birthday"] < 3
    assert row["gaussian"]["rows"] == 3000
    assert row["gaussian"]["observed"] == pytest.approx(minimum)


def test_lengths_against_single_prompts(pocket: LanguageModel) -> None:
    """Nested beginnings, distinct ones only; distances against pdist."""
    long = torch.stack(different(windows(pocket.tokenizer, 12, 9)))
    long[1, :4] = long[0, :4]
    rows = survey_lengths(pocket, long, [4, 9], layers=[2])["rows"]
    assert [row["distinct"] for row in rows] == [11, 12]
    x = torch.stack([pocket.states(ids, 2)[-1] for ids in long]).cpu()
    d = torch.pdist(x.double())
    wanted = {"minimum": d.min(), "mean": d.mean(), "maximum": d.max()}
    assert rows[1]["2"] == pytest.approx(
        {name: float(value) for name, value in wanted.items()}, rel=1e-4
    )


def test_spread_against_every_pair_alone() -> None:
    """Each pair once, and no row with itself."""
    x = cloud(40, 3)
    d = [math.dist(a, b) for a, b in combinations(x.tolist(), 2)]
    wanted = {"minimum": min(d), "mean": sum(d) / len(d), "maximum": max(d)}
    assert spread(x) == pytest.approx(wanted)


def test_layer_without_structure_has_no_dimension() -> None:
    """Equal rows are collisions, and the null models have nothing to say."""
    row, report = survey_layer(torch.ones(4, 3))
    assert (row["collisions"], row["minimum"], row["birthday"]) == (6, 0.0, None)
    assert report.compared == 6


def test_short_keeps_six_digits() -> None:
    """Integers, texts and nothing stay as they are."""
    nested = [1.23456789, (123456789, "a"), {"b": None}]
    assert short(nested) == [1.23457, [123456789, "a"], {"b": None}]


def test_bad_input(pocket: LanguageModel) -> None:
    """Each refusal quotes what came."""
    with pytest.raises(StatesError, match="got no prompt"):
        survey(pocket, [])
    windows = torch.tensor([[1, 2, 3], [1, 2, 4]])
    with pytest.raises(StatesError, match="got length 4; expected 1 to 3"):
        survey_lengths(pocket, windows, [4])
    with pytest.raises(StatesError, match="one beginning of 2 tokens"):
        survey_lengths(pocket, windows, [2])
