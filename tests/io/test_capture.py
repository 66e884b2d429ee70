"""States of a running model survive the disk, without the prompt; bad files do not."""

import copy
import os
import re
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sipit_lite import (
    Captured,
    LanguageModel,
    NotVerified,
    StatesError,
    capture,
    load,
    read_states,
    write_states,
)
from sipit_lite.experiments.families import small

TEXT = "Nobody should read this in the file."
SHORT = "Nobody"  # where all tokens are tried
POCKET = Path(__file__).parents[2] / "sipit_lite" / "pocket_gpt2"
# What somebody else's program does: transformers alone, and one line of ours around it.
PROGRAM = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from sipit_lite import capture
folder, place = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("A running model leaks", return_tensors="pt")
for dtype in ("float32", "bfloat16"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    with capture(model, f"{place}/{dtype}", layers=[1, 6]):
        answer = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    print(*answer[0].tolist())
"""


@pytest.fixture
def untouched() -> PreTrainedModel:
    """The bundled model in the hands of transformers alone."""
    return GPT2LMHeadModel.from_pretrained(POCKET, dtype=torch.float32).eval()


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.float16, torch.bfloat16])
def test_round_trip(
    pocket: LanguageModel, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    """What comes back is what was captured, in the format that was asked for."""
    written = write_states(
        tmp_path / "s.safetensors", pocket, TEXT, [6, 3], dtype=dtype
    )
    stored = read_states(tmp_path / "s.safetensors")
    for layer in (3, 6):
        assert torch.equal(
            stored.at(layer),
            pocket.states(TEXT, layer).cpu().to(dtype or torch.float32),
        )
    for one in (written, stored):
        assert (one.model, *one.states, one.begin) == ("pocket-gpt2", 3, 6, None)
        assert one.passes == (len(stored.at(3)),)


def test_eight_bits_come_with_their_scale(
    pocket: LanguageModel, tmp_path: Path
) -> None:
    """Each number is within half the scale of what it was; the prompt comes back."""
    stored = write_states(
        tmp_path / "s.safetensors", pocket, SHORT, 6, dtype=torch.int8
    )
    stored = read_states(tmp_path / "s.safetensors")
    exact = pocket.states(SHORT, 6).cpu()
    off = (stored.at(6) * stored.scales[6][:, None] - exact).abs()
    assert stored.at(6).dtype == torch.int8 and bool(
        (off <= stored.scales[6][:, None] * 0.5001).all()
    )
    assert stored.invert(pocket).text == SHORT


def test_another_process_and_its_generation(tmp_path: Path) -> None:
    """What another process captured as it generated: all tokens but the last."""
    command = [sys.executable, "-c", PROGRAM, str(POCKET), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answers = done.stdout.splitlines()
    for dtype, answer in zip(("float32", "bfloat16"), answers, strict=True):
        model = load(device="cpu", dtype=getattr(torch, dtype))
        stored = read_states(tmp_path / dtype)
        found = stored.invert(model)
        assert found.tokens.tolist() == [int(token) for token in answer.split()][:-1]
        assert found.layer == 1
        assert stored.passes == (len(found.tokens) - 4, 1, 1, 1, 1)


def test_every_family_is_captured_as_it_runs(
    family: tuple[PreTrainedModel, LanguageModel], prompt: Tensor
) -> None:
    """All layers of an untouched model in one pass: our states, and the prompt."""
    untouched, model = family
    with torch.no_grad(), capture(untouched, layers=range(4)) as tape:
        untouched(prompt[None])
    stored = tape.captured()
    for layer in range(4):
        torch.testing.assert_close(
            stored.at(layer).to(model.device), model.states(prompt, layer)
        )
    assert torch.equal(stored.invert(model, 3).tokens, prompt.cpu())


def test_the_cheapest_layer_that_does_not_refuse() -> None:
    """The lowest; where no token verifies, the next; the last refusal is raised."""
    model = small("GPT2", device="cpu")
    ids = torch.tensor([5, 6, 7])
    good = {layer: model.states(ids, layer) for layer in (0, 2, 3)}
    assert Captured(good, "small").invert(model).layer == 0
    noise = {layer: torch.randn_like(x) for layer, x in good.items()}
    spoiled = Captured(good | {0: noise[0]}, "small")
    found = spoiled.invert(model)
    assert found.layer == 2 and torch.equal(found.tokens, ids)
    with pytest.raises(NotVerified):
        spoiled.invert(model, 0)
    with pytest.raises(NotVerified):
        Captured(noise, "small").invert(model)
    expected = "got layer 1; these states are of layers 0, 2, 3"
    with pytest.raises(StatesError, match=expected):
        Captured(good, "small").invert(model, 1)
    with pytest.raises(StatesError, match="without states"):
        Captured({}, "small").invert(model)


def with_begin(folder: Path, begin: int) -> LanguageModel:
    """A small model whose tokenizer puts a begin-of-text token first."""
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(9)}, unk_token="t0"))
    words.post_processor = TemplateProcessing(
        single=f"t{begin} $A", special_tokens=[(f"t{begin}", begin)]
    )
    GPT2LMHeadModel(
        GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2, n_positions=9)
    ).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", bos_token=f"t{begin}"
    ).save_pretrained(folder)
    return load(folder)


def test_the_begin_of_text_token(tmp_path: Path) -> None:
    """Recovered as any token, in the file, not in the text; another is refused."""
    one, other = with_begin(tmp_path / "a", 3), with_begin(tmp_path / "b", 4)
    path = tmp_path / "s.safetensors"
    assert (
        one.begin == 3
        and write_states(path, one, "t7", 2).begin == read_states(path).begin == 3
    )
    found = read_states(path).invert(one)
    assert found.tokens.tolist() == [
        3,
        *one.tokenizer("t7", add_special_tokens=False)["input_ids"],
    ]
    assert found.text == "t7" and torch.equal(
        one.encode(found.text).cpu(), found.tokens
    )
    with pytest.raises(
        StatesError,
        match=r"begin-of-text token 3; the tokenizer of .* puts token 4 first",
    ):
        read_states(path).invert(other)
    with pytest.raises(
        StatesError,
        match="begin-of-text token 3; the tokenizer of pocket-gpt2 puts none first",
    ):
        read_states(path).invert(load())
    with torch.no_grad(), capture(one.decoder, tokenizer=one.tokenizer) as tape:
        one.decoder(input_ids=one.encode("t7")[None])
    assert tape.captured().begin == 3


def test_neither_text_nor_ids(pocket: LanguageModel, tmp_path: Path) -> None:
    """The file holds the states alone and no word of the prompt."""
    write_states(tmp_path / "s.safetensors", pocket, TEXT, 2)
    assert set(load_file(tmp_path / "s.safetensors")) == {"layer.2"}
    assert b"Nobody" not in (tmp_path / "s.safetensors").read_bytes()


def test_the_layout_is_the_one_in_the_book(tmp_path: Path) -> None:
    """Every tensor and entry of the metadata has its line, and the other way round."""
    page = Path(__file__).parents[2] / "book" / "package.md"
    text = page.read_text(encoding="utf-8")
    lines = re.findall(r"^\| ((?:tensor|metadata) [^|]*) \|", text, re.MULTILINE)
    named = {name for line in lines for name in re.findall(r"`([^`]*)`", line)}
    write_states(
        tmp_path / "s.safetensors",
        with_begin(tmp_path, 3),
        "t7",
        2,
        dtype=torch.int8,
    )
    with safe_open(tmp_path / "s.safetensors", "pt") as stored:
        assert named == {name.replace("2", "ℓ") for name in stored.keys()} | set(
            stored.metadata()
        )
        assert f"`{stored.metadata()['format']}`" in text


def test_what_a_running_model_does_wrong(
    untouched: PreTrainedModel, tmp_path: Path
) -> None:
    """The model runs to its end; then one line, and what was captured before is kept."""
    ids = torch.tensor([[5, 6, 7]])
    path = tmp_path / "s.safetensors"
    cache = untouched(ids, use_cache=True).past_key_values
    passes = {
        "got a batch of 2 prompts or beams": [{"input_ids": ids.expand(2, -1)}],
        "got a prompt with padding": [
            {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1]])}
        ],
        "a pass from position 0 after 3 captured": [
            {"input_ids": ids},
            {"input_ids": ids + 1},
        ],
        "a pass from position 3 after 0 captured": [
            {"input_ids": ids, "past_key_values": cache}
        ],
    }
    for message, inputs in passes.items():
        outputs = []
        with (
            pytest.raises(StatesError, match=message),
            capture(untouched, path) as tape,
        ):
            outputs += [untouched(**one) for one in inputs]
        assert len(outputs) == len(inputs)
        if len(inputs) == 2:
            assert read_states(path).at(6).shape == tape.captured().at(6).shape
        else:
            with pytest.raises(StatesError, match=message):
                tape.captured()
    assert read_states(path).at(6).shape == (3, 256)
    with (
        pytest.raises(
            StatesError, match="no forward pass inside capture, or one of a comp"
        ),
        capture(untouched, path),
    ):
        pass
    for layers in ([8], [-1, 2], []):
        with (
            pytest.raises(StatesError, match=r"has layers 0 .embeddings. to 6"),
            capture(untouched, layers=layers),
        ):
            untouched(ids)
    with (
        pytest.raises(StatesError, match="got a model in training mode"),
        capture(untouched.train()),
    ):
        untouched(ids)
    untouched.eval()
    assert (
        not untouched.transformer._forward_pre_hooks
        and not untouched.transformer.h[5]._forward_hooks
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True},
    ],
    ids=str,
)
def test_generation_is_never_broken(
    untouched: PreTrainedModel, pocket: LanguageModel, options: dict
) -> None:
    """Read anew each time, or tokens tried in vain: all tokens but the last come back."""
    ids = pocket.encode("one two three one two three one two")[None].cpu()
    settings = {"do_sample": False, "max_new_tokens": 8} | options
    mask = torch.ones_like(ids)
    with capture(untouched, layers=[1, 6]) as tape:
        answer = untouched.generate(ids, attention_mask=mask, **settings)
    stored = tape.captured()
    recovered = stored.invert(pocket)
    # The last passes may have read beyond, where tokens were proposed.
    assert recovered.tokens.tolist()[: answer.shape[1] - 1] == answer[0, :-1].tolist()
    assert len(recovered.tokens) <= answer.shape[1]


def test_beams_and_failed_passes_are_named(
    untouched: PreTrainedModel, pocket: LanguageModel
) -> None:
    """Beams generate to their end; a pass that broke off is not mixed with others."""
    ids = pocket.encode("one two three")[None].cpu()
    mask = torch.ones_like(ids)
    with (
        pytest.raises(StatesError, match="got a batch of 2 prompts or beams"),
        capture(untouched),
    ):
        answer = untouched.generate(
            ids, attention_mask=mask, num_beams=2, do_sample=False, max_new_tokens=4
        )
    assert answer.shape == (1, ids.shape[1] + 4)

    def stop(*_: object) -> None:
        raise ValueError("stopped")

    cache = DynamicCache()
    with (
        pytest.raises(StatesError, match="got a pass after a failed one"),
        capture(untouched, layers=[1, 6]),
    ):
        handle = untouched.transformer.h[3].register_forward_hook(stop)
        with pytest.raises(ValueError, match="stopped"):
            untouched(ids, past_key_values=cache)
        handle.remove()
        # The lower blocks have kept the failed pass in the cache.
        with suppress(RuntimeError):
            untouched(ids[:, :1], past_key_values=cache)


def test_ctrl_c_keeps_the_whole_passes(
    untouched: PreTrainedModel, pocket: LanguageModel, tmp_path: Path
) -> None:
    """Stopped amid the third pass: two in the file, all layers of one length."""
    passes, path = [], tmp_path / "s.safetensors"

    def stop(*_: object) -> None:
        passes.append(1)
        if len(passes) == 3:
            raise KeyboardInterrupt

    ids = pocket.encode("Interrupted while")[None].cpu()
    handle = untouched.transformer.h[3].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt), capture(untouched, path, layers=[1, 6]):
        untouched.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=9,
            do_sample=False,
        )
    handle.remove()
    stored = read_states(path)
    assert stored.passes == (ids.shape[1], 1) and {
        len(x) for x in stored.states.values()
    } == {ids.shape[1] + 1}
    assert stored.invert(pocket).tokens.tolist()[:-1] == ids[0].tolist()


def broken_file(tmp_path: Path, case: str) -> Path:
    """One file for each way in which a file can be broken."""
    path, states = tmp_path / "broken.safetensors", {"layer.3": torch.zeros(2, 256)}
    good = {"format": "sipit-lite states 2", "model": "pocket-gpt2"}
    if case == "truncated":
        save_file({"layer.3": torch.zeros(64, 256)}, path, good)
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
        save_file({"layer.three": torch.zeros(2, 256)}, path, good)
    elif case == "passes":
        save_file(states, path, good | {"passes": "1 one"})
    elif case == "8 bits, no scale":
        save_file({"layer.3": torch.zeros(2, 256, dtype=torch.int8)}, path, good)
    elif case == "a folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "not a complete safetensors file"),
        ("a folder", "not a complete safetensors file"),
        ("truncated", "not a complete safetensors file"),
        ("not safetensors", "not a complete safetensors file"),
        ("empty", "not a complete safetensors file"),
        (
            "no metadata",
            r"metadata \[\]; expected tensors 'layer.ℓ', .* 'format'",
        ),
        ("no states", r"with tensors \['other'\]"),
        ("no layer", r"with tensors \['layer.three'\]"),
        ("passes", r"invalid literal for int\(\) with base 10: 'one'"),
        ("8 bits, no scale", r"'layer\.ℓ\.scale' for 8-bit .*'layer\.3\.scale'"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, case: str, message: str) -> None:
    """One line that names the file and what was expected."""
    path = broken_file(tmp_path, case)
    with pytest.raises(StatesError, match=message) as refusal:
        read_states(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_cannot_be_written_is_refused(
    pocket: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No folder, no format for states, one that is too small, a full disk, a pipe."""
    with pytest.raises(StatesError, match="where no file can be written"):
        write_states(tmp_path / "none" / "s.safetensors", pocket, TEXT, 2)
    with pytest.raises(StatesError, match=r"got dtype torch\.int16"):
        write_states(tmp_path / "s.safetensors", pocket, TEXT, 2, dtype=torch.int16)
    decoder = copy.deepcopy(pocket.decoder)
    decoder.wte.weight.mul_(1e6)
    large = LanguageModel(decoder, pocket.tokenizer, name="large")
    with pytest.raises(
        StatesError,
        match=r"got dtype torch\.float16; expected one that holds layer 0",
    ):
        write_states(tmp_path / "s.safetensors", large, TEXT, 0, dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    # What cannot be written leaves the file that was there, and nothing beside it.
    good = tmp_path / "s.safetensors"
    write_states(good, pocket, TEXT, 2)
    before = good.read_bytes()
    monkeypatch.setattr(
        "sipit_lite.io.capture.save_file",
        lambda tensors, path, metadata: Path(path).write_bytes(b"half") and full(),
    )
    with pytest.raises(StatesError, match="where no file can be written"):
        write_states(good, pocket, "another text", 2)
    assert good.read_bytes() == before and list(tmp_path.iterdir()) == [good]
    # A rename would put a file in the place of a device.
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StatesError, match=r"can be written \(not a file\)"):
        write_states(tmp_path / "pipe", pocket, TEXT, 2)
    assert not (tmp_path / "pipe").is_file()


def test_layers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Ten comes after two."""
    path = tmp_path / "s.safetensors"
    states = {f"layer.{layer}": torch.zeros(2, 8) for layer in (10, 2)}
    save_file(states, path, {"format": "sipit-lite states 2", "model": "deep"})
    assert list(read_states(path).states) == [2, 10]


def full() -> None:
    """The disk is full."""
    raise OSError("No space left on device")


def test_passes_of_others_are_not_captured(
    untouched: PreTrainedModel, tmp_path: Path
) -> None:
    """Others run the same weights between the passes, and beside them in a thread."""
    model = LanguageModel(untouched)
    ids = torch.tensor([[5, 6, 7, 8]])

    def beside(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        other = threading.Thread(target=model.states, args=(ids[0, :2], 6))
        other.start()
        other.join()

    handle = untouched.transformer.drop.register_forward_hook(beside)
    with torch.no_grad(), capture(untouched, layers=[0, 6]) as tape:
        model.states(ids[0, :3], 6)
        untouched(ids)
        model.states(ids[0, :3], 6)
    handle.remove()
    stored = tape.captured()
    assert stored.passes == (4,) and stored.at(0).shape == (4, 256)
    torch.testing.assert_close(stored.at(6), model.states(ids[0], 6))
