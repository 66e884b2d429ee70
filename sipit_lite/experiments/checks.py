"""Checks against targets: a missed one is reported, whoever reads the table judges."""

import io
import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
import transformers
from jaxtyping import Int
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from tqdm import tqdm

from sipit_lite.model import LanguageModel
from sipit_lite.recovery import Outcome, Recovery

Number = float | int
PUBLISHED = "speed-up over published"
# What is not listed is a share, of which all is wanted.
_TARGETS = json.loads(Path(__file__).with_name("targets.json").read_text("utf-8"))
AT_LEAST: dict[str, Number] = _TARGETS["at least"]
AT_MOST: dict[str, Number] = _TARGETS["at most"]


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


def judged(ids: Int[Tensor, " pos"], outcome: Outcome) -> dict:
    """Whether a known prompt came back; a wrong one without a refusal is silent."""
    refused = None if isinstance(outcome, Recovery) else type(outcome).__name__
    exact = not refused and torch.equal(outcome.tokens, ids.cpu())
    silent = not refused and not exact
    return {"exact": exact, "refused": refused, "silent error": silent}


def clock(work: Callable[[], object], device: torch.device, rounds: int = 1) -> float:
    """Median seconds of a call, the device's queue emptied before and after."""
    # Kernels of a GPU run on after the call that starts them has returned.
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(rounds):
        wait()  # else the work of earlier calls is counted
        started = time.perf_counter()
        work()
        wait()  # else this work is not
        seconds.append(time.perf_counter() - started)
    return median(seconds)


def report(bench: str, model: LanguageModel, checks: list[Check], data: dict) -> dict:
    """The JSON object of one bench."""
    lines = [*map(asdict, checks)]
    return {"bench": bench, **setting(model), "checks": lines, "data": data}


def setting(model: LanguageModel) -> dict:
    """What was measured with: model, versions, device and threads."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    place = {"device": str(model.device), "threads": torch.get_num_threads()}
    if model.device.type == "cuda":
        place["card"] = torch.cuda.get_device_name(model.device)
    return {"model": model.name, "versions": versions, **place}


def share(outcomes: Iterable[bool]) -> float:
    """Share of true outcomes; of none 0, since nothing measured is no success."""
    values = list(outcomes)
    return sum(values) / max(1, len(values))
