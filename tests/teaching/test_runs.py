"""A page's figures for one model beside the stored ones of others."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from sipit_lite.teaching.runs import compare


def measure(model: SimpleNamespace) -> dict[str, float | int | str]:
    """What a page would measure."""
    return {"layers, L": model.n_layers, "margin, L/2": model.margin}


def test_run_of_another_model_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first model is stored by name; the bundled one finds it, and is not."""
    real = SimpleNamespace(name="/somewhere/real", n_layers=30, margin=0.012345)
    compare("page", measure, real, tmp_path)
    stored = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))
    assert stored == {"real": {"layers, L": 30, "margin, L/2": 0.012345}}
    capsys.readouterr()
    bundled = SimpleNamespace(name="pocket-gpt2", n_layers=6, margin=0.5)
    compare("page", measure, bundled, tmp_path)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["pocket-gpt2", "real"]
    assert [row.split()[-2:] for row in rows] == [["6", "30"], ["0.5", "0.0123"]]
    assert json.loads((tmp_path / "page.json").read_text(encoding="utf-8")) == stored


def test_newer_run_replaces_the_older(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A measurement that the stored run lacks is a dash, until it runs again."""
    real = SimpleNamespace(name="real", n_layers=30, margin=1.0)
    compare("page", lambda model: {"layers, L": model.n_layers}, real, tmp_path)
    bundled = SimpleNamespace(name="pocket-gpt2", n_layers=6, margin=0.5)
    compare("page", measure, bundled, tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "-"
    compare("page", measure, real, tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "1"
