"""States as people have them: after the norm, in other files, other shapes and formats."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModel, GPT2LMHeadModel

from sipit_lite import (
    LanguageModel,
    ModelError,
    NotVerified,
    StatesError,
    capture,
    cli,
    invert,
    invert_last,
    invert_many,
    last_states,
    load,
    read_states,
)
from sipit_lite.experiments.families import small
from sipit_lite.extensions.laststate import Ends

POCKET = Path(__file__).parents[2] / "sipit_lite" / "pocket_gpt2"
TEXT = "Read this."


@pytest.fixture(scope="module")
def hidden(pocket: LanguageModel) -> tuple[Tensor, ...]:
    """What transformers gives for the text: L + 1 tensors of shape (1, T, d)."""
    model = GPT2LMHeadModel.from_pretrained(POCKET, dtype=torch.float32).eval()
    ids = pocket.encode(TEXT)[None].cpu()
    with torch.no_grad():
        return model(ids, output_hidden_states=True).hidden_states


def test_states_after_the_final_norm(
    pocket: LanguageModel, hidden: tuple[Tensor, ...]
) -> None:
    """They are layer L + 1: inverted like others; as layer L they are refused, named."""
    normed = pocket.n_layers + 1
    assert torch.equal(pocket.states(TEXT, normed).cpu(), hidden[-1][0])
    assert invert(hidden[-1], pocket, normed).text == TEXT
    with pytest.raises(NotVerified, match=r"after the norm. that is layer 7; noisy"):
        invert(hidden[-1][0, :2], pocket, normed - 1)
    short = pocket.states("hidden", normed)[-1]
    ends = Ends.fit(pocket, normed, 1, tokens=2000, features=0)
    assert invert_last(short, pocket, normed, length=1, ends=ends).text == "hidden"
    with pytest.raises(ModelError, match=r"layers 0 .embeddings. to 6, and one after"):
        pocket.states(TEXT, normed + 1)


def test_they_are_captured_and_read_as_others(
    pocket: LanguageModel, hidden: tuple[Tensor, ...], tmp_path: Path
) -> None:
    """In a file of one layer more than the model has blocks, and in last states."""
    path = tmp_path / "s.safetensors"
    ids = pocket.encode(TEXT)
    with torch.no_grad(), capture(pocket.decoder, path, layers=[6, 7]):
        pocket.decoder(input_ids=ids[None])
    stored = read_states(path)
    torch.testing.assert_close(stored.at(7), hidden[-1][0])
    assert stored.invert(load(layers=7), 7).text == TEXT
    rows = last_states(pocket, [ids], [6, 7])
    torch.testing.assert_close(rows[1, 0], hidden[-1][0, -1])


def test_arrays_and_a_batch_of_one(
    pocket: LanguageModel, hidden: tuple[Tensor, ...]
) -> None:
    """Shape (1, T, d) and NumPy's arrays are what they look like; a batch is not."""
    for states in (hidden[2], hidden[2].numpy(), hidden[2][0].double().numpy()):
        assert invert(states, pocket, 2).text == TEXT
    for states in (hidden[2].repeat(2, 1, 1), np.zeros((2, 3, 256)), np.zeros(4, "O")):
        with pytest.raises(StatesError, match="got states of"):
            invert(states, pocket, 2)


def write(path: Path, kind: str, hidden: tuple[Tensor, ...]) -> Path:
    """One file for each way in which others store states."""
    if kind == "npy":
        path = path / "h.npy"
        np.save(path, hidden[2].numpy())
    elif kind == "pt":
        path = path / "h.pt"
        torch.save(hidden[2][0], path)
    elif kind == "tuple":
        path = path / "h.pt"
        torch.save(hidden, path)
    elif kind == "stack":
        path = path / "h.npy"
        np.save(path, torch.cat(hidden).numpy())
    elif kind == "vllm":
        path = path / "h.safetensors"
        rows = torch.stack([hidden[1][0], hidden[2][0]], 1)
        tokens = torch.arange(len(rows))
        save_file({"hidden_states": rows, "token_ids": tokens}, path)
    elif kind == "safetensors":
        path = path / "h.safetensors"
        save_file({"anything": hidden[2]}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "layers", "expected"),
    [
        ("npy", [2], [2]),
        ("pt", [2], [2]),
        ("tuple", None, [0, 1, 2, 3, 4, 5, 7]),
        ("tuple", [2], [0, 1, 2, 3, 4, 5, 7]),
        ("stack", None, [0, 1, 2, 3, 4, 5, 7]),
        ("vllm", [1, 2], [1, 2]),
        ("safetensors", [2], [2]),
    ],
)
def test_files_of_others(
    pocket: LanguageModel,
    hidden: tuple[Tensor, ...],
    tmp_path: Path,
    kind: str,
    layers: list[int] | None,
    expected: list[int],
) -> None:
    """Each is read, and gives back the prompt; what transformers gives last is L + 1."""
    stored = read_states(write(tmp_path, kind, hidden), layers)
    assert list(stored.states) == expected
    assert torch.equal(stored.at(2), hidden[2][0])
    assert stored.invert(pocket, 2).text == TEXT
    if 7 in expected:
        assert stored.invert(pocket, 7).text == TEXT


@pytest.mark.parametrize("kind", ["npy", "pt", "vllm"])
def test_files_that_do_not_say_their_layers(
    hidden: tuple[Tensor, ...], tmp_path: Path, kind: str
) -> None:
    """One line, with the number of them."""
    path = write(tmp_path, kind, hidden)
    count = 2 if kind == "vllm" else 1
    for layers in (None, [1, 2, 3]):
        with pytest.raises(StatesError, match=f"of {count} layers, without") as refusal:
            read_states(path, layers)
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_files_that_hold_more_than_tensors(tmp_path: Path) -> None:
    """Pickles are never run; a damaged file is named; each in one line."""
    torch.save({"a": Path("x")}, tmp_path / "h.pt")
    np.save(tmp_path / "h.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "cut.pt").write_bytes(b"PK")
    torch.save([], tmp_path / "empty.pt")
    for name in ("h.pt", "h.npy", "cut.pt", "none.npy", "empty.pt"):
        with pytest.raises(StatesError, match=f"got '.*{name}'") as refusal:
            read_states(tmp_path / name)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600


def test_the_command_line_reads_them(
    hidden: tuple[Tensor, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model that is named, since the file names none."""
    path = str(write(tmp_path, "npy", hidden))
    words = ["invert", path, "--layer", "2", "--device", "cpu"]
    assert cli.main([*words, "--model", "pocket-gpt2"]) == 0
    assert capsys.readouterr().out.strip() == TEXT
    assert cli.main(words) == 2
    assert "--model with the name of one" in capsys.readouterr().err
    assert cli.main(["invert", path, "--model", "pocket-gpt2"]) == 2
    assert "without their numbers; expected" in capsys.readouterr().err
    normed = str(write(tmp_path, "tuple", hidden))
    words = ["invert", normed, "--layer", "7", "--device", "cpu"]
    assert cli.main([*words, "--model", "pocket-gpt2"]) == 0
    assert capsys.readouterr().out.strip() == TEXT


def test_caches_in_the_place_of_states_are_named(
    pocket: LanguageModel, tmp_path: Path
) -> None:
    """All layers, one layer, and one in a file: the refusal says what reads them."""
    with torch.no_grad():
        cache = pocket.decoder(pocket.encode(TEXT)[None]).past_key_values
    values = cache.layers[2].values.cpu()
    np.save(tmp_path / "v.npy", values.numpy())
    stored = read_states(tmp_path / "v.npy", [2])
    for ask in (
        lambda: invert(cache, pocket, 2),
        lambda: invert(values, pocket, 2),
        lambda: stored.invert(pocket),
    ):
        with pytest.raises(StatesError, match="got states of") as refusal:
            ask()
        line = str(refusal.value)
        assert "through Leaked(model, 'values').rows" in line and "\n" not in line
    with pytest.raises(StatesError, match="shape") as refusal:
        invert(values[0, 0], pocket, 2)  # no cache, as far as one can see
    assert "Leaked" not in str(refusal.value)


def test_the_command_line_reads_what_leaked(
    pocket: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One layer of a cache as it is, or states of length one; --leaked says which."""
    ids = pocket.encode(TEXT)[None]
    with torch.no_grad():
        output = pocket.decoder(ids, use_cache=True, output_hidden_states=True)
    stored = output.past_key_values.layers[3]
    np.save(tmp_path / "values.npy", stored.values.cpu().numpy())
    torch.save(stored.keys.cpu(), tmp_path / "keys.pt")
    unit = torch.nn.functional.normalize(output.hidden_states[3][0].cpu(), dim=-1)
    save_file({"embeddings": unit}, tmp_path / "unit.safetensors")
    common = ["--layer", "3", "--model", "pocket-gpt2", "--device", "cpu"]
    for name in ("values.npy", "keys.pt", "unit.safetensors"):
        words = ["invert", str(tmp_path / name), *common]
        what = name.partition(".")[0]
        assert cli.main([*words, "--leaked", what]) == 0, name
        assert capsys.readouterr().out.strip() == TEXT
        assert cli.main(words) == 2
        out, err = capsys.readouterr()
        assert out == "" and "Leaked(model" in err and err.count("\n") == 1, err
    assert cli.main([*words, "--leaked", "logits"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "got logits" in err and err.count("\n") == 1, err
    search = ["--lens", "none", "--policy", "gradient", "--leaked", what]
    assert cli.main([*words, *search]) == 0
    assert capsys.readouterr().out.strip() == TEXT
    assert cli.main(["invert", "--text", TEXT, "--leaked", "values", *common]) == 0
    assert capsys.readouterr().out.strip() == TEXT
    assert cli.main([*words, "--leaked", "both"]) == 2
    assert "expected 'keys' or 'values'" in capsys.readouterr().err


def test_the_format_that_made_them_is_named(tmp_path: Path) -> None:
    """A plain ``from_pretrained`` keeps float16; compared in float32 it is refused."""
    # As pocket-gpt2 is stored, and smaller: float16 is slow on a CPU.
    small("GPT2", device="cpu").decoder.half().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path).eval()
    assert model.dtype == torch.float16
    ids = torch.tensor([7, 400, 7])
    with torch.no_grad():
        states = model(ids[None], output_hidden_states=True).hidden_states[1]
    expected = r"torch\.float16 numbers, torch\.float32 here: load\(name, dtype=torch"
    plain = load(tmp_path, device="cpu")
    for seen in (states, states.float()):
        with pytest.raises(NotVerified, match=expected):
            invert(seen, plain, 1)
    half = load(tmp_path, dtype=torch.float16, device="cpu")
    assert torch.equal(invert(states, half, 1).tokens, ids)


@pytest.mark.parametrize("kind", ["Jamba", "Qwen3Next", "Gemma4Text", "Mamba", "Rwkv"])
def test_hybrid_and_recurrent_models_are_refused(kind: str, tmp_path: Path) -> None:
    """By ``load``, in one line: their blocks read no cache of keys and values alone."""
    settings = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    settings |= {"intermediate_size": 48, "max_position_embeddings": 32}
    # By default hundreds of experts, and a second table of 262 144 tokens.
    settings |= {"num_experts": 4, "vocab_size_per_layer_input": 64}
    config = getattr(transformers, f"{kind}Config")(**settings)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="recurrent") as refusal:
        load(tmp_path, device="cpu")
    assert "\n" not in str(refusal.value)


def test_a_tokenizer_that_appends_a_token(pocket: LanguageModel) -> None:
    """It comes back as a token, stands in no text, and the text encodes to the same."""
    tokenizer = copy.deepcopy(pocket.tokenizer)
    [end] = tokenizer.convert_ids_to_tokens([1])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, 1)]
    )
    model = LanguageModel(pocket.decoder, tokenizer)
    ids = model.encode(TEXT)
    with torch.no_grad(), capture(model.decoder, tokenizer=tokenizer) as tape:
        model.decoder(input_ids=ids[None])
    stored = tape.captured()
    recovered = stored.invert(model)
    assert stored.begin is None and model.begin is None
    assert int(ids[-1]) == 1 and torch.equal(recovered.tokens, ids.cpu())
    assert recovered.text == TEXT and torch.equal(model.encode(recovered.text), ids)


def test_rows_of_a_padded_batch(pocket: LanguageModel) -> None:
    """With its mask, as book/package.md says; positions count from 0 in each."""
    texts = ["hidden states", "give back the prompt"]
    rows = [pocket.encode(text) for text in texts]
    length = max(map(len, rows))
    for side in ("left", "right"):
        ids = torch.zeros(2, length, dtype=torch.int64)
        mask = torch.zeros(2, length, dtype=torch.int64)
        for i, row in enumerate(rows):
            place = (
                slice(length - len(row), None) if side == "left" else slice(len(row))
            )
            ids[i, place] = row.cpu()
            mask[i, place] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        model = GPT2LMHeadModel.from_pretrained(POCKET, dtype=torch.float32).eval()
        with torch.no_grad():
            states = model(**inputs, output_hidden_states=True).hidden_states[3]
        outcomes = invert_many(states, pocket, 3, mask=mask)
        assert [outcome.text for outcome in outcomes] == texts
