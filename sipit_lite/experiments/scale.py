"""Two processes against one, each of one thread, through ``torchrun`` (chapter 18)."""

import json
import os
import statistics
import subprocess
import sys

from sipit_lite.experiments.checks import Check
from sipit_lite.extensions.distributed import PROGRAM
from sipit_lite.io.loading import POCKET
from sipit_lite.model import LanguageModel, ModelError

ROUNDS = 3


def scale(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Seconds for the states of many prompts, and their closest pair, by processes.

    Medians of three rounds. Each process loads the model by its name and runs on one
    thread, on CUDA where there is one. Raises ``ModelError`` for a model at random
    initialisation, which has no name to load it by.
    """
    if " at random initialisation" in model.name:
        got = f"got {model.name}"
        raise ModelError(f"{got}; expected one that other processes load by its name")
    size = "-n 300 --length 8" if quick else "-n 6000 --length 24 --source installed"
    options = [*size.split(), "--layers=1", f"--layers={model.n_layers}"]
    options += [f"--seed={seed}"]
    # The bundled model is what a process loads by default.
    if model.name != POCKET:
        options += ["--model", model.name]
    runs = {}
    seconds = {}
    for count in (1, 2):
        rounds = [torchrun(count, *options) for _ in range(1 if quick else ROUNDS)]
        seconds[count] = statistics.median(run["seconds"] for run in rounds)
        runs[str(count)] = rounds
    layers = [run["layers"] for run in runs["1"] + runs["2"]]
    # Bit for bit: every distance is computed from the same two rows.
    equal = all(one == layers[0] for one in layers)
    checks = [
        Check.of("states, two processes over one", seconds[1] / seconds[2]),
        Check.of("equal minimum in two processes", float(equal)),
    ]
    reported = {f"seconds, processes = {count}": seconds[count] for count in (1, 2)}
    return checks, {"reported": reported, "runs": runs}


def torchrun(count: int, *options: str) -> dict:
    """What the program prints when so many processes of one thread run it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", "-m", PROGRAM, *options]
    # One thread each, or one process would use all cores already.
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run = subprocess.run(command, env=os.environ | threads, capture_output=True)
    if run.returncode:
        message = run.stderr.decode(errors="replace")[-500:]
        raise RuntimeError(f"{count} processes ended with {run.returncode}: {message}")
    return json.loads(run.stdout)
