"""The detector against what one would write first; a device against its own rates."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sipit_lite.collisions import closest_pairs
from sipit_lite.experiments import checks
from sipit_lite.experiments.checks import Check, clock
from sipit_lite.experiments.inversion import measure, sample, together
from sipit_lite.extensions.lens import Lens
from sipit_lite.io.shards import last_states
from sipit_lite.io.text import distinct
from sipit_lite.model import LanguageModel
from sipit_lite.onestep import EXACT, OneStepMap
from sipit_lite.sipit import invert

BLOCK = 4096
LENGTH = 24  # tokens of a prompt
REPEATS = 3


def detector(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Closest pairs of 100 000 prompts at every layer, by detector and by products."""
    layers = [1, model.n_layers] if quick else list(range(1, model.n_layers + 1))
    rows = []
    for layer, x in zip(layers, drawn(model, layers, quick, seed), strict=True):
        rows.append(compare(x.to(model.device), layer, 1 if quick else REPEATS))
    lines = []
    for way in ("gemm", "cdist"):
        # At the layer where the detector gains least.
        least = min(row[way] / row["seconds"] for row in rows)
        lines.append(Check.of(f"speed-up over {way}", least))
    error = max(row["error"] for row in rows)
    lines.append(Check.of("minimum error against float64", error))
    worst = max(row["gemm error"] for row in rows)
    return lines, {"reported": {"minimum error of gemm": worst}, "layers": rows}


def drawn(model: LanguageModel, layers: list[int], quick: bool, seed: int) -> Tensor:
    """Last states of many prompts, shape (layers, prompts, d_model)."""
    count = 300 if quick else 100_000
    source = "bundled" if quick else "installed"
    prompts = distinct(model.tokenizer, count, LENGTH, seed=seed, source=source)
    return last_states(model, prompts, layers)


def device(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """What a device makes of its own matrix rate, measured in the same run.

    A float32 product; then last states, the detector on three clouds, a full scan, a
    lens and inversions. The targets are those of one H100; a CPU is not held to them.
    """
    last = model.n_layers
    middle = max(1, last // 2)
    work = partial(timed, model.device, 1 if quick else REPEATS)
    a = torch.randn(2048, 2048, device=model.device)
    rate = 2 * len(a) ** 3 / work(lambda: a @ a)[0]
    # Two operations a weight and token in the blocks: attention, less, is left out.
    blocks = getattr(model.decoder, model.parts[0])
    token = 2 * sum(weight.numel() for weight in blocks.parameters())
    took, (x,) = work(lambda: drawn(model, [last], quick, seed))
    figures = {"last states, TFLOP/s": token * len(x) * LENGTH / took / 1e12}
    noise = torch.randn(x.shape)
    stretched = noise * torch.logspace(1, -1, model.d_model)
    clouds = {"states": x, "isotropic": noise, "anisotropic": stretched}
    for name, cloud in clouds.items():
        row = compare(cloud.to(model.device), last, 1 if quick else REPEATS)
        name = f"closest pair over float32 products, {name}"
        figures[name] = row["gemm"] / row["seconds"]
    few = sample(model, "random", 2 if quick else 30, 20, seed)
    many = sample(model, "prose", 2 if quick else 64, 20, seed)
    step = OneStepMap.after(model, last, few[0])
    took, _ = work(lambda: step.tokens(model.vocabulary))
    figures["scan, share of the matrix rate"] = token * model.vocab_size / took / rate
    sizes = {"tokens": 100_000}
    if quick:  # text takes long to prepare
        text = sample(model, "random", 80, 64, seed)
        sizes = {"tokens": 4000, "features": 0, "prompts": text}
    figures["seconds, a lens"], lens = work(lambda: Lens.fit(model, last, **sizes))
    passes = measure(model, few, lens)["passes, median"]
    figures["passes, 20 random tokens, last layer"] = passes
    batch = together(model, many, lens)["all at once, seconds"]
    figures["seconds of a prompt, many at once"] = batch
    states = model.states(many[0][:14], middle)
    took, _ = work(lambda: invert(states, model, middle, lens=False))
    figures["seconds, 14 tokens, L/2, no lens"] = took
    card = checks.setting(model).get("card")
    lines = [Check.of(name, value) for name, value in figures.items() if card]
    reported = {"matrix rate, TFLOP/s": rate / 1e12, **figures}
    return lines, {"reported": reported, "table": [f"on {card or model.device}"]}


def timed(place: torch.device, repeats: int, work: Callable[[], Any]) -> tuple:
    """The least seconds of a few calls, and what the last one returned."""
    results = []
    seconds = min(clock(lambda: results.append(work()), place) for _ in range(repeats))
    return seconds, results[-1]


def compare(x: Float[Tensor, "n d_model"], layer: int, repeats: int) -> dict:
    """One layer: seconds and minima of the detector, of float32 products, of cdist."""
    minima = []
    product = clock(lambda: minima.append(gemm_minimum(x)), x.device)
    report = closest_pairs(x, 1)
    truth = gemm_minimum(x.double())
    row = {"layer": layer, "pairs": report.compared, "minimum": report.minimum}
    row |= {"seconds": clock(lambda: closest_pairs(x, 1), x.device, repeats)}
    row |= {"gemm": product, "cdist": cdist_seconds(x), "bounded": report.bounded}
    row |= {"error": abs(report.minimum - truth), "recomputed": report.recomputed}
    return row | {"gemm error": abs(minima[0] - truth)}


def gemm_minimum(x: Float[Tensor, "n d_model"], block: int = BLOCK) -> float:
    """The obvious code: the smallest ‖a‖² + ‖b‖² − 2a·b by blocks, however wrong."""
    parts = x.split(block)
    squares = [part.square().sum(1) for part in parts]
    smallest = torch.inf
    for i, a in enumerate(parts):
        for j in range(i, len(parts)):
            apart = torch.addmm(squares[j][None], a, parts[j].T, alpha=-2)
            apart += squares[i][:, None]
            if i == j:
                apart.fill_diagonal_(torch.inf)  # a row and itself are no pair
            smallest = min(smallest, float(apart.min()))
    return max(smallest, 0.0) ** 0.5


def cdist_seconds(x: Float[Tensor, "n d_model"], rows: int = 128) -> float:
    """Seconds of exact ``torch.cdist`` for all pairs, from a sample of rows."""
    sample = torch.linspace(0, len(x) - 1, min(rows, len(x)), device=x.device).long()

    def work() -> Tensor:
        return torch.cdist(x[sample], x, compute_mode=EXACT).min()

    return clock(work, x.device) * len(x) / len(sample) / 2  # each pair once
