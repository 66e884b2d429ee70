"""How often the last state alone gives the prompt back: by length and kind of text, and beside two other searches."""

import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from sipit_lite.experiments.baselines import (
    Attempt,
    greedy_coordinate,
    hard_prompts,
)
from sipit_lite.experiments.checks import Check
from sipit_lite.experiments.defences import wilson
from sipit_lite.experiments.inversion import sample
from sipit_lite.experiments.perturb import noisy
from sipit_lite.extensions.laststate import (
    Collision,
    Ends,
    Law,
    NotRecovered,
    fitted_ends,
    invert_last,
)
from sipit_lite.model import LanguageModel

KINDS = ("prose", "random")
SECONDS = {
    1: 10.0,
    2: 30.0,
    3: 60.0,
    4: 60.0,
    6: 60.0,
    8: 60.0,
}  # the budget of one prompt, by its length
ASKED = {1: 60, 2: 60, 3: 60, 4: 60, 6: 60, 8: 12}  # prompts of each length and kind
BESIDE, TRIED = (
    {2: 20.0, 3: 20.0, 6: 30.0},
    5,
)  # seconds by length, and prompts of each kind, for the comparison


def laststate(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """``invert_last`` at the last layer, last token and length not given, on held-out prose and random tokens.

    The other searches get the same states, the same seconds, and the true length.
    """
    asked = {1: 2, 2: 1} if quick else ASKED
    ends = (
        Ends.fit(model, model.n_layers, tokens=4000, features=64)
        if quick
        else fitted_ends(model, model.n_layers, 16)
    )
    cells = [
        cell(
            model,
            ends,
            kind,
            length,
            count,
            5.0 if quick else SECONDS[length],
            seed,
            progress,
        )
        for length, count in asked.items()
        for kind in KINDS
    ]
    beside = [
        compared(
            model,
            ends,
            kind,
            length,
            1 if quick else TRIED,
            2.0 if quick else BESIDE[length],
            seed,
            progress,
        )
        for length in ((2,) if quick else BESIDE)
        for kind in KINDS
    ]
    return checks(cells), {
        "reported": reported(cells, beside),
        "cells": cells,
        "beside": beside,
    }


def checks(cells: list[dict]) -> list[Check]:
    """The lines of the closing table: the worse of the two kinds for each length."""
    found = {}
    for row in cells:
        found.setdefault(row["length"], []).append(row)
    lines = [
        Check.of(
            f"exact, T = {length}", min(row["exact"] / row["prompts"] for row in rows)
        )
        for length, rows in found.items()
    ]
    lines += [Check.of("false successes", sum(row["false successes"] for row in cells))]
    return lines + [
        Check.of(
            f"seconds, last state, T = {length}",
            max(row["seconds"] for row in found[length]),
        )
        for length in (3, 4, 6)
        if length in found
    ]


def reported(cells: list[dict], beside: list[dict]) -> dict[str, float]:
    """Shares with both ends of their 95 % intervals, and median seconds, by kind and length; then the comparison."""
    told = {}
    for row in cells:
        name = f"{row['kind']}, T = {row['length']}"
        told |= {
            f"exact, {name}": row["exact"] / row["prompts"],
            f"seconds, {name}": row["seconds"],
        }
        told |= {
            f"exact, {name}: {end} of the interval": row[end] for end in ("low", "high")
        }
    for row in beside:
        name = f"{row['kind']}, T = {row['length']}, length told"
        told |= {
            f"exact, {name}: {way}": found / row["prompts"]
            for way, found in row["exact"].items()
        }
    return told


def curves(rows: list[dict]) -> dict[str, list[list[float | int]]]:
    """For each kind of prompt: lengths, shares that came back exactly, and both ends of their intervals.

    >>> row = {"kind": "prose", "length": 2, "prompts": 4, "exact": 3, "low": 0.3, "high": 0.95}
    >>> curves([row, row | {"length": 1, "exact": 4}])
    {'prose': [[1, 2], [1.0, 0.75], [0.3, 0.3], [0.95, 0.95]]}
    """
    told = {}
    for kind in dict.fromkeys(row["kind"] for row in rows):
        ordered = sorted(
            (row for row in rows if row["kind"] == kind), key=lambda row: row["length"]
        )
        shares = [row["exact"] / row["prompts"] for row in ordered]
        told[kind] = [[row["length"] for row in ordered], shares] + [
            [row[end] for row in ordered] for end in ("low", "high")
        ]
    return told


def cell(
    model: LanguageModel,
    ends: Ends,
    kind: str,
    length: int,
    count: int,
    seconds: float,
    seed: int,
    progress: bool = False,
) -> dict:
    """Prompts of one kind and length: how many came back exactly, and what became of the others, see ``summary``."""
    asked = sample(model, kind, count, length, seed)
    bar = tqdm(asked, f"{kind}, T = {length}", disable=None if progress else True)
    return summary(kind, length, [one(model, ends, ids, seconds) for ids in bar])


def summary(kind: str, length: int, runs: list[dict]) -> dict:
    """Counts over the runs of ``one``, with Wilson's 95 % interval of the share that is exact.

    The true prompt explains its state exactly, so a search that finds nothing ended in a local minimum: ``other
    length`` counts those where the closest prompt had another length, ``local minimum`` those where it had the right
    one, and ``wrong prior`` those of the latter where the law of prompts alone prefers the closest to the true one.

    >>> run = {"exact": True, "false success": False, "collision": False, "right length": True, "seconds": 1.0}
    >>> told = summary("prose", 3, [run, run | {"exact": False, "likelier": True}])
    >>> told["exact"], told["local minimum"], told["wrong prior"], round(told["low"], 3), round(told["high"], 3)
    (1, 1, 1, 0.095, 0.905)
    """
    exact = sum(run["exact"] for run in runs)
    low, high = wilson(exact, len(runs))
    missed = [
        run
        for run in runs
        if not (run["exact"] or run["collision"] or run["false success"])
    ]
    return {
        "kind": kind,
        "length": length,
        "prompts": len(runs),
        "exact": exact,
        "low": low,
        "high": high,
        "false successes": sum(run["false success"] for run in runs),
        "collisions": sum(run["collision"] for run in runs),
        "other length": sum(not run["right length"] for run in missed),
        "local minimum": sum(run["right length"] for run in missed),
        "wrong prior": sum(run["right length"] and run["likelier"] for run in missed),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "runs": runs,
    }


def one(
    model: LanguageModel,
    ends: Ends,
    ids: Int[Tensor, " pos"],
    seconds: float,
    length: int | None = None,
    noise: float = 0.0,
) -> dict:
    """One prompt through ``invert_last``: what came of it, in how many seconds; ``length`` where it is told.

    ``noise`` is the ℓ2 norm of what is added to the state; ``invert_last`` is told as much.
    """
    state, begun, collision = (
        model.states(ids, ends.layer)[-1],
        time.perf_counter(),
        False,
    )
    state = noisy(state[None], noise)[0] if noise else state
    try:
        found = best = invert_last(
            state,
            model,
            ends.layer,
            length,
            ends=ends,
            seconds=seconds,
            epsilon=noise or None,
        )
    except NotRecovered as error:
        found, best, collision = None, error.best, isinstance(error, Collision)
    spent, law = time.perf_counter() - begun, Law.of(model, ends)
    exact = found is not None and torch.equal(found.tokens, ids.cpu())
    return {
        "exact": exact,
        "false success": found is not None and not exact,
        "collision": collision,
        "right length": len(best.tokens) == len(ids),
        "likelier": law.log_probability(best.tokens.to(ids)) > law.log_probability(ids),
        "seconds": round(spent, 3),
    }


def compared(
    model: LanguageModel,
    ends: Ends,
    kind: str,
    length: int,
    count: int,
    seconds: float,
    seed: int,
    progress: bool = False,
) -> dict:
    """The same states, seconds and length for ``invert_last``, a greedy coordinate search, and HardPrompts."""
    ways: dict[str, Callable[[Tensor], bool]] = {
        "invert_last": lambda ids: one(model, ends, ids, seconds, len(ids))["exact"],
        "greedy coordinate": partial(
            _by_other, greedy_coordinate, model, ends.layer, seconds
        ),
        "HardPrompts": partial(_by_other, hard_prompts, model, ends.layer, seconds),
    }
    asked = sample(model, kind, count, length, seed)
    bar: Iterable = tqdm(
        ways.items(),
        f"beside, {kind}, T = {length}",
        disable=None if progress else True,
    )
    exact = {name: sum(way(ids) for ids in asked) for name, way in bar}
    return {
        "kind": kind,
        "length": length,
        "prompts": len(asked),
        "seconds": seconds,
        "exact": exact,
    }


def _by_other(
    search: Callable[..., Attempt],
    model: LanguageModel,
    layer: int,
    seconds: float,
    ids: Tensor,
) -> bool:
    found = search(model.states(ids, layer)[-1], model, layer, len(ids), limit=seconds)
    return found.finished and torch.equal(found.tokens, ids.cpu())
