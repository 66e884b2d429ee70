"""What the benches of the last state count."""

import pytest
import torch

from sipit_lite import LanguageModel
from sipit_lite.experiments.last_states import conditions, log_probability, summary
from sipit_lite.extensions.laststate import Law


def test_missed_prompts_are_counted_by_their_cause() -> None:
    """Another length, a local minimum, and of these a prior that prefers it."""
    run = {"exact": False, "false success": False, "collision": False, "length": 3}
    run |= {"right length": True, "likelier": True, "seconds": 1.0}
    unlikely = run | {"likelier": False, "seconds": 3.0}
    longer = run | {"right length": False, "seconds": 2.0}
    row = summary([run | {"exact": True}, run, unlikely, longer])
    assert (row["prompts"], row["exact"], row["other length"]) == (4, 1, 1)
    assert (row["local minimum"], row["wrong prior"]) == (2, 1)
    assert row["seconds"] == 1.5 and row["low"] < 0.25 < row["high"]


def test_probability_of_a_prompt() -> None:
    """Three fair coins."""
    law = Law(torch.tensor([0.5, 0.5]).log())
    expected = float(torch.tensor(0.125).log())
    ids = torch.tensor([0, 1, 0])
    assert log_probability(law, ids) == pytest.approx(expected)


def test_one_condition_changes_at_a_time(pocket: LanguageModel) -> None:
    """What is changed, in its order."""
    changes = conditions(pocket, 2, 1)
    expected = ["plain", "layer", "kind", "tokens", "noise", "width"]
    assert list(dict.fromkeys(change.what for change in changes)) == expected
