"""Last-token states of many prompts: those of each alone; shards on the disk are reused, mended, never mixed up."""

from pathlib import Path

import pytest
import torch

from sipit_lite import LanguageModel, ModelError, StatesError, last_states, load
from sipit_lite.experiments.perturb import twins
from sipit_lite.io import shards


def ragged(model: LanguageModel, count: int = 12) -> list[torch.Tensor]:
    """Random prompts of one to eleven tokens, in no order."""
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(model.vocab_size, (1 + (7 * i) % 11,), generator=generator)
        for i in range(count)
    ]


def one_by_one(
    model: LanguageModel, prompts: list[torch.Tensor], layers: list[int]
) -> torch.Tensor:
    """Oracle: every prompt alone, every layer by itself."""
    return torch.stack(
        [
            torch.stack([model.states(ids, layer)[-1].cpu() for ids in prompts])
            for layer in layers
        ]
    )


def test_last_states_of_every_family(
    family: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged prompts in batches, all layers in one pass, more than one cut: the states of each prompt alone."""
    _, model = family
    monkeypatch.setattr(shards, "SHARD", 5)
    prompts, layers = ragged(model), [3, 0, 1, 2]
    assert torch.equal(
        last_states(model, prompts, [0]), one_by_one(model, prompts, [0])
    )
    found = last_states(model, prompts, layers)
    torch.testing.assert_close(
        found, one_by_one(model, prompts, layers), rtol=1e-4, atol=1e-5
    )


def test_last_states_resume_and_mend(
    pocket: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished shards are read back; a damaged, truncated or foreign one is computed again."""
    monkeypatch.setattr(shards, "SHARD", 4)
    prompts, layers = ragged(pocket), [1, 6]
    first = last_states(pocket, prompts, layers, folder=tmp_path)
    assert torch.equal(first, last_states(pocket, prompts, layers))
    files = sorted(tmp_path.iterdir())
    names = [f"shard-{i:05d}.safetensors" for i in range(3)]
    assert [path.name for path in files] == names
    flipped = bytearray(files[0].read_bytes())
    flipped[-5] ^= 1
    files[0].write_bytes(flipped)
    files[1].write_bytes(files[1].read_bytes()[:-100])
    computed, honest = [], shards._last_states
    monkeypatch.setattr(
        shards,
        "_last_states",
        lambda *args: computed.append(len(args[1])) or honest(*args),
    )
    assert torch.equal(
        first, last_states(pocket, prompts, layers, folder=tmp_path)
    ) and computed == [4, 4]
    assert (
        torch.equal(first, last_states(pocket, prompts, layers, folder=tmp_path))
        and len(computed) == 2
    )
    last_states(pocket, prompts, [1, 5], folder=tmp_path)
    assert len(computed) == 5, "other layers are other shards"


def test_last_states_of_another_model_are_not_taken(tmp_path: Path) -> None:
    """The same prompts and layers, other weights: the shards are computed again."""
    models = [load("pocket-gpt2", random_init=True, seed=seed) for seed in (0, 1)]
    prompts = ragged(models[0], 3)
    first, second = (
        last_states(model, prompts, [2], folder=tmp_path) for model in models
    )
    assert not torch.equal(first, second) and torch.equal(
        second, last_states(models[1], prompts, [2])
    )


def test_a_planted_collision_is_seen_beside_earlier_shards(
    pocket: LanguageModel, tmp_path: Path
) -> None:
    """Two rows of the embeddings are made equal, and nothing else is changed."""
    prompts = [torch.tensor([5]), torch.tensor([6])]
    before, after = (
        last_states(model, prompts, [2], folder=tmp_path)[0]
        for model in (pocket, twins(pocket, 5, 6))
    )
    assert (before[0] - before[1]).norm() > 1 and torch.equal(after[0], after[1])


def test_an_interrupted_run_keeps_its_shards(
    pocket: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the third shard: two stay on the disk, and the next run computes the third alone."""
    monkeypatch.setattr(shards, "SHARD", 4)
    prompts, computed, honest = ragged(pocket), [], shards._last_states

    def interrupted(*args: object) -> torch.Tensor:
        computed.append(1)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(shards, "_last_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        last_states(pocket, prompts, [2], folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    found = last_states(pocket, prompts, [2], folder=tmp_path)
    assert len(computed) == 4 and torch.equal(found, last_states(pocket, prompts, [2]))


def test_a_full_disk_is_an_error_and_keeps_what_is_done(
    pocket: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second shard cannot be written: the first stays, no half-written file is left, the message says where."""
    monkeypatch.setattr(shards, "SHARD", 4)
    honest = shards.save_file
    written = []

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        honest(tensors, path, metadata)
        written.append(path.name.split(".")[0])
        if len(written) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(
        StatesError, match=r"shard-0000..safetensors', where no file can.*No space left"
    ):
        last_states(pocket, ragged(pocket), [2], folder=tmp_path)
    assert [path.stem for path in tmp_path.iterdir()] == written[:1]


def test_two_processes_share_a_folder(
    pocket: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one writes a shard, another finishes the same one: both names differ."""
    monkeypatch.setattr(shards, "SHARD", 4)
    prompts = ragged(pocket)
    honest = shards.save_file
    parts = set()

    def overtaken(tensors: dict, path: Path, metadata: dict) -> None:
        parts.add(path)
        if len(parts) == 1:
            last_states(pocket, prompts, [2], folder=tmp_path)
        honest(tensors, path, metadata)

    monkeypatch.setattr(shards, "save_file", overtaken)
    states = last_states(pocket, prompts, [2], folder=tmp_path)
    assert torch.equal(states, last_states(pocket, prompts, [2]))
    assert len(parts) == 4, "three shards, one of them written twice"
    assert len(list(tmp_path.iterdir())) == 3, "and nothing half-written stays"


def test_a_folder_that_cannot_be_made_is_one_line(
    pocket: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is computed."""
    (tmp_path / "file").touch()
    monkeypatch.setattr(shards, "_last_states", lambda *_: pytest.fail("computed"))
    with pytest.raises(StatesError, match=r"file/folder/shard-0.*where no file can be"):
        last_states(pocket, ragged(pocket), [2], folder=tmp_path / "file" / "folder")


def test_nothing_global_is_drawn_from(pocket: LanguageModel, tmp_path: Path) -> None:
    """The caller's generator goes on as it was."""
    before = torch.get_rng_state()
    last_states(pocket, ragged(pocket), [2], folder=tmp_path)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("prompts", "layers", "words"),
    [
        ([], [1], "no prompt or no layer"),
        ([torch.tensor([1])], [], "no prompt or no layer"),
        ([torch.tensor([1])], [8], "layer 8"),
        ([torch.tensor([1]), torch.tensor([4096])], [1], "tokens are 0 to 4095"),
        (
            [torch.tensor([1]), torch.ones(257, dtype=torch.long)],
            [1],
            "1 to 256 tokens",
        ),
        (
            [torch.tensor([1]), torch.tensor([], dtype=torch.long)],
            [1],
            "1 to 256 tokens",
        ),
    ],
)
def test_last_states_refuse(
    pocket: LanguageModel, prompts: list, layers: list, words: str
) -> None:
    """Each refusal quotes what came and what was expected, before anything is computed."""
    with pytest.raises(ValueError, match=words):
        last_states(pocket, prompts, layers)


def test_a_full_device_is_an_answer(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass that did not fit, and what may, in place of a traceback of the allocator."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LanguageModel, "cut", lambda self, layer: full)
    with pytest.raises(
        ModelError,
        match="got 12 prompts of 7 tokens, which do not fit into memory; expected fewer",
    ):
        last_states(pocket, [torch.arange(7)] * 12, [3])
