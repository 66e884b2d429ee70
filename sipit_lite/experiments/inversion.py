"""Inversion side by side: published loop, brute force, our policies and ``auto``."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, islice
from statistics import median

import numpy as np
import torch
from torch import Tensor

from sipit_lite.experiments import checks
from sipit_lite.experiments.baselines import brute_force, published
from sipit_lite.experiments.checks import Check, clock, progress_bar, share
from sipit_lite.extensions.lens import Lens
from sipit_lite.extensions.newton import Newton
from sipit_lite.io.loading import load
from sipit_lite.io.text import KINDS, prompts
from sipit_lite.model import LanguageModel
from sipit_lite.onestep import EXACT, OneStepMap
from sipit_lite.recovery import Recovery
from sipit_lite.sipit import invert, invert_many

Texts = Iterable[Tensor] | None
TIMED = ("prose", "random")
STEPS = 30  # Newton steps that are tried
NEVER = 100  # what stands for a token that they do not reach


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    exact: int = 1000  # prompts of 1 to 256 tokens, over all layers and kinds
    prompts: int = 30  # for each figure of speed
    tokens: int = 20  # of each of them
    slow: int = 3  # of these, for what is far too slow
    newton: int = 10  # of these, to count Newton's steps at every layer and position
    limit: float = 10.0  # seconds that a baseline gets for a prompt
    lengths: tuple[int, ...] = (20, 40, 80, 160, 256)
    batch: int = 64
    positions: int = 2000  # for noise at the edge of the margin
    lens_tokens: int = 100_000
    features: int = 2048
    large: int = 30  # prompts for GPT-2 124M at random initialisation


QUICK = Size(4, 1, 3, 1, 1, 0.1, (2, 4), 2, 3, 4000, 0, 0)


def inversion(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Exactness, speed, growth, batches, the edge of the margin (chapters 11 to 13)."""
    size = QUICK if quick else Size()
    last = model.n_layers
    timed = sorted({1, last // 2, last})
    # Installed text, the default of a lens, takes seconds to collect.
    text = sample(model, "random", 100, 64, seed) if quick else None
    lenses: dict[int, Lens] = {}
    reported = {}
    for layer in progress_bar(timed if quick else range(last + 1), "lenses", progress):
        lenses[layer], seconds = _fitted(model, layer, size, seed, text)
        reported[f"lens of layer {layer}, seconds to fit"] = seconds
    exact = exactness(model, lenses, size, seed, progress)
    speed = {}
    steps = []
    for kind in TIMED:
        options = sample(model, kind, size.prompts, size.tokens, seed)
        for layer in progress_bar(timed, f"speed, {kind}", progress):
            row = compare(model, options, layer, lenses[layer], size)
            speed[f"{kind}, layer {layer}"] = row
        for layer in lenses:
            steps += newton_steps(model, options[: size.newton], layer)
    large = gpt2_as_drawn(size, seed, model.device) if size.large else {}
    rows = speed | large
    for name, row in rows.items():
        reported |= {f"{name}: {what}": value for what, value in row.items()}
    lengths = {}
    for n in size.lengths:
        options = sample(model, "code", 5, n, seed)
        lengths[n] = auto_seconds(model, options, lenses[last])
        reported[f"auto, code, {n} tokens, last layer: seconds"] = lengths[n]
    options = sample(model, "prose", min(10, size.prompts), size.tokens, seed)
    for layer, lens in lenses.items():
        seconds = auto_seconds(model, options, lens)
        reported[f"auto, prose, layer {layer}: seconds"] = seconds
    options = sample(model, "prose", size.batch, size.tokens, seed)
    for layer in timed:
        batch = together(model, options, lenses[layer])
        name = f"batch of {size.batch}, prose, layer {layer}"
        reported |= {f"{name}: {what}": value for what, value in batch.items()}
    # The exponent is the slope of log time against log length.
    slope = np.polyfit(np.log(list(lengths)), np.log(list(lengths.values())), 1)[0]
    edge = at_the_edge(model, timed, size, seed, progress)
    lines = [
        Check.of("exact, auto", share(run["exact"] for run in exact)),
        Check.of("silent errors", sum(run["silent error"] for run in exact)),
    ]
    for kind in TIMED:
        passes = [speed[f"{kind}, layer {n}"]["forward passes"] for n in timed]
        gain = speed[f"{kind}, layer {last}"]["speed-up"]
        lines += [
            Check.of(f"speed-up over published, {kind}, last layer", gain),
            Check.of(f"forward passes, {kind}, up to layer L/2", max(passes[:-1])),
            Check.of(f"forward passes, {kind}, last layer", passes[-1]),
        ]
    for name, row in large.items():
        lines.append(Check.of(f"speed-up over published, {name}", row["speed-up"]))
    lines += [
        Check.of("Newton steps, median", float(np.median(steps))),
        Check.of("Newton steps, 99th percentile", float(np.percentile(steps, 99))),
        Check.of("growth exponent of time with T", float(slope)),
        # That of the last layer, which came last.
        Check.of("batch speed-up for each prompt", batch["speed-up"]),
        Check.of("recovered at 0.49 of the margin", edge["recovered"]),
        Check.of("rival at 0.51 of the margin", edge["rival"]),
    ]
    data = {"reported": reported, "exact": exact, "speed": rows}
    return lines, data | {"Newton steps": steps, "edge": edge}


def _fitted(
    model: LanguageModel, layer: int, size: Size, seed: int, text: Texts = None
) -> tuple[Lens, float]:
    """A lens, and the seconds that it took."""
    started = time.perf_counter()
    sizes = {"tokens": size.lens_tokens, "features": size.features}
    lens = Lens.fit(model, layer, prompts=text, **sizes, seed=seed)
    return lens, time.perf_counter() - started


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
) -> dict:
    """Medians over prompts: seconds of each way, also over a forward pass."""
    # What is measured once for a model and a layer is not in the seconds.
    invert(model.states(options[0], layer), model, layer, lens=lens)
    seconds = {"forward": [], "auto": [], "auto without a lens": []}
    slow = {"newton": [], "brute force": [], "published": []}
    for n, ids in enumerate(options):
        states = model.states(ids, layer)
        forward = partial(model.states, ids, layer)
        plain = partial(_inverted, ids, states, model, layer)
        # So short that one measurement says little.
        times = [clock(forward, model.device) for _ in range(5)]
        seconds["forward"].append(median(times))
        seconds["auto"].append(clock(partial(plain, lens=lens), model.device))
        seconds["auto without a lens"].append(clock(plain, model.device))
        if n < size.slow:  # seconds for a prompt
            slow["newton"].append(plain(policy=Newton()))
            attempt = brute_force(states, model, layer, limit=size.limit)
            slow["brute force"].append(attempt)
        if layer == model.n_layers:
            slow["published"].append(published(states, model, layer, limit=size.limit))
    pairs = zip(seconds["auto"], seconds["forward"], strict=True)
    row = {"forward passes": median(auto / forward for auto, forward in pairs)}
    for name, runs in slow.items():
        if runs:
            seconds[name] = [run.seconds for run in runs]
        if runs and name != "brute force":
            tested = torch.cat([run.tested for run in runs]).float()
            row[f"candidates per token, {name}"] = float(tested.median())
    middle = {name: median(times) for name, times in seconds.items()}
    if slow["published"]:
        finished = share(run.finished for run in slow["published"])
        row["published within the time limit"] = finished
        row["forward passes, published"] = middle["published"] / middle["forward"]
        row["speed-up"] = middle["published"] / middle["auto"]
    return {f"{name}, seconds": value for name, value in middle.items()} | row


def newton_steps(
    model: LanguageModel, options: Sequence[Tensor], layer: int
) -> list[int]:
    """Steps from the mean embedding until the true token is nearest, by position."""
    table = model.embeddings
    counts = []
    for ids in options:
        states = model.states(ids, layer)
        for t, token in enumerate(ids.tolist()):
            step = OneStepMap.after(model, layer, ids[:t])
            path = islice(Newton().path(step, table.mean(0), states[t]), STEPS + 1)
            # Before any token is tested: how far does the path alone lead?
            distances = (torch.linalg.vector_norm(table - e, dim=1) for e in path)
            hits = (n for n, d in enumerate(distances) if int(d.argmin()) == token)
            # Both are lazy: no step is taken after the first hit.
            counts.append(next(hits, NEVER))
    return counts


def auto_seconds(model: LanguageModel, options: Sequence[Tensor], lens: Lens) -> float:
    """Median seconds of ``auto`` for a prompt."""
    times = []
    for ids in options:
        states = model.states(ids, lens.layer)
        work = partial(_inverted, ids, states, model, lens.layer, lens=lens)
        times.append(clock(work, model.device))
    return median(times)


def together(
    model: LanguageModel, options: Sequence[Tensor], lens: Lens
) -> dict[str, float]:
    """Seconds for each prompt, one at a time and all at once; so for forward passes."""
    layer = lens.layer
    states = [model.states(ids, layer) for ids in options]
    runs = {
        "one at a time": lambda: [invert(x, model, layer, lens=lens) for x in states],
        "all at once": lambda: invert_many(states, model, layer, lens=lens),
        "forward, one at a time": lambda: [model.states(ids, layer) for ids in options],
        "forward, all at once": lambda: model.states(torch.stack(options), layer),
    }
    row = {}
    for name, run in runs.items():
        rounds = [clock(run, model.device) for _ in range(3)]
        row[f"{name}, seconds"] = median(rounds) / len(options)
    alone, batched, forward, forwards = row.values()
    row["speed-up"] = alone / batched
    # Without any inversion: what a batch gains by itself.
    row["speed-up of forward passes"] = forward / forwards
    return row


def at_the_edge(
    model: LanguageModel, layers: Sequence[int], size: Size, seed: int, progress: bool
) -> dict[str, float]:
    """Theorem 3.2 at its edge: noise of 0.49 and 0.51 margins to the nearest rival."""
    recovered = []
    rivals = []
    stream = islice(_positions(model, layers, size, seed), size.positions)
    for layer, prefix, token in progress_bar(stream, "margins", progress):
        step = OneStepMap.after(model, layer, prefix)
        states = step.tokens(model.vocabulary).double()
        apart = torch.cdist(states[token, None], states, compute_mode=EXACT)[0]
        apart[token] = torch.inf  # the token is no rival of itself
        margin, rival = apart.min(0)
        distances = []
        for part in (0.49, 0.51):
            # On the way from the token's state to its rival's.
            noisy = torch.lerp(states[token], states[rival], part)
            distances.append(torch.linalg.vector_norm(states - noisy, dim=1))
        near, beyond = distances
        # The token comes back where no other is within half the margin.
        alone = int((near < margin / 2).sum()) == 1
        recovered.append(alone and int(near.argmin()) == token)
        rivals.append(int(beyond.argmin()) == int(rival))
    shares = {"recovered": share(recovered), "rival": share(rivals)}
    return shares | {"positions": len(recovered)}


def _positions(
    model: LanguageModel, layers: Sequence[int], size: Size, seed: int
) -> Iterator[tuple[int, Tensor, int]]:
    """Layer, prefix and next token along prompts of all kinds, the layers in turn."""
    options = {"length": size.tokens, "seed": seed + 2}
    streams = [prompts(model.tokenizer, kind, **options) for kind in KINDS]
    mixed = chain.from_iterable(zip(*streams, strict=False))
    for layer, ids in zip(cycle(layers), mixed, strict=False):
        for t, token in enumerate(ids.tolist()):
            yield layer, ids[:t], token


def gpt2_as_drawn(size: Size, seed: int, device: torch.device) -> dict[str, dict]:
    """GPT-2 124M with weights as drawn: ``auto`` and the published loop."""
    model = load("gpt2", random_init=True, seed=seed, device=device)
    layer = model.n_layers
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (size.large, size.tokens)
    options = torch.randint(model.vocab_size, shape, generator=generator).to(device)
    small = Size(lens_tokens=10_000, features=0)
    lens, seconds = _fitted(model, layer, small, seed)
    auto = auto_seconds(model, options, lens)
    runs = []
    for ids in options[: size.slow]:
        states = model.states(ids, layer)
        runs.append(published(states, model, layer, limit=10 * size.limit))
    slow = median(run.seconds for run in runs)
    row = {"lens, seconds to fit": seconds, "auto, seconds": auto}
    row |= {"published, seconds": slow, "speed-up": slow / auto}
    # Where it is below 1, the speed-up is a lower bound.
    row["published within the time limit"] = share(run.finished for run in runs)
    return {"gpt2 at random initialisation": row}


def _inverted(
    ids: Tensor, states: Tensor, model: LanguageModel, layer: int, **options: object
) -> Recovery:
    """What ``invert`` returns; a time counts only for the right prompt."""
    recovery = invert(states, model, layer, **options)
    if not torch.equal(recovery.tokens, ids.cpu()):
        wrong = recovery.tokens.tolist()
        raise AssertionError(f"recovered {wrong}, the prompt is {ids.tolist()}")
    return recovery
