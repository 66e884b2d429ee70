"""The tests of real weights run on small random models, and fail on broken ones."""

import copy
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sipit_lite import LanguageModel, load
from sipit_lite.io.text import bundled

ROOT = Path(__file__).parent.parent


def run(models: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The command of book/package.md, on these models."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:nbval",
        "-q",
        "tests/real",
        # What is installed beside is none of these.
        "--ignore=tests/real/test_smollm2.py",
        *options,
    ]
    environment = os.environ | {"SIPIT_LITE_REAL": models, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> str:
    """A folder as the hub would give it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def small_gpt2(vocabulary: int) -> GPT2LMHeadModel:
    """Two blocks with every weight drawn."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_embd=64, n_layer=2, n_head=4, n_positions=64
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def with_begin(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, which puts token 0 before every text."""
    begun = copy.deepcopy(tokenizer)
    name = begun.convert_ids_to_tokens(0)
    begun.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, 0)]
    )
    return begun


@pytest.fixture(scope="module")
def folders(
    pocket: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Two sound models, one rotary, untied, with a begin token; two broken ones."""
    place, vocabulary = tmp_path_factory.mktemp("weights"), pocket.vocab_size
    gpt2, config = small_gpt2(vocabulary), LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    found = {
        "gpt2": save(gpt2, pocket.tokenizer, place / "gpt2"),
        "llama": save(
            LlamaForCausalLM(config), with_begin(pocket.tokenizer), place / "llama"
        ),
        "truncated": save(gpt2, pocket.tokenizer, place / "truncated"),
    }
    weights = place / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    twin = int(
        pocket.tokenizer(bundled("prose")[0])["input_ids"][3]
    )  # a token of the prompt that is tested
    with torch.no_grad():
        gpt2.transformer.wte.weight[twin] = gpt2.transformer.wte.weight[twin - 1]
    return found | {"twins": save(gpt2, pocket.tokenizer, place / "twins")}


@pytest.fixture(scope="module")
def outcomes(folders: dict[str, str]) -> dict[str, dict[str, str]]:
    """For each folder, what became of each test, from one run over all of them."""
    done = run(os.pathsep.join(folders.values()), "-rA")
    found: dict[str, dict[str, str]] = {name: {} for name in folders}
    for verdict, test, name in re.findall(
        r"^(\w+) .*::(\w+)\[.*/(\w+)\]", done.stdout, re.MULTILINE
    ):
        found[name][test] = verdict
    assert done.returncode == 1, done.stdout + done.stderr
    return found


def test_sound_folders_pass(
    folders: dict[str, str], outcomes: dict[str, dict[str, str]]
) -> None:
    """The same four tests for each; the second has a begin-of-text token."""
    assert load(folders["llama"], device="cpu").begin == 0
    assert len(outcomes["gpt2"]) == 4 and set(outcomes["gpt2"].values()) == {"PASSED"}
    assert outcomes["llama"] == outcomes["gpt2"]


def test_broken_folders_fail(outcomes: dict[str, dict[str, str]]) -> None:
    """Truncated weights cannot be read; two equal embeddings make inversion refuse."""
    assert (
        set(outcomes["truncated"].values()) == {"ERROR"}
        and len(outcomes["truncated"]) == 4
    )
    assert outcomes["twins"] == outcomes["gpt2"] | {
        "test_auto_recovers_the_prompt": "FAILED"
    }


def test_without_models_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One line in place of a green run of nothing."""
    monkeypatch.setenv("SIPIT_LITE_REAL", "")
    configured = runpy.run_path(str(ROOT / "tests" / "real" / "conftest.py"))
    with pytest.raises(pytest.UsageError, match="SIPIT_LITE_REAL=''; expected 'paper'"):
        configured["pytest_configure"]()
