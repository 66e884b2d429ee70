"""Inversion of a model that others trained, over the time of one forward pass."""

from pathlib import Path

from torch import Tensor

from sipit_lite.acceptance import related
from sipit_lite.experiments.checks import Check, progress_bar, share
from sipit_lite.experiments.inversion import measure, sample
from sipit_lite.extensions.fitted import lens_of
from sipit_lite.model import LanguageModel

LENGTH = 20  # tokens of a prompt
# Passes at layers 1, L/2 and L: of the median and of the slowest twentieth.
KNOWN = ((5, 10, 100), (30, 60, 600))
STRANGE = ((30, 100, 1000),)
KINDS = {"prose": KNOWN, "code": KNOWN, "other languages": STRANGE, "random": STRANGE}
# Pushkin, Goethe, Cervantes, La Fontaine, Li Bai: long out of copyright.
OTHERS = Path(__file__).with_name("others.txt").read_text("utf-8").removesuffix("\n")


def real(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Exactness and passes at three layers, beside the published loop and LM order."""
    rows = {}
    lines = []
    reported = {}
    for n, layer in enumerate((1, model.n_layers // 2, model.n_layers)):
        lens = lens_of(model, layer)
        for kind, limits in progress_bar(KINDS.items(), f"layer {layer}", progress):
            drawn = options(model, kind, 1 if quick else 30, seed)
            place = f"{kind}, layer {layer}"
            row = measure(model, drawn, lens, 1, 0.1 if quick else 20.0)
            rows[place] = row
            reported |= {f"{place}: {what}": value for what, value in row.items()}
            for name, bounds in zip(("median", "slowest 5 %"), limits, strict=False):
                value = row[f"passes, {name}"]
                known = (value, bounds[n], "lower", value <= bounds[n])
                lines.append(Check(f"passes, {name}, {place}", *known))
    exact = Check.of("exact", share(row["exact"] == 1 for row in rows.values()))
    silent = sum(row["silent errors"] for row in rows.values())
    lines = [exact, Check.of("silent errors", silent), *lines]
    return lines, {"reported": reported, "rows": rows}


def options(model: LanguageModel, kind: str, count: int, seed: int) -> list[Tensor]:
    """Held-out prompts of a kind; random tokens are none that share their states."""
    if kind == "other languages":
        ids = model.encode(OTHERS)
        return [ids for ids in ids.split(LENGTH) if len(ids) == LENGTH][:count]
    drawn = sample(model, kind, count, LENGTH, seed)
    alone = (~related(model, 1)).nonzero()[:, 0]
    return [alone[ids % len(alone)] if kind == "random" else ids for ids in drawn]
