"""States are those of untouched transformers models; bad input is refused clearly."""

import copy
import io
import json
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    MambaConfig,
    MambaModel,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    T5Config,
    T5Model,
    modeling_utils,
)

from sipit_lite import (
    LanguageModel,
    ModelError,
    load,
)
from sipit_lite.io import loading
from sipit_lite.io.capture import tapped
from sipit_lite.io.loading import POCKET, pick_device

NORMS = {"ln_f", "norm", "final_layer_norm"}


def reference(untouched: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """All layers from transformers: for L, what the final norm receives."""
    received = []
    norm = next(m for n, m in untouched.base_model.named_children() if n in NORMS)
    hook = norm.register_forward_hook(
        lambda module, inputs, output: received.append(inputs[0])
    )
    with torch.no_grad():
        states = untouched(ids[None], output_hidden_states=True).hidden_states
    hook.remove()
    return [h[0] for h in (*states[:-1], received[0])]


def test_states_are_those_of_transformers(
    family: tuple[PreTrainedModel, LanguageModel], prompt: Tensor
) -> None:
    """Every family, every layer from 0 to L."""
    untouched, model = family
    expected = reference(untouched, prompt)
    assert len(expected) == model.n_layers + 1
    for layer, states in enumerate(expected):
        torch.testing.assert_close(model.states(prompt, layer), states)


def test_pocket_states_are_those_of_transformers(pocket: LanguageModel) -> None:
    """The bundled model through transformers' own class, every layer."""
    folder = Path(__file__).parent.parent / "sipit_lite" / "pocket_gpt2"
    untouched = (
        GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
        .eval()
        .to(pocket.device)
    )
    ids = pocket.encode("The states of every layer, before the final norm.")
    for layer, states in enumerate(reference(untouched, ids)):
        torch.testing.assert_close(pocket.states(ids, layer), states)


def test_a_batch_is_its_rows(
    family: tuple[PreTrainedModel, LanguageModel], prompt: Tensor
) -> None:
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


def test_embeddings_are_what_the_first_block_sees(
    family: tuple[PreTrainedModel, LanguageModel],
) -> None:
    """Scaled embeddings (Gemma) come scaled."""
    untouched, model = family
    ids = torch.arange(5, device=model.device)
    with torch.no_grad():
        torch.testing.assert_close(
            model.embeddings[ids], untouched.get_input_embeddings()(ids)
        )


def test_round_trip_of_text(pocket: LanguageModel) -> None:
    """Byte-level BPE loses nothing."""
    for text in (
        "plain",
        "tabs\tand\n\nlines  ",
        "naïve 🙂 привет 世界",
        " leading space",
    ):
        assert pocket.decode(pocket.encode(text)) == text


def test_random_initialisation_is_seeded() -> None:
    """The same seed, the same weights; the caller's random numbers are left alone."""
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two, other = (load(POCKET, random_init=True, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(one.embeddings, two.embeddings) and not torch.equal(
        one.embeddings, other.embeddings
    )
    assert not torch.equal(one.embeddings, load(POCKET).embeddings)


def test_gpt2_at_initialisation_needs_no_file() -> None:
    """The 124M architecture of Theorem 2.2, without any download."""
    model = load("gpt2", random_init=True)
    assert (model.n_layers, model.d_model, model.vocab_size, model.n_positions) == (
        12,
        768,
        50257,
        1024,
    )
    if model.tokenizer is None:
        assert model.decode(torch.tensor([5, 7])) == "5 7"
        with pytest.raises(
            ModelError,
            match=r"got text; gpt2 at .* came without a readable tokenizer",
        ):
            model.encode("text")


@pytest.mark.parametrize("name", ["no-such-model-anywhere", "folder", "truncated"])
def test_unknown_models_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in reach, an empty folder, truncated weights: the name is quoted."""
    monkeypatch.chdir(tmp_path)
    source = Path(__file__).parent.parent / "sipit_lite" / "pocket_gpt2"
    if name != "no-such-model-anywhere":
        Path(name).mkdir()
    if name == "truncated":
        Path(name, "config.json").write_bytes((source / "config.json").read_bytes())
        Path(name, "model.safetensors").write_bytes(
            (source / "model.safetensors").read_bytes()[:1000]
        )
    with pytest.raises(
        ModelError, match=f"got model '{name}'; expected 'pocket-gpt2', 'smollm2'"
    ) as refusal:
        load(name)
    assert "\n" not in str(refusal.value)


def test_environment_variable_names_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIPIT_LITE_MODEL switches the default, and only the default."""
    monkeypatch.setenv("SIPIT_LITE_MODEL", "no-such-model-anywhere")
    with pytest.raises(ModelError, match="no-such-model-anywhere"):
        load()
    assert load(POCKET).name == POCKET


def test_missing_weights_are_not_drawn_at_random(tmp_path: Path) -> None:
    """A configuration with more blocks than the file has weights for."""
    source = Path(__file__).parent.parent / "sipit_lite" / "pocket_gpt2"
    (tmp_path / "model.safetensors").write_bytes(
        (source / "model.safetensors").read_bytes()
    )
    (tmp_path / "config.json").write_text(
        (source / "config.json").read_text().replace('"n_layer": 6', '"n_layer": 8')
    )
    with pytest.raises(
        ModelError, match=r"without 24 of its weights, among them 'h\.6\."
    ):
        load(tmp_path)


def test_other_structures_are_refused(tmp_path: Path) -> None:
    """A sequence-to-sequence model, an encoder, others without such blocks."""
    T5Model(
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "a")
    with pytest.raises(
        ModelError,
        match=r"a sequence-to-sequence model \(t5\); expected a decoder-only",
    ):
        load(tmp_path / "a")
    sizes = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    encoder = ModernBertConfig(
        vocab_size=9, **sizes, pad_token_id=0, max_position_embeddings=9
    )
    ModernBertModel(encoder).save_pretrained(tmp_path / "b")
    with pytest.raises(
        ModelError, match=r"whose states move by .* expected a causal decoder"
    ):
        load(tmp_path / "b")
    BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained(tmp_path / "c")
    with pytest.raises(
        ModelError,
        match=r"got BertModel with 0 lists of 2 blocks, 0 norms of width 8 .* expected",
    ):
        load(tmp_path / "c")
    MambaModel(
        MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2)
    ).save_pretrained(tmp_path / "d")
    with pytest.raises(
        ModelError,
        match=r"got MambaModel with 1 lists .* and no max_position_embeddings; ",
    ):
        load(tmp_path / "d")


def test_a_gated_model_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The licence and the token are named, and whether a token was sent."""

    def gated(*_: object, **__: object) -> None:
        reply = httpx.Response(401, request=httpx.Request("GET", "https://example.org"))
        raise OSError("You are trying to access a gated repo.") from GatedRepoError(
            "gated", response=reply
        )

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", gated)
    for token, piece in ((None, "not set"), ("secret", "a token was sent")):
        monkeypatch.setattr(
            loading.huggingface_hub, "get_token", lambda token=token: token
        )
        with pytest.raises(
            ModelError,
            match=f"which is gated; expected an account .* HF_TOKEN .{piece}",
        ) as refusal:
            load("meta-llama/Llama-3.1-8B")
        assert "secret" not in str(refusal.value)


def test_a_tokenizer_of_another_model_is_refused(
    tmp_path: Path, pocket: LanguageModel
) -> None:
    """Its tokens go beyond the embeddings: one is quoted, none is clipped."""
    GPT2Model(
        GPT2Config(vocab_size=99, n_embd=8, n_layer=1, n_head=2, n_positions=9)
    ).save_pretrained(tmp_path)
    pocket.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"got token \d+; .* has 99: tokenizer and model disagree"
    ):
        load(tmp_path).encode("hidden states")


def test_layers_left_out_are_never_loaded(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks of six: the same states, and none of the rest was read."""
    read: list[str] = []

    class Told:
        """An open file, or the slice of a weight, that says what was read."""

        def __init__(self, inner: object, name: str = ""):
            self.inner, self.name = inner, name

        def __getattr__(self, name: str) -> object:
            return getattr(self.inner, name)

        def __getitem__(self, index: object) -> Tensor:
            read.append(self.name)
            return self.inner[index]

        def get_slice(self, name: str) -> "Told":
            return Told(self.inner.get_slice(name), name)

    honest = modeling_utils.safe_open
    with monkeypatch.context() as patch:
        patch.setattr(
            modeling_utils,
            "safe_open",
            lambda *given, **options: Told(honest(*given, **options)),
        )
        some = load(POCKET, layers=3)
    assert some.n_layers == 3 and len(some.decoder.h) == 3
    assert "transformer.h.2.ln_1.weight" in read and not [
        name for name in read if re.search(r"\.h\.[345]\.", name)
    ]
    for layer in range(4):
        assert torch.equal(
            some.states("hidden states", layer), pocket.states("hidden states", layer)
        )
    assert load(POCKET, layers=0).n_layers == 1, (
        "layer 0 is what enters the first block, so that one stays"
    )
    for layers in (8, -1, True):
        with pytest.raises(
            ModelError,
            match=f"got layer {layers} as the last to keep; the model has layers 0",
        ):
            load(POCKET, layers=layers)


def test_layers_left_out_of_every_family(
    family: tuple[PreTrainedModel, LanguageModel], prompt: Tensor
) -> None:
    """Patterns of local and global layers are cut with the blocks."""
    model = family[1]
    some = load(model.name, layers=2)
    assert some.n_layers == 2 and torch.equal(
        some.states(prompt, 2), model.states(prompt, 2)
    )


def test_memory_is_told_and_checked_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line comes first; what does not fit is refused, and no weight is read."""
    config = GPT2Config(vocab_size=9, n_embd=64, n_layer=4, n_head=2, n_positions=9)
    untouched = GPT2Model(config)
    untouched.save_pretrained(tmp_path)
    size = loading.footprint(config, torch.float32, torch.device("cpu"))
    assert (
        size.parameters == sum(p.numel() for p in untouched.parameters())
        and size.bytes == 4 * size.parameters
    )
    quantised = loading.footprint(config, torch.float32, torch.device("cpu"), 8)
    assert size.bytes > quantised.bytes
    load(tmp_path, device="cpu", progress=True)
    assert f"{size.parameters:,} parameters, 4 blocks, take" in capsys.readouterr().err
    free = SimpleNamespace(available=size.bytes - 1)
    monkeypatch.setattr(loading.psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(
        loading, "_stored", lambda *_: pytest.fail("the weights were read")
    )
    with pytest.raises(
        ModelError,
        match=r"expected one that fits: dtype=torch\.bfloat16, layers=",
    ):
        load(tmp_path, device="cpu")


def test_out_of_memory_is_an_answer(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for and what may fit, in place of a traceback of the allocator."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LanguageModel, "cut", lambda self, layer: full)
    with pytest.raises(
        ModelError,
        match="got 2 prompts of 3 tokens, which do not fit into memory; expected fewer",
    ):
        pocket.states(torch.zeros(2, 3, dtype=torch.int64), 4)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()]
)
@pytest.mark.parametrize(("place", "name"), [(loading, "_stored"), (GPT2Model, "to")])
def test_out_of_memory_while_loading(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: object,
    name: str,
    error: Exception,
) -> None:
    """The layers and the format that fit are named, in reading and in moving."""
    GPT2Model(
        GPT2Config(vocab_size=9, n_embd=64, n_layer=4, n_head=2, n_positions=9)
    ).save_pretrained(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(place, name, full)
    with pytest.raises(
        ModelError,
        match=r"out of memory: .* take .* one that fits: dtype=torch\.bfloat16",
    ):
        load(tmp_path, device="cpu")


def test_options_reach_transformers_as_they_are(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Format, device map, quantisation; weights stay where transformers put them."""
    given, quantised = {}, BitsAndBytesConfig(load_in_8bit=True)

    def stored(place: str, **options: object) -> tuple[PreTrainedModel, dict]:
        given.update(options)
        return copy.deepcopy(pocket.decoder), {"missing_keys": []}

    monkeypatch.setattr(loading.AutoModel, "from_pretrained", stored)
    monkeypatch.setattr(
        type(pocket.decoder), "to", lambda *_: pytest.fail("the model was moved")
    )
    load(
        POCKET,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
        quantization_config=quantised,
    )
    assert (given["dtype"], given["device_map"]) == (torch.bfloat16, {"": "cpu"})
    assert given["quantization_config"] is quantised


def test_a_model_that_accelerate_has_spread(pocket: LanguageModel) -> None:
    """Its forward is bound to the whole model: the cut must not run that one."""
    spread = copy.copy(pocket.decoder)
    spread._modules = dict(pocket.decoder._modules)
    spread.forward, spread._hf_hook = pocket.decoder.forward, object()
    model = LanguageModel(spread, pocket.tokenizer, name="spread")
    assert torch.equal(
        model.states("hidden states", 2), pocket.states("hidden states", 2)
    )


def test_options_that_need_more_packages_say_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without accelerate, a device map is refused with the command that installs it."""
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setattr(
        "transformers.modeling_utils.is_accelerate_available",
        lambda *_: False,
        raising=False,
    )
    monkeypatch.setattr(
        "transformers.integrations.accelerate.is_accelerate_available",
        lambda *_: False,
        raising=False,
    )
    with pytest.raises(ModelError, match=r"pip install 'sipit-lite\[quantised\]'"):
        load(POCKET, device_map="auto")


def test_a_folder_without_a_tokenizer_takes_ids(tmp_path: Path) -> None:
    """States of ids work; a text is refused."""
    GPT2Model(
        GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=5)
    ).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert (
        model.states(torch.tensor([1, 2]), 1).shape == (2, 8)
        and model.decode(torch.tensor([1, 2])) == "1 2"
    )
    with pytest.raises(ModelError, match="without a readable tokenizer"):
        model.encode("text")


@pytest.mark.parametrize("layer", [-1, 8, True])
def test_layers_out_of_range_are_refused(pocket: LanguageModel, layer: int) -> None:
    """The message has the layer received and the range expected."""
    with pytest.raises(
        ModelError,
        match=re.escape(
            f"got layer {layer!r}; pocket-gpt2 has layers 0 (embeddings) to 6"
        ),
    ):
        pocket.states("text", layer)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), "shape (0,); a prompt has 1 to 256 tokens"),
        (
            torch.zeros(257, dtype=torch.int64),
            "shape (257,); a prompt has 1 to 256 tokens",
        ),
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


# Models in memory


class Wrapped(nn.Module):
    """What PEFT makes of a model, as far as it matters here."""

    def __init__(self, inner: PreTrainedModel):
        super().__init__()
        self.inner = inner

    def get_base_model(self) -> PreTrainedModel:
        return self.inner


@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: x.get_decoder(), lambda x: Wrapped(x)]
)
def test_any_model_in_memory(form: object) -> None:
    """Its unembedding, wrapper, mode and gradients do not matter, and stay."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2}
    untouched = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.5))
    ids = torch.tensor([5, 6, 7])
    expected = reference(untouched.eval(), ids)
    model = LanguageModel(form(untouched.train()))
    for layer in range(3):
        torch.testing.assert_close(model.states(ids, layer), expected[layer])
    assert all(part.training for part in untouched.modules())
    assert all(weight.requires_grad for weight in untouched.parameters())
    assert not model.states(ids, 2).requires_grad
    assert model.name == "GPT2Model" and model.decode(ids) == "5 6 7"
    assert torch.equal(model.vocabulary, torch.arange(50)) and model.measured == {}
    assert "\n" not in repr(model) and "GPT2Model" in repr(model)


def test_what_is_no_model_is_refused(pocket: LanguageModel) -> None:
    """In one line, which does not quote the module; and names are for ``load``."""
    for wrong in ("gpt2", nn.Linear(2, 2), pocket, None):
        kind = type(wrong).__name__
        with pytest.raises(ModelError, match=f"got an object {kind}; ") as refusal:
            LanguageModel(wrong)
        assert "\n" not in str(refusal.value)
    with pytest.raises(ModelError, match=r"got a model in memory; .* takes it$"):
        load(pocket.decoder)


# Code of others


def test_code_that_comes_with_a_model_never_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is asked, whatever stands on standard input."""
    ours = {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}
    config = {"model_type": "theirs", "auto_map": ours}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\nmy prompt\n"))
    with pytest.raises(ModelError, match="with code of its own, never run") as refusal:
        load(tmp_path)
    assert "\n" not in str(refusal.value) and sys.stdin.tell() == 0
    assert not (tmp_path / "ran").exists()


class Bomb:
    """What a pickle can do."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_of_more_than_weights_is_refused(tmp_path: Path) -> None:
    """In one line, and it has not run."""
    GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2).save_pretrained(tmp_path)
    torch.save({"wte.weight": Bomb(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="a pickle of more than weights") as refusal:
        load(tmp_path)
    assert "\n" not in str(refusal.value) and not (tmp_path / "ran").exists()


# What belongs to the caller


def test_loading_changes_nothing_global() -> None:
    """Neither the precision of products nor, from several threads, the verbosity."""
    verbosity = loading.logging.get_verbosity()
    bars = loading.logging.is_progress_bar_enabled()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert loading.logging.get_verbosity() == verbosity
    assert loading.logging.is_progress_bar_enabled() == bars


def test_messages_quote_little_of_a_prompt(pocket: LanguageModel) -> None:
    """At most 40 characters: it may be a secret."""
    with pytest.raises(ModelError) as refusal:
        pocket.encode("a" * 60 + "\udcff")
    assert "a" * 39 in str(refusal.value) and "a" * 41 not in str(refusal.value)


@pytest.mark.parametrize("ends", ["BEGIN $A END", "$A END", "BEGIN $A", "$A"])
def test_the_text_is_the_prompt(pocket: LanguageModel, ends: str) -> None:
    """What a tokenizer puts at either end is in the ids, and not in the text."""
    tokenizer = copy.deepcopy(pocket.tokenizer)
    begin, end = tokenizer.convert_ids_to_tokens([0, 1])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=ends.replace("BEGIN", begin).replace("END", end),
        special_tokens=[(begin, 0), (end, 1)],
    )
    model = LanguageModel(pocket.decoder, tokenizer)
    ids = model.encode("hidden states")
    assert model.begin == (0 if "BEGIN" in ends else None)
    assert len(ids) == len(pocket.encode("hidden states")) + len(ends.split()) - 1
    assert model.decode(ids) == "hidden states"


def test_taps_see_passes_of_their_thread_alone(pocket: LanguageModel) -> None:
    """Another thread's pass over the same blocks, amid ours, is not kept."""
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), tapped(pocket, [0, 2]) as states:
        pocket.cut(2)(inputs_embeds=pocket.embeddings[ids])
        other = threading.Thread(target=pocket.states, args=("another prompt", 3))
        other.start()
        other.join()
    assert states[0].shape == (1, 3, 256)
    torch.testing.assert_close(states[2][0], pocket.states(ids[0], 2))
