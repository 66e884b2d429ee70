"""Several processes share the states of many prompts and their closest pairs.

Start one a core or GPU with ``torchrun``, each loads the model, and call these inside
``ranks()``. A rank that dies ends the run; shards in ``folder`` are used again.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sipit_lite import collisions
from sipit_lite.io import shards
from sipit_lite.io.text import different
from sipit_lite.model import LanguageModel, SipItError, StatesError

MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun
Block = tuple[Int[Tensor, " rows"], Float[Tensor, "rows d_model"]]  # one rank's


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """Join the processes that ``torchrun`` started, as (rank, ranks); else (0, 1).

    Raises ``SipItError`` for an environment that is set by half, or a failed meeting.
    """
    given = {name: os.environ.get(name, "") for name in MEETING}
    rank, count, *_ = given.values()
    if not rank and not count:
        yield 0, 1
        return
    numbers = rank.isdecimal() and count.isdecimal() and int(rank) < int(count)
    if not numbers or not all(given.values()):
        raise SipItError(f"got {given}; expected all four, as torchrun sets them")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", rank))
        torch.cuda.set_device(local % torch.cuda.device_count())
    try:
        # NCCL carries the messages between GPUs, Gloo between CPUs.
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    except (ValueError, RuntimeError) as error:
        raise SipItError(f"got {given}, which do not meet ({error})") from error
    try:
        yield _place()
    finally:
        dist.destroy_process_group()


def last_states(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    layers: Sequence[int],
    folder: str | Path | None = None,
) -> tuple[Int[Tensor, " rows"], Float[Tensor, "layers rows d_model"]]:
    """This rank's share of ``shards.last_states``: numbers of its prompts, and states.

    Raises as that one, and ``StatesError`` for repeated prompts or fewer than ranks.
    """
    rank, count = _place()
    distinct = len(different(prompts))
    # States of equal prompts are equal, and would pass for a collision.
    if distinct < max(count, len(prompts)):
        got = f"got {len(prompts)} prompts, {distinct} of them different"
        raise StatesError(f"{got}; expected each once, and one or more for each rank")
    if folder is not None:
        folder = Path(folder) / f"rank-{rank}-of-{count}"
    options = {"folder": folder, "progress": rank == 0}
    states = shards.last_states(model, prompts[rank::count], layers, **options)
    return torch.arange(rank, len(prompts), count), states


def closest_pairs(
    rows: Int[Tensor, " n"], states: Float[Tensor, "n d_model"], k: int = 10
) -> tuple[Int[Tensor, "k 2"], Float64[Tensor, " k"]]:
    """The k closest pairs of all ranks at one layer: numbers i < j, sorted distances.

    ``rows`` numbers this rank's prompts. Every two blocks meet on one rank of a ring,
    in ``collisions.closest_pairs``, which certifies and refuses as alone (``scale``).
    """
    rank, count = _place()
    sizes = gathered(len(rows))
    pairs = math.comb(sum(sizes), 2)
    if not 1 <= k <= pairs:
        raise StatesError(f"got k={k} and {sum(sizes)} rows; expected 1 to {pairs}")
    distances = _compared(rows, states, k) if count == 1 else {}
    visiting = (rows, states)
    # After s steps rank r is visited by block r + s.
    for step in range(1, count // 2 + 1):
        visiting = _passed_on(visiting, sizes[(rank + step) % count])
        # Half way round an even ring every two blocks meet twice, and once is enough.
        if 2 * step < count or rank < step:
            both = map(torch.cat, zip((rows, states), visiting, strict=True))
            distances |= _compared(*both, k)
    # Each rank sends the k closest of its own, so the k closest of all are here.
    for others in gathered(distances):
        distances |= others
    # Equal distances in the order of their numbers: the same on every rank.
    best = sorted(zip(distances.values(), distances, strict=True))[:k]
    values, pairs = zip(*best, strict=True)
    return torch.tensor(pairs), torch.tensor(values, dtype=torch.float64)


def _compared(
    rows: Int[Tensor, " n"], states: Float[Tensor, "n d_model"], k: int
) -> dict[tuple[int, int], float]:
    """Distances of the closest pairs of one search, by the numbers of their prompts."""
    report = collisions.closest_pairs(states, min(k, math.comb(len(rows), 2)))
    pairs = rows[report.pairs].sort(dim=1).values.tolist()
    return dict(zip(map(tuple, pairs), report.distances.tolist(), strict=True))


def _place() -> tuple[int, int]:
    """This rank, and how many there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(value: object) -> list:
    """The value of every rank, in their order, on every rank."""
    values = [value] * _place()[1]
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def _passed_on(block: Block, size: int) -> Block:
    """Send a block to the rank before this one, and take one of ``size`` rows."""
    rank, count = _place()
    place = "cuda" if dist.get_backend() == "nccl" else "cpu"
    received = [part.new_empty(size, *part.shape[1:], device=place) for part in block]
    moves = []  # all at once: one send after the other would wait for its receiver
    for part, space in zip(block, received, strict=True):
        sent = part.to(place).contiguous()
        moves.append(dist.P2POp(dist.isend, sent, (rank - 1) % count))
        moves.append(dist.P2POp(dist.irecv, space, (rank + 1) % count))
    for move in dist.batch_isend_irecv(moves):
        move.wait()
    return received[0].to(block[0].device), received[1].to(block[1].device)
