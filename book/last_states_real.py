"""The last state on SmolLM2: rows of ``laststate.json`` for ``last_state``.

    python last_states_real.py 15 prose 4 60

Arguments: layer, kind of prompt, tokens, prompts. Each prompt has 120 seconds of one
core, by processor time, which other programs do not take away. What is fitted once for
a layer is not counted. The file is written after each prompt, so that a run that is cut
short loses nothing.
"""

import json
import sys
import time
from pathlib import Path

import torch
from sipit_lite import load
from sipit_lite.experiments.inversion import sample
from sipit_lite.experiments.last_states import one, summary
from sipit_lite.extensions.laststate import fitted_ends
from tqdm import tqdm

PATH = Path(__file__).with_name("laststate.json")
LONGEST = 8
SECONDS = 120.0


def main(layer: int, kind: str, length: int, count: int) -> None:
    """Measure one place, and keep what is there after each prompt."""
    time.perf_counter = time.process_time  # by which everything here is timed
    torch.set_num_threads(1)
    model = load("smollm2", device="cpu")
    ends = fitted_ends(model, layer, LONGEST)
    runs = []
    for ids in tqdm(sample(model, kind, count, length, 0)):
        runs.append(one(ends, ids, SECONDS))
        store({"layer": layer, "kind": kind, "lent": True} | summary(runs))


def store(row: dict) -> None:
    """Put a row in the place of that of the same layer, kind and length."""
    del row["runs"]
    stored = json.loads(PATH.read_text("utf-8"))
    place = [row[name] for name in ("layer", "kind", "length")]
    rows = [row]
    for other in stored["smollm2"]:
        if [other[name] for name in ("layer", "kind", "length")] != place:
            rows.append(other)
    stored["smollm2"] = sorted(rows, key=lambda x: (x["layer"], x["length"], x["kind"]))
    PATH.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    layer, kind, *numbers = sys.argv[1:]
    main(int(layer), kind, *map(int, numbers))
