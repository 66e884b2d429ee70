"""Measurements side by side in one run, each ending in a table of checks: name, value, target, verdict.

A missed target is reported, never raised: whoever reads the table judges.
"""

import copy
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from sipit_lite.acceptance import Observation
from sipit_lite.io.text import prompts
from sipit_lite.model import LanguageModel
from sipit_lite.onestep import ROWS, OneStepMap
from sipit_lite.policies import Gradient
from sipit_lite.recovery import NotVerified
from sipit_lite.sipit import CHALLENGERS, every_token, invert

Better = Literal["higher", "lower"]
Number = float | int
TARGETS: dict[str, tuple[Number, Better]] = {
    "exact, all": (1.0, "higher"),
    "silent errors": (0, "lower"),
    "exact, full context": (1.0, "higher"),
    "exact, repeated token": (1.0, "higher"),
    "exact, single token": (1.0, "higher"),
    "exact, end-of-text token": (1.0, "higher"),
    "exact, float16 under half the margin": (1.0, "higher"),
    "exact, bfloat16 under half the margin": (1.0, "higher"),
    "exact, demo": (1.0, "higher"),
    "peak memory GiB, demo": (2.0, "lower"),
    "exact, gpt2 at random initialisation": (1.0, "higher"),
    "peak memory GiB, gpt2 at random initialisation": (3.0, "lower"),
    "scan over plain forward": (1.5, "lower"),
    "speed-up over gemm": (10, "higher"),
    "speed-up over cdist": (100, "higher"),
    "minimum error against float64": (1e-9, "lower"),
    "isotropic time over gemm": (2, "lower"),
    "peak memory GiB above the states": (1.0, "lower"),
    "forward rate over gemm rate": (0.5, "higher"),
    "exact, auto": (1.0, "higher"),
    "speed-up over published, prose, last layer": (200, "higher"),
    "speed-up over published, random, last layer": (200, "higher"),
    "speed-up over published, gpt2 at random initialisation": (50, "higher"),
    "forward passes, prose, up to layer L/2": (3, "lower"),
    "forward passes, prose, last layer": (10, "lower"),
    "forward passes, random, up to layer L/2": (10, "lower"),
    "forward passes, random, last layer": (40, "lower"),
    "Newton steps, median": (4, "lower"),
    "Newton steps, 99th percentile": (10, "lower"),
    "growth exponent of time with T": (1.2, "lower"),
    "batch speed-up for each prompt": (5, "higher"),
    "recovered at 0.49 of the margin": (1.0, "higher"),
    "rival at 0.51 of the margin": (1.0, "higher"),
    "states, two processes over one": (1.7, "higher"),
    "equal minimum in two processes": (1.0, "higher"),
    "exact, all families": (1.0, "higher"),
    "exact, T = 1": (1.0, "higher"),
    "exact, T = 2": (0.97, "higher"),
    "exact, T = 3": (0.95, "higher"),
    "exact, T = 4": (0.90, "higher"),
    "exact, T = 6": (0.50, "higher"),
    "exact, T = 8": (0.90, "higher"),
    "false successes": (0, "lower"),
    "seconds, last state, T = 3": (5, "lower"),
    "seconds, last state, T = 4": (20, "lower"),
    "seconds, last state, T = 6": (120, "lower"),
}


@dataclass(frozen=True)
class Check:
    """One line of the closing table.

    >>> Check.of("silent errors", 0).ok, Check.of("scan over plain forward", 1.6).ok
    (True, False)
    """

    name: str
    value: Number
    target: Number
    better: Better
    ok: bool

    @classmethod
    def of(cls, name: str, value: Number) -> "Check":
        """Compare a measured value with the target of that name."""
        target, better = TARGETS[name]
        return cls(
            name,
            value,
            target,
            better,
            value >= target if better == "higher" else value <= target,
        )


def exactness(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Invert held-out prompts of 1 to 48 tokens at the first, middle and last layer with ``Gradient``, and edge cases.

    Counts what was recovered exactly, silent errors (a wrong prompt returned as verified), and candidates tested.
    """
    layers = [1, model.n_layers // 2, model.n_layers]
    counts = (
        {"prose": 2, "code": 1, "random": 1}
        if quick
        else {"prose": 30, "code": 15, "random": 15}
    )
    asked = list(held_out(model, counts, 12 if quick else 48, seed))
    cases = [(kind, ids, layer) for layer in layers for kind, ids in asked]
    runs = [
        attempt(model, ids, layer) | {"kind": kind}
        for kind, ids, layer in _bar(cases, "held-out", progress)
    ]
    edges = {
        name: [
            attempt(model, ids, layer) for layer in (layers[:1] if quick else layers)
        ]
        for name, ids in _bar(
            edge_prompts(model, quick, seed).items(), "edge cases", progress
        )
    }
    short = [ids[-5:] for _, ids in asked[3::15]] if not quick else [asked[1][1][-2:]]
    pairs = [
        (ids, layer) for ids in short for layer in (layers[:1] if quick else layers)
    ]
    stored = [
        run
        for ids, layer in _bar(pairs, "rounded", progress)
        for run in rounded(model, ids, layer)
    ]
    every = runs + [run for group in edges.values() for run in group] + stored
    checks = [Check.of("exact, all", share(run["exact"] for run in runs))]
    checks += [Check.of("silent errors", sum(run["silent error"] for run in every))]
    checks += [
        Check.of(f"exact, {name}", share(run["exact"] for run in group))
        for name, group in edges.items()
    ]
    for dtype in ("float16", "bfloat16"):
        under = [
            run["exact"]
            for run in stored
            if run["dtype"] == dtype and run["noise under half the margin"]
        ]
        checks.append(Check.of(f"exact, {dtype} under half the margin", share(under)))
    checks += [] if quick else whole_processes()
    return checks, {
        "reported": candidate_counts(runs),
        "runs": runs,
        "edges": edges,
        "stored": stored,
    }


def held_out(
    model: LanguageModel, counts: dict[str, int], longest: int, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Held-out prompts of each kind, their lengths spread evenly from 1 to ``longest`` tokens."""
    for kind, count in counts.items():
        for i, length in enumerate(np.linspace(1, longest, count).round().astype(int)):
            yield (
                kind,
                next(prompts(model.tokenizer, kind, int(length), seed=seed + i)).to(
                    model.device
                ),
            )


def edge_prompts(
    model: LanguageModel, quick: bool, seed: int
) -> dict[str, Int[Tensor, " pos"]]:
    """The prompts that break naive inverters."""
    full = min(64, model.n_positions) if quick else model.n_positions
    text = torch.cat(
        list(islice(prompts(model.tokenizer, "prose", 16, seed=seed), -(-full // 16)))
    )
    end = model.tokenizer.eos_token_id or 0
    some = {
        "full context": text[:full],
        "repeated token": text[:1].repeat(8 if quick else 32),
        "single token": text[:1],
        "end-of-text token": torch.tensor([end]),
    }
    return {name: ids.to(model.device) for name, ids in some.items()}


def attempt(
    model: LanguageModel,
    ids: Int[Tensor, " pos"],
    layer: int,
    dtype: torch.dtype | None = None,
) -> dict:
    """Invert the states of known ids and say what came of it."""
    states, begun = model.states(ids, layer), time.perf_counter()
    try:
        found = invert(states if dtype is None else states.to(dtype), model, layer)
        exact, tested, refused = (
            torch.equal(found.tokens, ids.cpu()),
            found.tested.tolist(),
            None,
        )
    except NotVerified as refusal:
        exact, tested, refused = (
            False,
            refusal.recovered.tested.tolist(),
            type(refusal).__name__,
        )
    return {
        "layer": layer,
        "length": len(ids),
        "exact": exact,
        "refused": refused,
        "tested": tested,
        "silent error": not exact and refused is None,
        "seconds": round(time.perf_counter() - begun, 4),
    }


def rounded(model: LanguageModel, ids: Int[Tensor, " pos"], layer: int) -> list[dict]:
    """Invert states stored as float16 and bfloat16, and say whether that noise was under half the margin."""
    states = model.states(ids, layer)
    margins = torch.tensor(
        [OneStepMap.after(model, layer, ids[:t]).margin() for t in range(len(ids))]
    )
    runs = []
    for dtype in (torch.float16, torch.bfloat16):
        noise = torch.linalg.vector_norm(states - states.to(dtype).float(), dim=1).cpu()
        told = {
            "dtype": str(dtype).removeprefix("torch."),
            "noise under half the margin": bool((noise < margins / 2).all()),
        }
        runs.append(attempt(model, ids, layer, dtype) | told)
    return runs


def candidate_counts(runs: list[dict]) -> dict[str, float]:
    """Candidates tested per token: median, 99th percentile, share of positions that went on to the scan.

    >>> candidate_counts([{"tested": [40, 72, 4096]}])["candidates per token, median"]
    72.0
    """
    tested = np.array([n for run in runs for n in run["tested"]])
    policy = Gradient()
    reach = policy.proposals_per_step * policy.max_steps + CHALLENGERS
    return {
        "candidates per token, median": float(np.median(tested)),
        "candidates per token, 99th percentile": float(np.percentile(tested, 99)),
        "share of positions that needed the scan": float((tested > reach).mean()),
        "positions": len(tested),
    }


def scan(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Time a full-vocabulary scan at one position against a plain forward pass over as many one-token rows.

    The plain pass is what ``transformers`` offers: the prefix cache repeated for each row, the decoder uncut.
    """
    prefix = next(prompts(model.tokenizer, "prose", 20, seed=seed)).to(model.device)
    step = OneStepMap.after(model, model.n_layers, prefix)
    seen = Observation.of(step.tokens(every_token(model)[:1]), model, model.n_layers)
    times = [
        (
            clock(
                lambda: seen.distance(0, step.tokens(every_token(model))), model.device
            ),
            clock(
                lambda: plain_forward(model, prefix, every_token(model)), model.device
            ),
        )
        for _ in _bar(range(2 if quick else 9), "scan", progress)
    ]
    ratio = statistics.median(ours / plain for ours, plain in times)
    seconds = {
        "scan, seconds": statistics.median(ours for ours, _ in times),
        "plain forward, seconds": statistics.median(plain for _, plain in times),
    }
    data = {
        "reported": seconds,
        "prefix": len(prefix),
        "rows": model.vocab_size,
        "seconds": times,
    }
    return [Check.of("scan over plain forward", ratio)], data


def plain_forward(
    model: LanguageModel, prefix: Int[Tensor, " pos"], tokens: Int[Tensor, " cand"]
) -> None:
    """One-token rows over a repeated prefix cache, with nothing of ours in it."""
    with torch.no_grad():
        cache = DynamicCache()
        model.decoder(prefix[None], past_key_values=cache, use_cache=True)
        for rows in tokens.split(ROWS):
            repeated = copy.deepcopy(cache)
            repeated.batch_repeat_interleave(len(rows))
            model.decoder(rows[:, None], past_key_values=repeated, use_cache=True)


def clock(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's queue emptied before and after."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def report(bench: str, model: LanguageModel, checks: list[Check], data: dict) -> dict:
    """The JSON object of one bench."""
    return {
        "bench": bench,
        **setting(model),
        "checks": [asdict(check) for check in checks],
        "data": data,
    }


def setting(model: LanguageModel) -> dict:
    """What was measured with: model, versions, device and threads."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {
        "model": model.name,
        "versions": versions,
        "device": str(model.device),
        "threads": torch.get_num_threads(),
    }


def table(checks: Iterable[Check]) -> str:
    """The closing table, aligned.

    >>> print(table([Check.of("silent errors", 0)]))
    check          value  target  verdict
    silent errors      0    <= 0  met
    """
    rows = [("check", "value", "target", "verdict")]
    for check in checks:
        sign = ">=" if check.better == "higher" else "<="
        rows.append(
            (
                check.name,
                f"{check.value:.4g}",
                f"{sign} {check.target:g}",
                "met" if check.ok else "MISSED",
            )
        )
    name, value, target = (max(len(row[i]) for row in rows) for i in range(3))
    return "\n".join(
        f"{r[0]:<{name}}  {r[1]:>{value}}  {r[2]:>{target}}  {r[3]}" for r in rows
    )


def whole_processes() -> list[Check]:
    """Exactness and peak memory of two runs of the command line, each a process of its own."""
    demo = _demo()
    large = _demo("--model", "gpt2", "--random-init", "--layer", "12")
    name = "gpt2 at random initialisation"
    return [
        Check.of("exact, demo", float(demo["exact"])),
        Check.of("peak memory GiB, demo", demo["peak memory GiB"]),
        Check.of(f"exact, {name}", float(large["exact"])),
        Check.of(f"peak memory GiB, {name}", large["peak memory GiB"]),
    ]


def in_a_process(module: str, function: str, *arguments: object) -> float:
    """The number that a function of ours returns in a fresh process, where its memory is its own.

    >>> in_a_process("sipit_lite.experiments.checks", "share", "[True, False]")
    0.5
    """
    code = f"from {module} import {function}; print({function}({', '.join(map(str, arguments))}))"
    return float(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )


def peak_memory() -> float | None:
    """Peak resident memory of this process so far, GiB; None where the system does not tell.

    >>> peak_memory() is None or peak_memory() > 0.01
    True
    """
    status = Path("/proc/self/status")
    if (
        status.exists()
    ):  # Linux's ru_maxrss also holds the memory of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _demo(*options: str) -> dict:
    command = [
        sys.executable,
        "-m",
        "sipit_lite.cli",
        "demo",
        "--json",
        "--device",
        "cpu",
        "--figure",
        "",
        *options,
    ]
    return json.loads(
        subprocess.run(command, capture_output=True, text=True, check=False).stdout
    )


def share(outcomes: Iterable[bool]) -> float:
    """Share of true outcomes; of none at all 0, since nothing measured is no success.

    >>> share([True, False])
    0.5
    """
    kept = list(outcomes)
    return sum(kept) / len(kept) if kept else 0.0


def _bar(items: Iterable, name: str, progress: bool) -> Iterable:
    return tqdm(items, name, disable=None if progress else True)
