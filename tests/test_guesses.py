"""What ``invert`` returns where no token fits, and what it refuses."""

import pytest
import torch

from sipit_lite import LanguageModel, OneStepMap, invert


def test_nearest_is_marked(pocket: LanguageModel) -> None:
    """A state that no prompt has: with ``on_fail`` its token is a guess, and says so."""
    ids = pocket.encode("a guess")
    states = pocket.states(ids, 3).clone()
    states[-1] += 3.0
    found = invert(states, pocket, 3, on_fail="nearest")
    assert found.verified.tolist() == [True] * (len(ids) - 1) + [False]
    assert torch.equal(found.tokens[:-1], ids[:-1].cpu())
    step = OneStepMap.after(pocket, 3, ids[:-1])
    everything = step.tokens(pocket.vocabulary)
    assert int(found.tokens[-1]) == int((everything - states[-1]).norm(dim=1).argmin())
    assert float(found.distance[-1]) > float(found.radius[-1])


def test_bad_input(pocket: LanguageModel) -> None:
    """Policy and bounds."""
    with pytest.raises(
        ValueError, match="got policy='fast', on_fail='raise', seed=0; expected 'auto'"
    ):
        invert(pocket.states("x", 1), pocket, 1, policy="fast")
    with pytest.raises(ValueError, match="got policy='auto', on_fail='guess'"):
        invert(pocket.states("x", 1), pocket, 1, on_fail="guess")
    with pytest.raises(ValueError, match=r"got epsilon=.* expected one finite"):
        invert(pocket.states("x", 1), pocket, 1, epsilon=torch.tensor([1.0, 2.0, 3.0]))
