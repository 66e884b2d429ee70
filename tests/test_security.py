"""What the section on security of book/package.md promises, sentence by sentence."""

import ast
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2Model

import sipit_lite as sl
from sipit_lite import cli
from sipit_lite.io.text import prompts
from sipit_lite.model import LanguageModel

PACKAGE = Path(__file__).parent.parent / "sipit_lite"


class Bomb:
    """What a pickle can do."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_no_call_trusts_remote_code() -> None:
    """The one setting is False, and all calls of transformers that load take it."""
    seen = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value == "trust_remote_code":
                seen.append(path.name)
            if not isinstance(node, ast.Call) or not isinstance(
                node.func, ast.Attribute
            ):
                continue
            if node.func.attr in ("from_pretrained", "from_config"):
                spread = {ast.unparse(k.value) for k in node.keywords if k.arg is None}
                assert spread & {"OURS", "common", "options"}, ast.unparse(node)
    # Beside the setting: the words by which a refusal of transformers is known.
    assert seen == ["loading.py", "loading.py"]
    from sipit_lite.io.loading import OURS

    assert OURS == {"trust_remote_code": False}


def test_nothing_of_torch_is_unpickled() -> None:
    """No call of ours could run a pickle that is more than weights."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("weights_only") == "True", path


def test_safetensors_come_before_a_pickle(tmp_path: Path) -> None:
    """Both in one folder: the pickle is not opened."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    decoder = GPT2Model(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    decoder.save_pretrained(tmp_path)
    torch.save({"wte.weight": Bomb(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    model = sl.load(tmp_path, device="cpu")
    assert torch.equal(model.embeddings, decoder.wte.weight.detach())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("named", ["gpt2", "/some/folder", "../theirs"])
def test_a_states_file_loads_no_model(
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not even a name of the hub; with --model the one that is named there."""
    loaded = []
    honest = sl.load

    def load(name: str | None, **options: object) -> LanguageModel:
        loaded.append(name)
        return honest("pocket-gpt2", device="cpu")

    path = tmp_path / "states"
    states = sl.load(device="cpu").states("theirs", 1)
    metadata = {"format": "sipit-lite states 2", "model": named}
    save_file({"layer.1": states}, path, metadata)
    monkeypatch.setattr(cli.sl, "load", load, raising=False)
    assert cli.main(["invert", str(path)]) == 2
    assert loaded == [] and "expected --model" in capsys.readouterr().err
    assert cli.main(["invert", str(path), "--model", "mine"]) == 0
    assert loaded == ["mine"] and capsys.readouterr().out == "theirs\n"


def test_nothing_is_downloaded_without_a_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No address is looked up and no connection made, whatever is done offline."""

    def refuse(*given: object, **options: object) -> None:
        raise AssertionError(given)

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = sl.load(device="cpu")
    model.decoder.save_pretrained(tmp_path)
    folder = sl.load(tmp_path, device="cpu")
    assert folder.tokenizer is None and folder.vocab_size == model.vocab_size
    text = prompts(model.tokenizer, "prose", 16)
    lens = sl.Lens.fit(model, 1, prompts=text, tokens=3000, features=0)
    states = sl.write_states(tmp_path / "s", model, "hidden states", 1).at(1)
    assert sl.invert(states, model, 1, lens=lens).text == "hidden states"
