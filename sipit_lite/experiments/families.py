"""The paper's six families as small random models, each with its peculiarities switched on, and a bench over them.

No weights are needed: the architecture is what the generic code path has to survive. Windows are shorter than the
prompts, key-value heads are shared, embeddings scaled, rotations partial; two more recent decoders check that the path
is generic.
"""

from collections.abc import Iterable

import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from sipit_lite.experiments.checks import Check, share
from sipit_lite.extensions.lens import Lens
from sipit_lite.io.loading import pick_device
from sipit_lite.model import LanguageModel
from sipit_lite.policies import Gradient, Newton, Policy
from sipit_lite.recovery import NotVerified, Outcome, Recovery
from sipit_lite.sipit import invert, invert_many

LONGEST, WINDOW = 48, 6
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
COMMON = {
    "vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": LONGEST, "pad_token_id": 0, **ENDS,
}  # fmt: skip
GROUPED = COMMON | {"num_key_value_heads": 2, "intermediate_size": 128}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
NEO = {
    "num_layers": 3,
    "num_heads": 4,
    "attention_types": [[["global", "local", "global"], 1]],
    "window_size": WINDOW,
}
SETTINGS = {
    "GPT2": {
        "vocab_size": 500,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": LONGEST,
        **ENDS,
    },
    "GPTNeo": {
        "vocab_size": 500,
        "hidden_size": 64,
        "max_position_embeddings": LONGEST,
        **NEO,
        **ENDS,
    },
    "Llama": GROUPED,
    "Mistral": GROUPED | {"sliding_window": WINDOW},
    "Gemma3Text": GROUPED
    | {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    "Phi3": GROUPED | {"partial_rotary_factor": 0.5},
    "Qwen3": GROUPED | {"head_dim": 16},
    "Olmo2": GROUPED,
}


def small(
    name: str, *, seed: int = 0, device: str | torch.device = "auto"
) -> LanguageModel:
    """A small model of one architecture, every weight drawn from a normal law, gains and biases included.

    ``name`` is a key of ``SETTINGS``, the name of its configuration in ``transformers``. Raises ``KeyError`` for
    another.

    >>> small("Mistral", device="cpu").n_layers
    3
    """
    config = getattr(transformers, f"{name}Config")(**SETTINGS[name])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        decoder = (
            transformers.AutoModel.from_config(config).eval().requires_grad_(False)
        )
        for weight in (
            decoder.parameters()
        ):  # gains of one and biases of zero would hide mistakes
            weight.add_(0.1 * torch.randn_like(weight))
    decoder = decoder.to(pick_device(device))
    return LanguageModel(decoder, name=f"small {name}, seed {seed}")


def families(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Invert prompts of 1 to 48 random tokens at two layers of every family; the policies by themselves on a few.

    ``model`` gives the device alone. Each prompt is inverted by ``auto`` with a lens, every tenth also by ``Gradient``
    and by ``Newton``.
    """
    count, runs = 3 if quick else 100, []
    names = list(SETTINGS)[: 3 if quick else None]
    for name in tqdm(names, "families", disable=None if progress else True):
        tested = small(name, seed=seed, device=model.device)
        asked = random_prompts(tested, count, seed + 1)
        for layer in (1, tested.n_layers):
            lens = Lens.fit(
                tested,
                layer,
                prompts=random_prompts(tested, 200, seed + 2),
                tokens=4000,
                features=64,
            )
            states = [tested.states(ids, layer) for ids in asked]
            found = {"auto": (asked, invert_many(states, tested, layer, lens=lens))}
            for policy in (Gradient(), Newton()):
                told = [outcome(x, tested, layer, policy) for x in states[::10]]
                found[type(policy).__name__] = (asked[::10], told)
            runs += [
                {"family": name, "layer": layer, "policy": policy}
                | counts(prompts, told)
                for policy, (prompts, told) in found.items()
            ]
    checks = [
        Check.of(
            "exact, all families", share(run["exact"] == run["prompts"] for run in runs)
        ),
        Check.of("silent errors", sum(run["silent errors"] for run in runs)),
    ]
    inverted = {
        name: sum(run["exact"] for run in runs if run["family"] == name)
        for name in names
    }
    return checks, {
        "reported": {f"exact, {name}": n for name, n in inverted.items()},
        "runs": runs,
    }


def random_prompts(model: LanguageModel, count: int, seed: int) -> list[Tensor]:
    """Prompts of 1 to 48 random tokens, the lengths spread evenly, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(1, LONGEST, count).round().long().tolist()
    return [
        torch.randint(model.vocab_size, (n,), generator=generator).to(model.device)
        for n in lengths
    ]


def outcome(
    states: Tensor, model: LanguageModel, layer: int, policy: Policy
) -> Outcome:
    """What ``invert`` returns or refuses with."""
    try:
        return invert(states, model, layer, policy=policy)
    except NotVerified as error:
        return error


def counts(prompts: Iterable[Tensor], outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many prompts came back exactly, and how many came back wrong.

    >>> model = small("GPT2", device="cpu")
    >>> ids = torch.tensor([5, 6, 7])
    >>> counts([ids], [outcome(model.states(ids, 1), model, 1, Gradient())])
    {'prompts': 1, 'exact': 1, 'silent errors': 0}
    """
    pairs = list(zip(prompts, outcomes, strict=True))
    returned = [(ids, o) for ids, o in pairs if isinstance(o, Recovery)]
    exact = sum(torch.equal(o.tokens, ids.cpu()) for ids, o in returned)
    return {
        "prompts": len(pairs),
        "exact": exact,
        "silent errors": len(returned) - exact,
    }
