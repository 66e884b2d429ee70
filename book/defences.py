"""What each defence leaves and costs: makes ``defences.json`` for ``privacy``.

    python defences.py > defences.json

On held-out prose, for the model of SIPIT_LITE_MODEL at its middle layer.
"""

import json
from dataclasses import astuple

import torch
from sipit_lite import LanguageModel, load
from sipit_lite.experiments.defences import (
    Defence,
    DefenceError,
    Dropping,
    Noise,
    Projection,
    Rounding,
    extra_losses,
    losses,
    openings,
    recovery,
    recovery_of_dropped,
)
from tqdm import tqdm

LONG = 64  # tokens of the texts on which the loss is measured
STRENGTHS: tuple[Defence, ...] = (
    *map(Noise, (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)),
    *map(Rounding, (8, 6, 4, 3, 2, 1)),
    *map(Projection, (192, 128, 64, 16, 4, 1)),
    *map(Dropping, (2, 3, 4, 5, 6)),
)


def study(model: LanguageModel, count: int = 12, length: int = 12, layer: int | None = None) -> dict:
    """Every defence at every strength, on ``count`` openings of passages (chapter 11).

    A row has the counts of ``Score``, the mean extra loss and its standard error.
    """
    layer = max(1, model.n_layers // 2) if layer is None else layer
    short = list(openings(model, length))[:count]
    long = list(openings(model, LONG))[:count]
    if not 1 <= count == len(short) == len(long):
        raise DefenceError(f"got {count} prompts; there are 1 to {len(long)} passages")
    masks = [defence for defence in STRENGTHS if not isinstance(defence, Dropping)]
    scores = recovery(model, tqdm(short, disable=None), layer, masks)
    for defence in tqdm(STRENGTHS[len(masks) :], disable=None):
        scores.append(recovery_of_dropped(model, short, layer, defence))
    rows = []
    for defence, score in zip(STRENGTHS, scores, strict=True):
        extra = extra_losses(model, long, layer, defence).double()
        error = extra.std() / len(extra) ** 0.5
        row = {"defence": type(defence).__name__.lower()}
        row["strength"] = astuple(defence)[0]
        row |= {"extra": round(float(extra.mean()), 4), "error": round(float(error), 4)}
        rows.append(row | score._asdict())
    clean = torch.cat([losses(model, ids, layer, Defence()) for ids in long])
    settings = {"model": model.name, "layer": layer, "count": count, "length": length}
    settings |= {"predicted": len(clean), "loss": round(float(clean.mean()), 4)}
    return settings | {"rows": rows}


if __name__ == "__main__":
    print(json.dumps(study(load()), indent=1))
