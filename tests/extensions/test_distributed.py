"""Several processes give the answer of one; a killed one ends the run, and what was done stays done."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sipit_lite.extensions import distributed
from sipit_lite.model import StatesError

PROGRAM = str(Path(__file__).with_name("rank_program.py"))


def torchrun(count: int, *program: str) -> subprocess.CompletedProcess:
    """Run a program in so many processes of one thread, on the CPU."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        *program,
    ]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, env=alone, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("count", [2, 3, 4])
def test_equal_to_one_process(count: int, tmp_path: Path) -> None:
    """Pairs, states, outcomes, traffic; even and odd rings, and one in which every two meet twice half way round."""
    run = torchrun(count, PROGRAM, "equal_to_one_process", str(tmp_path))
    assert run.returncode == 0, run.stderr


def test_the_command_gives_the_same_minimum() -> None:
    """Bit for bit, from one, two and three processes."""
    told = []
    for count in (1, 2, 3):
        run = torchrun(
            count,
            "-m",
            "sipit_lite.extensions.distributed",
            "-n",
            "200",
            "--length",
            "8",
            "--layers",
            "1",
            "6",
        )
        assert run.returncode == 0, run.stderr
        told.append(json.loads(run.stdout))
    assert [t["ranks"] for t in told] == [1, 2, 3] and told[0]["layers"] == told[1][
        "layers"
    ] == told[2]["layers"]


def test_a_killed_rank_ends_the_run_and_shards_stay(tmp_path: Path) -> None:
    """The other rank does not wait for ever; the next start makes only what was missing."""
    run = torchrun(2, PROGRAM, "dies_once", str(tmp_path))
    assert run.returncode != 0
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len([path for path in done if "rank-1" in str(path)]) == 1
    assert torchrun(2, PROGRAM, "dies_once", str(tmp_path)).returncode == 0
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(kept) == 8 and all(kept[path] == when for path, when in done.items())


def test_alone_is_one_rank() -> None:
    """Without torchrun the functions work as they are; too large a k and too few prompts are refused."""
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.5]])
    found = distributed.closest_pairs(torch.arange(3), x, 2)
    assert found.pairs.tolist() == [[1, 2], [0, 1]] and found.minimum == 0.5
    with pytest.raises(StatesError, match="got k=4"):
        distributed.closest_pairs(torch.arange(3), x, 4)
    with pytest.raises(StatesError, match="got 2 prompts for 3 rows"):
        distributed.closest_pairs(
            torch.arange(3), x, 1, prompts=[torch.tensor([1]), torch.tensor([2])]
        )
