"""A survey of the distances between last-token states of many prompts (chapter 7).

At every layer: the closest pairs, the distances of neighbours, and how close chance
would bring as many points. And the distances by length of the prompts.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sipit_lite.collisions import COLLISION, CollisionReport, closest_pairs
from sipit_lite.experiments import null_models as nulls
from sipit_lite.io import corpora
from sipit_lite.io.shards import last_states
from sipit_lite.io.text import TextError, different, distinct
from sipit_lite.model import LanguageModel, StatesError

CLOSEST = 5  # pairs that are kept, with their texts
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
DIMENSION_ROWS = 4000  # the intrinsic dimension compares all their pairs
COUNTED = ("compared", "collisions", "practical")  # of a detector's report
GAUSSIAN_ROWS = 20_000  # rows that the normal null model draws
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


def from_source(
    tokenizer: Any, count: int, length: int, *, source: str = "bundled", seed: int = 0
) -> list[Int[Tensor, " pos"]]:
    """``sampled`` from the corpora, else ``distinct``."""
    if tokenizer is None:
        raise TextError("got a model without a tokenizer; expected one that has it")
    if source != "corpora":
        return distinct(tokenizer, count, length, seed=seed, source=source)
    streams = corpora.open_corpora(seed)
    return corpora.sampled(tokenizer, count, length, streams, seed=seed)


def survey(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    *,
    layers: Sequence[int] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Distances between the states of all pairs of different prompts, by layer.

    All ``layers`` from 1 by default; ``folder`` keeps states for a run that goes on.

    >>> from sipit_lite import load
    >>> prompts = list(torch.tensor([[1, 2], [3, 2], [5, 4], [3, 2]]))
    >>> summary = survey(load(device="cpu"), prompts, layers=[1, 6])
    >>> summary["distinct"], summary["duplicates"], summary["pairs"]
    (3, 1, 3)
    """
    distinct = different(prompts)
    layers = list(range(1, model.n_layers + 1)) if layers is None else list(layers)
    states = last_states(model, distinct, layers, folder=folder, progress=progress)
    # Texts of the closest pairs at three layers: all would be most of the file.
    read = {layers[0], model.n_layers // 2, model.n_layers}
    rows = []
    bar = tqdm(states, "layers", disable=not progress or None)  # None: on a terminal
    for layer, x in zip(layers, bar, strict=True):
        row, report = survey_layer(x.to(model.device), seed=seed)
        closest = closest_texts(model, distinct, report) if layer in read else []
        rows.append({"layer": layer, **row, "closest": short(closest)})
    n = len(distinct)
    summary = {"model": model.name, "prompts": len(prompts), "distinct": n}
    summary |= {"duplicates": len(prompts) - n, "pairs": n * (n - 1) // 2}
    summary["lengths"] = sorted(set(map(len, distinct)))
    return summary | {"quantiles": list(QUANTILES), "layers": rows}


def closest_texts(
    model: LanguageModel, prompts: Sequence[Tensor], report: CollisionReport
) -> list[dict[str, Any]]:
    """The closest pairs of a report as texts, each with its distance."""
    rows = []
    for pair, distance in zip(report.pairs, report.distances, strict=True):
        texts = [model.decode(prompts[index]) for index in pair]
        rows.append({"distance": float(distance), "texts": texts})
    return rows


def counts(report: CollisionReport) -> dict[str, Any]:
    """The numbers of a report that tables hold."""
    return {name: getattr(report, name) for name in ("minimum", *COUNTED)}


def survey_layer(
    x: Float[Tensor, "n d_model"], *, seed: int = 0
) -> tuple[dict[str, Any], CollisionReport]:
    """One layer's numbers, rounded to six digits, and the detector's report."""
    # Few rows have few pairs.
    k = min(CLOSEST, len(x) * (len(x) - 1) // 2)
    report = closest_pairs(x, k, nearest=True)
    shares = torch.tensor(QUANTILES, dtype=torch.float64)
    row = {"pairs": report.compared, "recomputed": report.recomputed}
    row |= {name: getattr(report, name) for name in ("minimum", *COUNTED[1:])}
    row["nearest"] = report.nearest.cpu().quantile(shares).tolist()
    return short(row | null_models(x, seed=seed)), report


def null_models(x: Float[Tensor, "n d_model"], *, seed: int = 0) -> dict[str, Any]:
    """How close chance brings N points on a sphere, and with the same covariance.

    ``radius`` is the median norm from the centre, ``birthday`` the median minimum on a
    sphere of this ``dimension``, where ``needed`` points come within 1e-6; ``gaussian``
    draws as many normal points as states. None where rows are too few or equal.
    """
    # From the mean: rows far from the origin are not far from each other.
    norms = torch.linalg.vector_norm(x.double() - x.double().mean(0), dim=1)
    radius = float(norms.median())
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    # Equal rows have no ratio of neighbour distances.
    sample = x[order[:DIMENSION_ROWS]].unique(dim=0)
    if len(sample) < 3:
        unknown = dict.fromkeys(("dimension", "birthday", "needed", "gaussian"))
        return {"radius": radius, **unknown}
    dimension = nulls.intrinsic_dimension(sample)
    # The same rows for both, because the minimum depends on their number.
    drawn = x[order[:GAUSSIAN_ROWS]]
    minimum = nulls.gaussian_minimum(drawn, seed)
    observed = closest_pairs(drawn, 1).minimum
    row = {"radius": radius, "dimension": dimension, "dimension rows": len(sample)}
    row["birthday"] = nulls.birthday_minimum(len(x), dimension, radius)
    row["needed"] = nulls.birthday_count(COLLISION, dimension, radius)
    gaussian = {"rows": len(drawn), "minimum": minimum, "observed": observed}
    return row | {"gaussian": gaussian}


def survey_lengths(
    model: LanguageModel,
    ids: Int[Tensor, "windows pos"],
    lengths: Iterable[int] = LENGTHS,
    *,
    layers: Sequence[int] | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """``spread`` of the states of the windows' first tokens, for several lengths.

    All pairs of different beginnings: meant for a few thousand windows. ``layers``
    defaults to the middle and the last. Raises ``StatesError`` for a length outside
    the windows, or with fewer than two beginnings.
    """
    layers = [model.n_layers // 2, model.n_layers] if layers is None else list(layers)
    rows = []
    for length in tqdm(list(lengths), "lengths", disable=not progress or None):
        if not 1 <= length <= ids.shape[1]:
            raise StatesError(f"got length {length}; expected 1 to {ids.shape[1]}")
        starts = different(ids[:, :length])  # short beginnings repeat
        if len(starts) < 2:
            got = f"got {len(ids)} windows with one beginning of {length} tokens"
            raise StatesError(f"{got}; expected two or more")
        place = folder and Path(folder) / f"{length:04d}"
        states = last_states(model, starts, layers, folder=place)
        rows.append({"length": length, "distinct": len(starts)})
        for layer, x in zip(layers, states, strict=True):
            rows[-1][str(layer)] = spread(x.to(model.device))
    return short({"windows": len(ids), "layers": layers, "rows": rows})


def spread(x: Float[Tensor, "n d_model"]) -> dict[str, float]:
    """Smallest, mean and largest distance of all pairs, in float64."""
    apart = torch.pdist(x.double())
    row = {"minimum": apart.min(), "mean": apart.mean(), "maximum": apart.max()}
    return {name: float(value) for name, value in row.items()}


def short(value: Any) -> Any:
    """Every float of a nested structure to six significant digits, as JSON has it."""
    if isinstance(value, dict):
        return {key: short(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [short(inside) for inside in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
