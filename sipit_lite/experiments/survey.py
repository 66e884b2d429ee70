"""A survey of the distances between the last-token states of many prompts, as one small JSON file (chapter 7).

At every layer: the closest pairs, how far neighbours and random pairs are apart, and how close chance would bring as
many points. Then the same distances against the length of the prompts, and the pairs that rounding makes equal.
"""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import mpmath
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sipit_lite.collisions import CollisionReport, closest_pairs
from sipit_lite.experiments.null_models import (
    birthday_minimum,
    gaussian_minimum,
    intrinsic_dimension,
)
from sipit_lite.experiments.perturb import BITS, rounded
from sipit_lite.io.corpora import SOURCES, from_source
from sipit_lite.io.loading import load
from sipit_lite.io.shards import last_states
from sipit_lite.io.text import prompts
from sipit_lite.model import LanguageModel
from sipit_lite.onestep import EXACT

CLOSEST = 5  # pairs that are kept with their texts
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
RANDOM_PAIRS = 20_000
DIMENSION_ROWS = 4000  # rows that the intrinsic dimension is estimated from: it compares all their pairs
GAUSSIAN_ROWS = 20_000  # rows that the normal null model draws
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
FORMS = ("bfloat16", "float8", "int8", "int4")


def survey(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    *,
    layers: Sequence[int] | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """Distances between the last-token states of all pairs of different prompts, at each layer (all from 1 by default).

    Prompts that occurred before are left out and counted. Quantiles are those of ``QUANTILES``; the closest pairs are
    kept with their texts at the first, the middle and the last layer. ``folder`` keeps the states, so that an
    interrupted run goes on. Raises what ``last_states`` and ``closest_pairs`` raise.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> found = survey(model, [torch.tensor([1, 2]), torch.tensor([3, 2]), torch.tensor([5, 4]), torch.tensor([3, 2])])
    >>> found["distinct"], found["duplicates"], found["pairs"], [row["layer"] for row in found["layers"]]
    (3, 1, 3, [1, 2, 3, 4, 5, 6])
    """
    distinct = different(prompts)
    layers = list(range(1, model.n_layers + 1)) if layers is None else list(layers)
    states = last_states(model, distinct, layers, folder=folder, progress=progress)
    return _survey(model, len(prompts), distinct, layers, states, seed, progress)


def _survey(
    model: LanguageModel,
    given: int,
    distinct: Sequence[Tensor],
    layers: Sequence[int],
    states: Float[Tensor, "layers n d_model"],
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    read, rows = {layers[0], model.n_layers // 2, model.n_layers}, []
    for layer, x in zip(
        layers, tqdm(states, "layers", disable=None if progress else True), strict=True
    ):
        row, report = survey_layer(x.to(model.device), seed=seed)
        texts = [
            [model.decode(distinct[i]) for i in pair] for pair in report.pairs.tolist()
        ]
        closest = zip(report.distances.tolist(), texts, strict=True)
        kept = (
            [{"distance": short(d), "texts": pair} for d, pair in closest]
            if layer in read
            else []
        )
        rows.append({"layer": layer, **row, "closest": kept})
    return {
        "model": model.name,
        "prompts": given,
        "distinct": len(distinct),
        "duplicates": given - len(distinct),
        "lengths": sorted({len(ids) for ids in distinct}),
        "pairs": len(distinct) * (len(distinct) - 1) // 2,
        "quantiles": list(QUANTILES),
        "layers": rows,
    }


def survey_layer(
    x: Float[Tensor, "n d_model"], *, seed: int = 0
) -> tuple[dict[str, Any], CollisionReport]:
    """One layer's numbers, rounded to six digits, and the detector's report; the rows belong to different prompts.

    >>> row, report = survey_layer(torch.randn(200, 5, generator=torch.Generator().manual_seed(0)))
    >>> row["pairs"] == 200 * 199 // 2, row["minimum"] == row["nearest"][0]
    (True, True)
    """
    k = min(CLOSEST, len(x) * (len(x) - 1) // 2)
    report = closest_pairs(x, k, nearest=True, sample=RANDOM_PAIRS, seed=seed)
    row = {
        "pairs": report.compared,
        "recomputed": report.recomputed,
        "minimum": report.minimum,
        "collisions": report.collisions,
        "practical": report.practical,
        "nearest": quantiles(report.nearest),
        "random": quantiles(report.sample),
        "seconds": report.seconds,
    }
    return short(row | null_models(x, seed=seed)), report


def null_models(x: Float[Tensor, "n d_model"], *, seed: int = 0) -> dict[str, Any]:
    """How close chance brings N points: on a sphere of the same radius and dimension, and with the same covariance.

    ``radius`` is the median norm from the centre, ``dimension`` the TwoNN estimate from at most ``DIMENSION_ROWS``
    rows, ``birthday`` the median minimum of N points on that sphere, ``needed`` how many points it takes for 1e-6.
    ``gaussian`` compares normal draws with as many of the states, at most ``GAUSSIAN_ROWS`` of either.

    >>> sphere = torch.nn.functional.normalize(torch.randn(500, 3, generator=torch.Generator().manual_seed(0)))
    >>> found = null_models(sphere)
    >>> 0.9 < found["radius"] < 1.1, 1.7 < found["dimension"] < 2.3
    (True, True)
    """
    norms = torch.linalg.vector_norm(x.double() - x.double().mean(0), dim=1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(
        x.device
    )
    radius, nothing = (
        float(norms.median()),
        {"dimension": None, "birthday": None, "needed": None, "gaussian": None},
    )
    some = x[order[:DIMENSION_ROWS]].unique(
        dim=0
    )  # equal rows have no ratio of neighbour distances
    if len(some) < 3:
        return {"radius": radius, **nothing}
    dimension, drawn = intrinsic_dimension(some), x[order[:GAUSSIAN_ROWS]]
    return {
        "radius": radius,
        "dimension": dimension,
        "dimension rows": len(some),
        "birthday": birthday_minimum(len(x), dimension, radius),
        "needed": birthday_count(1e-6, dimension, radius),
        "gaussian": {
            "rows": len(drawn),
            "minimum": gaussian_minimum(drawn, seed),
            "observed": closest_pairs(drawn, 1).minimum,
        },
    }


def birthday_count(distance: float, dimension: float, radius: float = 1.0) -> float:
    """How many points on a sphere come within a distance with probability one half: the inverse of the median minimum.

    Solves n(n − 1)/2 · p = ln 2 for n, with p the share of the cap (chapter 7). The dimension need not be an integer.
    Raises ``ValueError`` unless the distance is positive and below √2 radii, and the dimension positive.

    >>> n = birthday_count(0.01, 5.0)
    >>> round(birthday_minimum(round(n), 5.0), 4)
    0.01
    """
    if not 0 < distance < math.sqrt(2) * radius or not dimension > 0:
        raise ValueError(
            f"got distance={distance}, dimension={dimension}, radius={radius}; "
            "expected 0 < distance < √2·radius and a positive dimension"
        )
    angle = 2 * mpmath.asin(mpmath.mpf(distance) / (2 * radius))
    share = (
        mpmath.betainc(dimension / 2, 0.5, 0, mpmath.sin(angle) ** 2, regularized=True)
        / 2
    )
    return float((1 + mpmath.sqrt(1 + 8 * mpmath.log(2) / share)) / 2)


def survey_lengths(
    model: LanguageModel,
    ids: Int[Tensor, "windows pos"],
    lengths: Iterable[int] = LENGTHS,
    *,
    layers: Sequence[int] | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Smallest, mean and largest distance between prompts that are the first tokens of the same windows.

    At each length only different beginnings count. Compares all pairs in float64: meant for a few thousand windows.
    ``layers`` defaults to the middle and the last. Raises ``ValueError`` for a length outside the windows, or one at
    which fewer than two beginnings differ.

    >>> from sipit_lite import load
    >>> windows = torch.tensor([[1, 2, 3], [1, 2, 4], [5, 6, 7]])
    >>> [row["distinct"] for row in survey_lengths(load(device="cpu"), windows, [1, 2, 3])["rows"]]
    [2, 2, 3]
    """
    layers = [model.n_layers // 2, model.n_layers] if layers is None else list(layers)
    rows = []
    for length in tqdm(list(lengths), "lengths", disable=None if progress else True):
        if not 1 <= length <= ids.shape[1]:
            raise ValueError(
                f"got length {length}; expected 1 to {ids.shape[1]}, the length of the windows"
            )
        starts = different(ids[:, :length])
        if len(starts) < 2:
            raise ValueError(
                f"got {len(ids)} windows with one beginning of {length} tokens; expected two or more"
            )
        place = None if folder is None else Path(folder) / f"{length:04d}"
        states = last_states(model, starts, layers, folder=place)
        found = {
            str(layer): spread(x.to(model.device))
            for layer, x in zip(layers, states, strict=True)
        }
        rows.append({"length": length, "distinct": len(starts), **found})
    return short({"windows": len(ids), "layers": layers, "rows": rows})


def spread(x: Float[Tensor, "n d_model"]) -> dict[str, float]:
    """Smallest, mean and largest distance of all pairs, in float64.

    >>> spread(torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]]))
    {'minimum': 5.0, 'mean': 6.666666666666667, 'maximum': 10.0}
    """
    x, total, low, high = x.double(), 0.0, math.inf, 0.0
    for first in range(0, len(x), 256):
        found = torch.cdist(x[first : first + 256], x[first:], compute_mode=EXACT)
        found = found[torch.ones_like(found, dtype=torch.bool).triu(1)]
        if len(found):
            total, low, high = (
                total + float(found.sum()),
                min(low, float(found.min())),
                max(high, float(found.max())),
            )
    return {
        "minimum": low,
        "mean": total / (len(x) * (len(x) - 1) / 2),
        "maximum": high,
    }


def survey_rounding(
    states: Float[Tensor, "n d_model"],
    forms: Sequence[str] = FORMS,
    sizes: Iterable[int] = (),
) -> dict[str, Any]:
    """How many pairs of the first N states become exactly equal in smaller formats, for growing N.

    The sizes default to powers of two up to all rows. The integer formats keep their scale, one a row, in the format
    of the states, and equal pairs agree in it too; ``codes`` counts those that agree in the integers alone.
    Raises ``ValueError`` for an unknown format, or sizes outside 1 to N.

    >>> survey_rounding(torch.tensor([[1.0, 0.6], [1.0, 0.59], [2.0, 1.2]]), ["int4"], [2, 3])["codes"]
    {'int4': [1, 3]}
    """
    sizes = list(sizes) or [2**i for i in range(1, (len(states) - 1).bit_length())] + [
        len(states)
    ]
    if not all(1 <= size <= len(states) for size in sizes):
        raise ValueError(
            f"got sizes {sizes}; expected 1 to {len(states)}, the number of states"
        )
    pairs, codes = {}, {}
    for form in forms:
        smaller = rounded(states, form)
        pairs[form] = equal_pairs(smaller, sizes)
        if form in BITS:
            codes[form] = equal_pairs(_codes(smaller, BITS[form]), sizes)
    return {"sizes": sizes, "pairs": pairs, "codes": codes}


def equal_pairs(rows: Float[Tensor, "n d_model"], sizes: Sequence[int]) -> list[int]:
    """Number of pairs of equal rows among the first N, for each N.

    >>> equal_pairs(torch.tensor([[0.0], [1.0], [-0.0], [0.0]]), [2, 3, 4])
    [0, 1, 3]
    """
    seen: dict[bytes, int] = {}
    pairs = [0]  # pairs[n]: equal pairs among the first n rows
    for row in rows.cpu().double().add(0.0).numpy():  # adding zero turns −0 into 0
        key = row.tobytes()
        pairs.append(pairs[-1] + seen.get(key, 0))
        seen[key] = seen.get(key, 0) + 1
    return [pairs[size] for size in sizes]


def windows(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    *,
    kinds: Sequence[str] = ("prose", "code"),
    seed: int = 0,
    source: str = "bundled",
) -> list[Int[Tensor, " pos"]]:
    """Windows of text, the kinds in turn, until ``count`` of them differ or the text ends; repeated ones stay in.

    >>> from sipit_lite import load
    >>> found = windows(load(device="cpu").tokenizer, 40, 8)
    >>> len(different(found)), len(found) >= 40
    (40, True)
    """
    split = "train" if source == "installed" else "held-out"
    streams = [
        prompts(tokenizer, kind, length, seed=seed, source=source, split=split)
        for kind in kinds
    ]
    found, seen = [], set()
    for ids in (
        ids for some in zip_longest(*streams) for ids in some if ids is not None
    ):
        found.append(ids)
        seen.add(tuple(ids.tolist()))
        if len(seen) >= count:
            break
    return found


def different(prompts: Iterable[Tensor]) -> list[Tensor]:
    """The prompts without those that occurred before.

    >>> [ids.tolist() for ids in different([torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([1, 2])])]
    [[1, 2], [3]]
    """
    first: dict[tuple[int, ...], Tensor] = {}
    for ids in prompts:
        first.setdefault(tuple(ids.tolist()), ids)
    return list(first.values())


def quantiles(values: Float64[Tensor, " n"]) -> list[float]:
    """The quantiles of ``QUANTILES``, smallest and largest included.

    >>> quantiles(torch.arange(101, dtype=torch.float64))
    [0.0, 5.0, 25.0, 50.0, 75.0, 95.0, 100.0]
    """
    return values.cpu().quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()


def short(value: Any, digits: int = 6) -> Any:
    """Every float of a nested structure rounded to six significant digits; tuples become lists, as in JSON.

    >>> short({"a": [1 / 3, 10**9, None]})
    {'a': [0.333333, 1000000000, None]}
    """
    if isinstance(value, dict):
        return {key: short(inside, digits) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [short(inside, digits) for inside in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def main(argv: Sequence[str] | None = None) -> int:
    """The whole survey into one JSON file: ``python -m sipit_lite.experiments.survey FILE.json``; 2 for bad input."""
    options = _parser().parse_args(argv)
    model = load(options.model, device=options.device)
    try:
        found = _everything(model, options)
        half = options.file.with_suffix(".part")
        half.write_text(
            json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        half.replace(options.file)
    except (ValueError, OSError) as error:
        _parser().exit(2, f"survey: {error}\n")
    return 0


def _everything(model: LanguageModel, options: argparse.Namespace) -> dict[str, Any]:
    def shards(name: str) -> Path | None:
        return options.shards and options.shards / name

    def texts(count: int, length: int, name: str) -> list[Tensor]:
        chosen = {"seed": options.seed, "source": options.source}
        if options.source == "corpora":  # these come without repetitions
            return from_source(
                model.tokenizer, count, length, **chosen, folder=shards(name)
            )
        return windows(model.tokenizer, count, length, **chosen)

    asked = texts(options.prompts, options.length, "states")
    distinct, layers = different(asked), list(range(1, model.n_layers + 1))
    states = last_states(
        model, distinct, layers, folder=shards("states"), progress=options.progress
    )
    found = _survey(
        model, len(asked), distinct, layers, states, options.seed, options.progress
    )
    last = states[-1]
    order = torch.randperm(
        len(last), generator=torch.Generator().manual_seed(options.seed)
    )
    long = torch.stack(
        different(texts(options.windows, max(options.lengths), "lengths"))
    )
    lengths = survey_lengths(
        model,
        long,
        options.lengths,
        folder=shards("lengths"),
        progress=options.progress,
    )
    rounding = {"layer": model.n_layers, **survey_rounding(last[order])}
    return {
        "source": options.source,
        "seed": options.seed,
        "survey": found,
        "lengths": lengths,
        "rounding": rounding,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sipit_lite.experiments.survey", description=main.__doc__
    )
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument(
        "--prompts",
        type=int,
        default=2000,
        help="different prompts; fewer where the text ends",
    )
    parser.add_argument("--length", type=int, default=24, help="tokens of each prompt")
    parser.add_argument(
        "--windows",
        type=int,
        default=2000,
        help="long windows whose beginnings are compared",
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--source", choices=SOURCES, default="bundled")
    parser.add_argument(
        "--shards",
        type=Path,
        help="a folder that keeps the states, so that a stopped run goes on",
    )
    parser.add_argument(
        "--model",
        help="pocket-gpt2 (default), a folder, or a name on the Hugging Face hub",
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--progress", action="store_true")
    return parser


def _codes(x: Float[Tensor, "n d_model"], bits: int) -> Float[Tensor, "n d_model"]:
    """The integers behind rows that were rounded with one scale a row."""
    largest = x.abs().amax(-1, keepdim=True)
    return (x / largest.where(largest > 0, 1.0) * (2 ** (bits - 1) - 1)).round()


if __name__ == "__main__":
    raise SystemExit(main())
