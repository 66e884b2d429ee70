"""States survive the disk bit for bit; the prompt is not in the file unless asked for; broken files are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sipit_lite import LanguageModel, StatesError, invert, read_states, write_states

TEXT = "Nobody should read this in the file."


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.float16, torch.bfloat16])
def test_round_trip(pocket: LanguageModel, tmp_path: Path, dtype: torch.dtype | None) -> None:
    """What comes back is what was captured, in the format that was asked for."""
    written = write_states(tmp_path / "s.safetensors", pocket, TEXT, 3, dtype=dtype)
    stored = read_states(tmp_path / "s.safetensors")
    assert torch.equal(stored.states, pocket.states(TEXT, 3).cpu().to(dtype or torch.float32))
    assert (
        (stored.model, stored.layer, stored.text)
        == ("pocket-gpt2", 3, None)
        == (written.model, written.layer, written.text)
    )


def test_neither_text_nor_ids_unless_asked(pocket: LanguageModel, tmp_path: Path) -> None:
    """By default the file holds one tensor and no word of the prompt."""
    write_states(tmp_path / "s.safetensors", pocket, TEXT, 2)
    assert set(load_file(tmp_path / "s.safetensors")) == {"states"}
    assert b"Nobody" not in (tmp_path / "s.safetensors").read_bytes()
    write_states(tmp_path / "kept.safetensors", pocket, TEXT, 2, keep_text=True)
    assert read_states(tmp_path / "kept.safetensors").text == TEXT
    assert torch.equal(load_file(tmp_path / "kept.safetensors")["ids"], pocket.encode(TEXT).cpu())


def test_a_file_is_enough_to_invert(pocket: LanguageModel, tmp_path: Path) -> None:
    """States, model name, layer: the text comes back."""
    write_states(tmp_path / "s.safetensors", pocket, TEXT, 6)
    stored = read_states(tmp_path / "s.safetensors")
    assert invert(stored.states, pocket, stored.layer).text == TEXT


def broken_file(tmp_path: Path, case: str) -> Path:
    """One file for each way in which a file can be broken."""
    path, states = tmp_path / "broken.safetensors", {"states": torch.zeros(2, 256)}
    good = {"format": "sipit-lite states 1", "model": "pocket-gpt2", "layer": "3"}
    if case == "truncated":
        save_file({"states": torch.zeros(64, 256)}, path, good)
        path.write_bytes(path.read_bytes()[:-100])
    elif case == "not safetensors":
        path.write_text("states, but as text")
    elif case == "empty":
        path.touch()
    elif case == "no metadata":
        save_file(states, path)
    elif case == "no states":
        save_file({"other": torch.zeros(2)}, path, good)
    elif case == "no layer":
        save_file(states, path, {k: v for k, v in good.items() if k != "layer"})
    elif case == "layer is no number":
        save_file(states, path, good | {"layer": "three"})
    elif case == "a folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "where there is no file; expected a safetensors file"),
        ("a folder", "where there is no file"),
        ("truncated", "not a whole safetensors file"),
        ("not safetensors", "not a whole safetensors file"),
        ("empty", "not a whole safetensors file"),
        ("no metadata", "expected the tensor 'states' and metadata 'format'"),
        ("no states", r"with tensors \['other'\]"),
        ("no layer", r"metadata \['format', 'model'\]; expected"),
        ("layer is no number", "got layer 'three'"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, case: str, message: str) -> None:
    """One line that names the file and what was expected."""
    path = broken_file(tmp_path, case)
    with pytest.raises(StatesError, match=message) as refusal:
        read_states(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_cannot_be_written_is_refused(pocket: LanguageModel, tmp_path: Path) -> None:
    """A folder that is not there, a format that holds no states."""
    with pytest.raises(StatesError, match="where no file can be written"):
        write_states(tmp_path / "none" / "s.safetensors", pocket, TEXT, 2)
    with pytest.raises(StatesError, match=r"got dtype torch\.int8"):
        write_states(tmp_path / "s.safetensors", pocket, TEXT, 2, dtype=torch.int8)
