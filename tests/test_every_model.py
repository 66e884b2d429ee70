"""The cells that measure any model run on one that no page has seen."""

import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from sipit_lite.io.loading import POCKET, _place

BOOK = Path(__file__).parent.parent / "book"
SPEC = spec_from_file_location("every_model", BOOK / "every_model.py")
EVERY_MODEL = module_from_spec(SPEC)
SPEC.loader.exec_module(EVERY_MODEL)
PAGES = dict(EVERY_MODEL.cells())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of another depth, width and context, as the hub would give it."""
    torch.manual_seed(0)
    shape = {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": 300}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, **shape))
    place = tmp_path_factory.mktemp("models") / "another"
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(_place(POCKET)[0]).save_pretrained(place)
    return place


def test_pages_have_such_cells() -> None:
    """The tests below run once for each, so they would pass without any."""
    assert len(PAGES) >= 8


@pytest.mark.parametrize("page", PAGES)
def test_cell_runs_on_any_model(
    page: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its asserts hold, its run is stored, and its column is printed under its name."""
    monkeypatch.setenv("SIPIT_LITE_MODEL", str(folder))
    monkeypatch.chdir(tmp_path)
    exec(compile(PAGES[page], page, "exec"), {"__name__": page})
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["another"]
    assert len(table) > 1 and all(re.search(r"\S\s+\S+$", row) for row in table[1:])
    assert (tmp_path / "runs" / f"{page}.json").exists()


def test_stored_runs_belong_to_pages() -> None:
    """No run of a page that is gone or was renamed."""
    assert {path.stem for path in (BOOK / "runs").glob("*.json")} <= set(PAGES)
