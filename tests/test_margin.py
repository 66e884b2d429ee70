"""Margins against one-step maps compared pair by pair, and Theorem 3.2 at its edge."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sipit_lite import (
    LanguageModel,
    ModelError,
    NotVerified,
    OneStepMap,
    invert,
    margins,
)
from sipit_lite.io.text import prompts

Family = tuple[PreTrainedModel, LanguageModel]


def test_equal_to_all_pairs(family: Family, prompt: Tensor) -> None:
    """Every token through the whole model after every prefix; all pairs in float64."""
    model, layer = family[1], 2
    found = margins(model, prompt[:5], layer)
    for t in range(5):
        rows = torch.stack(
            [
                torch.cat([prompt[:t], torch.tensor([v], device=prompt.device)])
                for v in range(60)
            ]
        )
        states = model.states(rows, layer)[:, -1].double()
        apart = torch.stack(
            [torch.stack([(a - b).norm() for b in states]) for a in states]
        )
        apart.fill_diagonal_(torch.inf)
        assert float(found.prefix[t]) == pytest.approx(float(apart.min()), rel=1e-3)
        assert float(found.token[t]) == pytest.approx(
            float(apart[prompt[t]].min()), rel=1e-3
        )
        assert int(found.rival[t]) == int(apart[prompt[t]].argmin())


def test_certificate_is_the_margin(pocket: LanguageModel) -> None:
    """``certify`` reports Δ_{π,t} as the one-step map has it, and the noise that is still tolerated."""
    ids = pocket.encode("certified")
    found = invert(pocket.states(ids, 2), pocket, 2, certify=True)
    expected = torch.tensor(
        [OneStepMap.after(pocket, 2, ids[:t]).margin() for t in range(len(ids))]
    )
    assert torch.allclose(found.margin, expected, rtol=1e-5)
    assert found.certified and torch.allclose(
        found.headroom, found.margin / 2 - found.distance
    )
    plain = invert(pocket.states(ids, 2), pocket, 2)
    assert plain.margin.isnan().all() and not plain.certified


def test_half_the_margin_is_the_edge(pocket: LanguageModel) -> None:
    """Noise towards the rival: 0.49 of the own margin is recovered, at 0.51 the rival is the nearest token."""
    ids, layer = (
        next(prompts(pocket.tokenizer, "prose", 6, seed=1)).to(pocket.device),
        3,
    )
    found, states = margins(pocket, ids, layer), pocket.states(ids, layer).double()
    rival = torch.stack(
        [
            OneStepMap.after(pocket, layer, ids[:t]).tokens(v[None].to(ids.device))[0]
            for t, v in enumerate(found.rival)
        ]
    ).double()
    for share, expected in ((0.49, ids.cpu()), (0.51, found.rival)):
        moved = (states + share * (rival - states)).float()
        for t in range(len(ids)):
            step = OneStepMap.after(pocket, layer, ids[:t])
            everything = step.tokens(torch.arange(pocket.vocab_size, device=ids.device))
            assert int((everything - moved[t]).norm(dim=1).argmin()) == int(expected[t])
        if share < 0.5:
            assert torch.equal(
                invert(moved, pocket, layer, epsilon=0.495 * found.token).tokens,
                ids.cpu(),
            )
        else:
            with pytest.raises(NotVerified):
                invert(moved, pocket, layer, epsilon=0.495 * found.token)


def test_nearest_is_marked(pocket: LanguageModel) -> None:
    """States that no prompt produced: with ``on_fail`` every token is the nearest one, and says that it is a guess."""
    ids = pocket.encode("marked where guessed")
    states = pocket.states(ids, 3).clone()
    states[-1] += 3.0
    found = invert(states, pocket, 3, on_fail="nearest")
    assert found.verified.tolist() == [True] * (len(ids) - 1) + [False]
    assert torch.equal(found.tokens[:-1], ids[:-1].cpu())
    step = OneStepMap.after(pocket, 3, ids[:-1])
    everything = step.tokens(torch.arange(pocket.vocab_size, device=ids.device))
    assert int(found.tokens[-1]) == int((everything - states[-1]).norm(dim=1).argmin())
    assert float(found.distance[-1]) > float(found.radius[-1])


def test_bad_input(pocket: LanguageModel) -> None:
    """Layer, ids, policy and bounds."""
    with pytest.raises(ModelError, match="got layer 7"):
        margins(pocket, torch.tensor([1]), 7)
    with pytest.raises(
        ValueError, match="got policy='fast', on_fail='raise'; expected 'auto'"
    ):
        invert(pocket.states("x", 1), pocket, 1, policy="fast")
    with pytest.raises(ValueError, match="got policy='auto', on_fail='guess'"):
        invert(pocket.states("x", 1), pocket, 1, on_fail="guess")
    with pytest.raises(
        ValueError, match=r"got epsilon=.* expected one finite"
    ):
        invert(pocket.states("x", 1), pocket, 1, epsilon=torch.tensor([1.0, 2.0, 3.0]))
