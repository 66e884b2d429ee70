"""Fixtures: the bundled model, and small random models of the architectures of the paper."""

import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

# The process that hands tests out reads this file as well, and needs no torch: what
# takes seconds is imported where it is used.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sipit_lite import LanguageModel

# To check addresses, nbformat would read a grammar: two seconds of every process.
sys.modules["rfc3987_syntax"] = None
VOCAB = 60
NAMES = {
    "gpt2": "GPT2",
    "gpt-neo": "GPTNeo",
    "llama": "Llama",
    "mistral": "Mistral",
    "gemma3": "Gemma3Text",
    "phi3": "Phi3",
    "qwen3": "Qwen3",
}


@pytest.fixture(scope="session", autouse=True)
def little_text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Text of the standard library alone: that of all packages takes ten seconds."""
    from sipit_lite.io import text

    paths = {"stdlib": sysconfig.get_path("stdlib")}
    paths["purelib"] = str(tmp_path_factory.mktemp("packages"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "sysconfig", SimpleNamespace(get_path=paths.get))
        yield


@pytest.fixture(scope="session")
def pocket() -> "LanguageModel":
    """The bundled trained model, on the CPU or on CUDA where there is one; read-only."""
    from sipit_lite import load

    return load("pocket-gpt2")


@pytest.fixture(scope="session", params=NAMES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> "tuple[PreTrainedModel, LanguageModel]":
    """A small random model of each architecture: untouched in transformers, and ours, loaded from its folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from sipit_lite import load
    from sipit_lite.experiments.families import configuration, randomised

    folder = tmp_path_factory.mktemp(request.param)
    name = NAMES[request.param]
    config = configuration(name, vocabulary=VOCAB, width=32, context=40)
    untouched = randomised(config, AutoModelForCausalLM)
    untouched.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(
        folder
    )
    model = load(folder)
    return untouched.to(model.device), model


@pytest.fixture
def prompt(family: "tuple[PreTrainedModel, LanguageModel]") -> "torch.Tensor":
    """Thirteen random token ids for the small models, longer than their windows."""
    import torch

    return torch.randint(VOCAB, (13,), generator=torch.Generator().manual_seed(1)).to(
        family[1].device
    )


@pytest.fixture
def bars() -> Iterator[None]:
    """Bars share a lock; one that Ctrl-C leaves taken would stop those of other threads."""
    from tqdm import tqdm

    yield
    tqdm.set_lock(threading.RLock())


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(folder),
        str(Path(__file__).parent.parent),
    ]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))
