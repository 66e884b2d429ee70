"""What the benches of the last state count."""

from sipit_lite.experiments.last_states import summary


def test_missed_prompts_are_counted_by_their_cause() -> None:
    """Another length, or a local minimum of the right one."""
    run = {"exact": False, "false success": False, "collision": False, "length": 3}
    run |= {"right length": True, "seconds": 1.0}
    slower = run | {"seconds": 3.0}
    longer = run | {"right length": False, "seconds": 2.0}
    row = summary([run | {"exact": True}, run, slower, longer])
    assert (row["prompts"], row["exact"], row["other length"]) == (4, 1, 1)
    assert row["local minimum"] == 2 and row["false successes"] == 0
    assert row["seconds"] == 1.5 and row["low"] < 0.25 < row["high"]
