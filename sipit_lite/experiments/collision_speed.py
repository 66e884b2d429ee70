"""The detector against what one would write first, on the same states (chapter 6)."""

import subprocess
import sys
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from sipit_lite.collisions import closest_pairs
from sipit_lite.experiments.checks import Check, clock, peak_memory
from sipit_lite.io.shards import last_states
from sipit_lite.io.text import distinct
from sipit_lite.model import LanguageModel
from sipit_lite.onestep import EXACT

BLOCK = 4096
LENGTH = 24  # tokens of a prompt
REPEATS = 3


def collisions(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """Closest pairs of 100 000 prompts at every layer, by the detector and by products.

    Then its peak memory above the states.
    """
    n = 600 if quick else 100_000
    source = "bundled" if quick else "installed"
    prompts = distinct(model.tokenizer, n, LENGTH, seed=seed, source=source)
    layers = [1, model.n_layers] if quick else list(range(1, model.n_layers + 1))
    states = last_states(model, prompts, layers, progress=progress)
    rows = []
    for layer, x in zip(layers, states, strict=True):
        rows.append(compare(x.to(model.device), layer, 1 if quick else REPEATS))
    # Peak memory never falls, so it is measured in a process of its own.
    code = f"from {__name__} import extra; print(extra({n}, {model.d_model}))"
    fresh = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True
    )
    checks = []
    for way in ("gemm", "cdist"):
        # At the layer where the detector gains least.
        least = min(row[way] / row["seconds"] for row in rows)
        checks.append(Check.of(f"speed-up over {way}", least))
    checks += [
        Check.of("minimum error against float64", max(row["error"] for row in rows)),
        Check.of("peak memory GiB above the states", float(fresh.stdout)),
    ]
    reported = {
        "pairs a layer": rows[0]["pairs"],
        "minimum error of gemm, largest": max(row["gemm error"] for row in rows),
    }
    return checks, {"reported": reported, "layers": rows}


def compare(x: Float[Tensor, "n d_model"], layer: int, repeats: int) -> dict:
    """One layer: seconds and minima of the detector, of float32 products, of cdist."""
    minima = []
    product = clock(lambda: minima.append(gemm_minimum(x)), x.device)
    report = closest_pairs(x, 1)
    truth = gemm_minimum(x.double())
    row = {"layer": layer, "pairs": report.compared, "minimum": report.minimum}
    row |= {"seconds": median_seconds(x, repeats), "gemm": product}
    row |= {"cdist": cdist_seconds(x), "error": abs(report.minimum - truth)}
    row |= {"gemm error": abs(minima[0] - truth), "bounded": report.bounded}
    return row | {"recomputed": report.recomputed}


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


def median_seconds(x: Float[Tensor, "n d_model"], repeats: int = REPEATS) -> float:
    """Median time of the detector."""
    return median(clock(lambda: closest_pairs(x, 1), x.device) for _ in range(repeats))


def extra(n: int, d: int) -> float:
    """GiB of memory that the detector takes above random states."""
    x = torch.randn(n, d).mul_(torch.logspace(1, -1, d))
    closest_pairs(x[:1000])  # loading the libraries' kernels is not the detector's
    before = peak_memory() or 0.0
    closest_pairs(x)
    return (peak_memory() or 0.0) - before
