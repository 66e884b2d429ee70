"""The detector against what one would write first, on the same states (chapter 6)."""

import statistics
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sipit_lite.collisions import closest_pairs
from sipit_lite.experiments.checks import Check, clock, in_a_process, peak_memory
from sipit_lite.io.shards import SHARD, last_states
from sipit_lite.io.text import distinct
from sipit_lite.model import LanguageModel
from sipit_lite.onestep import EXACT

BLOCK = 4096
LENGTH = 24  # tokens of a prompt
REPEATS = 3


def collisions(
    model: LanguageModel,
    *,
    quick: bool = False,
    seed: int = 0,
    progress: bool = False,
    folder: str | Path | None = None,
) -> tuple[list[Check], dict]:
    """Closest pairs of 100 000 prompts at every layer, by the detector and by products.

    Then normal data without structure, peak memory, growth with N, and the rate of the
    forward passes on one shard. ``folder`` keeps the states, so that a run goes on.
    """
    device = model.device
    n = 600 if quick else 100_000
    text = {"seed": seed, "source": "bundled" if quick else "installed"}
    prompts = distinct(model.tokenizer, n, LENGTH, **text)
    layers = [1, model.n_layers] if quick else list(range(1, model.n_layers + 1))
    shard = prompts[:SHARD]
    # The rate of products before and after: a machine may slow down in between.
    rates = [gemm_rate(device)]
    seconds = clock(lambda: last_states(model, shard, layers), device)
    rates.append(gemm_rate(device))
    rate = statistics.mean(rates)
    share = forward_flops(model, len(shard) * LENGTH) / seconds / rate
    states = last_states(model, prompts, layers, folder=folder, progress=progress)
    rows = []
    for layer, x in zip(layers, states, strict=True):
        rows.append(compare(x.to(device), layer, 1 if quick else REPEATS))
    generator = torch.Generator().manual_seed(seed)
    flat_rows = n if quick else n // 4
    flat = torch.randn(flat_rows, model.d_model, generator=generator).to(device)
    ratios = []
    for _ in range(REPEATS):
        ours = clock(lambda: closest_pairs(flat, 1), device)
        ratios.append(ours / clock(lambda: gemm_minimum(flat), device))
    # Half as long: other states, for twice as many rows.
    more = distinct(model.tokenizer, n, LENGTH // 2, **text)
    place = folder and Path(folder) / "more"
    longer = last_states(model, more, layers[-1:], folder=place, progress=progress)
    sizes = [n // 4, n // 2, n, 2 * n]
    grown = torch.cat([states[-1], longer[0]])
    grown = grown[torch.randperm(2 * n, generator=generator)].to(device)
    times = [median_seconds(grown[:size]) for size in sizes]
    memory = in_a_process(__name__, "memory_above_the_states", n, model.d_model)
    gemm = min(row["gemm seconds"] / row["seconds"] for row in rows)
    cdist = min(row["cdist seconds"] / row["seconds"] for row in rows)
    checks = [
        Check.of("speed-up over gemm", gemm),
        Check.of("speed-up over cdist", cdist),
        Check.of("minimum error against float64", max(row["error"] for row in rows)),
        Check.of("isotropic time over gemm", statistics.median(ratios)),
        Check.of("peak memory GiB above the states", memory),
        Check.of("forward rate over gemm rate", share),
    ]
    slope = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
    largest = max(row["gemm error"] for row in rows)
    reported = {
        "pairs a layer": rows[0]["pairs"],
        "minimum error of gemm against float64, largest": largest,
        "states, prompts a second": len(shard) / seconds,
        "forward GFLOP/s": share * rate / 1e9,
        "gemm GFLOP/s": rate / 1e9,
        "growth exponent of time with N": slope,
    }
    for size, taken in zip(sizes, times, strict=True):
        reported[f"seconds, N = {size}"] = taken
    return checks, {"reported": reported, "layers": rows, "isotropic rows": flat_rows}


def compare(x: Float[Tensor, "n d_model"], layer: int, repeats: int) -> dict:
    """One layer: seconds and minima of the detector, of float32 products, of cdist."""
    minima = []
    product = clock(lambda: minima.append(gemm_minimum(x)), x.device)
    report = closest_pairs(x, 1)
    truth = gemm_minimum(x.double())
    return {
        "layer": layer,
        "pairs": report.compared,
        "minimum": report.minimum,
        "seconds": median_seconds(x, repeats),
        "gemm seconds": product,
        "cdist seconds": cdist_seconds(x),
        "error": abs(report.minimum - truth),
        "gemm error": abs(minima[0] - truth),
        "bounded": report.bounded,
        "recomputed": report.recomputed,
    }


def gemm_minimum(x: Float[Tensor, "n d_model"], block: int = BLOCK) -> float:
    """The obvious code: the smallest ‖a‖² + ‖b‖² − 2a·b by blocks, however wrong.

    >>> gemm_minimum(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.5]]))
    0.5
    """
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


def median_seconds(x: Float[Tensor, "n d_model"], repeats: int = REPEATS) -> float:
    """Median time of the detector."""
    work = [clock(lambda: closest_pairs(x, 1), x.device) for _ in range(repeats)]
    return statistics.median(work)


def gemm_rate(device: torch.device, size: int = 2048) -> float:
    """Operations a second of a large float32 matrix product; the better of two."""
    a, b = torch.randn(2, size, size, device=device)
    return 2 * size**3 / min(clock(lambda: a @ b, device) for _ in range(2))


def forward_flops(model: LanguageModel, tokens: int) -> int:
    """Operations of matrix products: two a weight and token, and those of attention."""
    blocks = 0
    for module in model.decoder.modules():
        if not isinstance(module, torch.nn.Embedding):
            weights = module.parameters(recurse=False)
            blocks += sum(w.numel() for w in weights if w.ndim == 2)
    return tokens * (2 * blocks + 4 * LENGTH * model.d_model * model.n_layers)


def memory_above_the_states(n: int, d: int) -> float:
    """GiB that the detector takes above random states; in a process of its own."""
    x = torch.randn(n, d).mul_(torch.logspace(1, -1, d))
    closest_pairs(x[:1000])  # loading the libraries' kernels is not the detector's
    before = peak_memory() or 0.0
    closest_pairs(x)
    return (peak_memory() or 0.0) - before
