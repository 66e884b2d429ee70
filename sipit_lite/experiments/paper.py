"""What the paper reports, as data, beside runs of ``reproduce`` (``real_models``)."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sipit_lite.experiments import checks
from sipit_lite.model import SipItError

Run = dict[str, Any]
Value = float | int | None
GPT2 = "gpt2"
TINY = "roneneldan/TinyStories-33M"
LLAMA = "meta-llama/Llama-3.1-8B"
MISTRAL = "mistralai/Mistral-7B-v0.1"
PHI = "microsoft/Phi-4-mini-instruct"
DEPTHS = ("first", "middle", "last")
NOT_THERE = "not in the paper"
SPEED = ("seconds", "exact")
NEAREST = ("minimum", "collisions")
# The quantities of each experiment that stand in its table.
SHOWN = {
    "layers": NEAREST,
    "lengths": ("minimum", "mean", "maximum"),
    "continuations": NEAREST,
    "inversion": (*SPEED, "explored, %"),
    "compared": SPEED,
    "splits": SPEED,
    "times": SPEED,
    "same-answer": NEAREST,
    "shape": ("margin", "anisotropy", "dimension",
              "margin and anisotropy", "margin and dimension"),
}  # fmt: skip


class RunsError(SipItError):
    """A place that holds no runs of ``reproduce``."""


@dataclass(frozen=True)
class Reported:
    """One number of the paper: where it stands, which experiment measures it here."""

    where: str
    experiment: str
    model: str
    condition: str
    quantity: str
    value: float | int
    spread: float | None = None  # what stands behind the paper's ±
    weights: str = "full"  # or int8, fp4


# The smallest distance at the first, middle and last layer.
BY_DEPTH = [
    ("Table 1", "layers", LLAMA, 0.001, 0.129, 0.620),
    ("Table 1", "layers", MISTRAL, 0.002, 0.187, 1.274),
    ("Table 1", "layers", PHI, 0.014, 1.336, 9.020),
    ("Table 1", "layers", TINY, 0.029, 1.434, 2.793),
    ("E.3", "same-answer", MISTRAL, 0.012, 0.265, 3.494),
    ("E.3", "same-answer", LLAMA, 0.046, 0.733, 6.227),
    ("E.3", "same-answer", PHI, 0.087, 2.302, 18.913),
]
# The same at the last layer, for weights in FP4, in int8 and in full.
BY_WEIGHTS = [
    (LLAMA, 2.281, 6.597, 1.274),
    (MISTRAL, 1.748, 2.692, 1.136),
    (PHI, 18.368, 20.956, 8.780),
]
# Seconds and their spread, weights, share of exact prompts, explored vocabulary in %.
TIMED = [
    ("Table 4", "inversion", MISTRAL, "published", 111.78, 46.50, "fp4", 1.0, 0.19),
    ("Table 4", "inversion", LLAMA, "published", 549.48, 265.75, "fp4", 1.0, 0.21),
    ("Table 5", "compared", GPT2, "hard prompts", 6132.59, 104.61, "full", 0.0, None),
    ("Table 5", "compared", GPT2, "brute force", 3889.61, 691.17, "full", 1.0, None),
    ("Table 5", "compared", GPT2, "published", 28.01, 35.87, "full", 1.0, None),
    ("Table 6", "inversion", MISTRAL, "published", 72.99, 37.57, "full", None, 0.21),
    ("Table 6", "inversion", LLAMA, "published", 345.35, 181.30, "full", None, 0.22),
    ("Table 7", "splits", GPT2, "train, published", 146.48, 91.52, "full", 1.0, None),
    ("Table 7", "splits", GPT2, "test, published", 128.62, 83.40, "full", 1.0, None),
    ("Table 7", "splits", GPT2, "random, published", 106.87, 39.10, "full", 1.0, None),
]
SHAPES = [
    ("first", "margin", 1.85),
    ("last", "margin", 4.64),
    ("last", "anisotropy", 0.288),
    ("first", "dimension", 20.8),
    ("last", "dimension", 16.4),
    ("correlation", "margin and anisotropy", 0.72),
    ("correlation", "margin and dimension", -0.60),
]


def _paper() -> Iterator[Reported]:
    """All numbers, table by table."""
    for *which, first, middle, last in BY_DEPTH:
        for depth, value in zip(DEPTHS, (first, middle, last), strict=True):
            yield Reported(*which, depth, "minimum", value)
    for model, *minima in BY_WEIGHTS:
        which = ("Table 2", "layers", model, "last", "minimum")
        for weights, value in zip(("fp4", "int8", "full"), minima, strict=True):
            yield Reported(*which, value, weights=weights)
    for *which, seconds, spread, weights, exact, explored in TIMED:
        yield Reported(*which, "seconds", seconds, spread, weights)
        for quantity, value in (("exact", exact), ("explored, %", explored)):
            if value is not None:
                yield Reported(*which, quantity, value, weights=weights)
    for shape in SHAPES:
        yield Reported("Table 11", "shape", GPT2, *shape)


PAPER = tuple(_paper())


@dataclass(frozen=True)
class Line:
    """One quantity under one condition, in the paper and in a run; None: not there."""

    where: str
    model: str
    condition: str
    quantity: str
    paper: Value
    spread: float | None
    measured: Value
    measured_spread: float | None


def read_runs(place: str | Path) -> list[Run]:
    """Runs of ``reproduce``: of one JSON file, with one or a list, or of a folder.

    Raises ``RunsError`` where there is no file, or one that holds something else.
    """
    runs = []
    for file in sorted(Path(place).glob("*.json")) or [Path(place)]:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            wanted = "JSON, or a folder of it, that sipit-lite reproduce wrote"
            raise RunsError(f"got {str(file)!r}; expected {wanted} ({error})") from None
        # A file holds one run or a list of them.
        runs += content if isinstance(content, list) else [content]
    for run in runs:
        # A bench is JSON as well, so is any other file.
        known = isinstance(run, dict) and run.get("experiment") in SHOWN
        if not known or "rows" not in run:
            content = f"{str(place)!r} with {str(run)[:60]!r}"
            raise RunsError(f"got {content}; expected runs of sipit-lite reproduce")
    return runs


def side_by_side(runs: Sequence[Run], experiment: str) -> list[Line]:
    """The paper's numbers of one experiment beside the runs', then what only runs have.

    Raises ``KeyError`` for an unknown experiment.
    """
    # Of several runs of one model with the same weights the last counts.
    latest = {}
    for run in runs:
        if run["experiment"] == experiment:
            latest[run["model"], run["weights"]] = run["rows"]
    measured = {}
    for (model, weights), rows in latest.items():
        label = _label(model, weights)
        for row in rows:
            for quantity in SHOWN[experiment]:
                if row.get(quantity) is not None:
                    # Only seconds have a spread.
                    spread = row.get("spread") if quantity == "seconds" else None
                    key = (label, row["condition"], quantity)
                    measured[key] = (row[quantity], spread)
    lines = []
    used = set()  # a number may stand in two tables
    for number in PAPER:
        if number.experiment == experiment:
            label = _label(number.model, number.weights)
            key = (label, number.condition, number.quantity)
            used.add(key)
            value = measured.get(key, (None, None))  # None: not run
            lines.append(Line(number.where, *key, number.value, number.spread, *value))
    for key, value in measured.items():
        # The layers between the paper's three are for the figures.
        if key not in used and not re.fullmatch(r"layer \d+", key[1]):
            lines.append(Line(NOT_THERE, *key, None, None, *value))
    return lines


def _label(model: str, weights: str) -> str:
    """A model without its owner or folder; full weights go without saying."""
    name = Path(model).name
    # A folder's name counts as the hub's, however it is spelled.
    for known in (GPT2, TINY, LLAMA, MISTRAL, PHI):
        if Path(known).name.lower() == name.lower():
            name = Path(known).name
    return name if weights == "full" else f"{name}, {weights}"


def comparison(lines: Iterable[Line]) -> str:
    """Lines as text, one table for each table of the paper."""
    tables = defaultdict(list)
    for line in lines:
        paper = _number(line.paper, line.spread, "g", "–")
        # Three digits, as most of the paper's numbers have.
        yours = _number(line.measured, line.measured_spread, ".3g", "not run")
        row = (line.model, line.condition, line.quantity, paper, yours)
        tables[line.where].append(row)
    header = ("condition", "quantity", "paper", "yours")
    texts = [checks.table((where, *header), rows) for where, rows in tables.items()]
    return "\n\n".join(texts)


def _number(value: Value, spread: float | None, form: str, missing: str) -> str:
    """A number with what stands behind its ±."""
    if value is None:
        return missing
    return f"{value:{form}}" + ("" if spread is None else f" ± {spread:{form}}")
