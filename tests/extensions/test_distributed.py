"""Several processes give the answer of one; a rank that dies ends the run."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import rank_program
import torch

from sipit_lite.experiments import ranks as program
from sipit_lite.extensions import distributed
from sipit_lite.model import StatesError

CASES = [
    "pairs_equal_one_process",
    "states_equal_one_process",
    "traffic_is_as_calculated",
    "corpora_are_streamed_once",
]


@pytest.fixture(scope="module")
def context() -> multiprocessing.context.BaseContext:
    """Processes forked from one that has imported everything, and computed nothing."""
    server = multiprocessing.get_context("forkserver")
    # The server does not know the path of the tests, so the program is not among these.
    server.set_forkserver_preload(["sipit_lite", "sipit_lite.experiments.ranks"])
    return server


def run(
    context: multiprocessing.context.BaseContext, count: int, *arguments: object
) -> list[int]:
    """Exit codes of so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        context.Process(target=rank_program.run, args=(rank, count, port, *arguments))
        for rank in range(count)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=120)
    return [rank.exitcode for rank in ranks]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_equal_to_one_process(
    context: multiprocessing.context.BaseContext, count: int, tmp_path: Path
) -> None:
    """Even and odd rings, and one in which every two blocks meet twice half way."""
    assert run(context, count, tmp_path, CASES) == [0] * count


def test_a_rank_that_dies_ends_the_run_and_shards_stay(
    context: multiprocessing.context.BaseContext, tmp_path: Path
) -> None:
    """The other does not wait for ever; the next start makes only what was missing."""
    first, second = run(context, 2, tmp_path, ["dies_once"])
    assert first not in (0, None) and second == 9
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len([path for path in done if "rank-1" in str(path)]) == 1
    assert run(context, 2, tmp_path, ["dies_once"]) == [0, 0]
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(after) == 8 and all(after[path] == when for path, when in done.items())


def test_the_command_gives_the_same_minimum(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit for bit, from one process and from two under ``torchrun``."""
    options = ["-n", "60", "--length", "8", "--layers", "1", "--layers", "6"]
    assert program.main(options) == 0
    alone = json.loads(capsys.readouterr().out)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", program.PROGRAM, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    two = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert two.returncode == 0, two.stderr
    both = json.loads(two.stdout)
    assert (alone["ranks"], both["ranks"]) == (1, 2)
    assert alone["layers"] == both["layers"]


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["-n", "1"], {}, "greater than or equal to 2"),
        (["-n", "x"], {}, "valid integer"),
        (["-n", "9999", "--length", "200"], {}, "got count=9999; the text"),
        (["--length", "0"], {}, "greater than or equal to 1"),
        (["--length", "999"], {}, "got count=2000; the text"),
        (["--layers", "8"], {}, "layer"),
        (["--layers", "-1"], {}, "layer"),
        (["--source", "hub"], {}, "bundled"),
        (["--model", "no/where/at-all"], {}, "no/where/at-all"),
        (["-n", "9", "--length", "4", "--folder", "FILE"], {}, "FILE/rank-0-of-1"),
        (["--frobnicate"], {}, "No such option"),
        (["what"], {}, "unexpected extra argument"),
        ([], {"RANK": "0"}, "expected all four, as torchrun sets them"),
        ([], {"WORLD_SIZE": "2"}, "expected all four"),
        ([], {"RANK": "2", "WORLD_SIZE": "2"}, "expected all four"),
        ([], {"RANK": "a", "WORLD_SIZE": "2"}, "expected all four"),
        (
            [],
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "::", "MASTER_PORT": "x"},
            "do not meet",
        ),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str],
    environment: dict[str, str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bad arguments and half-set environments: exit status 2, and no traceback."""
    (tmp_path / "FILE").touch()
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert program.main(arguments) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("distributed: ") and words in line


def test_alone_is_one_rank() -> None:
    """Without torchrun the functions work; too large a k is refused."""
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.5]])
    pairs, distances = distributed.closest_pairs(torch.arange(3), x, 2)
    assert pairs.tolist() == [[1, 2], [0, 1]] and distances.tolist() == [0.5, 5.0]
    with pytest.raises(StatesError, match="got k=4 and 3 rows; expected 1 to 3"):
        distributed.closest_pairs(torch.arange(3), x, 4)


def test_repeated_prompts_are_refused(pocket: distributed.LanguageModel) -> None:
    """Their states are equal, and would pass for a collision."""
    prompts = list(torch.tensor([[1, 2], [3, 4], [1, 2]]))
    with pytest.raises(StatesError, match="got 3 prompts, 2 of them different"):
        distributed.last_states(pocket, prompts, [1])
