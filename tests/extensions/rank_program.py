"""What every rank runs in ``test_distributed``: the assertions of one case, on each rank."""

import argparse
import os
import sys
from pathlib import Path

import torch

from sipit_lite import StatesError, collisions, invert_many, load
from sipit_lite.extensions import distributed
from sipit_lite.io import corpora, shards
from sipit_lite.io.text import bundled, distinct


def pairs_equal_one_process(rank: int, count: int, folder: str) -> None:
    """A cloud with equal rows and repeated prompts, in blocks of unequal sizes: pairs, counts and distances."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(301, 8, generator=generator)
    x[[17, 200]] = x[[90, 91]]  # two collisions between different prompts
    x[5] = x[6] + 1e-9
    asked = list(torch.arange(301)[:, None])
    asked[300], x[300] = asked[0], x[0]  # and one prompt twice
    mine = torch.arange(301)[rank::count]
    found = distributed.closest_pairs(
        mine, x[mine], 7, prompts=[asked[i] for i in mine]
    )
    whole = collisions.closest_pairs(x, 7, prompts=asked)
    assert found.distances.tolist() == whole.distances.tolist()
    assert {tuple(p) for p in found.pairs.tolist()} == {
        tuple(p) for p in whole.pairs.tolist()
    }
    for name in ("compared", "collisions", "practical", "duplicates"):
        assert getattr(found, name) == getattr(whole, name), name


def states_equal_one_process(rank: int, count: int, folder: str) -> None:
    """Every prompt is on one rank, and its states are those of one process."""
    model = load(device="cpu")
    asked = [
        ids[: 3 + i % 5]
        for i, ids in enumerate(distinct(model.tokenizer, 40, 8, source="bundled"))
    ]
    shard = distributed.last_states(model, asked, [1, 6], folder=folder)
    whole = shards.last_states(model, asked, [1, 6])
    torch.testing.assert_close(shard.states, whole[:, shard.rows])
    assert sorted(
        row for rows in distributed._gathered(shard.rows.tolist()) for row in rows
    ) == list(range(40))


def outcomes_equal_one_process(rank: int, count: int, folder: str) -> None:
    """Recoveries and refusals, in order, on every rank."""
    model = load(device="cpu")
    states = [
        model.states(text, 1)
        for text in ("one", "two words", "three words now", "four")
    ]
    states[2] = model.states("three words now", 2)
    states[3] = states[3] * torch.nan
    found = distributed.many_inverted(states, model, 1)
    alone = invert_many(states, model, 1)
    assert [type(f) for f in found] == [type(f) for f in alone]
    assert [getattr(f, "text", str(f)) for f in found] == [
        getattr(f, "text", str(f)) for f in alone
    ]
    assert found[2].position == alone[2].position and isinstance(found[3], StatesError)


def traffic_is_as_told(rank: int, count: int, folder: str) -> None:
    """The bytes of all blocks that this rank passes on, counted."""
    x, sent, honest = (
        torch.randn(12 * count, 8, generator=torch.Generator().manual_seed(3)),
        [],
        distributed._passed_on,
    )

    def counted(
        block: tuple[torch.Tensor, torch.Tensor], size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sent.append(sum(part.nbytes for part in block))
        return honest(block, size)

    distributed._passed_on = counted
    mine = torch.arange(len(x))[rank::count]
    distributed.closest_pairs(mine, x[mine], 1)
    distributed._passed_on = honest
    assert sum(sent) == distributed.ring_bytes(len(x), 8, count)


def corpora_are_streamed_once(rank: int, count: int, folder: str) -> None:
    """The first rank alone opens them, and all get its prompts."""
    streams, opened = {"pages": [{"text": text} for text in bundled("prose")]}, []
    corpora.open_corpora = lambda seed: opened.append(rank) or streams
    model = load(device="cpu")
    found = distributed._prompts(
        model,
        argparse.Namespace(prompts=5, length=7, seed=0, source="corpora", folder=None),
    )
    assert [x.tolist() for x in found] == [
        x.tolist() for x in corpora.sampled(model.tokenizer, 5, 7, streams)
    ]
    assert distributed._gathered(opened) == [[0]] + [[]] * (count - 1)


def equal_to_one_process(rank: int, count: int, folder: str) -> None:
    """All of it, in one start of the processes."""
    for case in (
        pairs_equal_one_process,
        states_equal_one_process,
        outcomes_equal_one_process,
        traffic_is_as_told,
        corpora_are_streamed_once,
    ):
        case(rank, count, folder)


def dies_once(rank: int, count: int, folder: str) -> None:
    """The last rank is killed at its second shard, unless another run has begun before."""
    shards.SHARD, honest = 4, shards._shard
    again = (Path(folder) / "begun").exists()
    distributed._gathered(None)
    (Path(folder) / "begun").touch()

    def shard(path: Path, *arguments: object) -> torch.Tensor:
        if not again and rank == count - 1 and path.name != "shard-00000.safetensors":
            os._exit(9)
        return honest(path, *arguments)

    shards._shard = shard
    model = load(device="cpu")
    distributed.last_states(
        model, distinct(model.tokenizer, 30, 6, source="bundled"), [2], folder=folder
    )
    distributed._gathered(None)


if __name__ == "__main__":
    with distributed.ranks() as (number, how_many):
        globals()[sys.argv[1]](number, how_many, sys.argv[2])
