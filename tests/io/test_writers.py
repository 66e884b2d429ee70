"""Every writer of the package: complete, or the earlier file as it was."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sipit_lite import Lens, SipItError, cli, last_states, load, write_states
from sipit_lite.experiments import reproduce
from sipit_lite.experiments.families import small
from sipit_lite.extensions import lens as lens_module
from sipit_lite.io import capture, shards
from sipit_lite.io.capture import capture as recording

LAST_STATES = "sipit_lite.experiments.last_states.laststate"
MODEL = small("GPT2", device="cpu")
POCKET = load(device="cpu")
PROMPTS = [torch.tensor([5, 6, 7])]
ROWS = torch.randint(500, (256, 8), generator=torch.Generator().manual_seed(0))
LENS = Lens.fit(MODEL, 1, prompts=ROWS, features=0)


def states(path: Path) -> None:
    """As ``sipit-lite capture`` writes."""
    write_states(path, POCKET, "hidden states", 1)


def recorded(path: Path) -> None:
    """As a running model is captured."""
    with torch.no_grad(), recording(MODEL.decoder, path, layers=[1]):
        MODEL.decoder(input_ids=PROMPTS[0][None])


def shard(path: Path) -> None:
    """A shard of last states, at the place where they look for it."""
    last_states(MODEL, PROMPTS, [1], folder=path.parent)


# What writes, and the name that it gives its file.
WRITERS = {
    "states": (states, "file"),
    "a recording": (recorded, "file"),
    "last states": (shard, "shard-00000.safetensors"),
    "a lens": (LENS.save, "file"),
    "a run": (lambda path: reproduce.keep_result({"rows": []}, path), "file"),
}


def no_room(*_: object, **__: object) -> None:
    """The disk is full."""
    raise OSError(28, "No space left on device")


def half(honest: Callable) -> Callable:
    """Writes, and is told then that the disk was full before the end."""

    def write(*arguments: object, **options: object) -> None:
        honest(*arguments, **options)
        no_room()

    return write


@pytest.mark.parametrize(
    "moment", ["amid the writing", "at the rename", "at its start"]
)
@pytest.mark.parametrize("name", WRITERS)
def test_what_was_there_stays(
    name: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails: one line, the earlier file, and nothing beside it."""
    write, file = WRITERS[name]
    path = tmp_path / file
    write(path)
    path.write_bytes(b"earlier, and of no model that is here")
    before = path.read_bytes()
    with monkeypatch.context() as full:
        if moment == "at the rename":
            full.setattr(Path, "replace", no_room)
        elif moment == "at its start":
            full.setattr(Path, "touch", no_room)
        else:
            for module in (capture, shards, lens_module):
                full.setattr(module, "save_file", half(module.save_file))
            full.setattr(Path, "write_text", half(Path.write_text))
        with pytest.raises(SipItError, match=r"no file can be written .*No space left"):
            write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write(path)
    assert path.read_bytes() != before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["states", "last states"])
def test_paths_are_checked_before_the_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be written, nothing is computed."""
    write, file = WRITERS[name]
    computed = []
    monkeypatch.setattr(type(MODEL), "states", lambda *_: computed.append(1))
    monkeypatch.setattr(shards, "_last_states", lambda *_: computed.append(1))
    monkeypatch.setattr(Path, "touch", no_room)
    with pytest.raises(SipItError, match="no file can be written"):
        write(tmp_path / file)
    assert computed == []


def test_a_capture_has_its_path_checked_before_the_model_runs(tmp_path: Path) -> None:
    """A folder of that name, or none to hold it; and an earlier file stays."""
    earlier = tmp_path / "earlier"
    earlier.write_bytes(b"kept")
    for path in (tmp_path, tmp_path / "none" / "states"):
        refused = pytest.raises(SipItError, match="no file can be written")
        with refused, recording(MODEL.decoder, path):
            pytest.fail("the model was run")
    empty = pytest.raises(SipItError, match="no forward pass")
    with empty, recording(MODEL.decoder, earlier):
        pass
    assert earlier.read_bytes() == b"kept"
    assert list(tmp_path.iterdir()) == [earlier]


def test_a_run_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder in which no file can be written, and a folder of the file's name."""
    monkeypatch.setattr(reproduce, "reproduce", lambda *_, **__: pytest.fail("ran"))
    command = ["reproduce", "layers", "--quick", "--device", "cpu", "--force"]
    wanted = [*command, "-o", str(tmp_path)]
    with monkeypatch.context() as full:
        full.setattr(Path, "touch", no_room)
        assert cli.main(wanted) == 2
    assert "no file can be written" in capsys.readouterr().err
    (tmp_path / "pocket-gpt2-layers-full.json").mkdir()
    assert cli.main(wanted) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_lens_has_its_path_checked_before_the_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a minute of fitting is not spent for nothing."""
    monkeypatch.setattr(cli.sl.Lens, "fit", lambda *_, **__: pytest.fail("fitted"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    command = ["invert", "--text", "x", "--layer", "1", "--device", "cpu"]
    assert cli.main([*command, "--lens", str(tmp_path / "lens")]) == 2
    assert "expected a writable folder there" in capsys.readouterr().err


def test_json_goes_to_standard_output_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bench writes no file."""
    monkeypatch.chdir(tmp_path)
    nothing = ([], {"reported": {}})
    monkeypatch.setattr(LAST_STATES, lambda *_, **__: nothing)
    assert cli.main(["bench", "laststate", "--json", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["bench"] == "laststate"
    assert list(tmp_path.iterdir()) == []
