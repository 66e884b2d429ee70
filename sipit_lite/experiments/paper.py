"""What the paper reports, as data, beside runs of ``reproduce`` (``real_models``)."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
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


# Tables 1, 2, 4 to 7 and 11, and E.3: a line a number.
_STORED = Path(__file__).with_name("paper.json").read_text(encoding="utf-8")
PAPER = tuple(Reported(**row) for row in json.loads(_STORED))


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
