"""The experiments of the paper on any model, as JSON beside the paper's own numbers (chapter 14).

Nothing new is computed here: each experiment draws prompts, calls the survey, the detector, the inverters or the null
models, and writes down what came out under the conditions of the paper's tables.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from sipit_lite.acceptance import noise_floor, separated
from sipit_lite.collisions import closest_pairs, continuations
from sipit_lite.experiments import checks as bench
from sipit_lite.experiments.baselines import (
    Attempt,
    brute_force,
    hard_prompts,
    published,
)
from sipit_lite.experiments.null_models import anisotropy, intrinsic_dimension
from sipit_lite.experiments.paper import DEPTHS
from sipit_lite.experiments.survey import (
    DIMENSION_ROWS,
    LENGTHS,
    different,
    short,
    survey,
    survey_lengths,
    windows,
)
from sipit_lite.extensions.lens import Lens
from sipit_lite.io.corpora import from_source
from sipit_lite.io.loading import shortened
from sipit_lite.io.shards import last_states
from sipit_lite.io.text import distinct
from sipit_lite.model import LanguageModel, ModelError
from sipit_lite.onestep import OneStepMap
from sipit_lite.recovery import NotVerified, Recovery
from sipit_lite.sipit import invert

Row = dict[str, Any]
SUFFIX, PREFIX = " the quick brown fox jumps over the lazy", 12


@dataclass(frozen=True)
class Plan:
    """How much of an experiment is run: so many prompts of so many tokens, at these layers, from this text.

    ``layers`` left empty are those of the paper's table; ``closest`` prompts are continued by every token, all of them
    by ``tokens`` drawn at random; ``ways`` are names of ``WAYS``; ``limit`` is in seconds, for each prompt of a
    published method; ``lens_tokens`` and ``features`` size the lens of ``here``; ``shards`` is a folder for states.
    """

    prompts: int
    length: int = 24
    lengths: tuple[int, ...] = ()
    layers: tuple[int, ...] = ()
    ways: tuple[str, ...] = ("published", "here")
    closest: int = 10
    tokens: int = 1000
    limit: float = math.inf
    lens_tokens: int = 100_000
    features: int = 2048
    source: str = "installed"
    seed: int = 0
    shards: str | None = None
    progress: bool = False


def minima(model: LanguageModel, plan: Plan) -> list[Row]:
    """Smallest distance between last-token states of different prompts, and the closest texts, by layer."""
    asked, layers = texts(model, plan.prompts, plan), _layers(model, plan)
    found = survey(
        model,
        asked,
        layers=layers,
        folder=plan.shards,
        seed=plan.seed,
        progress=plan.progress,
    )
    kept = (
        "pairs",
        "minimum",
        "collisions",
        "practical",
        "radius",
        "birthday",
        "closest",
    )
    told = {"prompts": found["distinct"], "left out": found["duplicates"]}
    return [
        _row(model, row["layer"], **told, **{name: row[name] for name in kept})
        for row in found["layers"]
    ]


def lengths(model: LanguageModel, plan: Plan) -> list[Row]:
    """Smallest, mean and largest distance against the length of the prompts, at the last layer."""
    layers, begin = _layers(model, plan, ("last",)), int(model.begin is not None)
    asked = torch.stack(
        different(texts(model, plan.prompts, replace(plan, length=max(plan.lengths))))
    )
    at = [length + begin for length in plan.lengths]
    found = survey_lengths(
        model, asked, at, layers=layers, folder=plan.shards, progress=plan.progress
    )
    return [
        {
            "condition": f"{length} tokens",
            "length": length,
            "prompts": row["distinct"],
            "layer": layer,
            **row[str(layer)],
        }
        for length, row in zip(plan.lengths, found["rows"], strict=True)
        for layer in layers
    ]


def every_continuation(model: LanguageModel, plan: Plan) -> list[Row]:
    """The closest prompts at the last layer asked for, each continued by every token: all pairs within each prompt."""
    asked, layers = (
        different(texts(model, plan.prompts, plan)),
        _layers(model, plan, ("last",)),
    )
    states = last_states(
        model, asked, layers[-1:], folder=plan.shards, progress=plan.progress
    )[0]
    pairs = closest_pairs(
        states.to(model.device), min(plan.closest, len(asked) - 1)
    ).pairs
    chosen = [
        asked[row].to(model.device) for row in dict.fromkeys(pairs.flatten().tolist())
    ][: plan.closest]
    rows = []
    for layer in layers:
        reports = list(continuations(model, chosen, layer, progress=plan.progress))
        counts = {
            name: sum(getattr(r, name) for r in reports)
            for name in ("compared", "collisions", "practical")
        }
        rows.append(
            _row(
                model,
                layer,
                prompts=len(chosen),
                minimum=min(r.minimum for r in reports),
                **counts,
            )
        )
    return rows


def same_answer(model: LanguageModel, plan: Plan) -> list[Row]:
    """Random tokens before one suffix: the prompts with the most frequent greedy next token, and how close they come.

    Raises ``ModelError`` for what ``unembedding`` refuses.
    """
    ids, head = _before_one_suffix(model, plan), unembedding(model)
    with torch.no_grad():
        answers = torch.cat(
            [
                (model.decoder(part).last_hidden_state[:, -1] @ head.T).argmax(1)
                for part in ids.split(64)
            ]
        )
    answer = answers.mode().values
    alike, layers = list(ids[answers == answer].cpu()), _layers(model, plan)
    told = {
        "prompts": len(alike),
        "tried": len(ids),
        "answer": model.decode(answer[None]),
    }
    states = last_states(
        model, alike, layers, folder=plan.shards, progress=plan.progress
    )
    reports = [closest_pairs(x.to(model.device), 1, prompts=alike) for x in states]
    kept = ("minimum", "compared", "collisions", "practical")
    return [
        _row(model, layer, **told, **{name: getattr(report, name) for name in kept})
        for layer, report in zip(layers, reports, strict=True)
    ]


def shape(model: LanguageModel, plan: Plan) -> list[Row]:
    """Margin, anisotropy and intrinsic dimension of random one-token continuations by layer, and their correlations.

    The definitions are those of chapter 8, and need not be the paper's.
    """
    asked, layers = (
        different(texts(model, plan.prompts, plan)),
        list(plan.layers) or range(1, model.n_layers + 1),
    )
    generator = torch.Generator().manual_seed(plan.seed)
    some = torch.randperm(model.vocab_size, generator=generator)[: plan.tokens].to(
        model.device
    )
    rows = []
    for layer in tqdm(layers, "layers", disable=None if plan.progress else True):
        clouds = [
            OneStepMap.after(model, layer, ids.to(model.device)).tokens(some)
            for ids in asked
        ]
        pooled = torch.cat(clouds)
        drawn = torch.randperm(
            len(pooled), generator=torch.Generator().manual_seed(plan.seed)
        )[:DIMENSION_ROWS]
        margin = float(np.mean([closest_pairs(cloud, 1).minimum for cloud in clouds]))
        measured = {
            "anisotropy": anisotropy(pooled),
            "dimension": intrinsic_dimension(pooled[drawn.to(pooled.device)]),
        }
        rows.append(
            _row(
                model,
                layer,
                prompts=len(asked),
                tokens=len(some),
                margin=margin,
                **measured,
            )
        )
    told = {
        f"margin and {name}": _pearson(rows, "margin", name)
        for name in ("anisotropy", "dimension")
    }
    return [*rows, {"condition": "correlation", **told}]


def inversion(model: LanguageModel, plan: Plan) -> list[Row]:
    """Ways to invert side by side on prose and code, one prompt in ten of random tokens, from the last layer."""
    asked = texts(model, plan.prompts - plan.prompts // 10, plan) + at_random(
        model, plan.prompts // 10, plan
    )
    layers = _layers(model, plan, ("last",))
    return [
        row
        for layer in layers
        for row in ways_to_invert(model, asked, layer, plan, _lens(model, layer, plan))
    ]


def splits(model: LanguageModel, plan: Plan) -> list[Row]:
    """Prompts of the training text of pocket-gpt2, of held-out text, and of random tokens; bundled text has no first.

    For another model the first two are text that it may or may not have been trained on.
    """
    asked = {
        "test": texts(model, plan.prompts, plan, "held-out"),
        "random": at_random(model, plan.prompts, plan),
    }
    if plan.source == "installed":
        asked = {"train": texts(model, plan.prompts, plan, "train")} | asked
    return [
        row | {"condition": f"{kind}, {row['condition']}"}
        for layer in _layers(model, plan, ("last",))
        for lens in [_lens(model, layer, plan)]
        for kind, some in asked.items()
        for row in ways_to_invert(model, some, layer, plan, lens)
    ]


def times(model: LanguageModel, plan: Plan) -> list[Row]:
    """Seconds to invert a prompt by layer and by length."""
    asked = {
        length: texts(model, plan.prompts, replace(plan, length=length))
        for length in plan.lengths
    }
    return [
        row | {"condition": f"layer {layer}, {length} tokens, {row['condition']}"}
        for layer in _layers(model, plan)
        for lens in [_lens(model, layer, plan)]
        for length, some in asked.items()
        for row in ways_to_invert(model, some, layer, plan, lens)
    ]


@dataclass(frozen=True)
class Experiment:
    """What is run, where the paper has it, with the paper's numbers of prompts, and as a smoke run of seconds."""

    run: Callable[[LanguageModel, Plan], list[Row]]
    where: str
    full: Plan
    quick: Plan


_SMOKE = {"source": "bundled", "limit": 0.5, "lens_tokens": 4000, "features": 0}
_ALL_WAYS = ("hard prompts", "brute force", "published", "here")
EXPERIMENTS = {
    "layers": Experiment(minima, "Tables 1, 2, Figures 3, 7, 8", Plan(100_000), Plan(300, 16, **_SMOKE)),
    "lengths": Experiment(
        lengths, "Figures 5, 9", Plan(2000, lengths=LENGTHS), Plan(60, lengths=(1, 2, 4, 8, 16, 32), **_SMOKE)
    ),
    "continuations": Experiment(every_continuation, "Figure 4", Plan(100_000), Plan(40, 16, closest=1, **_SMOKE)),
    "inversion": Experiment(inversion, "Tables 4, 6", Plan(50, 10), Plan(5, 6, **_SMOKE)),
    "compared": Experiment(inversion, "Table 5", Plan(100, 20, ways=_ALL_WAYS), Plan(3, 4, ways=_ALL_WAYS, **_SMOKE)),
    "splits": Experiment(splits, "Table 7", Plan(50, 100), Plan(3, 12, **_SMOKE)),
    "times": Experiment(
        times, "Figure 6", Plan(10, lengths=(20, 50, 100, 150, 200)), Plan(2, lengths=(4, 8), ways=("here",), **_SMOKE)
    ),
    "same-answer": Experiment(same_answer, "E.3", Plan(10_000, PREFIX), Plan(200, PREFIX, **_SMOKE)),
    "shape": Experiment(shape, "Table 11", Plan(100), Plan(4, 16, tokens=100, **_SMOKE)),
}  # fmt: skip


def reproduce(
    experiment: str,
    model: LanguageModel,
    *,
    quick: bool = False,
    weights: str = "full",
    **changes: object,
) -> dict[str, Any]:
    """Run one experiment of the paper on a model and return what JSON will hold; ``changes`` replace parts of the plan.

    ``quick`` is a smoke run of seconds on the bundled text; without it, the numbers of prompts are the paper's.
    ``weights`` only labels the run: it is up to the caller to have loaded them so. Raises ``ValueError`` for an unknown
    experiment, part of a plan or way, and fewer than two prompts; ``ModelError`` and others as the experiments do.

    >>> from sipit_lite import load
    >>> told = reproduce("layers", load(device="cpu"), quick=True, prompts=40)
    >>> told["where"], [(row["condition"], row["collisions"]) for row in told["rows"]]
    ('Tables 1, 2, Figures 3, 7, 8', [('first', 0), ('middle', 0), ('last', 0)])
    """
    if experiment not in EXPERIMENTS:
        raise ValueError(
            f"got the experiment {experiment!r}; expected one of {list(EXPERIMENTS)}"
        )
    chosen = EXPERIMENTS[experiment]
    plan = chosen.quick if quick else chosen.full
    _check(changes, plan)
    plan, begun = replace(plan, **changes), time.perf_counter()
    rows = chosen.run(model, plan)
    return {
        "experiment": experiment,
        "where": chosen.where,
        **bench.setting(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights,
        "vocabulary": model.vocab_size,
        "layers": model.n_layers,
        "plan": {
            name: value
            for name, value in asdict(plan).items()
            if name not in ("progress", "shards")
        }
        | {"limit": plan.limit if math.isfinite(plan.limit) else None},
        "seconds": short(time.perf_counter() - begun),
        "rows": short(rows),
    }


def _check(changes: dict[str, object], plan: Plan) -> None:
    unknown = [name for name in changes if name not in asdict(plan)]
    ways = [way for way in changes.get("ways", ()) if way not in WAYS]
    if unknown or ways:
        raise ValueError(
            f"got {(unknown or ways)[0]!r}; expected parts of {list(asdict(plan))} and ways of {list(WAYS)}"
        )
    if changes.get("prompts", 2) < 2:
        raise ValueError(f"got prompts={changes['prompts']}; expected two or more")


def texts(
    model: LanguageModel, count: int, plan: Plan, split: str | None = None
) -> list[Int[Tensor, " pos"]]:
    """Windows of prose and code in turn, behind the begin-of-text token, not counted, where the tokenizer puts one.

    Without ``split`` there may be fewer than ``count``, where the text ends, and repeated ones. A model without a
    tokenizer gets random tokens. Raises ``ValueError`` where a split does not hold so many.

    >>> from sipit_lite import load
    >>> [len(ids) for ids in texts(load(device="cpu"), 2, Plan(2, 8, source="bundled"))]
    [8, 8]
    """
    if model.tokenizer is None:
        return at_random(model, count, plan)
    length, drawn = (
        plan.length + (model.begin is not None),
        {"seed": plan.seed, "source": plan.source},
    )
    if plan.source == "corpora":
        found = from_source(model.tokenizer, count, length, **drawn, folder=plan.shards)
    elif split is None:
        found = windows(model.tokenizer, count, length, **drawn)[:count]
    else:
        found = distinct(model.tokenizer, count, length, **drawn, split=split)
    return [_begun(model, ids).to(model.device) for ids in found]


def at_random(
    model: LanguageModel, count: int, plan: Plan
) -> list[Int[Tensor, " pos"]]:
    """Prompts of random tokens, behind the begin-of-text token, not counted, where the tokenizer puts one."""
    size = (
        model.vocab_size
        if model.tokenizer is None
        else min(len(model.tokenizer), model.vocab_size)
    )
    generator = torch.Generator().manual_seed(plan.seed + 1)
    drawn = torch.randint(
        size, (count, plan.length + (model.begin is not None)), generator=generator
    )
    return [_begun(model, ids).to(model.device) for ids in drawn]


def _begun(model: LanguageModel, ids: Int[Tensor, " pos"]) -> Int[Tensor, " pos"]:
    """The first window of a text has the begin-of-text token, the others get it in place of their last token."""
    if model.begin is None or int(ids[0]) == model.begin:
        return ids
    return torch.cat([ids.new_tensor([model.begin]), ids[:-1]])


def _before_one_suffix(model: LanguageModel, plan: Plan) -> Int[Tensor, "n pos"]:
    drawn = torch.stack(at_random(model, plan.prompts, plan))
    if model.tokenizer is None:
        return torch.cat([drawn, drawn[:1].flip(1).expand(len(drawn), -1)], 1)
    suffix = model.encode(SUFFIX)[int(model.begin is not None) :]
    return torch.cat([drawn, suffix.expand(len(drawn), -1)], 1)


def unembedding(model: LanguageModel) -> Float[Tensor, "vocab d_model"]:
    """The rows that turn the last normed state into logits: the embeddings where they are tied, else read anew.

    Only embeddings, one block and the unembedding are read. Raises ``ModelError`` for a model that has no name to read
    them by, such as one at random initialisation.

    >>> from sipit_lite import load
    >>> unembedding(load(device="cpu")).shape
    torch.Size([4096, 256])
    """
    if getattr(model.decoder.config, "tie_word_embeddings", True):
        return model.embeddings
    try:
        config = shortened(
            AutoConfig.from_pretrained(model.name, trust_remote_code=False), 1
        )
        whole = AutoModelForCausalLM.from_pretrained(
            model.name, config=config, dtype=model.dtype, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"got {model.name}, whose unembedding is its own and not kept; expected one that can be read by its name"
        ) from error
    return whole.get_output_embeddings().weight.detach().to(model.device)


def ways_to_invert(
    model: LanguageModel,
    asked: Sequence[Tensor],
    layer: int,
    plan: Plan,
    lens: Lens | None,
) -> list[Row]:
    """Mean seconds with standard deviation, share of exact prompts, and share of the vocabulary tested for a token.

    What is done once for a model and a layer is not in the seconds: the fit of the lens (chapter 12 has its time), and
    the noise floor.
    """
    separated(model, layer), noise_floor(model, layer)
    states, rows = [model.states(ids, layer) for ids in asked], []
    for way in plan.ways:
        bar = tqdm(states, way, disable=None if plan.progress else True)
        found = [WAYS[way](x, model, layer, plan, lens) for x in bar]
        seconds = [outcome.seconds for outcome in found]
        tested = torch.cat([outcome.tested.double() for outcome in found])
        rows.append({
            "condition": way, "layer": layer, "prompts": len(asked), "tokens": len(asked[0]),
            "exact": bench.share(torch.equal(o.tokens, ids.cpu()) for o, ids in zip(found, asked, strict=True)),
            "seconds": float(np.mean(seconds)), "spread": float(np.std(seconds, ddof=1)) if len(seconds) > 1 else None,
            "explored, %": None if way == "hard prompts" else 100 * float(tested.mean()) / model.vocab_size,
            "finished": bench.share(getattr(outcome, "finished", True) for outcome in found),
        })  # fmt: skip
    return rows


def _here(
    states: Tensor, model: LanguageModel, layer: int, plan: Plan, lens: Lens | None
) -> Recovery:
    try:
        return invert(states, model, layer, lens=lens, seed=plan.seed)
    except NotVerified as refused:
        return refused.recovered


def _published(
    states: Tensor,
    model: LanguageModel,
    layer: int,
    plan: Plan,
    lens: Lens | None,
    way: Callable[..., Attempt],
) -> Attempt:
    return way(states, model, layer, seed=plan.seed, limit=plan.limit)


WAYS: dict[str, Callable[..., Attempt | Recovery]] = {
    "hard prompts": partial(_published, way=hard_prompts),
    "brute force": partial(_published, way=brute_force),
    "published": partial(_published, way=published),
    "here": _here,
}


def _lens(model: LanguageModel, layer: int, plan: Plan) -> Lens | None:
    """Fitted on the model's own prompts, or for bundled text on random tokens: installed text takes long to find."""
    if "here" not in plan.ways:
        return None
    some = (
        at_random(model, plan.lens_tokens // 16 + 1, replace(plan, length=16))
        if plan.source == "bundled"
        else None
    )
    return Lens.fit(
        model,
        layer,
        prompts=some,
        tokens=plan.lens_tokens,
        features=plan.features,
        seed=plan.seed,
    )


def _layers(
    model: LanguageModel, plan: Plan, depths: Iterable[str] = DEPTHS
) -> list[int]:
    at = dict(
        zip(DEPTHS, (1, max(1, model.n_layers // 2), model.n_layers), strict=True)
    )
    return list(plan.layers) or sorted({at[depth] for depth in depths})


def _row(model: LanguageModel, layer: int, **values: object) -> Row:
    named = {model.n_layers // 2: "middle", 1: "first", model.n_layers: "last"}
    return {"condition": named.get(layer, f"layer {layer}"), "layer": layer, **values}


def _pearson(rows: Sequence[Row], one: str, other: str) -> float | None:
    if len(rows) < 3:  # two points always lie on a line
        return None
    return float(
        np.corrcoef([row[one] for row in rows], [row[other] for row in rows])[0, 1]
    )
