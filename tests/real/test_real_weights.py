"""Real weights through the whole path: states, cached steps, inversion, closest pairs.

Not part of the suite, which needs no download: book/package.md says the command.
``SIPIT_LITE_REAL_DTYPE`` is the format of the weights, float32 unless it says another.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.linalg import vector_norm
from transformers import AutoModelForCausalLM, AutoTokenizer

from sipit_lite import (
    LanguageModel,
    Lens,
    OneStepMap,
    closest_pairs,
    invert,
    last_states,
    load,
    noise_floor,
)
from sipit_lite.experiments.reproduce import Plan, at_random, texts
from sipit_lite.io.text import bundled

pytestmark = pytest.mark.timeout(7200)
DTYPE = getattr(torch, os.environ.get("SIPIT_LITE_REAL_DTYPE", "float32"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMS = {"ln_f", "norm", "final_layernorm", "final_layer_norm"}
TOKENS = 20


def reference(name: str) -> tuple[Tensor, dict[int, Tensor]]:
    """A held-out prompt, and its states at all layers by transformers alone."""
    hf_model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPE).eval().to(DEVICE)
    ids = AutoTokenizer.from_pretrained(name)(bundled("prose")[0], return_tensors="pt")[
        "input_ids"
    ][:, :TOKENS]
    received = []
    norm = next(
        part
        for part_name, part in hf_model.get_decoder().named_children()
        if part_name in NORMS
    )
    norm.register_forward_hook(
        lambda module, inputs, output: received.append(inputs[0])
    )
    with torch.no_grad():
        states = hf_model(ids.to(DEVICE), output_hidden_states=True).hidden_states
    return ids[0], {
        layer: x[0].cpu() for layer, x in enumerate((*states[:-1], received[0]))
    }


@pytest.fixture(scope="module")
def loaded(name: str) -> Iterator[tuple[LanguageModel, Tensor, dict[int, Tensor]]]:
    """Our model of that name, a held-out prompt, and what its states should be."""
    ids, expected = reference(name)
    model = load(name, device=DEVICE, dtype=DTYPE, progress=True)
    yield model, ids.to(model.device), expected


def depths(model: LanguageModel) -> list[int]:
    """First, middle and last layer."""
    return sorted({1, max(1, model.n_layers // 2), model.n_layers})


def test_states_are_those_of_transformers(
    loaded: tuple[LanguageModel, Tensor, dict[int, Tensor]],
) -> None:
    """At every layer from the embeddings on, the last before the final norm."""
    model, ids, expected = loaded
    assert set(expected) == set(range(model.n_layers + 1))
    for layer, states in expected.items():
        torch.testing.assert_close(model.states(ids, layer).cpu(), states)


def test_a_cached_step_is_a_full_pass(
    loaded: tuple[LanguageModel, Tensor, dict[int, Tensor]],
) -> None:
    """The last state over a cached prefix, within the noise floor of the layer."""
    model, ids, _ = loaded
    for layer in depths(model):
        step = OneStepMap.after(model, layer, ids[:-1]).tokens(ids[-1:])[0].double()
        full = model.states(ids, layer)[-1].double()
        assert vector_norm(step - full) <= noise_floor(model, layer) * vector_norm(
            full
        ), layer


def test_auto_recovers_the_prompt(
    loaded: tuple[LanguageModel, Tensor, dict[int, Tensor]],
) -> None:
    """A held-out prompt, exactly, from three layers."""
    model, ids, _ = loaded
    tokens = max(4000, 2 * model.d_model)
    for layer in depths(model):
        drawn = at_random(model, tokens // 16 + 1, Plan(1, 16))
        lens = Lens.fit(model, layer, prompts=drawn, tokens=tokens, features=0)
        assert torch.equal(
            invert(model.states(ids, layer), model, layer, lens=lens).tokens, ids.cpu()
        ), layer


def test_no_collision_among_some_prompts(
    loaded: tuple[LanguageModel, Tensor, dict[int, Tensor]],
) -> None:
    """Prose and code of 16 tokens: the closest pair is beyond the noise floor."""
    model, *_ = loaded
    drawn_texts = texts(model, 200, Plan(200, 16, source="bundled"))
    for layer, states in zip(
        depths(model), last_states(model, drawn_texts, depths(model)), strict=True
    ):
        report = closest_pairs(states.to(model.device), 1, prompts=drawn_texts)
        assert report.collisions == report.practical == 0
        assert (
            report.minimum
            > noise_floor(model, layer) * vector_norm(states.double(), dim=1).max()
        )
