"""How often the last state alone gives the prompt back."""

import statistics
import time
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from sipit_lite.acceptance import Tokens
from sipit_lite.experiments.baselines import greedy_coordinate, hard_prompts
from sipit_lite.experiments.checks import Check, progress_bar
from sipit_lite.experiments.defences import wilson
from sipit_lite.experiments.inversion import sample
from sipit_lite.extensions.laststate import (
    Collision,
    Ends,
    NotRecovered,
    fitted_ends,
    invert_last,
)
from sipit_lite.model import LanguageModel

KINDS = ("prose", "random")
PROMPTS = dict.fromkeys((1, 2, 3, 4, 6, 8), 60) | {12: 30, 16: 30}  # for each kind
SECONDS = {1: 10.0, 2: 30.0}  # the budget of a prompt by its length; longer ones: 120
BESIDE = {2: 20.0, 3: 20.0, 6: 30.0}  # for the comparison, of 30 prompts of each kind
BRIEF = partial(Ends.fit, tokens=2000, features=0)  # for quick runs: a second


def laststate(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """``invert_last`` at the last layer on held-out prose and random tokens.

    Two other searches get the same states and seconds, and the true length.
    """
    fit = BRIEF if quick else fitted_ends
    ends = fit(model, model.n_layers, 4 if quick else 16)
    cells = []
    for length, count in ({1: 1, 2: 1} if quick else PROMPTS).items():
        limit = 3.0 if quick else SECONDS.get(length, 120.0)
        for kind in KINDS:
            drawn = sample(model, kind, count, length, seed)
            bar = progress_bar(drawn, f"{kind}, T = {length}", progress)
            runs = [one(ends, ids, limit) for ids in bar]
            cells.append({"kind": kind} | summary(runs))
    beside = []
    for length, limit in ({2: 1.0} if quick else BESIDE).items():
        for kind in KINDS:
            drawn = sample(model, kind, 1 if quick else 30, length, seed)
            bar = progress_bar(drawn, f"beside, {kind}, T = {length}", progress)
            row = {"kind": kind, "length": length, "prompts": len(drawn)}
            beside.append(row | compared(ends, bar, limit))
    shares: dict[int, list[float]] = {}  # of both kinds, by length
    seconds: dict[int, list[float]] = {}
    reported = {}
    for row in cells:
        exact = row["exact"] / row["prompts"]
        shares.setdefault(row["length"], []).append(exact)
        seconds.setdefault(row["length"], []).append(row["seconds"])
        name = f"{row['kind']}, T = {row['length']}"
        reported |= {f"exact, {name}": exact, f"seconds, {name}": row["seconds"]}
    for row in beside:
        name = f"{row['kind']}, T = {row['length']}, length known"
        for way, exact in row["exact"].items():
            reported[f"exact, {name}: {way}"] = exact / row["prompts"]
    # The worse of the two kinds counts; of long prompts, prose.
    lines = []
    for n, both in shares.items():
        name = f"exact, prose, T = {n}" if n > 8 else f"exact, T = {n}"
        lines.append(Check.of(name, both[0] if n > 8 else min(both)))
    wrong = sum(row["false successes"] for row in cells)
    lines.append(Check.of("false successes", wrong))
    for n in sorted({3, 4, 6} & seconds.keys()):
        lines.append(Check.of(f"seconds, last state, T = {n}", max(seconds[n])))
    return lines, {"reported": reported, "cells": cells, "beside": beside}


def summary(runs: list[dict]) -> dict:
    """Counts over runs of ``one``, with Wilson's 95 % interval of the exact share.

    Of searches without result, ``other length`` counts those whose closest prompt had
    another length, ``local minimum`` those of the right one.
    """
    exact = sum(run["exact"] for run in runs)
    low, high = wilson(exact, len(runs))
    answered = ("exact", "collision", "false success")
    # What is neither returned nor refused as ambiguous was not reached.
    missed = [run for run in runs if not any(map(run.get, answered))]
    local = sum(run["right length"] for run in missed)
    row = {"length": runs[0]["length"], "prompts": len(runs)}
    row |= {"exact": exact, "low": low, "high": high}
    row["false successes"] = sum(run["false success"] for run in runs)
    row["collisions"] = sum(run["collision"] for run in runs)
    row |= {"other length": len(missed) - local, "local minimum": local}
    row["seconds"] = statistics.median(run["seconds"] for run in runs)
    return row | {"runs": runs}


def one(ends: Ends, ids: Tokens, limit: float, length: int | None = None) -> dict:
    """What comes of one prompt by ``invert_last``."""
    state = ends.model.states(ids, ends.layer)[-1]
    options = {"ends": ends, "longest": ends.longest, "seconds": limit}
    options |= {"layer": ends.layer, "length": length}
    started = time.perf_counter()
    error = None
    try:
        recovered = invert_last(state, ends.model, **options)
    except NotRecovered as refusal:
        error = refusal
        recovered = refusal.recovered  # the closest prompt, a guess
    spent = time.perf_counter() - started
    same = torch.equal(recovered.tokens, ids.cpu())
    row = {"length": len(ids), "exact": error is None and same}
    row |= {"false success": error is None and not same}
    row |= {"collision": isinstance(error, Collision)}
    row |= {"right length": len(recovered.tokens) == len(ids)}
    return row | {"seconds": round(spent, 3)}


def compared(ends: Ends, drawn: Iterable[Tensor], seconds: float) -> dict:
    """How many prompts come back by three searches that know T, in equal time."""
    others = {"greedy coordinate": greedy_coordinate, "HardPrompts": hard_prompts}
    exact = dict.fromkeys(["invert_last", *others], 0)
    for ids in drawn:
        exact["invert_last"] += one(ends, ids, seconds, len(ids))["exact"]
        state = ends.model.states(ids, ends.layer)[-1]
        for name, search in others.items():
            attempt = search(state, ends.model, ends.layer, len(ids), limit=seconds)
            same = torch.equal(attempt.tokens, ids.cpu())
            exact[name] += attempt.finished and same
    return {"seconds": seconds, "exact": exact}
