"""Policies enumerate the vocabulary once each; the gradient policy is Algorithm 3."""

from itertools import islice

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sipit_lite import (
    Gradient,
    LanguageModel,
    Newton,
    OneStepMap,
    Policy,
    Published,
    Random,
)

Family = tuple[PreTrainedModel, LanguageModel]
POLICIES = [
    Random(), Random(1), Random(7), Gradient(), Published(), Gradient(1),
    Gradient(5, max_steps=3), Gradient(2, max_steps=1000, window=4),
]  # fmt: skip
COMPLETE = [*POLICIES, Newton(), Newton(1, max_steps=2), Newton(100)]


def all_proposals(
    policy: Policy, model: LanguageModel, ids: Tensor, layer: int, seed: int = 0
) -> list[int]:
    """What a policy proposes to a verifier that always refuses."""
    step = OneStepMap.after(model, layer, ids[:-1])
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        list(policy.proposals(step, model.states(ids, layer)[-1], generator))
    ).tolist()


# Embeddings as they are, and scaled ones.
@pytest.mark.parametrize("family", ["gpt2", "gemma3"], indirect=True)
@pytest.mark.parametrize("policy", COMPLETE, ids=repr)
def test_every_token_is_proposed_exactly_once(
    policy: Policy, family: Family, prompt: Tensor
) -> None:
    """Complete and without repetition: T·|V| bounds every policy (Theorem 3.1)."""
    model = family[1]
    assert sorted(all_proposals(policy, model, prompt[:3], 2)) == list(
        range(model.vocab_size)
    )


@pytest.mark.parametrize("family", ["gpt2", "gemma3"], indirect=True)
@pytest.mark.parametrize("policy", COMPLETE, ids=repr)
def test_enumeration_survives_a_proxy_that_overflows(
    policy: Policy, family: Family, prompt: Tensor
) -> None:
    """States so large that the gradient is NaN: still every token exactly once."""
    step = OneStepMap.after(family[1], 2, prompt[:2])
    absurd = torch.full((family[1].d_model,), 3e38, device=prompt.device)
    found = torch.cat(list(policy.proposals(step, absurd, torch.Generator())))
    assert sorted(found.tolist()) == list(range(family[1].vocab_size))


@pytest.mark.parametrize("family", ["gpt2"], indirect=True)
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_seeds_decide(policy: Policy, family: Family, prompt: Tensor) -> None:
    """The same seed gives the same order, another seed another."""
    one, two, other = (
        all_proposals(policy, family[1], prompt[:3], 2, seed) for seed in (0, 0, 1)
    )
    assert one == two != other


def published_loop(
    untouched: PreTrainedModel,
    ids: Tensor,
    layer: int,
    start: int,
    window: int,
    count: int,
) -> list[int]:
    """Algorithm 3 from the paper: no cache, the full prefix, one candidate a step.

    Shares nothing with the package; the first ``count`` of its proposals.
    """
    table = untouched.get_input_embeddings().weight.detach()
    with torch.no_grad():
        target = untouched(ids[None], output_hidden_states=True).hidden_states[layer][
            0, -1
        ]
    e, untried, order = table[start].clone(), list(range(len(table))), []
    while len(order) < count:
        within = len(order) % window
        e = e.detach().requires_grad_()
        rows = torch.cat([table[ids[:-1]], e[None]])[None]
        state = untouched(inputs_embeds=rows, output_hidden_states=True).hidden_states[
            layer
        ][0, -1]
        gradient = torch.autograd.grad(torch.nn.functional.mse_loss(state, target), e)[
            0
        ]
        gradient = gradient / max(1.0, float(gradient.norm()))
        e = e.detach() - (1 - 0.99 * within / (window - 1)) * gradient
        order.append(min(untried, key=lambda v: float((table[v] - e).norm())))
        untried.remove(order[-1])
        if len(order) % window == 0:
            e = table[min(untried, key=lambda v: float((table[v] - e).norm()))].clone()
    return order


@pytest.mark.parametrize("layer", [1, 2])
def test_one_proposal_a_step_is_the_published_loop(
    family: Family, prompt: Tensor, layer: int
) -> None:
    """The same candidates in order, for as long as float noise allows: 12 steps."""
    untouched, model = family
    if (
        model.embeddings is not untouched.get_input_embeddings().weight
        and type(untouched.get_input_embeddings()) is not torch.nn.Embedding
    ):
        return  # the oracle does not know about scaled embeddings (Gemma)
    start = int(
        torch.randint(model.vocab_size, (), generator=torch.Generator().manual_seed(0))
    )
    expected = published_loop(untouched, prompt[:5], layer, start, 10, count=12)
    step = OneStepMap.after(model, layer, prompt[:4])
    where = (
        step,
        model.states(prompt[:5], layer)[-1],
        torch.Generator().manual_seed(0),
    )
    found = islice(Published(window=10).proposals(*where), 12)
    assert torch.cat([*found]).tolist() == expected


def test_gradient_finds_tokens_before_the_scan(pocket: LanguageModel) -> None:
    """On the trained model most tokens come within the steps, before a scan."""
    ids = pocket.encode("Return the number of items in the list.")
    states = pocket.states(ids, 3)
    places = []
    for t, token in enumerate(ids):
        step = OneStepMap.after(pocket, 3, ids[:t])
        generator = torch.Generator().manual_seed(0)
        place = 0
        for batch in Gradient().proposals(step, states[t], generator):
            if token in batch:
                break
            place += len(batch)
        places.append(place)
    assert sorted(places)[len(places) // 2] < pocket.vocab_size // 8


@pytest.mark.parametrize(
    "bad", [{"proposals_per_step": 0}, {"max_steps": 0}, {"window": -1}]
)
def test_bad_settings_are_refused(bad: dict[str, int]) -> None:
    """The setting and its value are quoted."""
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"got {name}={value}; expected at least 1"):
        Gradient(**bad)
    with pytest.raises(ValueError, match="got proposals_per_step=0"):
        Random(0)
