"""Inversion side by side: the published loop, Newton and ``auto``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import median

import numpy as np
import torch
from torch import Tensor

from sipit_lite.experiments import checks
from sipit_lite.experiments.baselines import published
from sipit_lite.experiments.checks import Check, clock, progress_bar, share
from sipit_lite.extensions.lens import Lens
from sipit_lite.extensions.newton import Newton
from sipit_lite.io.text import KINDS, prompts
from sipit_lite.model import LanguageModel
from sipit_lite.recovery import Recovery
from sipit_lite.sipit import invert, invert_many

TIMED = ("prose", "random")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    exact: int = 1000  # prompts of 1 to 256 tokens, over all layers and kinds
    prompts: int = 30  # for each figure of speed
    tokens: int = 20  # of each of them
    slow: int = 3  # of these, for what is far too slow
    limit: float = 10.0  # seconds that the published loop gets for a prompt
    lengths: tuple[int, ...] = (20, 40, 80, 160, 256)
    batch: int = 64
    lens_tokens: int = 100_000
    features: int = 2048


QUICK = Size(4, 1, 3, 1, 0.1, (2, 4), 2, 4000, 0)


def inversion(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Exactness at all layers; speed, growth and batches (chapters 11 to 13)."""
    size = QUICK if quick else Size()
    last = model.n_layers
    timed = sorted({1, last // 2, last})
    # Installed text, the default of a lens, takes seconds to collect.
    text = sample(model, "random", 100, 64, seed) if quick else None
    sizes = {"tokens": size.lens_tokens, "features": size.features}
    lenses: dict[int, Lens] = {}
    reported = {}
    for layer in progress_bar(timed if quick else range(last + 1), "lenses", progress):
        lenses[layer] = Lens.fit(model, layer, prompts=text, **sizes, seed=seed)
    exact = exactness(model, lenses, size, seed, progress)
    rows = {}
    for kind in TIMED:
        options = sample(model, kind, size.prompts, size.tokens, seed)
        for layer in progress_bar(timed, f"speed, {kind}", progress):
            row = compare(model, options, layer, lenses[layer], size)
            rows[f"{kind}, layer {layer}"] = row
    lengths = {}
    for n in size.lengths:
        options = sample(model, "code", 5, n, seed)
        lengths[n] = median(auto_seconds(model, options, lenses[last]))
        reported[f"auto, code, {n} tokens, last layer: seconds"] = lengths[n]
    batches = {}
    options = sample(model, "prose", size.batch, size.tokens, seed)
    for layer in timed:
        row = together(model, options, lenses[layer])
        batches[f"batch of {size.batch}, prose, layer {layer}"] = row
    for name, row in (rows | batches).items():
        reported |= {f"{name}: {what}": value for what, value in row.items()}
    # Errors first: speed without exactness is nothing.
    lines = [
        Check.of("exact, auto", share(run["exact"] for run in exact)),
        Check.of("silent errors", sum(run["silent error"] for run in exact)),
    ]
    for kind in TIMED:
        passes = [rows[f"{kind}, layer {n}"]["forward passes"] for n in timed]
        gain = rows[f"{kind}, layer {last}"]["speed-up"]
        lines += [
            Check.of(f"{checks.PUBLISHED}, {kind}, last layer", gain),
            Check.of(f"forward passes, {kind}, up to layer L/2", max(passes[:-1])),
            Check.of(f"forward passes, {kind}, last layer", passes[-1]),
        ]
    # The exponent is the slope of log time against log length.
    slope = np.polyfit(np.log(list(lengths)), np.log(list(lengths.values())), 1)[0]
    lines.append(Check.of("growth exponent of time with T", float(slope)))
    # That of the last layer, which came last.
    lines.append(Check.of("batch speed-up for each prompt", row["speed-up"]))
    return lines, {"reported": reported, "exact": exact, "speed": rows}


def sample(
    model: LanguageModel, kind: str, count: int, length: int, seed: int
) -> list[Tensor]:
    """Prompts of the bundled text, or of random tokens."""
    length = min(length, model.n_positions)
    stream = prompts(model.tokenizer, kind, length, seed=seed + 1)
    return [ids.to(model.device) for ids in islice(stream, count)]


def exactness(
    model: LanguageModel, lenses: dict[int, Lens], size: Size, seed: int, progress: bool
) -> list[dict]:
    """``auto`` on held-out prompts of all kinds and lengths, spread over the layers."""
    each = -(-size.exact // (len(KINDS) * len(lenses)))
    longest = min(256 if size.exact > 100 else 16, model.n_positions)
    counts = dict.fromkeys(KINDS, each)
    runs = []
    for layer, lens in progress_bar(lenses.items(), "exactness", progress):
        options = list(checks.held_out(model, counts, longest, seed + 1000 * layer))
        states = [model.states(ids, layer) for _, ids in options]
        outcomes = invert_many(states, model, layer, lens=lens)
        for (kind, ids), outcome in zip(options, outcomes, strict=True):
            row = {"kind": kind, "length": len(ids), "layer": layer}
            runs.append(row | checks.judged(ids, outcome))
    return runs


def compare(
    model: LanguageModel, options: Sequence[Tensor], layer: int, lens: Lens, size: Size
) -> dict[str, float]:
    """Medians over prompts: seconds of each way, also over a forward pass."""
    # What is measured once for a model and a layer is not in the seconds.
    invert(model.states(options[0], layer), model, layer, lens=lens)
    seconds = {"forward": [], "auto": auto_seconds(model, options, lens)}
    seconds["auto without a lens"] = []
    slow: dict[str, list] = {"newton": [], "published": []}
    for n, ids in enumerate(options):
        states = model.states(ids, layer)
        plain = partial(_inverted, ids, states, model, layer)
        # So short that one measurement says little.
        forward = partial(model.states, ids, layer)
        seconds["forward"].append(_repeated(forward, model, 5))
        seconds["auto without a lens"].append(clock(plain, model.device))
        if n < size.slow:  # seconds for a prompt
            slow["newton"].append(plain(policy=Newton()))
        if layer == model.n_layers:
            slow["published"].append(published(states, model, layer, limit=size.limit))
    pairs = zip(seconds["auto"], seconds["forward"], strict=True)
    row = {"forward passes": median(auto / forward for auto, forward in pairs)}
    for name, runs in slow.items():
        if runs:
            seconds[name] = [run.seconds for run in runs]
            tested = torch.cat([run.tested for run in runs]).float()
            row[f"candidates per token, {name}"] = float(tested.median())
    middle = {name: median(times) for name, times in seconds.items()}
    if slow["published"]:
        # Where it is below 1, the speed-up is a lower bound.
        finished = share(run.finished for run in slow["published"])
        row["published within the time limit"] = finished
        row["speed-up"] = middle["published"] / middle["auto"]
    return {f"{name}, seconds": value for name, value in middle.items()} | row


def auto_seconds(
    model: LanguageModel, options: Sequence[Tensor], lens: Lens
) -> list[float]:
    """Seconds of ``auto`` for each prompt."""
    times = []
    for ids in options:
        states = model.states(ids, lens.layer)
        work = partial(_inverted, ids, states, model, lens.layer, lens=lens)
        times.append(clock(work, model.device))
    return times


def together(
    model: LanguageModel, options: Sequence[Tensor], lens: Lens
) -> dict[str, float]:
    """Seconds for each prompt, one at a time and all at once."""
    layer = lens.layer
    states = [model.states(ids, layer) for ids in options]
    runs = {
        "one at a time": lambda: [invert(x, model, layer, lens=lens) for x in states],
        "all at once": lambda: invert_many(states, model, layer, lens=lens),
    }
    row = {}
    for name, run in runs.items():
        row[f"{name}, seconds"] = _repeated(run, model, 3) / len(options)
    alone, batched = row.values()
    return row | {"speed-up": alone / batched}


def _repeated(work: Callable[[], object], model: LanguageModel, rounds: int) -> float:
    """The median of so many measurements."""
    return median(clock(work, model.device) for _ in range(rounds))


def _inverted(
    ids: Tensor, states: Tensor, model: LanguageModel, layer: int, **options: object
) -> Recovery:
    """What ``invert`` returns; a time counts only for the right prompt."""
    recovery = invert(states, model, layer, **options)
    if not torch.equal(recovery.tokens, ids.cpu()):
        wrong = recovery.tokens.tolist()
        raise AssertionError(f"recovered {wrong}, the prompt is {ids.tolist()}")
    return recovery
