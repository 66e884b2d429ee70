"""Inversion side by side: the published loop, brute force, our policies and ``auto``, same prompts, same run."""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from sipit_lite.experiments.baselines import Attempt, brute_force, published
from sipit_lite.experiments.checks import Check, clock, held_out, share
from sipit_lite.extensions.lens import Lens
from sipit_lite.io.loading import load
from sipit_lite.io.text import KINDS, prompts
from sipit_lite.model import LanguageModel
from sipit_lite.onestep import EXACT, OneStepMap
from sipit_lite.policies import Newton
from sipit_lite.recovery import Recovery
from sipit_lite.sipit import every_token, invert, invert_many

TIMED = ("prose", "random")
NEVER = 100  # Newton steps that stand for a token that was not found


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    exact: int = 1000  # prompts of 1 to 256 tokens, over all layers and kinds
    prompts: int = 30  # for each figure of speed
    tokens: int = 20  # of each of them
    slow: int = 3  # of these, for what is far too slow
    newton: int = 10  # of these, for Newton's steps, which are counted at every layer and position
    limit: float = 10.0  # seconds that a baseline gets for a prompt
    lengths: tuple[int, ...] = (20, 40, 80, 160, 256)
    batch: int = 64
    positions: int = 2000  # for noise at the edge of the margin
    lens_tokens: int = 100_000
    features: int = 2048
    large: int = 30  # prompts for GPT-2 124M at random initialisation, of which ``slow`` for the published loop


QUICK = Size(7, 2, 4, 1, 1, 0.2, (4, 8), 4, 6, 4000, 0, 0)


def inversion(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Exactness, speed, growth, batches and the edge of the margin (chapters 11 to 13).

    ``auto`` with a lens on 1 000 prompts of 1 to 256 tokens at all layers; seconds of each way to invert, also as
    forward passes of the same prompt, and against the published loop, whose time limit makes a lower bound; Newton's
    steps from the mean embedding; time by length and layer; many prompts at once; noise at 0.49 and 0.51 of the margin.
    """
    size, last = QUICK if quick else Size(), model.n_layers
    timed_layers = sorted({1, last // 2, last})
    lenses = {}

    def fit(layer: int) -> None:
        text = (
            sample(model, "random", 100, 64, seed) if quick else None
        )  # installed text takes seconds to find
        lenses[layer] = Lens.fit(
            model,
            layer,
            prompts=text,
            tokens=size.lens_tokens,
            features=size.features,
            seed=seed,
        )

    layers = timed_layers if quick else range(last + 1)
    fitting = {
        layer: clock(partial(fit, layer), model.device)
        for layer in _bar(layers, progress)
    }
    exact = exactness(model, lenses, size, seed, progress)
    asked = {
        kind: sample(model, kind, size.prompts, size.tokens, seed) for kind in TIMED
    }
    speed = {
        (kind, layer): compare(model, asked[kind], layer, lenses[layer], size, progress)
        for kind in TIMED
        for layer in timed_layers
    }
    steps = [
        n
        for kind in TIMED
        for layer in lenses
        for n in newton_steps(model, asked[kind][: size.newton], layer)
    ]
    lengths = {
        n: auto_seconds(model, sample(model, "code", 5, n, seed), lenses[last])
        for n in size.lengths
    }
    by_layer = {
        layer: auto_seconds(model, asked["prose"][:10], lenses[layer])
        for layer in lenses
    }
    crowd = sample(model, "prose", size.batch, size.tokens, seed)
    batches = {layer: together(model, crowd, lenses[layer]) for layer in timed_layers}
    edge = at_the_edge(model, timed_layers, size, seed, progress)
    large = gpt2_at_initialisation(size, seed, model.device) if size.large else {}
    checks = [
        Check.of("exact, auto", share(run["exact"] for run in exact)),
        Check.of("silent errors", sum(run["silent error"] for run in exact)),
        *(
            Check.of(
                f"speed-up over published, {kind}, last layer",
                speed[kind, last]["speed-up"],
            )
            for kind in TIMED
        ),
        *(
            Check.of(f"speed-up over published, {name}", row["speed-up"])
            for name, row in large.items()
        ),
        *(
            Check.of(
                f"forward passes, {kind}, {name}",
                max(speed[kind, layer]["forward passes"] for layer in found),
            )
            for kind in TIMED
            for name, found in (
                ("up to layer L/2", {1, last // 2}),
                ("last layer", {last}),
            )
        ),
        Check.of("Newton steps, median", float(np.median(steps))),
        Check.of("Newton steps, 99th percentile", float(np.percentile(steps, 99))),
        Check.of("growth exponent of time with T", exponent(lengths)),
        Check.of("batch speed-up for each prompt", batches[last]["speed-up"]),
        Check.of("recovered at 0.49 of the margin", edge["recovered"]),
        Check.of("rival at 0.51 of the margin", edge["rival"]),
    ]
    reported = {
        f"lens of layer {layer}, seconds to fit": seconds
        for layer, seconds in fitting.items()
    }
    rows = {
        f"{kind}, layer {layer}": row for (kind, layer), row in speed.items()
    } | large
    reported |= {
        f"{name}: {what}": value
        for name, row in rows.items()
        for what, value in row.items()
    }
    reported |= {
        f"auto, code, {n} tokens, last layer: seconds": seconds
        for n, seconds in lengths.items()
    }
    reported |= {
        f"auto, prose, layer {layer}: seconds": seconds
        for layer, seconds in by_layer.items()
    }
    reported |= {
        f"batch of {size.batch}, prose, layer {layer}: {what}": value
        for layer, row in batches.items()
        for what, value in row.items()
    }
    return checks, {
        "reported": reported,
        "exact": exact,
        "speed": rows,
        "Newton steps": steps,
        "edge": edge,
    }


def sample(
    model: LanguageModel, kind: str, count: int, length: int, seed: int
) -> list[Int[Tensor, " pos"]]:
    """Prompts of the bundled text, or of random tokens."""
    found = prompts(
        model.tokenizer, kind, min(length, model.n_positions), seed=seed + 1
    )
    return [ids.to(model.device) for ids in islice(found, count)]


def exactness(
    model: LanguageModel,
    lenses: dict[int, Lens],
    size: Size,
    seed: int,
    progress: bool = False,
) -> list[dict]:
    """``auto`` on held-out prompts of all kinds and lengths, spread over the layers, many at once."""
    each = -(-size.exact // (len(KINDS) * len(lenses)))
    runs = []
    for layer, lens in _bar(lenses.items(), progress, "exactness"):
        longest = min(256 if size.exact > 100 else 16, model.n_positions)
        asked = list(
            held_out(model, dict.fromkeys(KINDS, each), longest, seed + 1000 * layer)
        )
        found = invert_many(
            [model.states(ids, layer) for _, ids in asked], model, layer, lens=lens
        )
        for (kind, ids), outcome in zip(asked, found, strict=True):
            exact = isinstance(outcome, Recovery) and torch.equal(
                outcome.tokens, ids.cpu()
            )
            refused = None if isinstance(outcome, Recovery) else type(outcome).__name__
            told = {
                "kind": kind,
                "length": len(ids),
                "layer": layer,
                "exact": exact,
                "refused": refused,
            }
            runs.append(told | {"silent error": not exact and refused is None})
    return runs


def compare(
    model: LanguageModel,
    asked: Sequence[Tensor],
    layer: int,
    lens: Lens,
    size: Size,
    progress: bool = False,
) -> dict:
    """Medians over the prompts: seconds of each way, forward passes of ``auto``, its factor over the published loop."""
    invert(
        model.states(asked[0], layer), model, layer, lens=lens
    )  # what is measured once for a model and layer
    ways: dict[str, list[float]] = {
        name: [] for name in ("forward", "auto", "auto without a lens")
    }
    slow: dict[str, list[Attempt | Recovery]] = {
        "newton": [],
        "brute force": [],
        "published": [],
    }
    for n, ids in enumerate(_bar(asked, progress, f"speed, layer {layer}")):
        states = model.states(ids, layer)
        forward = partial(model.states, ids, layer)
        ways["forward"].append(
            statistics.median(clock(forward, model.device) for _ in range(5))
        )
        ways["auto"].append(
            clock(
                partial(_inverted, ids, states, model, layer, lens=lens), model.device
            )
        )
        ways["auto without a lens"].append(
            clock(partial(_inverted, ids, states, model, layer), model.device)
        )
        if n < size.slow:
            slow["newton"].append(_inverted(ids, states, model, layer, policy=Newton()))
            slow["brute force"].append(
                brute_force(states, model, layer, limit=size.limit)
            )
        if layer == model.n_layers:
            slow["published"].append(published(states, model, layer, limit=size.limit))
    seconds = {
        f"{name}, seconds": statistics.median(times) for name, times in ways.items()
    }
    seconds |= {
        f"{name}, seconds": statistics.median(run.seconds for run in runs)
        for name, runs in slow.items()
        if runs
    }
    row = seconds | {
        "forward passes": statistics.median(
            a / f for a, f in zip(ways["auto"], ways["forward"], strict=True)
        ),
        "candidates per token, newton": float(
            torch.cat([run.tested for run in slow["newton"]]).float().median()
        ),
    }
    if slow["published"]:
        tested = torch.cat([run.tested for run in slow["published"]]).float()
        row |= {
            "candidates per token, published": float(tested.median()),
            "published within the time limit": share(
                run.finished for run in slow["published"]
            ),
            "forward passes, published": seconds["published, seconds"]
            / seconds["forward, seconds"],
            "speed-up": seconds["published, seconds"] / seconds["auto, seconds"],
        }
    return row


def newton_steps(
    model: LanguageModel,
    asked: Sequence[Tensor],
    layer: int,
    policy: Newton | None = None,
) -> list[int]:
    """Steps from the mean embedding until the true token is the nearest, for every position."""
    policy, table, found = policy or Newton(), model.embeddings, []
    for ids in asked:
        states, step = model.states(ids, layer), OneStepMap.after(model, layer)
        for t, token in enumerate(ids.tolist()):
            path = islice(policy.path(step, table.mean(0), states[t]), 31)
            nearest = (
                int(torch.linalg.vector_norm(table - e, dim=1).argmin()) for e in path
            )
            found.append(next((k for k, v in enumerate(nearest) if v == token), NEVER))
            step = step.extend(token) if t + 1 < len(ids) else step
    return found


def auto_seconds(model: LanguageModel, asked: Sequence[Tensor], lens: Lens) -> float:
    """Median seconds of ``auto`` for a prompt."""
    times = []
    for ids in asked:
        states = model.states(ids, lens.layer)
        times.append(
            clock(
                partial(_inverted, ids, states, model, lens.layer, lens=lens),
                model.device,
            )
        )
    return statistics.median(times)


def exponent(times: dict[int, float]) -> float:
    """The slope of log time against log size.

    >>> round(exponent({10: 1.0, 20: 2.0, 40: 4.0}), 6)
    1.0
    """
    return float(np.polyfit(np.log(list(times)), np.log(list(times.values())), 1)[0])


def together(
    model: LanguageModel, asked: Sequence[Tensor], lens: Lens
) -> dict[str, float]:
    """Seconds for each prompt, one at a time and all at once, and what forward passes alone gain: three rounds."""
    layer, ways = lens.layer, {}
    states = [model.states(ids, layer) for ids in asked]
    runs = {
        "one at a time": lambda: [invert(x, model, layer, lens=lens) for x in states],
        "all at once": lambda: invert_many(states, model, layer, lens=lens),
        "forward, one at a time": lambda: [model.states(ids, layer) for ids in asked],
        "forward, all at once": lambda: model.states(torch.stack(asked), layer),
    }
    for name, run in runs.items():
        ways[name] = statistics.median(
            clock(run, model.device) for _ in range(3)
        ) / len(asked)
    return {f"{name}, seconds": spent for name, spent in ways.items()} | {
        "speed-up": ways["one at a time"] / ways["all at once"],
        "speed-up of forward passes": ways["forward, one at a time"]
        / ways["forward, all at once"],
    }


def at_the_edge(
    model: LanguageModel,
    layers: Sequence[int],
    size: Size,
    seed: int,
    progress: bool = False,
) -> dict[str, float]:
    """Theorem 3.2 at its edge: noise towards the nearest other token, of 0.49 and of 0.51 times the margin.

    Recovered means that the token is the only one within half the margin; lost, that the rival is the nearest.
    """
    outcomes = []
    for layer, step, token in _bar(
        islice(_positions(model, layers, size, seed), size.positions),
        progress,
        "margins",
        size.positions,
    ):
        states = step.tokens(every_token(model)).double()
        apart = torch.cdist(states[token, None], states, compute_mode=EXACT)[0]
        apart[token] = torch.inf
        rival, margin = int(apart.argmin()), float(apart.min())
        found = []
        for part in (0.49, 0.51):
            noisy = torch.lerp(states[token], states[rival], part)
            distance = torch.linalg.vector_norm(states - noisy, dim=1)
            found.append((int(distance.argmin()), int((distance < margin / 2).sum())))
        outcomes.append(
            {
                "layer": layer,
                "recovered": found[0] == (token, 1),
                "rival": found[1][0] == rival,
            }
        )
    return {
        name: share(o[name] for o in outcomes) for name in ("recovered", "rival")
    } | {"positions": len(outcomes)}


def gpt2_at_initialisation(
    size: Size, seed: int, device: torch.device
) -> dict[str, dict]:
    """The architecture of GPT-2 124M, weights as drawn, last layer: ``auto`` and the published loop."""
    model = load("gpt2", random_init=True, seed=seed, device=device)
    layer, generator = model.n_layers, torch.Generator().manual_seed(seed + 1)
    asked = torch.randint(
        model.vocab_size, (size.large, size.tokens), generator=generator
    ).to(device)
    begun = time.perf_counter()
    lens = Lens.fit(model, layer, tokens=10_000, features=0, seed=seed)
    fitted = time.perf_counter() - begun
    slow = [
        published(model.states(ids, layer), model, layer, limit=10 * size.limit)
        for ids in asked[: size.slow]
    ]
    auto = auto_seconds(model, asked, lens)
    seconds = statistics.median(run.seconds for run in slow)
    name = "gpt2 at random initialisation"
    row = {
        "lens, seconds to fit": fitted,
        "auto, seconds": auto,
        "published, seconds": seconds,
    }
    return {
        name: row
        | {
            "speed-up": seconds / auto,
            "published within the time limit": share(r.finished for r in slow),
        }
    }


def _positions(
    model: LanguageModel, layers: Sequence[int], size: Size, seed: int
) -> Iterator[tuple[int, OneStepMap, int]]:
    """One-step maps along bundled prompts and random tokens, the layers in turn, for ever."""
    streams = [
        prompts(model.tokenizer, kind, size.tokens, seed=seed + 2) for kind in KINDS
    ]
    for layer, ids in zip(
        cycle(layers),
        (ids for some in zip(*streams, strict=False) for ids in some),
        strict=False,
    ):
        step = OneStepMap.after(model, layer)
        for token in ids.tolist():
            yield layer, step, token
            step = step.extend(token)


def _inverted(
    ids: Int[Tensor, " pos"],
    states: Tensor,
    model: LanguageModel,
    layer: int,
    **options: object,
) -> Recovery:
    """A time counts only for the right prompt."""
    found = invert(states, model, layer, **options)
    if not torch.equal(found.tokens, ids.cpu()):
        raise AssertionError(
            f"recovered {found.tokens.tolist()}, the prompt is {ids.tolist()}"
        )
    return found


def _bar(
    items: Iterable, progress: bool, name: str = "lenses", total: int | None = None
) -> Iterable:
    return tqdm(items, name, total, disable=None if progress else True)
