"""Inversion side by side: the published loop, LM order and ``auto``."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from statistics import median

import numpy as np
from torch import Tensor

from sipit_lite.experiments import checks
from sipit_lite.experiments.baselines import published
from sipit_lite.experiments.checks import Check, clock, progress_bar, share
from sipit_lite.extensions.lens import Lens
from sipit_lite.extensions.reading import final_states, log_law, unembedding
from sipit_lite.io.text import KINDS, prompts
from sipit_lite.model import LanguageModel
from sipit_lite.sipit import invert_many


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
    """Exactness at all layers; speed, growth and batches (chapter 9)."""
    size = QUICK if quick else Size()
    last = model.n_layers
    timed = sorted({1, last // 2, last})
    text = sample(model, "random", 100, 64, seed) if quick else None
    sizes = {"tokens": size.lens_tokens, "features": size.features}
    lenses: dict[int, Lens] = {}
    for layer in progress_bar(timed if quick else range(last + 1), "lenses", progress):
        lenses[layer] = Lens.fit(model, layer, prompts=text, **sizes, seed=seed)
    exact = exactness(model, lenses, size, seed, progress)
    rows = {}
    for kind in ("prose", "random"):
        options = sample(model, kind, size.prompts, size.tokens, seed)
        for layer in progress_bar(timed, f"speed, {kind}", progress):
            slow = size.slow if layer == last else 0
            row = measure(model, options, lenses[layer], slow, size.limit)
            rows[f"{kind}, layer {layer}"] = row
    lengths = {}
    for n in size.lengths:
        row = measure(model, sample(model, "code", 5, n, seed), lenses[last])
        rows[f"code, {n} tokens, last layer"] = row
        lengths[n] = row["seconds"]
    options = sample(model, "prose", size.batch, size.tokens, seed)
    for layer in timed:
        row = together(model, options, lenses[layer])
        rows[f"batch of {size.batch}, prose, layer {layer}"] = row
    reported = {}
    for name, row in rows.items():
        reported |= {f"{name}: {what}": value for what, value in row.items()}
    # Errors first: speed without exactness is nothing.
    lines = [Check.of("exact, auto", share(run["exact"] for run in exact))]
    lines.append(Check.of("silent errors", sum(run["silent error"] for run in exact)))
    for kind in ("prose", "random"):
        *half, full = (rows[f"{kind}, layer {n}"]["passes, median"] for n in timed)
        gain = rows[f"{kind}, layer {last}"]["speed-up"]
        lines.append(Check.of(f"{checks.PUBLISHED}, {kind}, last layer", gain))
        lines.append(Check.of(f"forward passes, {kind}, up to layer L/2", max(half)))
        lines.append(Check.of(f"forward passes, {kind}, last layer", full))
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
    lengths = np.linspace(1, longest, each).round().astype(int).tolist()
    runs = []
    for layer, lens in progress_bar(lenses.items(), "exactness", progress):
        options = []
        for kind, (i, length) in product(KINDS, enumerate(lengths)):
            # Another seed, else the shorter prompts would begin the longer ones.
            start = seed + 1000 * layer + i
            ids = next(prompts(model.tokenizer, kind, length, seed=start))
            options.append((kind, ids.to(model.device)))
        states = [model.states(ids, layer) for _, ids in options]
        outcomes = invert_many(states, model, layer, lens=lens)
        for (kind, ids), outcome in zip(options, outcomes, strict=True):
            row = {"kind": kind, "length": len(ids), "layer": layer}
            runs.append(row | checks.judged(ids, outcome))
    return runs


def one(model: LanguageModel, lens: Lens, ids: Tensor) -> dict:
    """Exactness, seconds, passes, tests and the rank of a token, of one prompt."""
    layer = lens.layer
    states = model.states(ids, layer)
    work = partial(invert_many, [states], model, layer, lens=lens)
    # In the same minute: a machine may be busy in another.
    forward = clock(partial(model.states, ids, layer), model.device, 5)
    [outcome] = work()
    run = getattr(outcome, "recovered", outcome)  # a refusal carries one
    # As often as a pass, where that takes no time.
    seconds = clock(work, model.device, 5) if run.seconds < 1 else run.seconds
    row = {"seconds": seconds, "passes": seconds / forward}
    row["tested"] = float(run.tested.double().mean())
    if len(ids) > 1 and unembedding(model) is not None:
        # In LM order, the law of the next token alone: no search needs to run.
        law = log_law(model, final_states(model, states, layer))[:-1]
        ahead = law > law.gather(1, ids[1:, None])
        row["rank"] = 1 + float(ahead.sum(1).double().mean())
    return row | checks.judged(ids, outcome)


def summary(runs: Sequence[dict]) -> dict[str, float]:
    """What ``one`` gives of several prompts: medians, and the slowest twentieth."""
    passes = sorted(run["passes"] for run in runs)
    row = {
        "exact": share(run["exact"] for run in runs),
        "silent errors": sum(run["silent error"] for run in runs),
        "seconds": median(run["seconds"] for run in runs),
        "passes, median": median(passes),
        "passes, slowest 5 %": passes[int(0.95 * len(passes))],
        "tests of a token": median(run["tested"] for run in runs),
    }
    if all("rank" in run for run in runs):
        row["tests of a token, LM order"] = median(run["rank"] for run in runs)
    return row


def measure(
    model: LanguageModel, drawn: list[Tensor], lens: Lens, slow=0, limit=0.0
) -> dict[str, float]:
    """``summary``; the first few by the published loop too, which stops at a limit."""
    states = [model.states(ids, lens.layer) for ids in drawn[: max(slow, 1)]]
    # What is measured once for a layer is not in the seconds.
    invert_many(states[:1], model, lens.layer, lens=lens)
    row = summary([one(model, lens, ids) for ids in drawn])
    runs = [published(x, model, lens.layer, limit=limit) for x in states[:slow]]
    if runs:
        # Where it is below 1, the speed-up is a lower bound.
        row["published within the limit"] = share(run.finished for run in runs)
        row["speed-up"] = median(run.seconds for run in runs) / row["seconds"]
    return row


def together(
    model: LanguageModel, options: Sequence[Tensor], lens: Lens
) -> dict[str, float]:
    """Seconds for each prompt, one at a time and all at once."""
    layer = lens.layer
    states = [model.states(ids, layer) for ids in options]
    work = partial(invert_many, model=model, layer=layer, lens=lens)
    alone = clock(lambda: [work([x]) for x in states], model.device, 3) / len(options)
    batched = clock(partial(work, states), model.device, 3) / len(options)
    row = {"one at a time, seconds": alone, "all at once, seconds": batched}
    return row | {"speed-up": alone / batched}
