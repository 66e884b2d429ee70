"""The command line as a user meets it: what it prints, writes and refuses."""

import functools
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sipit_lite import (
    LanguageModel,
    Lens,
    LensError,
    cli,
    closest_pairs,
    last_states,
    load,
)
from sipit_lite.cli import main
from sipit_lite.experiments import reproduce
from sipit_lite.extensions import laststate
from sipit_lite.io import text
from sipit_lite.io.text import distinct

ROOT = Path(__file__).parent.parent
Output = pytest.CaptureFixture[str]
cached = functools.cache(load)


def loaded_once(name: str | None, **options: object) -> LanguageModel:
    """What is measured once for a model is not measured again for every command."""
    quantised = "quantization_config" in options
    return load(name, **options) if quantised else cached(name, **options)


@pytest.fixture(autouse=True)
def one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands with the same options share their model."""
    monkeypatch.setattr(cli.sl, "load", loaded_once)


def run(*words: object) -> int:
    """One command on the CPU."""
    return main([*map(str, words), "--device", "cpu"])


def strict(text: str) -> dict:
    """The one JSON object of a text, which has no NaN and no infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def complaints(text: str) -> list[str]:
    """The lines on standard error, without bars."""
    lines = text.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith(("sipit-lite", "got"))]


def test_capture_then_invert(tmp_path: Path, capsys: Output) -> None:
    """Text to file to text; the file names its model and layer."""
    path = tmp_path / "s.safetensors"
    text = "Round and round, 🙂."
    assert run("capture", text, "-o", path, "--layers", 4, 2, "--json") == 0
    summary = strict(capsys.readouterr().out)
    assert summary["file"] == str(path)
    assert (summary["layers"], summary["dtype"]) == ([2, 4], "float32")
    assert run("invert", path) == 0
    assert capsys.readouterr().out == text + "\n"


def test_capture_reads_standard_input(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text is text; bytes that are not UTF-8 are refused in one line."""
    path = tmp_path / "s.safetensors"
    for given, code in ((b"plain", 0), (b"\xff\xfe", 2)):
        stream = io.TextIOWrapper(io.BytesIO(given), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stream)
        assert run("capture", "-", "-o", path, "--layer", 1) == code
    assert "not UTF-8" in capsys.readouterr().err


def test_invert_json(capsys: Output) -> None:
    """Everything a recovery holds, as strict JSON."""
    words = ("--text", "plain", "--layer", 2, "--json", "--policy", "random")
    assert run("invert", *words) == 0
    found = strict(capsys.readouterr().out)
    assert (found["text"], found["model"]) == ("plain", "pocket-gpt2")
    assert found["layer"] == 2
    assert found["margin"] == [None] * len(found["tokens"])
    for name in ("distance", "runner_up", "tested"):
        assert len(found[name]) == len(found["tokens"])


def test_demo(capsys: Output) -> None:
    """Rows that are all exact, and exit code 0."""
    assert run("demo", "--layer", 1) == 0
    out = capsys.readouterr().out
    first = [line.split()[0] for line in out.splitlines()]
    assert first == ["english,", "python,", "emoji", "random", "4"]
    assert "4 of 4 exact on cpu" in out and "NOT" not in out


def test_demo_fails_unless_exact(
    capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong prompt turns the exit code to 1; JSON says which row."""
    honest = cli.sl.invert

    def short(states: torch.Tensor, *rest: object, **options: object) -> object:
        return honest(states[:3], *rest, **options)

    monkeypatch.setattr(cli.sl, "invert", short)
    assert run("demo", "--layer", 1, "--json") == 1
    summary = strict(capsys.readouterr().out)
    assert summary["exact"] is False
    assert [row["exact"] for row in summary["rows"]] == [False] * 4


def states_file(
    path: Path, states: torch.Tensor, layer: int = 3, model: str = "pocket-gpt2"
) -> Path:
    """A file of states made by hand."""
    metadata = {"format": "sipit-lite states 2", "model": model}
    save_file({f"layer.{layer}": states}, path, metadata)
    return path


def bad_files(folder: Path) -> dict[str, tuple[list, str]]:
    """Files that hold no states of ours, and a piece of the line that each earns."""

    def states(*shape: int, dtype: torch.dtype = torch.float32, layer: int = 3) -> Path:
        name = f"{shape}-{dtype}-{layer}"
        return states_file(folder / name, torch.zeros(shape, dtype=dtype), layer)

    (folder / "text").write_text("no states")
    good = states_file(folder / "good", torch.randn(9, 256))
    (folder / "short").write_bytes(good.read_bytes()[:-50])
    save_file({"states": torch.zeros(1, 256)}, folder / "bare")
    nan = states_file(folder / "nan", torch.full((2, 256), torch.nan))
    noise = states_file(folder / "noise", torch.randn(2, 256))
    stranger = states_file(folder / "theirs", torch.zeros(2, 256), model="/some/folder")
    return {
        "wrong width": ([states(2, 255)], "(2, 255)"),
        "zero positions": ([states(0, 256)], "(0, 256)"),
        "too many positions": ([states(257, 256)], "(257, 256)"),
        "integers": ([states(2, 256, dtype=torch.int32)], "torch.int32"),
        "NaN": ([nan], "NaN or Inf"),
        "layer in the file": ([states(2, 256, layer=8)], "got layer 8"),
        "layer not in the file": ([good, "--layer", 2], "got layer 2"),
        "another model": ([noise], "no token verifies"),
        "a model we do not know": ([stranger], "'/some/folder'; expected --model"),
        "no file": ([folder / "none"], "not a complete safetensors file"),
        "truncated": ([folder / "short"], "not a complete safetensors file"),
        "not safetensors": ([folder / "text"], "not a complete safetensors file"),
        "no fields": ([folder / "bare"], "expected tensors 'layer.ℓ'"),
        "empty with last": ([states(0, 256), "--last"], "shape (1, 0)"),
        "NaN with last": ([nan, "--last"], "got NaN"),
        "two sources": ([good, "--text", "x"], "expected one of them"),
    }


def bad_texts(folder: Path) -> dict[str, tuple[list, str]]:
    """Options of ``invert --text x`` that mean nothing."""
    return {
        "layer": (["--layer", 8], "got layer 8"),
        "no number": (["--layer", "two"], "got 'two'"),
        "model": (["--model", "no-such-model"], "no-such-model"),
        "no name": (["--model", ""], "got model ''"),
        "epsilon": (["--epsilon", -1], "epsilon=-1.0"),
        "device": (["--device", "abacus"], "device 'abacus'"),
        "two places": (["--device-map", "auto"], "got --device cpu with --device-map"),
        "seed": (["--seed", 2**70], "got '1180591620717411303424'"),
        "policy": (["--policy", "guess"], "'guess' is not one of 'auto'"),
        "unknown option": (["--polite"], "No such option: --polite"),
        "packages": (["--weights", "fp4"], "pip install 'sipit-lite[quantised]'"),
        "unwritable lens": (["--lens", folder / "none" / "l"], "got the lens"),
        "length": (["--length", 2], "got --length without --last"),
        "certify with last": (["--last", "--certify"], "got --last with --certify"),
        "lens with last": (["--last", "--lens", "l"], "got --last with --lens"),
        "guess with last": (["--last", "--on-fail", "nearest"], "with --on-fail"),
        "no length": (["--last", "--length", 0], "got length=0"),
        "embeddings alone": (["--last", "--layer", 0], "expected length=1"),
    }


def bad_commands(folder: Path) -> dict[str, tuple[list, str]]:
    """Bad input of the other commands, options that do not apply among it."""
    many = ["collisions", "-n"]
    place = folder / "none" / "i"
    return {
        "nothing": ([], "Missing command"),
        "command": (["fly"], "No such command 'fly'"),
        "no source": (["invert"], "expected one of them"),
        "empty text": (["capture", "", "-o", folder / "h"], "0 tokens"),
        "no text": (["capture", "abc\udcff", "-o", folder / "j"], "lone surrogates"),
        "unwritable": (["capture", "x", "-o", place], "no file can be written"),
        "layer to capture": (["capture", "x", "--layers", 3, 9], "got layer 9"),
        "too many prompts": ([*many, 9999999], "got count=9999999"),
        "too long": ([*many, 2, "--length", 257], "1 to 256 tokens"),
        "layer to compare": ([*many, 4, "--layers", 9], "got layer 9"),
        "one layer": ([*many, 4, "--layer", 2], "No such option: --layer"),
        "pairs": ([*many, 4, "--layers", 1, "--closest", 7], "got k=7"),
        "negative": ([*many, 4, "--exhaustive", -1], "got '-1'"),
        "source": ([*many, 4, "--source", "poems"], "'poems' is not one of 'bundled'"),
        "shards": ([*many, 4, "--shards", folder / "text" / "l"], "can be written"),
        "bench": (["bench", "unknown"], "'unknown' is not one of 'inversion'"),
        "layer of a bench": (["bench", "laststate", "--layer", 99], "No such option"),
        "policy of a bench": (
            ["bench", "laststate", "--policy", "random"],
            "No such option",
        ),
        "no prompts": (["reproduce", "layers", "--prompts", 0], "got prompts=0"),
        "no tokens": (["reproduce", "layers", "--length", 0], "got length=0"),
        "way": (["reproduce", "inversion", "--ways", "luck"], "got ways=('luck',)"),
        "layer of a run": (["reproduce", "layers", "--layer", 2], "No such option"),
    }


def test_bad_input_gets_one_line_and_code_2(tmp_path: Path, capsys: Output) -> None:
    """Nothing on standard output, one line on standard error, exit code 2."""
    cases = {}
    for case, (words, piece) in bad_files(tmp_path).items():
        cases[case] = (["invert", *words], piece)
    for case, (words, piece) in bad_texts(tmp_path).items():
        cases["text, " + case] = (["invert", "--text", "x", *words], piece)
    for case, (words, piece) in (cases | bad_commands(tmp_path)).items():
        device = [] if not words or "--device" in words else ["--device", "cpu"]
        assert main([*map(str, words), *device]) == 2, case
        out, err = capsys.readouterr()
        lines = complaints(err)
        assert out == "" and len(lines) == 1, (case, out, err)
        assert piece in lines[0], (case, lines[0])


def test_help_has_examples(capsys: Output) -> None:
    """Of every command, and exit code 0."""
    for name in ("demo", "capture", "invert", "collisions", "bench", "reproduce"):
        assert main([name, "--help"]) == 0
        out = capsys.readouterr().out
        assert f"sipit-lite {name} " in out.split("Usage:")[1].split("\n", 1)[1]


def test_help_needs_no_model() -> None:
    """Neither do words that are no command: torch would take seconds."""
    lines = "import sys\nfrom sipit_lite.cli import main\n"
    lines += "code = main(sys.argv[1:])\nassert 'torch' not in sys.modules\n"
    for words, code in ((["invert", "--help"], 0), (["invert", "--layer", "x"], 2)):
        command = [sys.executable, "-c", f"{lines}sys.exit(code)", *words]
        assert subprocess.run(command, check=False).returncode == code


def test_choices_are_those_of_the_rooms() -> None:
    """They are written here once more, so that help needs no room."""
    assert [*reproduce.EXPERIMENTS] == cli.EXPERIMENTS
    assert {*text.SOURCES, "corpora"} == {*cli.SOURCES}


def test_ctrl_c_prints_the_prefix(
    capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 130 and what was verified."""
    import test_sipit

    monkeypatch.setattr(cli.sl, "Random", lambda: test_sipit.StopsAt(1))
    words = ("--text", "hidden states", "--layer", 2, "--policy", "random")
    assert run("invert", *words) == 130
    assert "interrupted after 1 verified tokens: 'h" in capsys.readouterr().err


def test_ctrl_c_leaves_the_rows_of_the_demo(
    capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was inverted before is printed."""
    honest = cli.sl.invert
    calls = []

    def pressed(*rest: object, **options: object) -> object:
        calls.append(rest)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return honest(*rest, **options)

    monkeypatch.setattr(cli.sl, "invert", pressed)
    assert run("demo", "--layer", 1) == 130
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err.endswith("sipit-lite demo: interrupted\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file of Linux")
def test_outputs_that_take_nothing(
    capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A closed pipe ends quietly; a full disk is one line. Both are no success."""
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    for descriptor, code in ((writer, 141), (full, 2)):
        with os.fdopen(descriptor, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            assert run("invert", "--text", "x", "--layer", 0) == code
    monkeypatch.undo()
    lines = complaints(capsys.readouterr().err)
    assert len(lines) == 1 and "No space left on device" in lines[0]


@pytest.fixture
def quick_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The regression that reads the last token, fitted in a second."""
    small = functools.partial(laststate.Ends.fit, tokens=4000, features=32)
    monkeypatch.setattr(laststate.Ends, "fit", small)


def test_invert_from_the_last_state_alone(
    tmp_path: Path, capsys: Output, quick_ends: None
) -> None:
    """From a file with all rows, with the last row alone, and from a text."""
    model = load(device="cpu")
    ids = torch.tensor([50, 2000])
    states = model.states(ids, 2)
    for name, rows in (("all", states), ("row", states[-1:])):
        file = states_file(tmp_path / name, rows, 2)
        assert run("invert", file, "--last") == 0
        out, err = capsys.readouterr()
        assert out == model.decode(ids) + "\n"
        assert "verified: distance " in err.splitlines()[-1]
    words = ("--text", "hidden states", "--last", "--layer", 2, "--length", 2)
    assert run("invert", *words, "--json") == 0
    found = strict(capsys.readouterr().out)
    assert (found["text"], found["layer"]) == ("hidden states", 2)
    assert found["verified"] == [True, True]
    assert found["distance"][0] is None
    assert found["distance"][1] <= found["radius"][1] < found["runner_up"][1]


def test_a_last_state_of_no_prompt(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, quick_ends: None
) -> None:
    """One line with the closest prompt and its distance, exit code 2."""
    brief = functools.partial(cli.sl.invert_last, seconds=0.1)
    monkeypatch.setattr(cli.sl, "invert_last", brief, raising=False)
    noise = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    file = states_file(tmp_path / "noise", noise, 2)
    assert run("invert", file, "--last", "--length", 2) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "no prompt was found" in complaints(err)[-1]


def test_ctrl_c_prints_the_closest(
    capsys: Output, monkeypatch: pytest.MonkeyPatch, quick_ends: None
) -> None:
    """Exit code 130, and the best so far."""

    def pressed(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(laststate, "checked", pressed)
    words = ("--text", "hidden states", "--last", "--layer", 2, "--length", 2)
    assert run("invert", *words) == 130
    assert "'hidden states'" in capsys.readouterr().err


def test_collisions(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command finds what the function finds, and says no collision."""
    small = ("collisions", "-n", 40, "--length", 8)
    layers = ("--layers", 2, 6, "--closest", 3, "--exhaustive", 1)
    loaded = []
    honest = cli.sl.load

    def seen(*given: object, **options: object) -> object:
        loaded.append(options["layers"])
        return honest(*given, **options)

    monkeypatch.setattr(cli.sl, "load", seen)
    files = ("--shards", tmp_path / "shards")
    assert run(*small, *layers, *files, "--json") == 0
    summary = strict(capsys.readouterr().out)
    model = load(device="cpu")
    prompts = distinct(model.tokenizer, 40, 8, source="bundled")
    states = last_states(model, prompts, [2, 6])
    for row, x in zip(summary["layers"], states, strict=True):
        assert row["minimum"] == pytest.approx(closest_pairs(x, 1).minimum, rel=1e-6)
        assert (row["compared"], row["collisions"], row["practical"]) == (780, 0, 0)
        assert len(row["closest"]) == 3
    for layer, row in zip((2, 6), summary["exhaustive"], strict=True):
        assert row["layer"] == layer
        assert row["after"] in [model.decode(ids) for ids in prompts]
        assert (row["compared"], row["collisions"]) == (4096 * 4095 // 2, 0)
    assert len(list((tmp_path / "shards").iterdir())) == 1
    assert run(*small, "--layers", 5) == 0
    assert loaded == [6, 5], "blocks beyond the last layer are not loaded"
    assert "collisions: ℓ2 distance below 1e-6" in capsys.readouterr().out


@pytest.fixture
def quick_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lens that is fitted in a second."""
    text = [torch.arange(first, first + 64) for first in range(0, 4032, 16)]
    small = functools.partial(Lens.fit, prompts=text, features=16)

    def fit(model: object, layer: int, progress: bool) -> Lens:
        return small(model, layer)

    monkeypatch.setattr(cli.sl.Lens, "fit", fit)


def test_a_lens_is_fitted_once_and_read_again(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, quick_lens: None
) -> None:
    """The file appears, the second run reads it, and another layer refuses it."""
    path = tmp_path / "lens.safetensors"
    words = ("invert", "--text", "hidden states", "--lens", path, "--layer")
    assert run(*words, 2) == 0 and path.exists()
    monkeypatch.setattr(cli.sl.Lens, "fit", None)
    assert run(*words, 2) == 0
    assert capsys.readouterr().out.splitlines() == ["hidden states"] * 2
    assert run(*words, 3) == 2
    assert "got a lens for layer 2" in capsys.readouterr().err


def test_a_lens_that_cannot_be_kept_loses_no_prompt(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, quick_lens: None
) -> None:
    """The disk is full after the fit: the prompt, one line, and exit code 1."""

    def full(lens: Lens, path: object) -> None:
        raise LensError("got a disk without room")

    monkeypatch.setattr(cli.sl.Lens, "save", full)
    words = ("--text", "hidden states", "--layer", 2, "--lens", tmp_path / "lens")
    assert run("invert", *words) == 1
    out, err = capsys.readouterr()
    assert out == "hidden states\n"
    assert complaints(err) == ["sipit-lite invert: got a disk without room"]


def test_certify_is_the_strongest_answer(capsys: Output) -> None:
    """All tokens are tested, the margin of the prompt's is measured and announced."""
    words = ("invert", "--text", "plain", "--layer", 2)
    assert run(*words, "--certify", "--json") == 0
    out, err = capsys.readouterr()
    summary = strict(out)
    assert summary["certified"] is True
    assert summary["tested"] == [4096] * len(summary["tokens"])
    for margin, distance in zip(summary["margin"], summary["distance"], strict=True):
        assert 2 * distance < margin
    assert "certified: True, room " in err.splitlines()[-1]
    assert run(*words, "--json") == 0
    assert strict(capsys.readouterr().out)["certified"] is False


def test_guesses_are_announced(tmp_path: Path, capsys: Output) -> None:
    """States of another layer: a refusal, or the nearest tokens, all of them named."""
    states = load(device="cpu").states("hidden", 3)
    file = states_file(tmp_path / "states.safetensors", states, layer=2)
    assert run("invert", file) == 2
    capsys.readouterr()
    assert run("invert", file, "--on-fail", "nearest", "--json") == 0
    out, err = capsys.readouterr()
    found = strict(out)
    count = len(found["tokens"])
    assert found["verified"] == [False] * count and found["margin"][0] is None
    assert err.strip().endswith(f"positions {list(range(count))}")


def program(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python -m sipit_lite`` in a process with these variables."""
    command = [sys.executable, "-m", "sipit_lite", *words]
    return subprocess.run(
        command,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


def test_settings_of_other_programs_do_not_matter() -> None:
    """Malformed ones of bars and of figures, which neither stop nor change a run."""
    settings = {"TQDM_MININTERVAL": "abc", "TQDM_FILE": "x", "MPLBACKEND": "garbage"}
    words = ("invert", "--text", "hidden states", "--layer", "1", "--device", "cpu")
    done = program(*words, **settings)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hidden states\n", "")


def test_an_address_that_is_none_is_one_line() -> None:
    """``HF_ENDPOINT`` is read while huggingface_hub is imported."""
    done = program("invert", "--text", "x", HF_ENDPOINT="http://[bad")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "HF_ENDPOINT" in done.stderr


def test_layers_are_one_option_by_two_names(tmp_path: Path, capsys: Output) -> None:
    """None of them is left out."""
    path = tmp_path / "s.safetensors"
    assert (
        run("capture", "x", "-o", path, "--layer", 2, "--layers", 3, 4, "--json") == 0
    )
    assert strict(capsys.readouterr().out)["layers"] == [2, 3, 4]


@pytest.mark.parametrize("spins", [None, "7"])
def test_the_program_sets_how_long_threads_spin(
    capsys: Output, monkeypatch: pytest.MonkeyPatch, spins: str | None
) -> None:
    """Unless the user has; bad input is one line here as well."""
    monkeypatch.setattr(sys, "argv", ["sipit_lite/__main__.py", "fly"])
    monkeypatch.setenv("GOMP_SPINCOUNT", spins or "")
    if spins is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    with pytest.raises(SystemExit) as left:
        runpy.run_module("sipit_lite", run_name="__main__")
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (2, "")
    assert len(err.splitlines()) == 1 and "No such command 'fly'" in err
    assert os.environ["GOMP_SPINCOUNT"] == (spins or "3000")


@pytest.mark.parametrize(
    ("module", "label"), [("typer", "sipit-lite"), ("torch", "sipit-lite demo")]
)
def test_ctrl_c_during_the_imports(tmp_path: Path, module: str, label: str) -> None:
    """One line and exit code 130, before the command line or torch has come."""
    # In the background a shell has SIGINT ignored, so the handler is set anew.
    press = "import os, signal, time\n"
    press += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    press += "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)"
    (tmp_path / f"{module}.py").write_text(press)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = program("demo", PYTHONPATH=path)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == f"{label}: interrupted\n"
