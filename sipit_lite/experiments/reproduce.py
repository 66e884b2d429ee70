"""The experiments of the paper on any model, as JSON (``real_models``)."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import StatisticsError, correlation, mean, stdev
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from sipit_lite.acceptance import noise_floor, related
from sipit_lite.collisions import CollisionReport, closest_pairs
from sipit_lite.experiments import baselines, checks, null_models, survey
from sipit_lite.experiments.paper import DEPTHS
from sipit_lite.extensions.lens import Lens
from sipit_lite.extensions.reading import unembedding
from sipit_lite.io.files import check_path, replacing
from sipit_lite.io.loading import OURS
from sipit_lite.io.shards import last_states
from sipit_lite.io.text import different, distinct, windows
from sipit_lite.model import LanguageModel, ModelError, SipItError
from sipit_lite.onestep import OneStepMap
from sipit_lite.recovery import NotVerified
from sipit_lite.sipit import invert

Row = dict[str, Any]
Prompts = list[Int[Tensor, " pos"]]
Groups = dict[Any, Prompts]
SUFFIX = " the quick brown fox jumps over the lazy"
PREFIX = 12  # random tokens before it
LAST = ("last",)  # where the paper has the last layer alone
BASELINES = {"hard prompts": baselines.hard_prompts}
BASELINES |= {"brute force": baselines.brute_force, "published": baselines.published}
WAYS = (*BASELINES, "here")


class PlanError(SipItError):
    """A plan that cannot be run, or a result that cannot be kept."""


@dataclass(frozen=True)
class Plan:
    """How much of an experiment is run."""

    prompts: int
    length: int = 24  # tokens of each
    lengths: tuple[int, ...] = ()  # the same, where the experiment is about it
    layers: tuple[int, ...] = ()  # if empty, those of the paper's table
    ways: tuple[str, ...] = ("published", "here")  # names of ``WAYS``
    closest: int = 10  # prompts that are continued by every token
    tokens: int = 1000  # by which all prompts are continued
    limit: float = math.inf  # seconds that a published method has for a prompt
    lens_tokens: int = 100_000  # with ``features``, the size of the lens of ``here``
    features: int = 2048
    source: str = "installed"  # of the text
    seed: int = 0
    shards: str | None = None  # a folder for states
    progress: bool = False

    @property
    def keep(self) -> dict[str, Any]:
        """Where states are stored, and whether bars are shown."""
        return {"folder": self.shards, "progress": self.progress}


def minima(model: LanguageModel, plan: Plan) -> list[Row]:
    """Smallest distance of last-token states, and the closest texts, by layer."""
    prompts = texts(model, plan.prompts, plan)
    options = {"layers": _layers(model, plan), "seed": plan.seed}
    measured = survey.survey(model, prompts, **options, **plan.keep)
    counts = {"prompts": measured["distinct"], "left out": measured["duplicates"]}
    return [_row(model, **counts, **row) for row in measured["layers"]]


def lengths(model: LanguageModel, plan: Plan) -> list[Row]:
    """Smallest, mean and largest distance by length of the prompts."""
    layers = _layers(model, plan, LAST)
    longest = replace(plan, length=max(plan.lengths))
    prompts = torch.stack(different(texts(model, plan.prompts, longest)))
    # The begin-of-text token is in front, and not counted.
    ends = [length + (model.begin is not None) for length in plan.lengths]
    by_length = survey.survey_lengths(model, prompts, ends, layers=layers, **plan.keep)
    rows = []
    for length, measured in zip(plan.lengths, by_length["rows"], strict=True):
        row = {"condition": f"{length} tokens", "length": length}
        row["prompts"] = measured["distinct"]
        # Keys are strings, as in JSON.
        rows += [row | {"layer": ell} | measured[str(ell)] for ell in layers]
    return rows


def continuations(
    model: LanguageModel, prompts: Sequence[Tensor], layer: int, progress: bool = False
) -> Iterator[CollisionReport]:
    """For each prompt, the closest of its |V| one-token continuations (Fig. 4).

    Parameters
    ----------
    prompts: token ids of each, shape (T,), with room for one token more
    layer, progress: of the states, 0 to L + 1; whether a bar is shown

    Yields
    ------
    A report a prompt, whose rows are tokens: its ``minimum`` is the margin Δ_{π,t}

    Raises
    ------
    ModelError: a bad layer or prompt

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> report = next(continuations(model, [model.encode("hidden")], 1))
    >>> report.compared == 4096 * 4095 // 2
    True
    """
    for prompt in tqdm(prompts, "continuations", disable=None if progress else True):
        step = OneStepMap.after(model, layer, prompt)
        # All pairs of tokens, since any two may be the closest.
        yield closest_pairs(step.tokens(model.vocabulary), 1)


def every_continuation(model: LanguageModel, plan: Plan) -> list[Row]:
    """The closest prompts, each continued by every token: all pairs within each."""
    prompts = different(texts(model, plan.prompts, plan))
    layers = _layers(model, plan, LAST)
    states = last_states(model, prompts, layers[-1:], **plan.keep)[0].to(model.device)
    pairs = closest_pairs(states, min(plan.closest, len(prompts) - 1)).pairs
    # In the order of their distance, and each once.
    nearest = list(dict.fromkeys(pairs.flatten().tolist()))[: plan.closest]
    chosen = [prompts[i].to(model.device) for i in nearest]
    rows = []
    for layer in layers:
        reports = list(continuations(model, chosen, layer, progress=plan.progress))
        row = {"minimum": min(report.minimum for report in reports)}
        # Counts add up, since no pair stands in two reports.
        for name in survey.COUNTED:
            row[name] = sum(getattr(report, name) for report in reports)
        rows.append(_row(model, layer, prompts=len(chosen), **row))
    return rows


def same_answer(model: LanguageModel, plan: Plan) -> list[Row]:
    """Random tokens before one suffix: those with the most frequent greedy next token.

    Raises ``ModelError`` where an untied unembedding cannot be read by the name.
    """
    ids = torch.stack(at_random(model, plan.prompts, plan))
    suffix = ids[0].flip(0)  # without a tokenizer any ids
    if model.tokenizer is not None:
        suffix = model.encode(SUFFIX)[int(model.begin is not None) :]
    ids = torch.cat([ids, suffix.expand(len(ids), -1)], 1)
    head = unembedding(model)
    if head is None:  # not kept
        try:
            full = AutoModelForCausalLM.from_pretrained(model.name, **OURS)
        except (OSError, ValueError) as error:
            got = f"got {model.name}, whose unembedding is its own and not kept"
            raise ModelError(f"{got}; expected one to read by its name") from error
        head = full.get_output_embeddings().weight.detach().to(model.embeddings)
    answers = []
    with torch.no_grad():
        for part in ids.split(64):
            last = model.decoder(part).last_hidden_state[:, -1]
            answers.append((last @ head.T).argmax(1))  # of greedy decoding
    answers = torch.cat(answers)
    answer = answers.mode().values
    alike = list(ids[answers == answer].cpu())
    layers = _layers(model, plan)
    states = last_states(model, alike, layers, **plan.keep)
    rows = []
    for layer, x in zip(layers, states, strict=True):
        report = closest_pairs(x.to(model.device), 1, prompts=alike)
        row = {"answer": model.decode(answer[None]), "tried": len(ids)}
        row |= {"prompts": len(alike), **survey.counts(report)}
        rows.append(_row(model, layer, **row))
    return rows


def shape(model: LanguageModel, plan: Plan) -> list[Row]:
    """Margin, anisotropy and dimension of random continuations by layer, correlated.

    The definitions are those of ``stress_tests``, and need not be the paper's.
    """
    prompts = different(texts(model, plan.prompts, plan))
    layers = list(plan.layers) or range(1, model.n_layers + 1)
    sample = _shuffled(model.vocab_size, plan)[: plan.tokens].to(model.device)
    rows = []
    for layer in checks.progress_bar(layers, "layers", plan.progress):
        maps = [OneStepMap.after(model, layer, ids.to(model.device)) for ids in prompts]
        clouds = [step.tokens(sample) for step in maps]
        row = {"margin": mean(closest_pairs(cloud, 1).minimum for cloud in clouds)}
        # Pooled over all prompts, for what has no prefix.
        pooled = torch.cat(clouds)
        few = _shuffled(len(pooled), plan)[: survey.DIMENSION_ROWS].to(pooled.device)
        row["anisotropy"] = null_models.anisotropy(pooled)
        row["dimension"] = null_models.intrinsic_dimension(pooled[few])
        counts = {"prompts": len(prompts), "tokens": len(sample)}
        rows.append(_row(model, layer, **counts, **row))
    last = {"condition": "correlation"}
    for name in ("anisotropy", "dimension"):
        last[f"margin and {name}"] = _pearson(rows, "margin", name)
    return [*rows, last]


def _shuffled(size: int, plan: Plan) -> Int[Tensor, " size"]:
    """The numbers below ``size``, in the order that the seed draws."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(plan.seed))


def inversion(model: LanguageModel, plan: Plan) -> list[Row]:
    """Ways to invert on prose and code, one prompt in ten of random tokens."""
    drawn = plan.prompts // 10
    prompts = texts(model, plan.prompts - drawn, plan) + at_random(model, drawn, plan)
    return _by_layer(model, plan, {"": prompts}, "{way}")


def splits(model: LanguageModel, plan: Plan) -> list[Row]:
    """Prompts of the training text of pocket-gpt2, held-out text, random tokens."""
    groups = {}
    # Bundled text is held out. Another model may have been trained on any of it.
    if plan.source == "installed":
        groups["train"] = texts(model, plan.prompts, plan, "train")
    groups["test"] = texts(model, plan.prompts, plan, "held-out")
    groups["random"] = at_random(model, plan.prompts, plan)
    return _by_layer(model, plan, groups, "{group}, {way}")


def times(model: LanguageModel, plan: Plan) -> list[Row]:
    """Seconds to invert a prompt by layer and by length."""
    groups = {}
    for length in plan.lengths:
        groups[length] = texts(model, plan.prompts, replace(plan, length=length))
    form = "layer {layer}, {group} tokens, {way}"
    return _by_layer(model, plan, groups, form, DEPTHS)


@dataclass(frozen=True)
class Experiment:
    """What is run, and where the paper has it."""

    run: Callable[[LanguageModel, Plan], list[Row]]
    where: str
    parts: tuple[str, ...]  # of the plan, that it uses; others may not be changed
    full: Plan  # the paper's numbers of prompts
    quick: Plan  # seconds


_ALL = ("prompts", "layers", "seed", "shards", "progress")
_TEXT = (*_ALL, "length", "source")
_WAYS = (*_ALL, "ways", "limit", "lens_tokens", "features", "source")
_SMOKE = {"source": "bundled", "limit": 0.5, "lens_tokens": 4000, "features": 0}
_LONG = (20, 50, 100, 150, 200)
_SHORT = {"lengths": (1, 2, 4, 8, 16, 32), **_SMOKE}
EXPERIMENTS = {
    "layers": Experiment(minima, "Tables 1, 2, Figures 3, 7, 8", _TEXT,
                         Plan(100_000), Plan(300, 16, **_SMOKE)),
    "lengths": Experiment(lengths, "Figures 5, 9", (*_ALL, "lengths", "source"),
                          Plan(2000, lengths=survey.LENGTHS), Plan(60, **_SHORT)),
    "continuations": Experiment(every_continuation, "Figure 4", (*_TEXT, "closest"),
                                Plan(100_000), Plan(40, 16, closest=1, **_SMOKE)),
    "inversion": Experiment(inversion, "Tables 4, 6", (*_WAYS, "length"),
                            Plan(50, 10), Plan(5, 6, **_SMOKE)),
    "compared": Experiment(inversion, "Table 5", (*_WAYS, "length"),
                           Plan(100, 20, ways=WAYS), Plan(3, 4, ways=WAYS, **_SMOKE)),
    "splits": Experiment(splits, "Table 7", (*_WAYS, "length"),
                         Plan(50, 100), Plan(3, 12, **_SMOKE)),
    "times": Experiment(times, "Figure 6", (*_WAYS, "lengths"), Plan(10, lengths=_LONG),
                        Plan(2, lengths=(4, 8), ways=("here",), **_SMOKE)),
    "same-answer": Experiment(same_answer, "E.3", (*_ALL, "length"),
                              Plan(10_000, PREFIX), Plan(200, PREFIX, **_SMOKE)),
    "shape": Experiment(shape, "Table 11", (*_TEXT, "tokens"),
                        Plan(100), Plan(4, 16, tokens=100, **_SMOKE)),
}  # fmt: skip


def reproduce(
    experiment: str,
    model: LanguageModel,
    *,
    quick: bool = False,
    weights: str = "full",
    **changes: object,
) -> dict[str, Any]:
    """Run one experiment of the paper on a model and return what JSON will hold.

    ``quick`` is a smoke run on bundled text, else the numbers of prompts are the
    paper's; ``weights`` says how the model was loaded; ``changes`` are parts of
    ``Plan``. Raises ``PlanError`` for an unknown experiment, part or value.

    >>> from sipit_lite import load
    >>> run = reproduce("layers", load(device="cpu"), quick=True, prompts=40)
    >>> [(row["condition"], row["collisions"]) for row in run["rows"]]
    [('first', 0), ('middle', 0), ('last', 0)]
    """
    plan = _planned(experiment, model, quick, changes)
    chosen = EXPERIMENTS[experiment]
    started = time.perf_counter()
    rows = chosen.run(model, plan)
    seconds = time.perf_counter() - started
    parts = asdict(plan)
    # JSON knows no infinity.
    parts["limit"] = plan.limit if math.isfinite(plan.limit) else None
    # Where a run keeps its states says nothing of what it measured.
    del parts["progress"], parts["shards"]
    run = {"experiment": experiment, "where": chosen.where, **checks.setting(model)}
    run |= {"dtype": str(model.dtype).removeprefix("torch."), "weights": weights}
    run |= {"vocabulary": model.vocab_size, "layers": model.n_layers}
    return run | survey.short({"plan": parts, "seconds": seconds, "rows": rows})


def _planned(
    experiment: str, model: LanguageModel, quick: bool, changes: dict[str, Any]
) -> Plan:
    """The plan of an experiment with its changes, checked; raises ``PlanError``."""
    if experiment not in EXPERIMENTS:
        names = list(EXPERIMENTS)
        raise PlanError(f"got the experiment {experiment!r}; expected one of {names}")
    chosen = EXPERIMENTS[experiment]
    for name in changes.keys() - chosen.parts:
        raise PlanError(f"got {name!r}; {experiment} takes {', '.join(chosen.parts)}")
    plan = replace(chosen.quick if quick else chosen.full, **changes)
    least = {"prompts": 2, "length": 1, "closest": 1, "tokens": 2, "limit": 0}
    for name, smallest in least.items():
        value = getattr(plan, name)
        # Not the other way round, so that NaN is refused as well.
        if not value >= smallest:
            raise PlanError(f"got {name}={value}; expected {smallest} or more")
    if "lengths" in chosen.parts and not (plan.lengths and min(plan.lengths) >= 1):
        raise PlanError(f"got lengths={plan.lengths}; expected numbers from 1")
    if not plan.ways or not set(plan.ways) <= set(WAYS):
        raise PlanError(f"got ways={plan.ways}; expected {WAYS}")
    for layer in plan.layers:
        model.check_layer(layer)  # raises ModelError
    return plan


def free_path(path: Path, *, force: bool) -> Path:
    """The path, or ``PlanError``, before a run, where it cannot be written."""
    check_path(path, PlanError, folders=True)
    if path.exists() and not force:
        raise PlanError(f"got {str(path)!r}, an earlier run; --force replaces it")
    return path


def keep_result(run: dict[str, Any], path: Path) -> None:
    """Write a run beside and rename it, so that a full disk spoils no earlier one."""
    text = json.dumps(run, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path, PlanError) as part:
        part.write_text(text, encoding="utf-8")


def texts(
    model: LanguageModel, count: int, plan: Plan, split: str | None = None
) -> Prompts:
    """Windows of prose and code in turn, behind a begin-of-text token, not counted.

    Without ``split`` there may be fewer than ``count``, and repeated ones. A model
    without a tokenizer gets random tokens.
    """
    if model.tokenizer is None:
        return at_random(model, count, plan)
    which = (model.tokenizer, count, plan.length + (model.begin is not None))
    options = {"seed": plan.seed, "source": plan.source}
    if plan.source == "corpora":
        drawn = survey.from_source(*which, **options)
    elif split is None:
        drawn = windows(*which, **options)[:count]
    else:
        drawn = distinct(*which, **options, split=split)
    return [_with_begin(model, ids) for ids in drawn]


def at_random(model: LanguageModel, count: int, plan: Plan) -> Prompts:
    """Prompts of random tokens, behind a begin-of-text token, not counted."""
    size = model.vocab_size
    if model.tokenizer is not None:
        # Rows of the table may have no token.
        size = min(len(model.tokenizer), size)
    shape = (count, plan.length + (model.begin is not None))
    # Another seed than that of the text.
    generator = torch.Generator().manual_seed(plan.seed + 1)
    drawn = torch.randint(size, shape, generator=generator)
    return [_with_begin(model, ids) for ids in drawn]


def _with_begin(model: LanguageModel, ids: Tensor) -> Tensor:
    """With a begin-of-text token in place of the last one, where it is missing."""
    if model.begin is not None and int(ids[0]) != model.begin:
        ids = torch.cat([ids.new_tensor([model.begin]), ids[:-1]])
    return ids.to(model.device)


def _by_layer(
    model: LanguageModel, plan: Plan, groups: Groups, form: str, depths: Any = LAST
) -> list[Row]:
    """All ways on all groups of prompts; ``form`` makes the condition of each row."""
    rows = []
    for layer in _layers(model, plan, depths):
        # What is done once for a model and a layer is not in the seconds.
        lens = _lens(model, layer, plan) if "here" in plan.ways else None
        related(model, layer)
        noise_floor(model, layer)
        for group, prompts in groups.items():
            states = [model.states(ids, layer) for ids in prompts]
            for way in plan.ways:
                bar = checks.progress_bar(states, way, plan.progress)
                outcomes = [_inverted(way, x, model, layer, plan, lens) for x in bar]
                row = {"condition": form.format(layer=layer, group=group, way=way)}
                row |= {"layer": layer, "prompts": len(prompts)}
                row |= {"tokens": len(prompts[0])}
                row |= _summary(prompts, outcomes, model.vocab_size)
                if way == "hard prompts":  # which tests no candidates one by one
                    row["explored, %"] = None
                rows.append(row)
    return rows


def _summary(prompts: Prompts, outcomes: Sequence[Any], vocabulary: int) -> Row:
    """Shares of exact and finished prompts, mean seconds, vocabulary tested."""
    seconds = [outcome.seconds for outcome in outcomes]
    tested = torch.cat([outcome.tested.double() for outcome in outcomes])
    pairs = zip(outcomes, prompts, strict=True)
    return {
        "exact": checks.share(torch.equal(o.tokens, ids.cpu()) for o, ids in pairs),
        "seconds": mean(seconds),
        # One prompt has no spread.
        "spread": stdev(seconds) if len(seconds) > 1 else None,
        "explored, %": 100 * float(tested.mean()) / vocabulary,
        "finished": checks.share(getattr(o, "finished", True) for o in outcomes),
    }


def _inverted(
    way: str, states: Tensor, model: LanguageModel, layer: int, plan: Plan, lens: Lens
) -> Any:
    """What one way recovers, or has when it gives up."""
    if way != "here":
        return BASELINES[way](states, model, layer, seed=plan.seed, limit=plan.limit)
    try:
        return invert(states, model, layer, lens=lens, seed=plan.seed)
    except NotVerified as refused:
        return refused.recovered


def _lens(model: LanguageModel, layer: int, plan: Plan) -> Lens:
    """Fitted on installed text, or for bundled text, to be quick, on random tokens."""
    prompts = None
    if plan.source == "bundled":
        prompts = at_random(model, plan.lens_tokens // 16 + 1, replace(plan, length=16))
    sizes = {"tokens": plan.lens_tokens, "features": plan.features}
    return Lens.fit(model, layer, prompts=prompts, **sizes, seed=plan.seed)


def _layers(model: LanguageModel, plan: Plan, depths: Any = DEPTHS) -> list[int]:
    """The plan's layers, or those of the paper's table."""
    # Of a model of one layer all three are that one.
    at = {"first": 1, "middle": max(1, model.n_layers // 2), "last": model.n_layers}
    return list(plan.layers) or sorted({at[depth] for depth in depths})


def _row(model: LanguageModel, layer: int, **values: object) -> Row:
    """One row, its layer named as in the paper's tables."""
    names = {model.n_layers // 2: "middle", 1: "first", model.n_layers: "last"}
    return {"condition": names.get(layer, f"layer {layer}"), "layer": layer, **values}


def _pearson(rows: Sequence[Row], one: str, other: str) -> float | None:
    """The correlation of two columns; None of constants, and of two points."""
    x = [row[one] for row in rows]
    y = [row[other] for row in rows]
    try:
        # Two points always lie on a line.
        return correlation(x, y) if len(rows) > 2 else None
    except StatisticsError:
        return None
