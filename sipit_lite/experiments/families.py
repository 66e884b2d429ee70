"""The paper's six families as small random models.

Windows are shorter than the prompts, key-value heads are shared, embeddings scaled,
rotations partial; Qwen3 and OLMo2, two more recent decoders, check the generic path.
"""

import torch
import transformers
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel

from sipit_lite.io.loading import OURS, pick_device
from sipit_lite.model import LanguageModel

LONGEST = 48  # tokens of a prompt
WINDOW = 6  # of local attention, shorter than the prompts
LOCAL_AND_GLOBAL = ["sliding_attention", "full_attention", "sliding_attention"]
NEO = [[["global", "local", "global"], 1]]
# What each has beside the common sizes, by the name of its configuration.
SETTINGS = {
    "GPT2": {},
    "GPTNeo": {"attention_types": NEO, "window_size": WINDOW},
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Gemma3Text": {"sliding_window": WINDOW, "layer_types": LOCAL_AND_GLOBAL},
    "Phi3": {"partial_rotary_factor": 0.5},
    "Qwen3": {},
    "Olmo2": {},
}


def configuration(
    name: str, vocabulary: int = 500, width: int = 64, context: int = LONGEST
) -> PreTrainedConfig:
    """The configuration of a small model; ``name`` is a key of ``SETTINGS``."""
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": context}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    # The GPT families know neither shared heads nor these names.
    if not name.startswith("GPT"):
        sizes |= {"num_key_value_heads": 2, "intermediate_size": 2 * width}
        sizes |= {"head_dim": width // 4}
    return getattr(transformers, f"{name}Config")(**sizes, **SETTINGS[name])


def randomised(
    config: PreTrainedConfig, head: type = AutoModel, *, seed: int = 0, by: float = 0.1
) -> PreTrainedModel:
    """A model whose weights are all drawn: gains and biases too move ``by`` noise."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        hf_model = head.from_config(config, **OURS).eval().requires_grad_(False)
        # Default gains of one and biases of zero would hide mistakes.
        for weight in hf_model.parameters():
            weight.add_(by * torch.randn_like(weight))
    return hf_model


def small(
    name: str, *, seed: int = 0, device: str | torch.device = "auto"
) -> LanguageModel:
    """A small random model of one architecture; ``KeyError`` for an unknown name."""
    decoder = randomised(configuration(name), seed=seed).to(pick_device(device))
    return LanguageModel(decoder, name=f"small {name}, seed {seed}")
