"""Policies enumerate the whole vocabulary once each; the gradient policy is Algorithm 3."""

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
from sipit_lite.extensions.newton import damped_step

Family = tuple[PreTrainedModel, LanguageModel]
POLICIES = [Random(), Random(1), Random(7), Gradient(), Published(), Gradient(1), Gradient(5, max_steps=3),
            Gradient(2, max_steps=1000, window=4)]  # fmt: skip
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


@pytest.mark.parametrize("policy", COMPLETE, ids=repr)
def test_every_token_is_proposed_exactly_once(
    policy: Policy, family: Family, prompt: Tensor
) -> None:
    """The enumeration is complete and without repetition, so T·|V| bounds every policy (Theorem 3.1)."""
    model = family[1]
    assert sorted(all_proposals(policy, model, prompt[:3], 2)) == list(
        range(model.vocab_size)
    )


@pytest.mark.parametrize("policy", COMPLETE, ids=repr)
def test_enumeration_survives_a_proxy_that_overflows(
    policy: Policy, family: Family, prompt: Tensor
) -> None:
    """Observed states so large that the gradient is NaN: still every token exactly once."""
    step = OneStepMap.after(family[1], 2, prompt[:2])
    absurd = torch.full((family[1].d_model,), 3e38, device=prompt.device)
    found = torch.cat(list(policy.proposals(step, absurd, torch.Generator())))
    assert sorted(found.tolist()) == list(range(family[1].vocab_size))


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_seeds_decide(policy: Policy, family: Family, prompt: Tensor) -> None:
    """The same seed gives the same order, another seed another."""
    one, two, other = (
        all_proposals(policy, family[1], prompt[:3], 2, seed) for seed in (0, 0, 1)
    )
    assert one == two != other


def published_loop(
    untouched: PreTrainedModel, ids: Tensor, layer: int, start: int, window: int
) -> list[int]:
    """Algorithm 3 written from the paper: no cache, the whole prefix each step, one candidate a step.

    Shares nothing with the package; stops when every token was proposed.
    """
    table = untouched.get_input_embeddings().weight.detach()
    with torch.no_grad():
        target = untouched(ids[None], output_hidden_states=True).hidden_states[layer][
            0, -1
        ]
    e, untried, order = table[start].clone(), list(range(len(table))), []
    while untried:
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
        if len(order) % window == 0 and untried:
            e = table[min(untried, key=lambda v: float((table[v] - e).norm()))].clone()
    return order


@pytest.mark.parametrize("layer", [1, 2])
def test_one_proposal_a_step_is_the_published_loop(
    family: Family, prompt: Tensor, layer: int
) -> None:
    """The same candidates in the same order from the same start, for as long as float noise allows: 12 steps."""
    untouched, model = family
    if (
        model.embeddings is not untouched.get_input_embeddings().weight
        and type(untouched.get_input_embeddings()) is not torch.nn.Embedding
    ):
        return  # the oracle does not know about scaled embeddings (Gemma)
    start = int(
        torch.randint(model.vocab_size, (), generator=torch.Generator().manual_seed(0))
    )
    expected = published_loop(untouched, prompt[:5], layer, start, window=10)
    found = all_proposals(Published(window=10), model, prompt[:5], layer)
    assert found[:12] == expected[:12]


def test_gradient_finds_tokens_before_the_scan(pocket: LanguageModel) -> None:
    """On the trained model, most tokens come within the gradient steps: a policy that only enumerated would fail."""
    ids = pocket.encode("Return the number of items in the list.")
    places = [
        all_proposals(Gradient(), pocket, ids[: t + 1], 3).index(int(ids[t]))
        for t in range(len(ids))
    ]
    assert sorted(places)[len(places) // 2] < pocket.vocab_size // 8


def test_damped_step_is_the_ridge_solution() -> None:
    """Levenberg and Marquardt's step minimises ‖Jδ − r‖² + λ Σ ‖J_i‖² δ_i²: a least-squares problem with more rows."""
    generator = torch.Generator().manual_seed(0)
    jacobian, residual = (
        torch.randn(6, 6, generator=generator),
        torch.randn(6, generator=generator),
    )
    for damping in (0.0, 0.1, 10.0):
        more = torch.diag(jacobian.norm(dim=0) * damping**0.5)
        rows = torch.cat([jacobian, more]).double()
        expected = torch.linalg.lstsq(
            rows, torch.cat([residual, torch.zeros(6)]).double()[:, None]
        ).solution[:, 0]
        assert torch.allclose(
            damped_step(jacobian, residual, damping).double(), expected, atol=1e-4
        )
    assert torch.equal(
        damped_step(torch.zeros(3, 3), torch.ones(3), 0.1), torch.zeros(3)
    )


def test_newton_arrives_within_a_few_steps(pocket: LanguageModel) -> None:
    """From the mean embedding to the true token, residuals never growing: prose and random tokens, last layer."""
    random = torch.randint(
        pocket.vocab_size, (8,), generator=torch.Generator().manual_seed(1)
    ).to(pocket.device)
    taken = []
    for ids in (pocket.encode("Return the number of items."), random):
        states = pocket.states(ids, 6)
        for t in range(len(ids)):
            step, before = OneStepMap.after(pocket, 6, ids[:t]), torch.inf
            for k, e in enumerate(
                Newton().path(step, pocket.embeddings.mean(0), states[t])
            ):
                residual = float((step.embedding(e[None])[0] - states[t]).norm())
                assert residual <= before
                before = residual
                if (
                    int((pocket.embeddings - e).norm(dim=1).argmin()) == int(ids[t])
                    or k == 30
                ):
                    taken.append(k)
                    break
    assert sorted(taken)[len(taken) // 2] <= 4 and max(taken) < 30


@pytest.mark.parametrize(
    "bad", [{"max_steps": 0}, {"proposals_per_step": 0}, {"damping": 0.0}]
)
def test_bad_settings_of_newton_are_refused(bad: dict[str, float]) -> None:
    """The setting and its value are quoted."""
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"got {name}={value}; expected"):
        Newton(**bad)


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
