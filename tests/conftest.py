"""Fixtures: the bundled model, and small random models of the architectures of the paper."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from sipit_lite import LanguageModel, load

VOCAB, WIDTH = 60, 32
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
COMMON = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 40, "pad_token_id": 0, **ENDS,
}  # fmt: skip
GROUPED = COMMON | {"num_key_value_heads": 2, "intermediate_size": 64}
# Windows are shorter than the prompts of the tests, so that they matter.
FAMILIES = {
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=3, n_head=4, n_positions=40, **ENDS),
    "gpt-neo": GPTNeoConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_layers=3, num_heads=4, max_position_embeddings=40,
                            attention_types=[[["global", "local", "global"], 1]], window_size=6, **ENDS),
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=6),
    "gemma3": Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=6,
                               layer_types=["sliding_attention", "full_attention", "sliding_attention"]),
    "phi3": Phi3Config(**GROUPED, partial_rotary_factor=0.5),
    "qwen3": Qwen3Config(**GROUPED, head_dim=8),
}  # fmt: skip


@pytest.fixture(scope="session")
def pocket() -> LanguageModel:
    """The bundled trained model, on the CPU or on CUDA where there is one; read-only."""
    return load("pocket-gpt2")


@pytest.fixture(scope="session", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, LanguageModel]:
    """A small random model of each architecture: untouched in transformers, and ours, loaded from its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    untouched = AutoModelForCausalLM.from_config(FAMILIES[request.param]).eval()
    with torch.no_grad():
        for weight in (
            untouched.parameters()
        ):  # default gains of one and biases of zero would hide mistakes
            weight.add_(0.1 * torch.randn_like(weight))
    untouched.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0").save_pretrained(
        folder
    )
    model = load(folder)
    return untouched.to(model.device), model


@pytest.fixture
def prompt(family: tuple[PreTrainedModel, LanguageModel]) -> torch.Tensor:
    """Thirteen random token ids for the small models, longer than their windows."""
    return torch.randint(VOCAB, (13,), generator=torch.Generator().manual_seed(1)).to(
        family[1].device
    )
