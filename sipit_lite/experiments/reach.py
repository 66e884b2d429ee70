"""What limits the prompt from the last state: layer, width, kind of text, frequency of tokens, noise on the state.

One condition is changed at a time, with everything else as it is in the plain case: random tokens, the last layer, the
bundled model, no noise. The length is told, so that it is the search alone that is measured (chapter 17).
"""

import copy
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel

from sipit_lite.experiments.checks import Check
from sipit_lite.experiments.inversion import sample
from sipit_lite.experiments.last_states import one, summary
from sipit_lite.extensions.laststate import Ends, fitted_ends
from sipit_lite.io.text import prompts
from sipit_lite.model import LanguageModel

LENGTH, COUNT, SECONDS = (
    5,
    12,
    15.0,
)  # tokens and prompts of a condition, and seconds a prompt
WIDTHS, LONGER = (
    (64, 128, 256),
    8,
)  # of models with random weights, which are asked for longer prompts too
NOISES = (0.1, 1.0, 3.0)
FEW, PIECE = (
    512,
    32,
)  # tokens that are called frequent in the bundled text, cut into pieces, and as many called rare
KEPT = (
    "length",
    "prompts",
    "exact",
    "low",
    "high",
    "false successes",
    "collisions",
    "seconds",
)  # of a summary


class Condition(NamedTuple):
    """What is changed, to what, and the question that results."""

    what: str
    value: str | float
    model: LanguageModel
    layer: int
    asked: list[Int[Tensor, " pos"]]
    noise: float = 0.0


def reach(
    model: LanguageModel, *, quick: bool = False, seed: int = 0, progress: bool = False
) -> tuple[list[Check], dict]:
    """``invert_last`` under one changed condition after another; each prompt's length is told."""
    length, count, seconds = (2, 1, 2.0) if quick else (LENGTH, COUNT, SECONDS)
    asked = list(conditions(model, length, count, seed))[:: 5 if quick else 1]
    rows = [
        measured(condition, seconds, quick)
        for condition in tqdm(asked, "reach", disable=None if progress else True)
    ]
    reported = {
        f"exact, T = {row['length']}, {row['what']} {row['value']}": row["exact"]
        / row["prompts"]
        for row in rows
    }
    return [Check.of("false successes", sum(row["false successes"] for row in rows))], {
        "reported": reported,
        "rows": rows,
    }


def conditions(
    model: LanguageModel, length: int, count: int, seed: int = 0
) -> Iterator[Condition]:
    """The plain case, then layers, kinds of text, frequencies of tokens, noises, and widths with random weights.

    >>> from sipit_lite import load
    >>> told = list(conditions(load(device="cpu"), 2, 1))
    >>> list(dict.fromkeys(condition.what for condition in told))
    ['plain', 'layer', 'kind', 'tokens', 'noise', 'width']
    """
    plain, last = sample(model, "random", count, length, seed), model.n_layers
    yield Condition("plain", "random tokens", model, last, plain)
    for layer in range(1, last):
        yield Condition("layer", layer, model, layer, plain)
    for kind in ("prose", "code"):
        yield Condition(
            "kind", kind, model, last, sample(model, kind, count, length, seed)
        )
    text = torch.cat(
        [
            ids
            for kind in ("prose", "code")
            for ids in prompts(model.tokenizer, kind, PIECE)
        ]
    )
    by_frequency = torch.bincount(text, minlength=model.vocab_size).argsort(
        descending=True, stable=True
    )
    for name, few in (("frequent", by_frequency[:FEW]), ("rare", by_frequency[-FEW:])):
        which = torch.randint(
            len(few), (count, length), generator=torch.Generator().manual_seed(seed)
        )
        yield Condition("tokens", name, model, last, list(few[which].to(model.device)))
    for noise in NOISES:
        yield Condition("noise", noise, model, last, plain, noise)
    for tokens, width in itertools.product((length, LONGER), WIDTHS):
        asked = (
            plain if tokens == length else sample(model, "random", count, tokens, seed)
        )
        yield Condition("width", width, untrained(model, width, seed), last, asked)


def untrained(model: LanguageModel, width: int, seed: int = 0) -> LanguageModel:
    """A model of the same configuration but for its width, with the weights that training would have begun with.

    >>> from sipit_lite import load
    >>> untrained(load(device="cpu"), 64).d_model
    64
    """
    config = copy.deepcopy(model.decoder.config)
    config.hidden_size = width
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        decoder = (
            AutoModel.from_config(config).eval().requires_grad_(False).to(model.device)
        )
    return LanguageModel(decoder, model.tokenizer, name=f"untrained, width {width}")


def measured(condition: Condition, seconds: float, quick: bool = False) -> dict:
    """How many prompts of a condition came back exactly, with Wilson's 95 % interval, and the median of seconds."""
    what, value, model, layer, asked, noise = condition
    ends = (
        Ends.fit(model, layer, len(asked[0]), tokens=1000, features=0)
        if quick
        else fitted_ends(model, layer, 16)
    )
    runs = [one(model, ends, ids, seconds, len(ids), noise) for ids in asked]
    told = summary(what, len(asked[0]), runs)
    return {"what": what, "value": value} | {name: told[name] for name in KEPT}
