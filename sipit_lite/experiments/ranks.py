"""Closest pairs of many prompts by several processes: a program for ``torchrun``."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from sipit_lite.experiments.survey import from_source
from sipit_lite.extensions import distributed
from sipit_lite.io.loading import load
from sipit_lite.model import SipItError

PROGRAM = "sipit_lite.experiments.ranks"


def compare(
    prompts: Annotated[int, typer.Option("-n", "--prompts", min=2)] = 2000,
    length: Annotated[int, typer.Option(min=1, help="tokens of a prompt")] = 24,
    layers: Annotated[list[int] | None, typer.Option(help="once for each")] = None,
    source: Literal["bundled", "installed", "corpora"] = "bundled",
    folder: Annotated[str | None, typer.Option(help="keeps the states")] = None,
    model: str | None = None,
) -> None:
    """States of many prompts and their closest pairs, one line of JSON from rank 0."""
    with distributed.ranks() as (rank, count):
        loaded = load(model, layers=max(layers) if layers else None)
        layers = layers or [loaded.n_layers]
        # Corpora are streamed once, so one rank draws for all; time starts after that.
        ids = []
        if rank == 0:
            ids = from_source(loaded.tokenizer, prompts, length, source=source)
        ids = distributed.gathered(ids)[0]
        started = time.perf_counter()
        rows, states = distributed.last_states(loaded, ids, layers, folder)
        seconds = max(distributed.gathered(time.perf_counter() - started))
        closest = []
        for layer, x in zip(layers, states, strict=True):
            [pair], [distance] = distributed.closest_pairs(rows, x, 1)
            row = {"layer": layer, "pair": pair.tolist(), "minimum": float(distance)}
            closest.append(row)
        line = {"ranks": count, "prompts": len(ids), "seconds": seconds}
        if rank == 0:
            print(json.dumps(line | {"layers": closest}))


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
