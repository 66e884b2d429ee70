"""The command line as a user meets it: what it prints, what it writes, how it refuses."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sipit_lite import Lens, cli, closest_pairs, last_states, load
from sipit_lite.cli import main
from sipit_lite.extensions import laststate
from sipit_lite.io.text import distinct

CPU = ["--device", "cpu"]


def test_capture_then_invert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text to file to text; the file names its model and layer."""
    path = str(tmp_path / "s.safetensors")
    assert (
        main(
            [
                "capture",
                "Round and round, 🙂.",
                "-o",
                path,
                "--layer",
                "4",
                "--json",
                *CPU,
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert (told["file"], told["layers"], told["dtype"], told["text kept"]) == (
        path,
        [4],
        "float32",
        False,
    )
    assert main(["invert", path, *CPU]) == 0
    assert capsys.readouterr().out == "Round and round, 🙂.\n"


def test_invert_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Everything a recovery holds, as plain JSON."""
    assert (
        main(
            [
                "invert",
                "--text",
                "plain",
                "--layer",
                "2",
                "--json",
                "--policy",
                "random",
                *CPU,
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert (
        told["text"] == "plain"
        and told["model"] == "pocket-gpt2"
        and told["layer"] == 2
    )
    assert (
        len(told["tokens"])
        == len(told["distance"])
        == len(told["runner_up"])
        == len(told["tested"])
    )


def test_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table whose rows are all exact, a figure, and exit code 0."""
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--layer", "1", *CPU]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:5]] == [
        "prompt",
        "english",
        "python",
        "emoji",
        "random",
    ]
    assert "4 of 4 exact on cpu" in out and "NO" not in out
    assert Path("sipit-lite-demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_fails_unless_exact(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong prompt turns the exit code to 1; JSON says which row."""
    honest = cli.invert
    monkeypatch.setattr(
        cli, "invert", lambda states, *rest, **more: honest(states[:-1], *rest, **more)
    )
    assert main(["demo", "--layer", "1", "--figure", "", "--json", *CPU]) == 1
    assert json.loads(capsys.readouterr().out)["exact"] is False


def states_file(path: Path, states: torch.Tensor, layer: int = 3) -> str:
    """A file of states made by hand."""
    save_file(
        {"states": states},
        path,
        {"format": "sipit-lite states 1", "model": "pocket-gpt2", "layer": str(layer)},
    )
    return str(path)


def bad_commands(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Every kind of bad input, and a piece of the line that it earns."""
    (folder / "text").write_text("no states")
    whole = states_file(folder / "whole", torch.randn(9, 256))
    (folder / "short").write_bytes(Path(whole).read_bytes()[:-50])
    save_file({"states": torch.zeros(1, 256)}, folder / "bare")
    return {
        "wrong width": (
            ["invert", states_file(folder / "a", torch.zeros(2, 255))],
            "(2, 255)",
        ),
        "zero positions": (
            ["invert", states_file(folder / "b", torch.zeros(0, 256))],
            "(0, 256)",
        ),
        "too many positions": (
            ["invert", states_file(folder / "c", torch.zeros(257, 256))],
            "(257, 256)",
        ),
        "integers": (
            [
                "invert",
                states_file(folder / "d", torch.zeros(2, 256, dtype=torch.int32)),
            ],
            "torch.int32",
        ),
        "NaN": (
            ["invert", states_file(folder / "e", torch.full((2, 256), torch.nan))],
            "NaN or Inf",
        ),
        "layer in the file": (
            ["invert", states_file(folder / "f", torch.zeros(2, 256), 8)],
            "got layer 8",
        ),
        "layer not in the file": (
            ["invert", whole, "--layer", "2"],
            "these states are of layers 3",
        ),
        "layer asked for": (["invert", "--text", "x", "--layer", "7"], "got layer 7"),
        "another model": (
            ["invert", states_file(folder / "g", torch.randn(2, 256))],
            "no token verifies",
        ),
        "no file": (["invert", str(folder / "none")], "there is no file"),
        "truncated": (
            ["invert", str(folder / "short")],
            "not a complete safetensors file",
        ),
        "not safetensors": (
            ["invert", str(folder / "text")],
            "not a complete safetensors file",
        ),
        "no fields": (["invert", str(folder / "bare")], "expected tensors 'layer.ℓ'"),
        "unknown model": (
            ["invert", "--text", "x", "--model", "no-such-model-anywhere"],
            "no-such-model-anywhere",
        ),
        "empty text": (
            ["capture", "", "-o", str(folder / "h")],
            "the text '' of 0 tokens",
        ),
        "unwritable": (
            ["capture", "x", "-o", str(folder / "none" / "i")],
            "no file can be written",
        ),
        "epsilon": (["invert", "--text", "x", "--epsilon", "-1"], "epsilon=-1.0"),
        "device": (["invert", "--text", "x", "--device", "abacus"], "device 'abacus'"),
        "no text": (
            ["capture", "abc\udcff", "-o", str(folder / "j")],
            "lone surrogates",
        ),
        "figure": (
            ["demo", "--figure", str(folder / "none" / "k.png")],
            "expected a name that ends in .png",
        ),
        "seed": (
            ["invert", "--text", "x", "--seed", str(2**70)],
            "got seed 1180591620717411303424",
        ),
        "too many prompts": (["collisions", "-n", "9999999"], "got count=9999999"),
        "prompt too long": (
            ["collisions", "-n", "2", "--length", "257"],
            "a prompt has 1 to 256 tokens",
        ),
        "layer to compare": (["collisions", "-n", "4", "--layers", "9"], "got layer 9"),
        "pairs": (
            ["collisions", "-n", "4", "--layers", "1", "--closest", "7"],
            "got k=7",
        ),
        "unwritable shards": (
            ["collisions", "-n", "4", "--shards", str(folder / "text" / "l")],
            "cannot be made",
        ),
        "packages": (
            ["invert", "--text", "x", "--weights", "fp4"],
            "pip install 'sipit-lite[quantised]'",
        ),
        "length without last": (
            ["invert", "--text", "x", "--length", "2"],
            "got --length without --last",
        ),
        "lens with last": (
            ["invert", "--text", "x", "--last", "--lens", "l"],
            "got --last with --lens",
        ),
        "all tokens with last": (
            ["invert", "--text", "x", "--last", "--certify"],
            "got --last with --certify",
        ),
        "empty with last": (
            ["invert", states_file(folder / "m", torch.zeros(0, 256)), "--last"],
            "(0, 256)",
        ),
        "NaN with last": (
            [
                "invert",
                states_file(folder / "n", torch.full((2, 256), torch.nan)),
                "--last",
            ],
            "got NaN",
        ),
        "no budget": (
            ["invert", "--text", "x", "--last", "--seconds", "0"],
            "got seconds=0.0",
        ),
        "no length": (
            ["invert", "--text", "x", "--last", "--length", "0"],
            "got length=0",
        ),
        "embeddings alone": (
            ["invert", "--text", "x", "--last", "--layer", "0"],
            "expected length=1",
        ),
        "no name": (["invert", "--text", "x", "--model", ""], "got model ''"),
    }


def test_bad_input_gets_one_line_and_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing on standard output, one line on standard error, exit code 2."""
    for case, (command, piece) in bad_commands(tmp_path).items():
        assert main(command if "--device" in command else [*command, *CPU]) == 2, case
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("inverting:")]
        assert out == "" and len(lines) == 1 and piece in lines[0], (case, out, err)


def test_ctrl_c_prints_the_prefix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 130 and what was verified."""
    import test_sipit

    monkeypatch.setitem(cli.POLICIES, "auto", test_sipit.StopsAt(1))
    assert main(["invert", "--text", "hidden states", "--layer", "2", *CPU]) == 130
    assert "interrupted after 1 verified tokens: 'h" in capsys.readouterr().err


@pytest.fixture
def quick_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The regression that reads the last token, fitted in a second in place of several."""
    small = functools.partial(laststate.Ends.fit, tokens=4000, features=32)
    monkeypatch.setattr(laststate.Ends, "fit", small)


def test_invert_from_the_last_state_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_ends: None
) -> None:
    """From a file with all rows, from one with the last row alone, and from a text: verified, as JSON too."""
    ids = torch.tensor([50, 2000])
    states = load(device="cpu").states(ids, 2)
    text = load(device="cpu").decode(ids)
    for name, rows in (("whole", states), ("row", states[-1:])):
        assert (
            main(
                [
                    "invert",
                    states_file(tmp_path / name, rows, 2),
                    "--last",
                    "--longest",
                    "4",
                    *CPU,
                ]
            )
            == 0
        )
        out, err = capsys.readouterr()
        assert out == text + "\n" and "verified: distance " in err.splitlines()[-1]
    command = [
        "invert",
        "--text",
        "hidden states",
        "--last",
        "--layer",
        "2",
        "--length",
        "2",
        "--json",
    ]
    assert main([*command, "--seconds", "60", "--restarts", "2", *CPU]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["text"] == "hidden states"
        and told["verified"] == [True, True]
        and told["layer"] == 2
    )
    assert (
        told["distance"][0] is None
        and told["distance"][1] <= told["radius"][1] < told["runner_up"][1]
    )


def test_a_last_state_of_no_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick_ends: None
) -> None:
    """One line with the closest prompt and its distance, exit code 2."""
    file = states_file(
        tmp_path / "noise",
        torch.randn(1, 256, generator=torch.Generator().manual_seed(0)),
        2,
    )
    assert (
        main(["invert", file, "--last", "--length", "2", "--seconds", "0.1", *CPU]) == 2
    )
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("inverting:")]
    assert (
        out == ""
        and len(lines) == 1
        and "no prompt was found whose last state is the observed one" in lines[0]
    )


def test_ctrl_c_prints_the_closest(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quick_ends: None,
) -> None:
    """Exit code 130, and the best so far, called not verified."""

    def pressed(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(laststate, "checked", pressed)
    assert (
        main(
            [
                "invert",
                "--text",
                "hidden states",
                "--last",
                "--layer",
                "2",
                "--length",
                "2",
                *CPU,
            ]
        )
        == 130
    )
    assert "stopped with 'hidden states' at distance" in capsys.readouterr().err


def test_unknown_options_end_with_code_2() -> None:
    """As every command does."""
    for command in (
        ["fly"],
        ["invert"],
        ["invert", "--text", "x", "--policy", "guess"],
        ["bench", "unknown"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 2


def test_collisions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command finds what the function finds, says no collision where there is none, and draws."""
    figure = tmp_path / "nearest.png"
    command = [
        "collisions",
        "-n",
        "40",
        "--length",
        "8",
        "--layers",
        "2",
        "6",
        "--closest",
        "3",
        "--exhaustive",
        "1",
    ]
    loaded, honest = [], cli.load
    monkeypatch.setattr(
        cli,
        "load",
        lambda *given, **options: (
            loaded.append(options["layers"]) or honest(*given, **options)
        ),
    )
    assert (
        main(
            [
                *command,
                "--json",
                "--figure",
                str(figure),
                "--shards",
                str(tmp_path / "shards"),
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    model = load("pocket-gpt2")
    asked = distinct(model.tokenizer, 40, 8, source="bundled")
    for row, x in zip(told["layers"], last_states(model, asked, [2, 6]), strict=True):
        assert row["minimum"] == pytest.approx(closest_pairs(x, 1).minimum, rel=1e-6)
        assert (
            row["compared"],
            row["collisions"],
            row["practical"],
            len(row["closest"]),
        ) == (780, 0, 0, 3)
    assert [row["layer"] for row in told["exhaustive"]] == [2, 6]
    assert all(
        row["compared"] == 4096 * 4095 // 2 and row["collisions"] == 0
        for row in told["exhaustive"]
    )
    assert (
        figure.stat().st_size > 1000 and len(list((tmp_path / "shards").iterdir())) == 1
    )
    assert main([*command[:5], "--layers", "5"]) == 0
    assert loaded == [6, 5], "blocks beyond the last layer are not loaded"
    assert "collisions: ℓ2 distance below 1e-6" in capsys.readouterr().out


def test_a_lens_is_fitted_once_and_read_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file appears, the second run reads it, and another layer refuses it in one line."""
    text = [torch.arange(first, first + 64) for first in range(0, 4032, 16)]
    small = functools.partial(Lens.fit, prompts=text, features=16)
    monkeypatch.setattr(
        cli.Lens, "fit", lambda model, layer, progress: small(model, layer)
    )
    command, path = (
        [
            "invert",
            "--text",
            "hidden states",
            "--lens",
            str(tmp_path / "lens.safetensors"),
        ],
        tmp_path,
    )
    assert (
        main([*command, "--layer", "2", *CPU]) == 0
        and (path / "lens.safetensors").exists()
    )
    monkeypatch.setattr(cli.Lens, "fit", None)
    assert main([*command, "--layer", "2", *CPU]) == 0
    assert capsys.readouterr().out.splitlines() == ["hidden states"] * 2
    assert main([*command, "--layer", "3", *CPU]) == 2
    assert "got a lens for layer 2; expected one for layer 3" in capsys.readouterr().err


def test_guesses_are_announced(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """States of another layer: without the option a refusal, with it the nearest tokens, all of them named."""
    file = states_file(
        tmp_path / "states.safetensors", load(device="cpu").states("hidden", 3), layer=2
    )
    assert main(["invert", file, *CPU]) == 2
    capsys.readouterr()
    assert main(["invert", file, "--on-fail", "nearest", "--json", *CPU]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert (
        found["verified"] == [False] * len(found["tokens"])
        and found["margin"][0] is None
    )
    assert told.err.strip().endswith(
        "positions " + ", ".join(map(str, range(len(found["tokens"]))))
    )
