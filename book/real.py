"""SmolLM2's rows of ``real.json`` for ``fast``, in the processor time of one thread.

    python real.py 15 code 30    # 30 prompts of 20 tokens from layer 15
    python real.py 1 mixed 220   # of 1 to 64 tokens, kinds in turn: exactness alone
    python real.py 15 mixed 80 prose code

The file is written after each prompt, so that a run that is cut short loses nothing.
A forward pass is timed beside each, and other work on the machine does not count.
"""

import json
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from sipit_lite import LanguageModel, load
from sipit_lite.acceptance import related
from sipit_lite.experiments import inversion, real
from sipit_lite.extensions.fitted import lens_of
from sipit_lite.extensions.imprints import own_imprints
from sipit_lite.io.text import prompts
from torch import Tensor
from tqdm import tqdm

PATH = Path(__file__).with_name("real.json")
LONGEST = 64


def mixed(model: LanguageModel, layer: int, count: int, kinds: list[str]) -> list[Tensor]:
    """Prompts of these kinds in turn, of lengths spread evenly over 1 to ``LONGEST``."""
    others = model.encode(real.OTHERS)
    alone = (~related(model, 1)).nonzero()[:, 0]
    drawn = []
    for i in range(count):
        kind = kinds[i % len(kinds)]
        length = 1 + (37 * i + layer) % LONGEST
        start = (97 * i + layer) % (len(others) - LONGEST)
        if kind != "other languages":
            seed = 10_000 + 1000 * layer + i
            ids = next(prompts(model.tokenizer, kind, length, seed=seed))
            drawn.append(alone[ids % len(alone)] if kind == "random" else ids)
        else:
            drawn.append(others[start : start + length])
    return drawn


def main(layer: int, kind: str, count: int, kinds: list[str]) -> None:
    """Measure one place, and keep what is there after each prompt."""
    model = load("smollm2", device="cpu")
    lens = lens_of(model, layer)
    if kind == "mixed":
        drawn = mixed(model, layer, count, kinds or list(real.KINDS))
    else:
        drawn = real.options(model, kind, count, 0)
    for first in (True, False):  # what is measured once for a model
        own_imprints(model, layer, first=first)
    inversion.one(model, lens, drawn[0][:2])  # and once for a layer
    runs = []
    for ids in tqdm(drawn):
        runs.append(inversion.one(model, lens, ids))
        stored = json.loads(PATH.read_text("utf-8"))
        part = stored["exact" if kind == "mixed" else "rows"]
        row = {"prompts": len(runs)} | inversion.summary(runs)
        row["timed by"] = "process_time"
        if kind == "mixed":
            row = dict(islice(row.items(), 3))  # passes of such a mixture say little
        part[f"{kind}, layer {layer}"] = row
        PATH.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    time.perf_counter = time.process_time  # by which everything here is timed
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4:])
