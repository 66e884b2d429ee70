"""The detector against what one would write first, same states (chapters 6, 7)."""

import statistics
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
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
    """Closest pairs of 100 000 distinct prompts at every layer, and what else it takes.

    Ours, blocked float32 products, exact cdist, float64. Then normal data without
    structure, peak memory, growth with N, and the rate of the forward passes, measured
    on one shard of prompts. ``folder`` keeps the states, so that a run that was stopped
    goes on.
    """
    n = 600 if quick else 100_000
    options = {"seed": seed, "source": "bundled" if quick else "installed"}
    prompts = distinct(model.tokenizer, n, LENGTH, **options)
    layers = [1, model.n_layers] if quick else list(range(1, model.n_layers + 1))
    shard = prompts[:SHARD]
    # Before and after, since clocks and neighbours change.
    rates = [gemm_rate(model.device)]
    seconds = clock(lambda: last_states(model, shard, layers), model.device)
    rates.append(gemm_rate(model.device))
    rate = statistics.mean(rates)
    share = forward_flops(model, len(shard) * LENGTH, LENGTH) / seconds / rate
    states = last_states(model, prompts, layers, folder=folder, progress=progress)
    rows = []
    for layer, x in zip(layers, states, strict=True):
        rows.append(compare(x.to(model.device), layer, quick))
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(n // (1 if quick else 4), model.d_model, generator=generator)
    flat_ratio = isotropic_ratio(flat.to(model.device))
    if quick:
        memory = memory_above_the_states(n, model.d_model)
    else:
        # What this process has taken so far would hide it.
        name = "memory_above_the_states"
        memory = in_a_process(__name__, name, n, model.d_model)
    more = distinct(model.tokenizer, n, LENGTH // 2, **options)
    place = folder and Path(folder) / "more"
    [others] = last_states(model, more, layers[-1:], folder=place, progress=progress)
    grown = torch.cat([states[-1], others])
    sizes = [n // 4, n // 2, n, 2 * n]
    times = growth(grown.to(model.device), sizes)
    checks = [
        Check.of(
            "speed-up over gemm",
            min(row["gemm seconds"] / row["seconds"] for row in rows),
        ),
        Check.of(
            "speed-up over cdist",
            min(row["cdist seconds"] / row["seconds"] for row in rows),
        ),
        Check.of("minimum error against float64", max(row["error"] for row in rows)),
        Check.of("isotropic time over gemm", flat_ratio),
        Check.of("peak memory GiB above the states", memory),
        Check.of("forward rate over gemm rate", share),
    ]
    reported = {
        "pairs a layer": rows[0]["pairs"],
        "minimum error of gemm against float64, largest": max(
            row["gemm error"] for row in rows
        ),
        "states, prompts a second": len(shard) / seconds,
        "forward GFLOP/s": share * rate / 1e9,
        "gemm GFLOP/s": rate / 1e9,
        "growth exponent of time with N": float(
            np.polyfit(np.log(sizes), np.log(times), 1)[0]
        ),
    } | {f"seconds, N = {size}": t for size, t in zip(sizes, times, strict=True)}
    return checks, {"reported": reported, "layers": rows, "isotropic rows": len(flat)}


def compare(x: Float[Tensor, "n d_model"], layer: int, quick: bool = False) -> dict:
    """One layer: seconds and minima of the detector, the formula, cdist and faiss."""
    ours, found = [], []
    gemm_seconds = clock(lambda: found.append(gemm_minimum(x)), x.device)
    for _ in range(1 if quick else REPEATS):
        ours.append(clock(lambda: found.append(closest_pairs(x, 1)), x.device))
    gemm, report = found[0], found[-1]
    truth = gemm_minimum(x.double())
    row = {
        "layer": layer,
        "pairs": report.compared,
        "minimum": report.minimum,
        "seconds": statistics.median(ours),
        "gemm seconds": gemm_seconds,
        "cdist seconds": cdist_seconds(x),
        "error": abs(report.minimum - truth),
        "gemm error": abs(gemm - truth),
        "bounded": report.bounded,
        "recomputed": report.recomputed,
    }
    return row | ({"faiss seconds": faiss_seconds(x)} if find_spec("faiss") else {})


def gemm_minimum(x: Float[Tensor, "n d_model"], block: int = BLOCK) -> float:
    """The obvious code, ‖a‖² + ‖b‖² − 2a·b by blocks; the smallest, however wrong.

    >>> gemm_minimum(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.5]]))
    0.5
    """
    squares, smallest = x.square().sum(1), torch.inf
    for i in range(0, len(x), block):
        for j in range(i, len(x), block):
            found = torch.addmm(
                squares[None, j : j + block],
                x[i : i + block],
                x[j : j + block].T,
                alpha=-2,
            )
            found += squares[i : i + block, None]
            if i == j:
                found.fill_diagonal_(torch.inf)
            smallest = min(smallest, float(found.min()))
    return max(smallest, 0.0) ** 0.5


def cdist_seconds(x: Float[Tensor, "n d_model"], rows: int = 128) -> float:
    """Seconds of exact ``torch.cdist``, from a sample of rows against all."""
    spread = torch.linspace(0, len(x) - 1, min(rows, len(x)), device=x.device).long()
    seconds = clock(
        lambda: torch.cdist(x[spread], x, compute_mode=EXACT).min(), x.device
    )
    return seconds * len(x) / len(spread) / 2  # each pair once


def faiss_seconds(x: Float[Tensor, "n d_model"], rows: int = 2000) -> float:
    """Seconds of a flat faiss index for the neighbour of every row, from a sample."""
    import faiss

    index, some = faiss.IndexFlatL2(x.shape[1]), x[:rows].cpu().numpy()
    index.add(x.cpu().numpy())
    begun = time.perf_counter()
    index.search(some, 2)
    return (time.perf_counter() - begun) * len(x) / len(some)


def isotropic_ratio(x: Float[Tensor, "n d_model"]) -> float:
    """Median time of the detector over the formula's where no axis stands out."""
    pairs = [
        (
            clock(lambda: closest_pairs(x, 1), x.device),
            clock(lambda: gemm_minimum(x), x.device),
        )
        for _ in range(REPEATS)
    ]
    return statistics.median(ours / gemm for ours, gemm in pairs)


def growth(
    x: Float[Tensor, "n d_model"], sizes: list[int], seed: int = 0
) -> list[float]:
    """Median seconds of the detector on random parts of the states, of these sizes."""
    order: Int[Tensor, " n"] = torch.randperm(
        len(x), generator=torch.Generator().manual_seed(seed)
    ).to(x.device)
    parts = (x[order[:size]] for size in sizes)
    return [
        statistics.median(
            clock(lambda part=part: closest_pairs(part, 1), x.device)
            for _ in range(REPEATS)
        )
        for part in parts
    ]


def gemm_rate(device: torch.device, size: int = 2048) -> float:
    """Operations a second of a large float32 matrix product; the better of two."""
    a, b = torch.randn(2, size, size, device=device)
    return 2 * size**3 / min(clock(lambda: a @ b, device) for _ in range(2))


def forward_flops(model: LanguageModel, tokens: int, length: int) -> int:
    """Operations of the blocks: two for each weight and token, and attention's own."""
    blocks = sum(
        p.numel() for name, p in model.decoder.named_parameters() if p.ndim == 2
    ) - sum(
        e.weight.numel()
        for e in model.decoder.modules()
        if isinstance(e, torch.nn.Embedding)
    )
    return tokens * (2 * blocks + 4 * length * model.d_model * model.n_layers)


def memory_above_the_states(n: int, d: int) -> float:
    """GiB that the detector takes above random states, in a process of its own."""
    x = torch.randn(n, d).mul_(torch.logspace(1, -1, d))
    closest_pairs(
        x[:1000]
    )  # what loading the libraries' kernels takes is not the detector's
    before = peak_memory() or 0.0
    closest_pairs(x)
    return (peak_memory() or 0.0) - before
