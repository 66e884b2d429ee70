"""States survive the disk bit for bit; the prompt is not in the file unless asked for; broken files are refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sipit_lite import LanguageModel, StatesError, capture, invert, last_states, load, read_states, write_states

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


def ragged(model: LanguageModel, count: int = 12) -> list[torch.Tensor]:
    """Random prompts of one to eleven tokens, in no order."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(model.vocab_size, (1 + (7 * i) % 11,), generator=generator) for i in range(count)]


def one_by_one(model: LanguageModel, prompts: list[torch.Tensor], layers: list[int]) -> torch.Tensor:
    """Oracle: every prompt alone, every layer by itself."""
    return torch.stack([torch.stack([model.states(ids, layer)[-1].cpu() for ids in prompts]) for layer in layers])


def test_last_states_of_every_family(family: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged prompts in batches, all layers in one pass, more than one cut: the states of each prompt alone."""
    _, model = family
    monkeypatch.setattr(capture, "SHARD", 5)
    prompts, layers = ragged(model), [3, 0, 1, 2]
    assert torch.equal(last_states(model, prompts, [0]), one_by_one(model, prompts, [0]))
    found = last_states(model, prompts, layers)
    torch.testing.assert_close(found, one_by_one(model, prompts, layers), rtol=1e-4, atol=1e-5)


def test_last_states_resume_and_mend(pocket: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished shards are read back; a damaged, truncated or foreign one is computed again."""
    monkeypatch.setattr(capture, "SHARD", 4)
    prompts, layers = ragged(pocket), [1, 6]
    first = last_states(pocket, prompts, layers, folder=tmp_path)
    assert torch.equal(first, last_states(pocket, prompts, layers))
    shards = sorted(tmp_path.iterdir())
    assert [path.name for path in shards] == [f"shard-{i:05d}.safetensors" for i in range(3)]
    flipped = bytearray(shards[0].read_bytes())
    flipped[-5] ^= 1
    shards[0].write_bytes(flipped)
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    computed, honest = [], capture._last_states
    monkeypatch.setattr(capture, "_last_states", lambda *args: computed.append(len(args[1])) or honest(*args))
    assert torch.equal(first, last_states(pocket, prompts, layers, folder=tmp_path)) and computed == [4, 4]
    assert torch.equal(first, last_states(pocket, prompts, layers, folder=tmp_path)) and len(computed) == 2
    last_states(pocket, prompts, [1, 5], folder=tmp_path)
    assert len(computed) == 5, "other layers are other shards"


def test_last_states_of_another_model_are_not_taken(tmp_path: Path) -> None:
    """The same prompts and layers, other weights: the shards are computed again."""
    models = [load("pocket-gpt2", random_init=True, seed=seed) for seed in (0, 1)]
    prompts = ragged(models[0], 3)
    first, second = (last_states(model, prompts, [2], folder=tmp_path) for model in models)
    assert not torch.equal(first, second) and torch.equal(second, last_states(models[1], prompts, [2]))


def test_an_interrupted_run_keeps_its_shards(
    pocket: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the third shard: two stay on the disk, and the next run computes the third alone."""
    monkeypatch.setattr(capture, "SHARD", 4)
    prompts, computed, honest = ragged(pocket), [], capture._last_states

    def interrupted(*args: object) -> torch.Tensor:
        computed.append(1)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(capture, "_last_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        last_states(pocket, prompts, [2], folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    found = last_states(pocket, prompts, [2], folder=tmp_path)
    assert len(computed) == 4 and torch.equal(found, last_states(pocket, prompts, [2]))


def test_a_full_disk_is_an_error_and_keeps_what_is_done(
    pocket: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second shard cannot be written: the first stays, no half-written file is left, the message says where."""
    monkeypatch.setattr(capture, "SHARD", 4)
    honest = capture.save_file

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        honest(tensors, path, metadata)
        if "00001" in str(path):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(capture, "save_file", full)
    with pytest.raises(StatesError, match=r"shard-00001.safetensors cannot be written.*No space left"):
        last_states(pocket, ragged(pocket), [2], folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.safetensors"]


@pytest.mark.parametrize(
    ("prompts", "layers", "words"),
    [
        ([], [1], "0 prompts and 1 layers"),
        ([torch.tensor([1])], [], "1 prompts and 0 layers"),
        ([torch.tensor([1])], [7], "layer 7"),
        ([torch.tensor([1]), torch.tensor([4096])], [1], "tokens are 0 to 4095"),
        ([torch.tensor([1]), torch.ones(257, dtype=torch.long)], [1], "1 to 256 tokens"),
        ([torch.tensor([1]), torch.tensor([], dtype=torch.long)], [1], "1 to 256 tokens"),
    ],
)
def test_last_states_refuse(pocket: LanguageModel, prompts: list, layers: list, words: str) -> None:
    """Each refusal quotes what came and what was expected, before anything is computed."""
    with pytest.raises(ValueError, match=words):
        last_states(pocket, prompts, layers)
