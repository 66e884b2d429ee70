"""The bench contract: one JSON object, checks with targets, a smoke run that measures the real thing."""

import json

import pytest
import torch

from sipit_lite import LanguageModel, cli
from sipit_lite.cli import main
from sipit_lite.experiments import checks as bench
from sipit_lite.experiments.checks import Check, candidate_counts, verdicts


@pytest.mark.parametrize(
    "name",
    [
        "exactness",
        "scan",
        "collisions",
        "inversion",
        "scale",
        "families",
        "laststate",
        "reach",
    ],
)
def test_quick_run_keeps_the_contract(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every check has a name, value, target, direction and verdict; the verdict follows from them."""
    assert main(["bench", name, "--quick", "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"bench", "versions", "device", "checks", "data"} <= set(told) and told[
        "bench"
    ] == name
    for check in told["checks"]:
        assert set(check) == {"name", "value", "target", "better", "ok"}
        above = check["value"] >= check["target"]
        assert check["ok"] == (
            above if check["better"] == "higher" else check["value"] <= check["target"]
        )
    if name in ("exactness", "families"):
        assert all(check["ok"] for check in told["checks"]), told["checks"]


def test_counts_are_printed_below_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no target is reported all the same."""

    def measured(*_: object, **__: object) -> tuple[list[Check], dict]:
        check = Check.of("scan over plain forward", 1.2)
        return [check], {"reported": {"plain forward, seconds": 0.5}}

    monkeypatch.setitem(cli.BENCHES, "scan", measured)
    assert main(["bench", "scan", "--quick", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "value", "target", "verdict"]
    assert lines[-1].startswith("plain forward, seconds:")


def test_silent_errors_are_counted(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong prompt without a refusal is a silent error; a refusal is not."""
    ids = torch.tensor([5, 6, 7], device=pocket.device)
    honest = bench.invert
    monkeypatch.setattr(
        bench, "invert", lambda states, model, layer: honest(states[:2], model, layer)
    )
    wrong = bench.attempt(pocket, ids, 1)
    assert (wrong["exact"], wrong["silent error"], wrong["refused"]) == (
        False,
        True,
        None,
    )
    monkeypatch.setattr(
        bench, "invert", lambda states, model, layer: honest(states, model, 2)
    )
    refused = bench.attempt(pocket, ids, 1)
    assert (refused["exact"], refused["silent error"], refused["refused"]) == (
        False,
        False,
        "NotVerified",
    )


def test_a_missed_target_is_reported() -> None:
    """The table says so; nothing is raised."""
    assert "MISSED" in verdicts([Check.of("exact, all", 0.99)]) and "met" in verdicts(
        [Check.of("exact, all", 1.0)]
    )


def test_nothing_measured_is_no_success() -> None:
    """A share of no outcomes is zero, so an empty group cannot meet a target."""
    assert bench.share([]) == 0.0 and bench.share([True, False]) == 0.5


def test_candidate_counts_against_a_hand_count() -> None:
    """40 steps of 32 are 1280 proposals: what needed more went on to the scan."""
    found = candidate_counts([{"tested": [40, 1281, 2000]}, {"tested": [1288]}])
    assert (
        found["positions"],
        found["candidates per token, median"],
        found["share of positions that needed the scan"],
    ) == (4, 1284.5, 0.25)
