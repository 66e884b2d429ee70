"""The baselines do what the paper describes, and stop when told to."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sipit_lite import LanguageModel, OneStepMap, Published, Random, StatesError
from sipit_lite.experiments.baselines import (
    Attempt,
    FullPasses,
    brute_force,
    greedy_coordinate,
    hard_prompts,
    published,
)
from sipit_lite.experiments.families import configuration, randomised, small

Family = tuple[PreTrainedModel, LanguageModel]


def test_published_proposes_what_our_gradient_policy_proposes(
    family: Family, prompt: Tensor
) -> None:
    """From one start, one with a cache and a cut model, the other with neither."""
    model = family[1]
    target = model.states(prompt[:5], 2)[-1]
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    passes = FullPasses(model, 2, 4, model.decoder, (), prompt[:4].tolist())
    theirs = Published().proposals(passes, target, generators[0])
    step = OneStepMap.after(model, 2, prompt[:4])
    ours = Published().proposals(step, target, generators[1])
    for _ in range(12):
        assert int(next(theirs)) == int(next(ours))


def test_every_token_is_proposed_once() -> None:
    """Whatever the target, and also behind the first window."""
    model = LanguageModel(randomised(configuration("GPT2", vocabulary=60, width=32)))
    target = torch.zeros(model.d_model)
    generator = torch.Generator().manual_seed(0)
    step = FullPasses(model, 1, 0, model.decoder, (), [])
    tokens = torch.cat([*Published().proposals(step, target, generator)]).tolist()
    assert sorted(tokens) == list(range(model.vocab_size))


@pytest.mark.parametrize("baseline", [published, brute_force])
def test_prompts_come_back(
    baseline: Callable[..., Attempt], family: Family, prompt: Tensor
) -> None:
    """Exact, candidates counted one by one."""
    model = family[1]
    found = baseline(model.states(prompt[:2], 3), model, 3)
    assert found.finished and found.tokens.tolist() == prompt[:2].tolist()
    assert len(found.tested) == 2 and (found.tested >= 1).all()
    assert (found.tested <= model.vocab_size).all()


def test_brute_force_tests_half_the_vocabulary(pocket: LanguageModel) -> None:
    """In the order of Algorithm 2: where is the true token in the permutation?"""
    ids = pocket.encode("a")
    found = brute_force(pocket.states(ids, 0), pocket, 0, seed=9)
    generator = torch.Generator().manual_seed(9)
    target = torch.zeros(256, device=ids.device)
    batches = Random().proposals(OneStepMap.after(pocket, 0), target, generator)
    order = torch.cat(list(batches)).tolist()
    assert found.tested.tolist() == [order.index(int(ids[0])) + 1]


def test_a_limit_ends_it(pocket: LanguageModel) -> None:
    """Not finished, and what was found so far is there."""
    for baseline in (published, brute_force, hard_prompts):
        states = pocket.states("a prompt that takes longer than no time", 6)
        attempt = baseline(states, pocket, 6, limit=0.0)
        assert not attempt.finished
        assert len(attempt.tested) >= 1 and attempt.seconds < 30


def test_hard_prompts_solve_the_easy_layer_and_say_so_elsewhere() -> None:
    """At layer 0 each position is a convex problem of its own; deeper it is not."""
    model = small("GPT2", device="cpu")
    ids = torch.tensor([7, 11, 5, 7])
    easy = hard_prompts(model.states(ids[:3], 0), model, 0, steps=400, rate=0.02)
    assert easy.finished == (easy.tokens.tolist() == ids[:3].tolist())
    deep = hard_prompts(model.states(ids, 3), model, 3, steps=20)
    assert deep.finished == (deep.tokens.tolist() == ids.tolist())
    assert deep.tested.tolist() == [20] * 4


def test_bad_states_are_refused(pocket: LanguageModel) -> None:
    """As everywhere."""
    with pytest.raises(StatesError, match="got states of shape"):
        published(torch.zeros(2, 3), pocket, 1)


@pytest.mark.parametrize(
    ("search", "length"), [(greedy_coordinate, 2), (hard_prompts, 1)]
)
def test_searches_from_the_last_state_find_a_short_prompt(
    search: Callable[..., Attempt], length: int
) -> None:
    """What is finished is the true prompt; a state that no prompt has never is."""
    model = small("GPT2", device="cpu")
    ids = torch.tensor([7, 11])[:length]
    state = model.states(ids, 1)[-1]
    found = search(state, model, 1, length, limit=60.0)
    assert found.finished and found.tokens.tolist() == ids.tolist()
    assert not search(torch.randn(model.d_model), model, 1, length, limit=0.05).finished
