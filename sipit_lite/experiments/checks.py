"""Checks against targets: a missed one is reported, whoever reads the table judges."""

import io
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import transformers
from jaxtyping import Int
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from tqdm import tqdm

from sipit_lite.io.text import prompts
from sipit_lite.model import LanguageModel
from sipit_lite.recovery import NotVerified, Outcome, Recovery
from sipit_lite.sipit import invert

Number = float | int
PUBLISHED = "speed-up over published"
# What is not listed is a share, of which all is wanted.
AT_LEAST: dict[str, Number] = {
    "speed-up over gemm": 10, "speed-up over cdist": 100,
    f"{PUBLISHED}, prose, last layer": 200, f"{PUBLISHED}, random, last layer": 200,
    "batch speed-up for each prompt": 5, "exact, T = 2": 0.97, "exact, T = 3": 0.95,
    "exact, T = 4": 0.90, "exact, T = 6": 0.50, "exact, T = 8": 0.90,
}  # fmt: skip
AT_MOST: dict[str, Number] = {
    "silent errors": 0, "false successes": 0, "minimum error against float64": 1e-9,
    "peak memory GiB above the states": 1, "growth exponent of time with T": 1.2,
    "forward passes, prose, up to layer L/2": 3,
    "forward passes, prose, last layer": 10,
    "forward passes, random, up to layer L/2": 10,
    "forward passes, random, last layer": 40,
    "seconds, last state, T = 3": 5, "seconds, last state, T = 4": 20,
    "seconds, last state, T = 6": 120,
}  # fmt: skip


@dataclass(frozen=True)
class Check:
    """One line of the closing table.

    >>> Check.of("silent errors", 0).ok, Check.of("speed-up over gemm", 1.6).ok
    (True, False)
    """

    name: str
    value: Number
    target: Number
    better: str  # higher or lower
    ok: bool

    @classmethod
    def of(cls, name: str, value: Number) -> "Check":
        """Compare a measured value with the target of that name."""
        if name in AT_MOST:  # less is better
            target = AT_MOST[name]
            return cls(name, value, target, "lower", value <= target)
        target = AT_LEAST.get(name, 1)
        return cls(name, value, target, "higher", value >= target)


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()
) -> str:
    """Lines of text in aligned columns, those named in ``right`` on the right."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in header:
        side = "right" if name in right else "left"
        grid.add_column(Text(name), justify=side, no_wrap=True)
    for row in rows:
        # As Text, since rich would read "[/folder]" as markup.
        grid.add_row(*map(Text, row))
    page = io.StringIO()
    # So wide that nothing is cut: whoever prints to a narrow terminal wraps.
    Console(file=page, width=1000, color_system=None).print(grid)
    return "\n".join(line.rstrip() for line in page.getvalue().splitlines())


def verdicts(checks: Iterable[Check]) -> str:
    """The closing table."""
    rows = []
    for check in checks:
        sign = ">=" if check.better == "higher" else "<="
        target = f"{sign} {check.target:g}"
        verdict = "met" if check.ok else "MISSED"
        rows.append((check.name, f"{check.value:.4g}", target, verdict))
    return table(("check", "value", "target", "verdict"), rows, ("value", "target"))


def progress_bar(items: Iterable, name: str, progress: bool) -> Iterable:
    """The items, with a bar on a terminal where ``progress`` is wanted."""
    return tqdm(items, name, disable=None if progress else True)


def exactness(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Invert held-out prompts and edge cases at the first, middle and last layer."""
    layers = [1, model.n_layers // 2, model.n_layers]
    counts = {"prose": 30, "code": 15, "random": 15}
    if quick:
        counts = dict.fromkeys(counts, 1)
    drawn = list(held_out(model, counts, 5 if quick else 48, seed))
    runs = []
    for kind, ids in progress_bar(drawn, "held-out", progress):
        runs += [attempt(model, ids, layer) | {"kind": kind} for layer in layers]
    groups = {"all": runs}
    # What breaks naive inverters.
    for name, ids in edge_prompts(model, quick, seed).items():
        where = layers[:1] if quick else layers
        groups[name] = [attempt(model, ids, layer) for layer in where]
    silent = sum(run["silent error"] for run in chain(*groups.values()))
    checks = [Check.of("silent errors", silent)]
    for name, group in groups.items():
        checks.append(Check.of(f"exact, {name}", share(run["exact"] for run in group)))
    tested = np.concatenate([run["tested"] for run in runs])
    reported = {"candidates per token, median": float(np.median(tested))}
    return checks, {"reported": reported, "runs": groups}


def held_out(
    model: LanguageModel, counts: dict[str, int], longest: int, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Held-out prompts of each kind, of lengths spread evenly from 1 to ``longest``."""
    for kind, count in counts.items():
        lengths = np.linspace(1, longest, count).round().astype(int).tolist()
        for i, length in enumerate(lengths):
            # Another seed, else the shorter prompts would begin the longer ones.
            ids = next(prompts(model.tokenizer, kind, length, seed=seed + i))
            yield kind, ids.to(model.device)


def edge_prompts(model: LanguageModel, quick: bool, seed: int) -> dict[str, Tensor]:
    """The prompts that break naive inverters."""
    full = min(32 if quick else model.n_positions, model.n_positions)
    parts = islice(prompts(model.tokenizer, "prose", 16, seed=seed), -(-full // 16))
    text = torch.cat(list(parts)).to(model.device)
    return {
        "full context": text[:full],
        "repeated token": text[:1].repeat(8 if quick else 32),
        "single token": text[:1],  # without a prefix, so without a cache
        # Not every tokenizer has one.
        "end-of-text token": text.new_tensor([model.tokenizer.eos_token_id or 0]),
    }


def attempt(model: LanguageModel, ids: Tensor, layer: int) -> dict:
    """Invert the states of known ids, and say what came of it."""
    states = model.states(ids, layer)
    started = time.perf_counter()
    try:
        outcome = invert(states, model, layer)
    except NotVerified as error:  # a refusal is an outcome, not a failure
        outcome = error
    seconds = time.perf_counter() - started
    # A refusal carries what was recovered before it.
    recovery = outcome if isinstance(outcome, Recovery) else outcome.recovered
    row = {"layer": layer, "length": len(ids)} | judged(ids, outcome)
    return row | {"tested": recovery.tested.tolist(), "seconds": round(seconds, 4)}


def judged(ids: Int[Tensor, " pos"], outcome: Outcome) -> dict:
    """Whether a known prompt came back; a wrong one without a refusal is silent."""
    refused = None if isinstance(outcome, Recovery) else type(outcome).__name__
    exact = not refused and torch.equal(outcome.tokens, ids.cpu())
    silent = not refused and not exact
    return {"exact": exact, "refused": refused, "silent error": silent}


def clock(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's queue emptied before and after."""
    # Kernels of a GPU run on after the call that starts them has returned.
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()  # else the work of earlier calls is counted
    started = time.perf_counter()
    work()
    wait()  # else this work is not
    return time.perf_counter() - started


def report(bench: str, model: LanguageModel, checks: list[Check], data: dict) -> dict:
    """The JSON object of one bench."""
    lines = [asdict(check) for check in checks]
    return {"bench": bench, **setting(model), "checks": lines, "data": data}


def setting(model: LanguageModel) -> dict:
    """What was measured with: model, versions, device and threads."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    place = {"device": str(model.device), "threads": torch.get_num_threads()}
    return {"model": model.name, "versions": versions, **place}


def peak_memory() -> float | None:
    """Peak resident memory of this process so far, GiB; None where it is not known."""
    status = Path("/proc/self/status")
    # Linux's ru_maxrss also holds the memory of the process that started this one.
    if not status.exists():
        return None
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20


def share(outcomes: Iterable[bool]) -> float:
    """Share of true outcomes; of none 0, since nothing measured is no success."""
    values = list(outcomes)
    return sum(values) / max(1, len(values))
