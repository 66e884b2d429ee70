"""Two processes against one, each of one thread, through ``torchrun``: seconds for the states, and the minimum."""

import json
import os
import statistics
import subprocess
import sys

from sipit_lite.experiments.checks import Check
from sipit_lite.io.loading import POCKET
from sipit_lite.model import LanguageModel, ModelError

ROUNDS = 3


def scale(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Last-token states of many prompts shared out over ranks, and their closest pair; medians of three rounds.

    Each process loads the model by its name and runs on one thread, on CUDA where there is one. Raises ``ModelError``
    for a model at random initialisation, which has no name to load it by.
    """
    if " at random initialisation" in model.name:
        raise ModelError(
            f"got {model.name}; expected a model that other processes can load by its name"
        )
    asked = (
        ["-n", "300", "--length", "8"]
        if quick
        else ["-n", "6000", "--length", "24", "--source", "installed"]
    )
    asked += ["--layers", *map(str, (1, model.n_layers)), "--seed", str(seed)]
    asked += [] if model.name == POCKET else ["--model", model.name]
    runs = {
        count: [torchrun(count, *asked) for _ in range(1 if quick else ROUNDS)]
        for count in (1, 2)
    }
    seconds = {
        count: statistics.median(run["seconds"] for run in found)
        for count, found in runs.items()
    }
    equal = all(
        run["layers"] == runs[1][0]["layers"]
        for found in runs.values()
        for run in found
    )
    checks = [
        Check.of("states, two processes over one", seconds[1] / seconds[2]),
        Check.of("equal minimum in two processes", float(equal)),
    ]
    reported = {
        f"seconds, processes = {count}": spent for count, spent in seconds.items()
    }
    return checks, {
        "reported": reported,
        "runs": {str(count): found for count, found in runs.items()},
    }


def torchrun(count: int, *arguments: str) -> dict:
    """What ``sipit_lite.extensions.distributed`` prints when run by so many processes of one thread. Raises ``RuntimeError``."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
    ]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "sipit_lite.extensions.distributed", *arguments],
        env=alone,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"{count} processes ended with {done.returncode}: {done.stderr[-500:]}"
        )
    return json.loads(done.stdout)
