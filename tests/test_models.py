"""States are those of untouched transformers models, at every layer; bad input gets a clear refusal."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedModel, T5Config, T5Model

from sipit_lite import LanguageModel, ModelError, load
from sipit_lite.models import POCKET, pick_device

NORMS = {"ln_f", "norm", "final_layer_norm"}


def reference(untouched: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """All layers from transformers: hidden_states below L, and what the final norm receives for L."""
    received = []
    norm = next(m for n, m in untouched.base_model.named_children() if n in NORMS)
    hook = norm.register_forward_hook(lambda module, inputs, output: received.append(inputs[0]))
    with torch.no_grad():
        states = untouched(ids[None], output_hidden_states=True).hidden_states
    hook.remove()
    return [h[0] for h in (*states[:-1], received[0])]


def test_states_are_those_of_transformers(family: tuple[PreTrainedModel, LanguageModel], prompt: Tensor) -> None:
    """Every family, every layer from 0 to L."""
    untouched, model = family
    expected = reference(untouched, prompt)
    assert len(expected) == model.n_layers + 1
    for layer, states in enumerate(expected):
        torch.testing.assert_close(model.states(prompt, layer), states)


def test_pocket_states_are_those_of_transformers(pocket: LanguageModel) -> None:
    """The bundled model through transformers' own class, every layer."""
    folder = Path(__file__).parent.parent / "sipit_lite" / "pocket_gpt2"
    untouched = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval().to(pocket.device)
    ids = pocket.encode("The states of every layer, before the final norm.")
    for layer, states in enumerate(reference(untouched, ids)):
        torch.testing.assert_close(pocket.states(ids, layer), states)


def test_a_batch_is_its_rows(family: tuple[PreTrainedModel, LanguageModel], prompt: Tensor) -> None:
    """Leading dimensions are batch dimensions."""
    model = family[1]
    rows = torch.stack([prompt, prompt.flip(0)]).expand(3, 2, -1)
    states = model.states(rows, 2)
    torch.testing.assert_close(states[1, 1], model.states(prompt.flip(0), 2))


def test_cutting_leaves_the_model_whole(pocket: LanguageModel) -> None:
    """The cut shares weights and changes nothing."""
    before = pocket.states("whole", pocket.n_layers)
    assert pocket.cut(1).h[0] is pocket.decoder.h[0]
    assert torch.equal(before, pocket.states("whole", pocket.n_layers))


def test_embeddings_are_what_the_first_block_sees(family: tuple[PreTrainedModel, LanguageModel]) -> None:
    """Scaled embeddings (Gemma) come scaled; layer 0 differs from them by a position term alone."""
    untouched, model = family
    ids = torch.arange(5, device=model.device)
    with torch.no_grad():
        torch.testing.assert_close(model.embeddings[ids], untouched.get_input_embeddings()(ids))


def test_round_trip_of_text(pocket: LanguageModel) -> None:
    """Byte-level BPE loses nothing."""
    for text in ("plain", "tabs\tand\n\nlines  ", "naïve 🙂 привет 世界", " leading space"):
        assert pocket.decode(pocket.encode(text)) == text


def test_random_initialisation_is_seeded() -> None:
    """The same seed gives the same weights, and the caller's random numbers are left alone."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two, other = (load(POCKET, random_init=True, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.embeddings, two.embeddings) and not torch.equal(one.embeddings, other.embeddings)
    assert not torch.equal(one.embeddings, load(POCKET).embeddings)


def test_gpt2_at_initialisation_needs_no_file() -> None:
    """The 124M architecture of Theorem 2.2, without any download."""
    model = load("gpt2", random_init=True)
    assert (model.n_layers, model.d_model, model.vocab_size, model.n_positions) == (12, 768, 50257, 1024)
    if model.tokenizer is None:
        assert model.decode(torch.tensor([5, 7])) == "5 7"
        with pytest.raises(ModelError, match=r"without a readable tokenizer: got text, expected token ids"):
            model.encode("text")


@pytest.mark.parametrize("name", ["no-such-model-anywhere", "folder", "truncated"])
def test_unknown_models_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name not in reach, an empty folder, and truncated weights: the name and what was expected are quoted."""
    monkeypatch.chdir(tmp_path)
    source = Path(__file__).parent.parent / "sipit_lite" / "pocket_gpt2"
    if name != "no-such-model-anywhere":
        Path(name).mkdir()
    if name == "truncated":
        Path(name, "config.json").write_bytes((source / "config.json").read_bytes())
        Path(name, "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match=f"got model '{name}'; expected 'pocket-gpt2', a folder") as refusal:
        load(name)
    assert "\n" not in str(refusal.value)


def test_environment_variable_names_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIPIT_LITE_MODEL switches the default, and only the default."""
    monkeypatch.setenv("SIPIT_LITE_MODEL", "no-such-model-anywhere")
    with pytest.raises(ModelError, match="no-such-model-anywhere"):
        load()
    assert load(POCKET).name == POCKET


def test_missing_weights_are_not_drawn_at_random(tmp_path: Path) -> None:
    """A configuration with more blocks than the file has weights for."""
    source = Path(__file__).parent.parent / "sipit_lite" / "pocket_gpt2"
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text((source / "config.json").read_text().replace('"n_layer": 6', '"n_layer": 8'))
    with pytest.raises(ModelError, match=r"without 24 of its weights, among them 'h\.6\."):
        load(tmp_path)


def test_other_structures_are_refused(tmp_path: Path) -> None:
    """An encoder-decoder is no decoder with one list of blocks."""
    T5Model(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="expected"):
        load(tmp_path)


def test_a_folder_without_a_tokenizer_takes_ids(tmp_path: Path) -> None:
    """States of ids work; a text is refused."""
    GPT2Model(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=5)).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.states(torch.tensor([1, 2]), 1).shape == (2, 8) and model.decode(torch.tensor([1, 2])) == "1 2"
    with pytest.raises(ModelError, match="without a readable tokenizer"):
        model.encode("text")


@pytest.mark.parametrize("layer", [-1, 7, True])
def test_layers_out_of_range_are_refused(pocket: LanguageModel, layer: int) -> None:
    """The message has the layer received and the range expected."""
    with pytest.raises(ModelError, match=re.escape(f"got layer {layer!r}; pocket-gpt2 has layers 0 (embeddings) to 6")):
        pocket.states("text", layer)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), "shape (0,); a prompt has 1 to 256 tokens"),
        (torch.zeros(257, dtype=torch.int64), "shape (257,); a prompt has 1 to 256 tokens"),
        (torch.zeros(3), "ids of torch.float32; token ids are integers"),
        (torch.tensor([5, -1]), "ids from -1 to 5; tokens are 0 to 4095"),
        (torch.tensor([4096]), "ids from 4096 to 4096; tokens are 0 to 4095"),
    ],
)
def test_bad_ids_are_refused(pocket: LanguageModel, ids: Tensor, message: str) -> None:
    """Empty, too long, of the wrong type, outside the vocabulary."""
    with pytest.raises(ModelError, match=re.escape(message)):
        pocket.states(ids, 1)


def test_empty_text_and_unknown_device_are_refused(pocket: LanguageModel) -> None:
    """No prompt has zero tokens; a device out of reach is named."""
    with pytest.raises(ModelError, match="got the text '' of 0 tokens"):
        pocket.encode("")
    with pytest.raises(ModelError, match="lone surrogates"):
        pocket.encode("abc\udcff")
    for device in ("abacus", "meta"):
        with pytest.raises(ModelError, match=f"got device '{device}'"):
            pick_device(device)
