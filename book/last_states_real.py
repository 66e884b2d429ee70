"""The last state on SmolLM2: rows of ``laststate.json`` for ``last_state``.

    python last_states_real.py 15 prose 2 20 > row.json

Arguments: layer, kind of prompt, tokens, prompts. Each prompt has 120 seconds, of
one thread; what is fitted once for a layer is not counted.
"""

import json
import sys

import torch
from sipit_lite import load
from sipit_lite.experiments.inversion import sample
from sipit_lite.experiments.last_states import one, summary
from sipit_lite.extensions.laststate import fitted_ends
from tqdm import tqdm

LONGEST = 8
SECONDS = 120.0

if __name__ == "__main__":
    torch.set_num_threads(1)
    kind = sys.argv[2]
    layer, length, count = map(int, [sys.argv[1], *sys.argv[3:]])
    model = load("smollm2", device="cpu")
    ends = fitted_ends(model, layer, LONGEST)
    runs = [one(ends, ids, SECONDS) for ids in tqdm(sample(model, kind, count, length, 0))]
    row = {"layer": layer, "kind": kind} | summary(runs)
    del row["runs"]
    json.dump(row, sys.stdout, indent=1)
