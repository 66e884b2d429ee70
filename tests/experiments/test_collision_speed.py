"""What benches of the detector and of a device print, and the memory it takes."""

import json
import re
import subprocess
import sys

import pytest
import torch

from sipit_lite import LanguageModel
from sipit_lite.cli import main
from sipit_lite.experiments import checks, collision_speed

FRESH = """
import torch
from sipit_lite import closest_pairs
def peak():  # ru_maxrss also holds that of the process that started this one
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**20
x = torch.randn(20_000, 256).mul_(torch.logspace(1, -1, 256))
closest_pairs(x[:2000])  # loading the libraries' kernels is not the detector's
before = peak()
closest_pairs(x)
print(peak() - before)
"""


def test_memory_above_the_states() -> None:
    """A fresh process, since peak memory never falls: a quarter of a GiB at most."""
    command = [sys.executable, "-c", FRESH]
    fresh = subprocess.run(command, capture_output=True, check=True, text=True)
    assert 0 < float(fresh.stdout.split()[-1]) < 0.25


def test_a_device_beside_its_own_rates(
    pocket: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """All rows of the table; a CPU is held to no target, and rates are shares."""
    words = ["--quick", "--json", "--model", "pocket-gpt2"]
    assert main(["bench", "device", *words, "--device", str(pocket.device)]) == 0
    run = json.loads(capsys.readouterr().out)
    assert run["bench"] == "device"
    lines, data = run["checks"], run["data"]
    figures = data["reported"]
    wanted = {name for name in figures if "rate, TFLOP/s" not in name}
    assert len(wanted) == 9 and wanted <= checks.AT_LEAST.keys() | checks.AT_MOST.keys()
    assert len(lines) == (9 if pocket.device.type == "cuda" else 0)
    assert all(value > 0 for value in figures.values())
    # A scan is matrix products, and cannot do more of them than the device can.
    assert 0.01 < figures["scan, share of the matrix rate"] < 1.5
    [where] = data["table"]
    assert re.fullmatch(r"on .+", where)


def test_the_clock_takes_the_least_of_several() -> None:
    """The least time of several, and what the last call gave."""
    calls = iter(range(5))
    seconds, last = collision_speed.timed(torch.device("cpu"), 3, lambda: next(calls))
    assert 0 < seconds < 1 and last == 2
