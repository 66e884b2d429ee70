"""The paper's six families as small random models, and a bench over them.

Windows are shorter than the prompts, key-value heads are shared, embeddings scaled,
rotations partial; Qwen3 and OLMo2, two more recent decoders, check the generic path.
"""

from collections import Counter

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from sipit_lite.experiments.checks import Check, judged, progress_bar, share
from sipit_lite.extensions.lens import Lens
from sipit_lite.extensions.newton import Newton
from sipit_lite.io.loading import pick_device
from sipit_lite.model import LanguageModel
from sipit_lite.policies import Gradient
from sipit_lite.recovery import Outcome
from sipit_lite.sipit import invert_many

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
    config: PreTrainedConfig, head: type = transformers.AutoModel, *, seed: int = 0
) -> PreTrainedModel:
    """A model whose weights are all drawn, gains and biases included."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        hf_model = head.from_config(config).eval().requires_grad_(False)
        # Default gains of one and biases of zero would hide mistakes.
        for weight in hf_model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return hf_model


def small(
    name: str, *, seed: int = 0, device: str | torch.device = "auto"
) -> LanguageModel:
    """A small random model of one architecture; ``KeyError`` for an unknown name.

    >>> small("Mistral", device="cpu").n_layers
    3
    """
    decoder = randomised(configuration(name), seed=seed).to(pick_device(device))
    return LanguageModel(decoder, name=f"small {name}, seed {seed}")


def families(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Invert random prompts at two layers of every family on the model's device."""
    names = list(SETTINGS)[: 2 if quick else None]
    count = 3 if quick else 100
    runs = []
    for name in progress_bar(names, "families", progress):
        tested = small(name, seed=seed, device=model.device)
        for layer in (1, tested.n_layers):
            for row in _inverted(tested, layer, count, seed):
                runs.append({"family": name, "layer": layer} | row)
    exact = share(run["exact"] == run["prompts"] for run in runs)
    silent = sum(run["silent errors"] for run in runs)
    reported = Counter()
    for run in runs:
        reported[f"exact, {run['family']}"] += run["exact"]
    checks = [Check.of("exact, all families", exact), Check.of("silent errors", silent)]
    return checks, {"reported": dict(reported), "runs": runs}


def _inverted(model: LanguageModel, layer: int, count: int, seed: int) -> list[dict]:
    """One row for ``auto`` and one for each policy by itself."""
    prompts = random_prompts(model, count, seed + 1)
    states = [model.states(ids, layer) for ids in prompts]
    # Without a tokenizer there is no text to fit a lens on.
    text = random_prompts(model, 200, seed + 2)
    lens = Lens.fit(model, layer, prompts=text, tokens=4000, features=64)
    outcomes = invert_many(states, model, layer, lens=lens)
    rows = [{"policy": "auto"} | counts(prompts, outcomes)]
    # Each without a lens, which is slower: every tenth prompt.
    for policy in (Gradient(), Newton()):
        outcomes = invert_many(states[::10], model, layer, policy=policy)
        name = type(policy).__name__
        rows.append({"policy": name} | counts(prompts[::10], outcomes))
    return rows


def random_prompts(model: LanguageModel, count: int, seed: int) -> list[Tensor]:
    """Prompts of random tokens, the lengths spread evenly from 1 to 48."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in torch.linspace(1, LONGEST, count).round().long().tolist():
        ids = torch.randint(model.vocab_size, (n,), generator=generator)
        rows.append(ids.to(model.device))
    return rows


def counts(prompts: list[Tensor], outcomes: list[Outcome]) -> dict[str, int]:
    """How many prompts came back exactly, and how many came back wrong."""
    rows = [judged(ids, one) for ids, one in zip(prompts, outcomes, strict=True)]
    exact = sum(row["exact"] for row in rows)
    silent = sum(row["silent error"] for row in rows)
    return {"prompts": len(rows), "exact": exact, "silent errors": silent}
