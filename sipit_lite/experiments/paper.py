"""What the paper reports, as data, and beside it what a reader's runs of ``reproduce`` measured (chapter 14)."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Run = dict[str, Any]
GPT2, TINY, LLAMA = "gpt2", "roneneldan/TinyStories-33M", "meta-llama/Llama-3.1-8B"
MISTRAL, PHI = "mistralai/Mistral-7B-v0.1", "microsoft/Phi-4-mini-instruct"
MODELS = (
    GPT2, "gpt2-medium", "gpt2-large", TINY, LLAMA, MISTRAL,
    "google/gemma-3-1b-pt", "google/gemma-3-4b-pt", "google/gemma-3-12b-pt", PHI,
)  # fmt: skip
DEPTHS = ("first", "middle", "last")
OWN = "not in the paper"
SHOWN = {
    "layers": ("minimum", "collisions"),
    "lengths": ("minimum", "mean", "maximum"),
    "continuations": ("minimum", "collisions"),
    "inversion": ("seconds", "exact", "explored, %"),
    "compared": ("seconds", "exact"),
    "splits": ("seconds", "exact"),
    "times": ("seconds", "exact"),
    "same-answer": ("minimum", "collisions"),
    "shape": (
        "margin",
        "anisotropy",
        "dimension",
        "margin and anisotropy",
        "margin and dimension",
    ),
}


@dataclass(frozen=True)
class Reported:
    """One number of the paper: where it stands, which experiment measures it here, for which model and condition.

    ``weights`` are full, int8 or fp4; ``spread`` is what stands behind the paper's ±.
    """

    where: str
    experiment: str
    model: str
    condition: str
    quantity: str
    value: float | int
    spread: float | None = None
    weights: str = "full"


def _paper() -> Iterator[Reported]:
    by_depth = {
        ("Table 1", "layers", LLAMA): (0.001, 0.129, 0.620),
        ("Table 1", "layers", MISTRAL): (0.002, 0.187, 1.274),
        ("Table 1", "layers", PHI): (0.014, 1.336, 9.020),
        ("Table 1", "layers", TINY): (0.029, 1.434, 2.793),
        ("E.3", "same-answer", MISTRAL): (0.012, 0.265, 3.494),
        ("E.3", "same-answer", LLAMA): (0.046, 0.733, 6.227),
        ("E.3", "same-answer", PHI): (0.087, 2.302, 18.913),
    }
    for which, minima in by_depth.items():
        for depth, value in zip(DEPTHS, minima, strict=True):
            yield Reported(*which, depth, "minimum", value)
    coarse = {
        LLAMA: (2.281, 6.597, 1.274),
        MISTRAL: (1.748, 2.692, 1.136),
        PHI: (18.368, 20.956, 8.780),
    }
    for model, minima in coarse.items():
        for weights, value in zip(("fp4", "int8", "full"), minima, strict=True):
            yield Reported(
                "Table 2", "layers", model, "last", "minimum", value, weights=weights
            )
    timed = [
        ("Table 4", "inversion", MISTRAL, "published", 111.78, 46.50, "fp4", 1.0, 0.19),
        ("Table 4", "inversion", LLAMA, "published", 549.48, 265.75, "fp4", 1.0, 0.21),
        (
            "Table 5",
            "compared",
            GPT2,
            "hard prompts",
            6132.59,
            104.61,
            "full",
            0.0,
            None,
        ),
        (
            "Table 5",
            "compared",
            GPT2,
            "brute force",
            3889.61,
            691.17,
            "full",
            1.0,
            None,
        ),
        ("Table 5", "compared", GPT2, "published", 28.01, 35.87, "full", 1.0, None),
        (
            "Table 6",
            "inversion",
            MISTRAL,
            "published",
            72.99,
            37.57,
            "full",
            None,
            0.21,
        ),
        (
            "Table 6",
            "inversion",
            LLAMA,
            "published",
            345.35,
            181.30,
            "full",
            None,
            0.22,
        ),
        (
            "Table 7",
            "splits",
            GPT2,
            "train, published",
            146.48,
            91.52,
            "full",
            1.0,
            None,
        ),
        (
            "Table 7",
            "splits",
            GPT2,
            "test, published",
            128.62,
            83.40,
            "full",
            1.0,
            None,
        ),
        (
            "Table 7",
            "splits",
            GPT2,
            "random, published",
            106.87,
            39.10,
            "full",
            1.0,
            None,
        ),
    ]
    for *which, seconds, spread, weights, exact, explored in timed:
        yield Reported(*which, "seconds", seconds, spread, weights)
        for quantity, value in (("exact", exact), ("explored, %", explored)):
            if value is not None:
                yield Reported(*which, quantity, value, weights=weights)
    shapes = {
        "margin": (1.85, 4.64),
        "anisotropy": (None, 0.288),
        "dimension": (20.8, 16.4),
    }
    for quantity, ends in shapes.items():
        for depth, value in zip(("first", "last"), ends, strict=True):
            if value is not None:
                yield Reported("Table 11", "shape", GPT2, depth, quantity, value)
    for quantity, value in (
        ("margin and anisotropy", 0.72),
        ("margin and dimension", -0.60),
    ):
        yield Reported("Table 11", "shape", GPT2, "correlation", quantity, value)


PAPER = tuple(_paper())


@dataclass(frozen=True)
class Line:
    """One quantity under one condition: the paper's number and that of a run, None where there is none."""

    where: str
    model: str
    condition: str
    quantity: str
    paper: float | int | None
    spread: float | None
    measured: float | int | None
    measured_spread: float | None


def read_runs(place: str | Path) -> list[Run]:
    """The runs of ``reproduce`` in one JSON file, which holds one of them or a list, or in all JSON files of a folder.

    Raises ``ValueError`` where there is no such place, no file in it, or one that holds something else.
    """
    place = Path(place)
    files = sorted(place.glob("*.json")) if place.is_dir() else [place]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(
            f"got {str(place)!r}; expected a file, or a folder with files, that sipit-lite reproduce wrote"
        )
    runs = []
    for file in files:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ValueError(
                f"got {str(file)!r}, which is not JSON ({error})"
            ) from error
        runs += found if isinstance(found, list) else [found]
    wrong = [
        run
        for run in runs
        if not isinstance(run, dict)
        or run.get("experiment") not in SHOWN
        or "rows" not in run
    ]
    if wrong:
        raise ValueError(
            f"got {str(place)!r} with {str(wrong[0])[:60]!r}; expected runs of sipit-lite reproduce"
        )
    return runs


def same_model(run: str, name: str) -> bool:
    """Whether a run's model, a name on the hub or a folder, is the one of that name: the last parts decide.

    >>> same_model("/models/Llama-3.1-8B/", "meta-llama/Llama-3.1-8B"), same_model("gpt2-medium", "gpt2")
    (True, False)
    """
    return run.rstrip("/").split("/")[-1].lower() == name.split("/")[-1].lower()


def side_by_side(runs: Sequence[Run], experiment: str) -> list[Line]:
    """The paper's numbers of one experiment with the runs' beside them, then what the runs measured besides.

    The last of several runs of one model with the same weights counts. Raises ``KeyError`` for an unknown experiment.

    >>> [line.measured for line in side_by_side([], "same-answer")[:2]]
    [None, None]
    """
    shown, lines, used = SHOWN[experiment], [], set()
    runs = list(
        {
            (run["model"], run["weights"]): run
            for run in runs
            if run["experiment"] == experiment
        }.values()
    )
    rows = [(run["model"], run["weights"], row) for run in runs for row in run["rows"]]
    for told in (told for told in PAPER if told.experiment == experiment):
        own = (None, None)
        for model, weights, row in rows:
            if (weights, row["condition"]) == (
                told.weights,
                told.condition,
            ) and same_model(model, told.model):
                own = _value(row, told.quantity)
                used.add((model, weights, told.condition, told.quantity))
        label = _label(told.model, told.weights)
        lines.append(
            Line(
                told.where,
                label,
                told.condition,
                told.quantity,
                told.value,
                told.spread,
                *own,
            )
        )
    for model, weights, row in rows:
        for quantity in shown:
            own, key = (
                _value(row, quantity),
                (model, weights, row["condition"], quantity),
            )
            if (
                own[0] is not None
                and key not in used
                and not _between(row["condition"])
            ):
                lines.append(
                    Line(
                        OWN,
                        _label(model, weights),
                        row["condition"],
                        quantity,
                        None,
                        None,
                        *own,
                    )
                )
    return lines


def _value(
    row: dict[str, Any], quantity: str
) -> tuple[float | int | None, float | None]:
    return row.get(quantity), row.get("spread") if quantity == "seconds" else None


def _between(condition: str) -> bool:
    """Whether this is a layer that no table of the paper has; it is in the figures."""
    return re.fullmatch(r"layer \d+", condition) is not None


def _label(model: str, weights: str) -> str:
    name = model.rstrip("/").split("/")[-1]
    return name if weights == "full" else f"{name}, {weights}"


def table(lines: Iterable[Line]) -> str:
    """Lines as aligned text, those of one table of the paper together.

    >>> print(table([Line("Table 9", "gpt2", "last", "minimum", 0.62, None, None, None)]))
    Table 9  condition  quantity  paper  yours
    gpt2     last       minimum   0.62   not run
    """
    blocks: dict[str, list[tuple[str, ...]]] = {}
    for line in lines:
        head = [(line.where, "condition", "quantity", "paper", "yours")]
        paper = "–" if line.paper is None else _number(line.paper, line.spread, "g")
        yours = (
            "not run"
            if line.measured is None
            else _number(line.measured, line.measured_spread, ".3g")
        )
        blocks.setdefault(line.where, head).append(
            (line.model, line.condition, line.quantity, paper, yours)
        )
    rows = [row for block in blocks.values() for row in block]
    width = [max((len(row[i]) for row in rows), default=0) for i in range(5)]
    texts = (
        "\n".join("  ".join(map(str.ljust, row, width)).rstrip() for row in block)
        for block in blocks.values()
    )
    return "\n\n".join(texts)


def _number(value: float | int, spread: float | None, form: str) -> str:
    return f"{value:{form}}" + (f" ± {spread:{form}}" if spread is not None else "")
