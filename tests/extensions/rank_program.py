"""What every rank runs in ``test_distributed``: the assertions of one case."""

import os
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import torch

from sipit_lite import collisions, load
from sipit_lite.experiments import ranks as program
from sipit_lite.extensions import distributed
from sipit_lite.io import corpora, shards
from sipit_lite.io.text import bundled, distinct


def run(rank: int, count: int, port: int, folder: Path, cases: list[str]) -> None:
    """One rank, set up as ``torchrun`` does it, on the CPU and with one thread."""
    torch.set_num_threads(1)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    numbers = {"RANK": str(rank), "WORLD_SIZE": str(count), "CUDA_VISIBLE_DEVICES": ""}
    os.environ.update(place | numbers)
    with distributed.ranks() as (number, how_many):
        assert (number, how_many) == (rank, count)
        for case in cases:
            globals()[case](rank, count, folder)


def pairs_equal_one_process(rank: int, count: int, folder: Path) -> None:
    """A cloud with equal rows, in blocks of unequal sizes: the pairs and distances."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(301, 8, generator=generator)
    x[[17, 200]] = x[[90, 91]]
    x[5] = x[6] + 1e-9
    mine = torch.arange(301)[rank::count]
    pairs, distances = distributed.closest_pairs(mine, x[mine], 7)
    alone = collisions.closest_pairs(x, 7)
    assert distances.tolist() == alone.distances.tolist()
    assert sorted(pairs.tolist()) == sorted(alone.pairs.tolist())


def states_equal_one_process(rank: int, count: int, folder: Path) -> None:
    """Every prompt is on one rank, and its states are those of one process."""
    model = load(device="cpu")
    prompts = distinct(model.tokenizer, 40, 8)
    prompts = [ids[: 5 + i % 4] for i, ids in enumerate(prompts)]
    rows, states = distributed.last_states(model, prompts, [1, 6], folder=folder)
    torch.testing.assert_close(
        states, shards.last_states(model, prompts, [1, 6])[:, rows]
    )
    assert sorted(chain(*distributed.gathered(rows.tolist()))) == list(range(40))


def traffic_is_as_calculated(rank: int, count: int, folder: Path) -> None:
    """The bytes of all blocks that this rank passes on, counted."""
    x = torch.randn(12 * count, 8, generator=torch.Generator().manual_seed(3))
    sent = []
    honest = distributed._passed_on

    def counted(block: distributed.Block, size: int) -> distributed.Block:
        sent.append(sum(part.nbytes for part in block))
        return honest(block, size)

    distributed._passed_on = counted
    mine = torch.arange(len(x))[rank::count]
    distributed.closest_pairs(mine, x[mine], 1)
    distributed._passed_on = honest
    # Half way round the ring: rows of eight numbers of four bytes, and an int64 each.
    assert sum(sent) == count // 2 * 12 * (8 * 4 + 8)


def corpora_are_streamed_once(rank: int, count: int, folder: Path) -> None:
    """The first rank alone opens them, and all have its prompts."""
    streams = {"pages": [{"text": text} for text in bundled("prose")]}
    opened = []
    corpora.open_corpora = lambda seed: opened.append(rank) or streams
    used = []
    honest = shards.last_states

    def noted(model: object, prompts: list, *rest: object, **options: object) -> object:
        used.extend(ids.tolist() for ids in prompts)
        return honest(model, prompts, *rest, **options)

    shards.last_states = noted
    # Joined already.
    distributed.ranks = lambda: nullcontext((rank, count))
    program.compare(9, 7, [1], "corpora")
    shards.last_states = honest
    tokenizer = load(device="cpu").tokenizer
    wanted = [ids.tolist() for ids in corpora.sampled(tokenizer, 9, 7, streams)]
    assert sorted(chain(*distributed.gathered(used))) == sorted(wanted)
    assert distributed.gathered(opened) == [[0]] + [[]] * (count - 1)


def dies_once(rank: int, count: int, folder: Path) -> None:
    """The last rank dies at its second shard, unless an earlier run has started."""
    shards.SHARD = 4
    again = (folder / "started").exists()
    distributed.gathered(None)
    (folder / "started").touch()
    honest = shards._shard
    done = []

    def shard(*arguments: object) -> torch.Tensor:
        if not again and rank == count - 1 and done:
            os._exit(9)
        done.append(honest(*arguments))
        return done[-1]

    shards._shard = shard
    model = load(device="cpu")
    prompts = distinct(model.tokenizer, 30, 6)
    distributed.last_states(model, prompts, [2], folder=folder)
    distributed.gathered(None)
