"""Benches: one JSON object, checks with targets, smoke runs that measure for real."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sipit_lite import LanguageModel, cli, invert_many
from sipit_lite.cli import main
from sipit_lite.experiments import checks as bench
from sipit_lite.experiments import inversion, safety
from sipit_lite.experiments.checks import Check, clock, verdicts
from sipit_lite.extensions import fitted

Output = pytest.CaptureFixture[str]
LAST_STATES = "sipit_lite.experiments.last_states.laststate"


@pytest.fixture(scope="module")
def small(pocket: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of two narrow blocks, drawn, that reads text as the bundled model."""
    torch.manual_seed(0)
    sizes = {"vocab_size": pocket.vocab_size, "n_embd": 64, "n_head": 4, "n_layer": 2}
    config = GPT2Config(**sizes, n_positions=256, initializer_range=0.2)
    folder = str(tmp_path_factory.mktemp("small"))
    GPT2LMHeadModel(config).save_pretrained(folder)
    pocket.tokenizer.save_pretrained(folder)
    return folder


# That of a device has a test of its own, in the same way.
@pytest.mark.parametrize("name", sorted(cli.BENCHES.keys() - {"device"}))
def test_quick_run_keeps_the_contract(
    name: str,
    small: str,
    capsys: Output,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every check has a value, a target and a verdict, which follows from them."""
    for setting, value in {"FOLDER": tmp_path, "TOKENS": 3000, "FEATURES": 0}.items():
        monkeypatch.setattr(fitted, setting, value)
    monkeypatch.setattr(safety, "STRIDE", 47)  # a prompt or two for each model
    # Once each: how long it took is not judged here.
    monkeypatch.setattr(inversion, "clock", lambda work, device, _: clock(work, device))
    words = ["--quick", "--json", "--device", "cpu"]
    # Where searches are long, the trained model is the quicker one.
    words += ["--model", "pocket-gpt2" if name == "real" else small]
    assert main(["bench", name, *words]) == 0
    run = json.loads(capsys.readouterr().out)
    assert {"bench", "versions", "device", "checks", "data"} <= set(run)
    assert run["bench"] == name
    for check in run["checks"]:
        assert set(check) == {"name", "value", "target", "better", "ok"}
        met = check["value"] >= check["target"]
        if check["better"] == "lower":
            met = check["value"] <= check["target"]
        assert check["ok"] == met
    if name == "real":
        for check in run["checks"][:2]:  # the passes are those of a busy machine
            assert check["ok"], check
    if name == "safety":
        assert all(check["ok"] for check in run["checks"]), run["checks"]


def test_counts_are_printed_below_the_table(
    capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no target is reported all the same."""

    def measured(*_: object, **__: object) -> tuple[list[Check], dict]:
        check = Check.of("silent errors", 1)
        return [check], {"reported": {"plain forward, seconds": 0.5}}

    monkeypatch.setattr(LAST_STATES, measured)
    assert main(["bench", "laststate", "--quick", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["check", "value", "target", "verdict"]
    assert lines[-1].startswith("plain forward, seconds:")


@pytest.mark.parametrize(("length", "layer", "refused"), [(2, 1, None), (3, 2, True)])
def test_silent_errors_are_counted(
    pocket: LanguageModel, length: int, layer: int, refused: bool | None
) -> None:
    """A wrong prompt without a refusal is a silent error; a refusal is not."""
    ids = torch.tensor([5, 6, 7], device=pocket.device)
    # A prompt that is too short, or states of another layer.
    [outcome] = invert_many([pocket.states(ids, 1)[:length]], pocket, layer)
    run = bench.judged(ids, outcome)
    assert not run["exact"] and run["silent error"] == (refused is None)
    assert run["refused"] == ("NotVerified" if refused else None)


def test_a_missed_target_is_reported() -> None:
    """The table says so; nothing is raised."""
    assert "MISSED" in verdicts([Check.of("exact, all", 0.99)])
    assert "met" in verdicts([Check.of("exact, all", 1.0)])


def test_nothing_measured_is_no_success() -> None:
    """A share of no outcomes is zero, so an empty group cannot meet a target."""
    assert bench.share([]) == 0.0 and bench.share([True, False]) == 0.5
