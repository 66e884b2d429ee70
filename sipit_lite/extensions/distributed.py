"""Several processes share states, closest pairs and inversions of many prompts.

Start one process a core or GPU with ``torchrun``, and call these inside ``ranks()``;
each rank loads the model itself. A rank that dies ends the run, and what was written to
``folder`` by then is not computed again.
``torchrun --nproc-per-node 2 -m sipit_lite.extensions.distributed --help``.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import typer
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sipit_lite import collisions
from sipit_lite.io import shards
from sipit_lite.io.corpora import from_source
from sipit_lite.io.loading import load
from sipit_lite.io.text import different
from sipit_lite.model import LanguageModel, SipItError, StatesError
from sipit_lite.recovery import Outcome
from sipit_lite.sipit import invert_many

PROGRAM = "sipit_lite.extensions.distributed"
Block = tuple[Int[Tensor, " rows"], Float[Tensor, "rows d_model"]]


class DistributedError(SipItError):
    """Processes that cannot find each other."""


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """Join the processes that ``torchrun`` started, as (rank, ranks); else alone.

    Raises
    ------
    DistributedError: for an environment that is set by half, or a failed meeting.

    >>> with ranks() as (rank, count):
    ...     rank, count
    (0, 1)
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        yield 0, 1
        return
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: os.environ.get(name, "") for name in names}
    rank, count, *_ = given.values()
    numbers = rank.isdecimal() and count.isdecimal() and int(rank) < int(count)
    if not numbers or not all(given.values()):
        raise DistributedError(f"got {given}; expected all four, as torchrun sets them")
    # NCCL carries the messages between GPUs, Gloo between CPUs.
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        local = int(os.environ.get("LOCAL_RANK", rank))
        torch.cuda.set_device(local % torch.cuda.device_count())
    try:
        dist.init_process_group(backend)
    except (ValueError, RuntimeError) as error:
        raise DistributedError(f"got {given}, which do not meet ({error})") from error
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
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "layers rows d_model"]]:
    """This rank's share of ``shards.last_states``: numbers of its prompts, and states.

    A run with as many ranks uses the shards of ``folder`` again. Raises ``StatesError``
    for repeated prompts, or fewer than ranks; else as it does there.
    """
    rank, count = _place()
    # States of equal prompts are equal, and would pass for a collision.
    if len(different(prompts)) < max(count, len(prompts)):
        got = f"got {len(prompts)} prompts, {len(different(prompts))} of them different"
        raise StatesError(f"{got}; expected each once, and one or more for each rank")
    # Every so-many-th prompt in the order of their lengths: equal shares of the work.
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    rows = order[rank::count]
    share = [prompts[row] for row in rows]
    place = None if folder is None else Path(folder) / f"rank-{rank}-of-{count}"
    states = shards.last_states(model, share, layers, folder=place, progress=progress)
    return torch.tensor(rows), states


def closest_pairs(
    rows: Int[Tensor, " n"], states: Float[Tensor, "n d_model"], k: int = 10
) -> tuple[Int[Tensor, "k 2"], Float64[Tensor, " k"]]:
    """The k closest pairs of all ranks at one layer: numbers i < j, sorted distances.

    ``rows`` numbers this rank's prompts. Blocks travel around a ring; every two meet
    on one rank, in ``collisions.closest_pairs``, so the result is certified as
    there (chapter 18). Raises ``StatesError`` as that one does.
    """
    rank, count = _place()
    sizes = _gathered(len(rows))
    possible = math.comb(sum(sizes), 2)
    if not 1 <= k <= possible:
        raise StatesError(f"got k={k} and {sum(sizes)} rows; expected 1 to {possible}")
    distances: dict[tuple[int, int], float] = {}  # by the numbers of both prompts
    visiting = (rows, states)
    # After s steps rank r is visited by block r + s.
    for step in range(1, count // 2 + 1):
        visiting = _passed_on(visiting, sizes[(rank + step) % count])
        # Half way round an even ring every two blocks meet twice, and once is enough.
        if 2 * step < count or rank < step:
            both = torch.cat([states, visiting[1]])
            distances |= _compared(torch.cat([rows, visiting[0]]), both, k)
    if count == 1:
        distances = _compared(rows, states, k)
    for others in _gathered(distances):
        distances |= others
    # Each rank has sent the k closest of its own, so the k closest of all are here.
    # Equal distances in the order of their numbers: the same on every rank.
    best = sorted(distances, key=lambda pair: (distances[pair], pair))[:k]
    values = [distances[pair] for pair in best]
    return torch.tensor(best), torch.tensor(values, dtype=torch.float64)


def ring_bytes(prompts: int, d_model: int, ranks: int, itemsize: int = 4) -> int:
    """Bytes that each rank sends in ``closest_pairs``, one layer: half of all states.

    The block of N/R rows, each with its int64 number, is passed on ⌊R/2⌋ times.

    >>> [ring_bytes(1200, 256, ranks) for ranks in (2, 4, 3)]
    [619200, 619200, 412800]
    """
    return ranks // 2 * (prompts // ranks) * (d_model * itemsize + 8)


def many_inverted(
    states: Sequence[Tensor], model: LanguageModel, layer: int, **options: object
) -> list[Outcome]:
    """``invert_many`` with the prompts dealt out to the ranks: all outcomes, on each.

    >>> model = load(device="cpu")
    >>> states = [model.states(text, 1) for text in ("one", "two")]
    >>> [outcome.text for outcome in many_inverted(states, model, 1)]
    ['one', 'two']
    """
    rank, count = _place()
    # Options in a list are one for each prompt.
    for name, value in options.items():
        if isinstance(value, list | tuple):
            options[name] = value[rank::count]
    dealt = _gathered(invert_many(states[rank::count], model, layer, **options))
    return [dealt[i % count][i // count] for i in range(len(states))]


def _compared(
    rows: Int[Tensor, " n"], states: Float[Tensor, "n d_model"], k: int
) -> dict[tuple[int, int], float]:
    """Distances of the closest pairs of one search, by the numbers of their prompts."""
    report = collisions.closest_pairs(states, min(k, math.comb(len(rows), 2)))
    pairs = rows[report.pairs].sort(dim=1).values.tolist()
    return dict(zip(map(tuple, pairs), report.distances.tolist(), strict=True))


def _place() -> tuple[int, int]:
    """This rank, and how many there are."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _gathered(value: object) -> list:
    """The value of every rank, in their order, on every rank."""
    values = [value] * _place()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def _passed_on(block: Block, size: int) -> Block:
    """Send a block to the rank before this one, and take one of ``size`` rows."""
    rank, count = _place()
    place = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    moves = []  # all at once: one send after the other would wait for its receiver
    received = []
    for part in block:
        received.append(part.new_empty(size, *part.shape[1:], device=place))
        sent = part.to(place).contiguous()
        moves.append(dist.P2POp(dist.isend, sent, (rank - 1) % count))
        moves.append(dist.P2POp(dist.irecv, received[-1], (rank + 1) % count))
    for move in dist.batch_isend_irecv(moves):
        move.wait()
    rows, states = received
    return rows.to(block[0].device), states.to(block[1].device)


def compare(
    prompts: Annotated[int, typer.Option("-n", "--prompts", min=2)] = 2000,
    length: Annotated[int, typer.Option(min=1, help="tokens of a prompt")] = 24,
    layers: Annotated[list[int] | None, typer.Option(help="once for each")] = None,
    source: Literal["bundled", "installed", "corpora"] = "bundled",
    folder: Annotated[str | None, typer.Option(help="keeps the states")] = None,
    model: str | None = None,
    seed: int = 0,
) -> None:
    """States of many prompts and their closest pairs, one line of JSON from rank 0."""
    with ranks() as (rank, count):
        loaded = load(model, layers=max(layers) if layers else None)
        layers = layers or [loaded.n_layers]
        options = {"seed": seed, "source": source, "folder": folder}
        ids = []
        # One rank draws them for all, since corpora are streamed once. All start
        # together after that, or the slowest to load would be part of the time.
        if rank == 0:
            ids = from_source(loaded.tokenizer, prompts, length, **options)
        ids = _gathered(ids)[0]
        started = time.perf_counter()
        keep = {"folder": folder, "progress": rank == 0}
        rows, states = last_states(loaded, ids, layers, **keep)
        summary = {"ranks": count, "prompts": len(ids), "layers": []}
        summary["seconds"] = max(_gathered(time.perf_counter() - started))
        for layer, x in zip(layers, states, strict=True):
            [pair], [distance] = closest_pairs(rows, x, 1)
            row = {"layer": layer, "pair": pair.tolist(), "minimum": float(distance)}
            summary["layers"].append(row)
        if rank == 0:
            print(json.dumps(summary))


def main(arguments: Sequence[str] | None = None) -> int:
    """``compare`` as a program: 2, and one line, for anything that cannot be done."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(compare)
    try:
        # Typer's errors take several lines; outside standalone mode they are raised.
        return app(arguments, f"torchrun -m {PROGRAM}", standalone_mode=False) or 0
    except typer.TyperException as error:
        message = error.format_message()
    except (SipItError, OSError, RuntimeError) as error:
        message = str(error) or type(error).__name__
    print("distributed:", " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
