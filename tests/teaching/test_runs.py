"""A page's figures for one model beside the stored ones of others."""

import json
from pathlib import Path

import pytest

from sipit_lite import LanguageModel
from sipit_lite.teaching.runs import compare


def measure(model: LanguageModel) -> dict[str, float | int | str]:
    """What a page would measure."""
    return {"layers, L": model.n_layers, "tokens over layers": model.vocab_size / 7}


@pytest.fixture
def real(pocket: LanguageModel) -> LanguageModel:
    """A model of another name, in a folder."""
    return LanguageModel(pocket.decoder, pocket.tokenizer, name="/somewhere/real")


def test_run_of_another_model_is_kept(
    tmp_path: Path,
    pocket: LanguageModel,
    real: LanguageModel,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first model is stored by name; the bundled one finds it, and is not."""
    compare("page", measure, real, tmp_path)
    stored = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))
    assert stored == {"real": measure(real)}
    capsys.readouterr()
    compare("page", measure, pocket, tmp_path)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["pocket-gpt2", "real"]
    assert [row.split()[-2:] for row in rows] == [["6", "6"], ["585", "585"]]
    assert json.loads((tmp_path / "page.json").read_text(encoding="utf-8")) == stored


def test_newer_run_replaces_the_older(
    tmp_path: Path,
    pocket: LanguageModel,
    real: LanguageModel,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A measurement that the stored run lacks is a dash, until it runs again."""
    compare("page", lambda model: {"layers, L": model.n_layers}, real, tmp_path)
    compare("page", measure, pocket, tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "-"
    compare("page", measure, real, tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "585"
