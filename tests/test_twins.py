"""Tokens that share a state, though their embeddings do not show it."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sipit_lite import Ambiguous, Gradient, LanguageModel, Random, invert, invert_many
from sipit_lite.acceptance import RELATED, related
from sipit_lite.experiments.safety import PAIR, UNPROBED, adversaries
from sipit_lite.onestep import OneStepMap

PLAIN = torch.tensor([7, 8, 5, 9, 11, 12, 13, 14, 15])  # a prompt without them


def with_twin(place: int) -> torch.Tensor:
    """The plain prompt with a twin at one position."""
    ids = PLAIN.clone()
    ids[place] = PAIR[0]
    return ids


MODELS = adversaries()
# The positions at which twins share their state; the last model is in one test alone.
PLACES = (0, 1, 4, 7)  # both at which the first block is probed, and others
ADVERSARIES = {
    "scaled rows before a norm": PLACES,
    "a direction that the MLP deletes": PLACES,
    "twins at the first position": [0],
    "twins at the eighth position": [7],
}


@pytest.mark.parametrize("name", ADVERSARIES)
def test_twins_are_refused_where_they_are_twins(name: str) -> None:
    """Both are quoted; elsewhere, and for all other tokens, prompts come back."""
    model = MODELS[name]
    places = ADVERSARIES[name]
    for layer in (1, model.n_layers):
        for place in PLACES:
            ids = with_twin(place)
            states = model.states(ids, layer)
            other = ids.clone()
            other[place] = PAIR[1]
            same = (model.states(other, layer)[place] - states[place]).norm()
            assert (same < 1e-3) == (place in places)  # they are what they are made for
            for policy in (Random(16), Gradient()):
                if place not in places:
                    assert torch.equal(invert(states, model, layer).tokens, ids)
                    continue
                with pytest.raises(Ambiguous, match=f"position {place}: 2 tokens"):
                    invert(states, model, layer, policy=policy)
        plain = invert(model.states(PLAIN, layer), model, layer, certify=True)
        assert torch.equal(plain.tokens, PLAIN) and plain.certified


def test_the_class_of_a_token_is_reported() -> None:
    """By position, in the error and where the nearest token was taken nevertheless."""
    model = MODELS["scaled rows before a norm"]
    states = model.states(with_twin(4), 2)
    with pytest.raises(Ambiguous) as caught:
        invert(states, model, 2)
    assert caught.value.recovered.twins == {4: list(PAIR)}
    taken = invert(states, model, 2, on_fail="nearest", certify=True)
    assert taken.twins == {4: list(PAIR)}
    assert taken.verified.tolist() == [place != 4 for place in range(9)]
    assert int(taken.tokens[4]) in PAIR and not taken.certified
    # Only the margin of the twin is rounding: the others are certified beside it.
    assert taken.margin[4] < 1e-5
    assert (taken.headroom > 0.1).tolist() == taken.verified.tolist()


def test_what_only_a_scan_can_tell() -> None:
    """Twins at a position where the first block was not probed: certify refuses them."""
    model = MODELS[UNPROBED]
    assert not related(model, 2)[list(PAIR)].any()
    states = model.states(with_twin(3), 2)
    with pytest.raises(Ambiguous, match="position 3: 2 tokens verify"):
        invert(states, model, 2, certify=True)


@pytest.mark.parametrize("name", ADVERSARIES)
def test_related_tokens_are_those_of_a_plain_search(name: str) -> None:
    """All pairs at both positions, by their distances in float64."""
    model = MODELS[name]
    expected = torch.zeros(model.vocab_size, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randint(model.vocab_size, (7,), generator=generator)
    for start in (prefix[:0], prefix):
        states = OneStepMap.after(model, 1, start).tokens(model.vocabulary).double()
        usual = (states - states.mean(0)).norm(dim=1).median()
        apart = (states[:, None] - states).norm(dim=2).fill_diagonal_(torch.inf)
        expected |= apart.amin(1) <= RELATED * usual
    assert expected[list(PAIR)].all()
    assert torch.equal(related(model, 2), expected)


def test_a_crowd_of_equal_tokens_is_related() -> None:
    """More pairs than are listed at first: then all rows are judged."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "n_embd": 32, "n_head": 4, "n_layer": 2}
    sizes |= {"n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    hf = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    hf.transformer.wte.weight.data[100:150] = hf.transformer.wte.weight.data[
        100
    ].clone()
    model = LanguageModel(hf, name="crowd")
    assert related(model, 1).nonzero()[:, 0].tolist() == list(range(100, 150))
    outcomes = invert_many([model.states(torch.tensor([3, 120]), 1)], model, 1)
    assert isinstance(outcomes[0], Ambiguous)
    assert "50 tokens verify" in str(outcomes[0])
    assert invert(model.states(PLAIN, 2), model, 2, certify=True).certified
