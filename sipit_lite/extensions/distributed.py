"""Several processes: states, closest pairs and inversions shared out over the ranks of ``torch.distributed``.

Start one process a core or GPU with ``torchrun``, and call these inside ``ranks()``; each rank loads the model itself.
Gloo carries the messages between CPUs, NCCL between GPUs. A rank that dies ends the run with an error, and what was
written to ``folder`` by then is not computed again. ``torchrun --nproc-per-node 2 -m sipit_lite.extensions.distributed --help``.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sipit_lite import collisions
from sipit_lite.extensions.lens import Lens
from sipit_lite.io import shards
from sipit_lite.io.corpora import SOURCES, from_source
from sipit_lite.io.loading import load
from sipit_lite.model import LanguageModel, StatesError
from sipit_lite.recovery import Outcome
from sipit_lite.sipit import invert_many


@dataclass(frozen=True, eq=False)
class Shard:
    """The part of many prompts' states that one rank holds.

    ``rows`` are the numbers of its prompts among all, ``states`` theirs, shape (layers, rows, d_model), on the CPU.
    """

    rows: Int[Tensor, " rows"]
    states: Float[Tensor, "layers rows d_model"]


@dataclass(frozen=True, eq=False)
class ClosestPairs:
    """The closest pairs over all ranks, the same on each: numbers of prompts i < j, float64 distances, sorted.

    ``compared`` counts all pairs; no other pair is closer than the last one reported. ``collisions`` and ``practical``
    count as in ``CollisionReport``; ``duplicates`` the rows left out because their prompt had occurred before.
    """

    pairs: Int[Tensor, "k 2"]
    distances: Float64[Tensor, " k"]
    compared: int
    collisions: int
    practical: int
    duplicates: int

    @property
    def minimum(self) -> float:
        """The smallest distance of all."""
        return float(self.distances[0])


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """Join the processes that ``torchrun`` started, as (rank, number of ranks); alone without it.

    >>> with ranks() as (rank, count):
    ...     rank, count
    (0, 1)
    """
    if "RANK" not in os.environ:
        yield 0, 1
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def last_states(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    layers: Sequence[int],
    *,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Shard:
    """This rank's share of ``shards.last_states``: every so-many-th prompt in the order of their lengths.

    With ``folder`` finished shards are kept, and used again by a run with as many ranks. Raises what it raises there,
    and ``StatesError`` for fewer prompts than ranks.
    """
    rank, count = _place()
    if len(prompts) < count:
        raise StatesError(
            f"got {len(prompts)} prompts for {count} ranks; expected at least one for each"
        )
    rows = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))[rank::count]
    place = folder and Path(folder) / f"rank-{rank}-of-{count}"
    found = shards.last_states(
        model, [prompts[row] for row in rows], layers, folder=place, progress=progress
    )
    return Shard(torch.tensor(rows), found)


def closest_pairs(
    rows: Int[Tensor, " n"],
    states: Float[Tensor, "n d_model"],
    k: int = 10,
    *,
    prompts: Sequence[Tensor] | None = None,
) -> ClosestPairs:
    """The k closest pairs among the states of all ranks, one layer, each rank giving its own rows.

    The blocks travel around a ring; every two meet on one rank, where ``collisions.closest_pairs`` compares all of
    theirs, so the result is certified as there. A rank holds its own block, the visiting one, and the two side by
    side; ``ring_bytes`` says what it sends. ``prompts``, one for each row of this rank, leave repeated prompts out,
    wherever they are. Raises ``StatesError`` as it does there.
    """
    rank, count = _place()
    kept = (
        _first_of_each(rows, prompts)
        if prompts is not None
        else torch.ones(len(rows), dtype=torch.bool)
    )
    mine = (
        (rows, states)
        if bool(kept.all())
        else (rows[kept], states[kept.to(states.device)])
    )  # no needless copy
    sizes = _gathered(len(mine[0]))
    total = sum(sizes)
    if not 1 <= k <= _pairs(total):
        raise StatesError(
            f"got k={k} and {total} rows of distinct prompts; expected 1 to {_pairs(total)}"
        )
    inside = _pairs(sizes[rank])
    alone = (
        [collisions.closest_pairs(mine[1], min(k, inside))]
        if inside and count != 2
        else []
    )
    met = [(mine[0], report) for report in alone] if count == 1 else []
    visiting = mine
    for step in range(1, count // 2 + 1):
        visiting = _passed_on(visiting, sizes[(rank + step) % count])
        if (
            2 * step < count or rank < step
        ):  # half way round an even ring every two meet twice
            met.append(_met(mine, visiting, k))
    found = {
        tuple(sorted(numbers[pair].tolist())): distance
        for numbers, report in met
        for pair, distance in zip(report.pairs, report.distances.tolist(), strict=True)
    }
    merged = {
        pair: distance for part in _gathered(found) for pair, distance in part.items()
    }
    best = sorted(merged.items(), key=lambda item: item[1])[:k]
    # Pairs inside a block were counted whenever it met another: count − 1 times, once of which is right.
    counts = {
        name: sum(_gathered(sum(getattr(report, name) for _, report in met)))
        - max(count - 2, 0)
        * sum(_gathered(sum(getattr(report, name) for report in alone)))
        for name in ("collisions", "practical")
    }
    return ClosestPairs(
        pairs=torch.tensor([pair for pair, _ in best]),
        distances=torch.tensor([distance for _, distance in best], dtype=torch.float64),
        compared=_pairs(total),
        duplicates=sum(_gathered(len(rows))) - total,
        **counts,
    )


def ring_bytes(prompts: int, d_model: int, ranks: int, itemsize: int = 4) -> int:
    """Bytes that each of so many ranks sends in ``closest_pairs``, one layer: half of all states, however many ranks.

    The block of N/R rows, each with its int64 number, is passed on ⌊R/2⌋ times; N is taken as a multiple of R.

    >>> ring_bytes(1200, 256, 2), ring_bytes(1200, 256, 4), ring_bytes(1200, 256, 3)
    (619200, 619200, 412800)
    """
    return ranks // 2 * (prompts // ranks) * (d_model * itemsize + 8)


def many_inverted(
    states: Sequence[Tensor],
    model: LanguageModel,
    layer: int,
    *,
    lens: Lens | None = None,
    seed: int = 0,
) -> list[Outcome]:
    """``invert_many`` with the prompts dealt out to the ranks: every outcome, in their order, on every rank.

    >>> model = load(device="cpu")
    >>> [found.text for found in many_inverted([model.states(text, 1) for text in ("one", "two")], model, 1)]
    ['one', 'two']
    """
    rank, count = _place()
    dealt = _gathered(
        invert_many(states[rank::count], model, layer, lens=lens, seed=seed)
    )
    return [dealt[i % count][i // count] for i in range(len(states))]


def _met(
    mine: tuple[Tensor, Tensor], visiting: tuple[Tensor, Tensor], k: int
) -> tuple[Int[Tensor, " rows"], collisions.CollisionReport]:
    """Numbers and closest pairs of two blocks together; the copy of both is gone before the next block comes."""
    both = torch.cat([mine[1], visiting[1]])
    return torch.cat([mine[0], visiting[0]]), collisions.closest_pairs(
        both, min(k, _pairs(len(both)))
    )


def _place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _pairs(n: int) -> int:
    return n * (n - 1) // 2


def _gathered(value: object) -> list:
    """The value of every rank, in their order, on every rank."""
    found = [value] * _place()[1]
    if len(found) > 1:
        dist.all_gather_object(found, value)
    return found


def _passed_on(block: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Send a block to the rank before this one, and take the one of the rank behind, which has so many rows."""
    rank, count = _place()
    place = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    gone = [part.to(place).contiguous() for part in block]
    come = [
        torch.empty(size, *part.shape[1:], dtype=part.dtype, device=place)
        for part in block
    ]
    moves = [dist.P2POp(dist.isend, part, (rank - 1) % count) for part in gone]
    moves += [dist.P2POp(dist.irecv, part, (rank + 1) % count) for part in come]
    for move in dist.batch_isend_irecv(moves):
        move.wait()
    return come[0].to(block[0].device), come[1].to(block[1].device)


def _first_of_each(rows: Int[Tensor, " n"], prompts: Sequence[Tensor]) -> Tensor:
    """Which rows hold the first occurrence of their prompt among the rows of all ranks."""
    if len(rows) != len(prompts):
        raise StatesError(
            f"got {len(prompts)} prompts for {len(rows)} rows; expected one for each"
        )
    keys = [tuple(prompt.tolist()) for prompt in prompts]
    first: dict[tuple[int, ...], int] = {}
    for part in _gathered(list(zip(keys, rows.tolist(), strict=True))):
        for key, row in part:
            first[key] = min(row, first.get(key, row))
    return torch.tensor(
        [first[key] == row for key, row in zip(keys, rows.tolist(), strict=True)],
        dtype=torch.bool,
    )


def _prompts(model: LanguageModel, options: argparse.Namespace) -> list[Tensor]:
    """The same prompts on every rank; corpora are streamed by the first alone."""
    alone = options.source != "corpora"
    if alone or _place()[0] == 0:
        chosen = {
            "seed": options.seed,
            "source": options.source,
            "folder": options.folder,
        }
        asked = from_source(model.tokenizer, options.prompts, options.length, **chosen)
    return asked if alone else _gathered(asked if _place()[0] == 0 else [])[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """States of many prompts and their closest pairs, one line of JSON from rank 0."""
    parser = argparse.ArgumentParser(
        prog="torchrun -m sipit_lite.extensions.distributed", description=main.__doc__
    )
    parser.add_argument("-n", "--prompts", type=int, default=2000)
    parser.add_argument("--length", type=int, default=24, help="tokens of a prompt")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="0 to L; the last by default"
    )
    parser.add_argument("--source", default="bundled", choices=SOURCES)
    parser.add_argument(
        "--folder", help="keeps the states, so that an interrupted run goes on"
    )
    parser.add_argument("--model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with ranks() as (rank, count):
        model = load(
            options.model, layers=max(options.layers) if options.layers else None
        )
        layers = options.layers or [model.n_layers]
        asked = _prompts(model, options)
        _gathered(
            None
        )  # all start together, or the slowest to load would be part of the time
        begun = time.perf_counter()
        shard = last_states(
            model, asked, layers, folder=options.folder, progress=rank == 0
        )
        spent = _gathered(time.perf_counter() - begun)
        found = [closest_pairs(shard.rows, states, 1) for states in shard.states]
        if rank == 0:
            rows = [
                {
                    "layer": layer,
                    "minimum": f.minimum,
                    "pair": f.pairs[0].tolist(),
                    "compared": f.compared,
                }
                for layer, f in zip(layers, found, strict=True)
            ]
            print(
                json.dumps(
                    {
                        "ranks": count,
                        "prompts": len(asked),
                        "seconds": max(spent),
                        "layers": rows,
                    }
                )
            )


if __name__ == "__main__":
    main()
