"""The command line: results on standard output, bars and errors on standard error."""

import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor
from tqdm import tqdm
from transformers import BitsAndBytesConfig
from typer import Argument, Option

import sipit_lite as sl
from sipit_lite.collisions import COLLISION
from sipit_lite.experiments import checks, paper
from sipit_lite.experiments.collision_speed import collisions as detector
from sipit_lite.experiments.inversion import inversion
from sipit_lite.experiments.last_states import curves, laststate, reach
from sipit_lite.experiments.perturb import quantised
from sipit_lite.experiments.reproduce import EXPERIMENTS, keep_result, result_path
from sipit_lite.experiments.reproduce import reproduce as run_experiment
from sipit_lite.io.corpora import SOURCES, from_source
from sipit_lite.io.loading import POCKET
from sipit_lite.model import LanguageModel, SipItError, StatesError

POLICIES = {"auto": "auto", "gradient": sl.Gradient(), "newton": sl.Newton()}
POLICIES |= {"published": sl.Published(), "random": sl.Random()}
BENCHES = {"exactness": checks.exactness, "inversion": inversion}
BENCHES |= {"collisions": detector, "laststate": laststate, "reach": reach}
DEMO_TEXTS = {
    "english": "A hidden state is not a summary: the prompt comes back, word for word.",
    "python": "def area(radius: float) -> float:\n    return 3.14159 * radius**2\n",
    "emoji and scripts": "naïve 🙂 привет, 世界!",
}
# Quantised weights, and the format that their products are computed in.
WEIGHTS = {"int8": "float16", "fp4": "bfloat16"}

# How columns of tables are written.
FORMS = {"exact": {True: "yes", False: "NO"}.get, "tested": "{:.0f}".format}
FORMS |= {"accepted": "{:.1e}".format, "runner-up": "{:.1e}".format}
FORMS |= {"seconds": "{:.2f}".format, "minimum": "{:.3e}".format}
FORMS |= {"text": lambda text: json.dumps(text, ensure_ascii=False)[:40]}
FORMS |= {"texts": lambda texts: json.dumps(texts, ensure_ascii=False)}

# Options that several commands share.
Format = Literal["float32", "float16", "bfloat16", "float64"]
Quantised = Literal[*WEIGHTS]
Json = Annotated[bool, Option("--json", help="One JSON object instead of text.")]
Seed = Annotated[int, Option(help="Of all that is drawn.")]
Layer = Annotated[int | None, Option(help="0 (embeddings) to L.")]
Layers = Annotated[list[int] | None, Option(help="Several: --layers 3 6.")]
Policy = Annotated[Literal[*POLICIES], Option(help="The order of the candidates.")]
Quick = Annotated[bool, Option("--quick", help="A smoke run of seconds.")]
Figure = Annotated[str, Option(help="A .png to draw.")]
Shards = Annotated[str | None, Option(help="A folder, where a stopped run goes on.")]
# Options that take several values at once.
SEVERAL = ("--layers", "--lengths", "--kinds", "--ways")

app = typer.Typer(add_completion=False, help="Hidden states that give back the prompt.")
# Typer carries click with it since 0.29: this is the base of usage errors anyway.
UsageError = typer.BadParameter.__base__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0; 1 for a demo that is not exact or a lens that was not kept; 2 for bad input; 130
    after Ctrl-C; 141 where nobody reads on.

    >>> main(["invert", "--text", "hidden states", "--layer", "3", "--device", "cpu"])
    hidden states
    0
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    label = " ".join(["sipit-lite", *arguments[:1]])
    # A terminal that cannot show a character still gets the rest.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # Not by typer's own main, which would draw boxes and hide what Ctrl-C carries.
        commands = typer.main.get_command(app)
        with commands.make_context("sipit-lite", spread(arguments)) as context:
            return commands.invoke(context)
    except typer.Exit as after_help:
        return after_help.exit_code
    except UsageError as error:
        # Typer reads values by pydantic, which keeps what it was given.
        errors = getattr(error.__cause__, "errors", list)()
        received = f"got {errors[0]['input']!r}; " if errors else ""
        return say(label, received + error.format_message())
    except SipItError as error:
        return say(label, error)
    except KeyboardInterrupt as stop:
        # An inversion that was stopped carries what it has.
        best = getattr(stop, "recovered", None)
        text = f": {best.text!r}" if best else ""
        return say(label, f"{str(stop) or 'interrupted'}{text}", 130)
    except OSError as error:
        # What Python would still flush at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message = f"got {error}; expected room for the output"
        return 141 if isinstance(error, BrokenPipeError) else say(label, message)


def say(label: str, message: object, code: int = 2) -> int:
    """Print one line on standard error, and return the exit code."""
    # A message may quote several lines.
    print(f"{label}: {' '.join(str(message).splitlines())}", file=sys.stderr)
    return code


def spread(arguments: Sequence[str]) -> list[str]:
    """Put an option of several values before each of them, as typer reads them.

    >>> spread(["--layers", "3", "6", "--json"])
    ['--layers', '3', '--layers', '6', '--json']
    """
    written: list[str] = []
    option = None
    for argument in arguments:
        # The values end where the next option starts.
        if argument.startswith("-"):
            option = argument if argument in SEVERAL else None
        elif option is not None and written[-1] != option:
            written.append(option)
        written.append(argument)
    return written


def bad(received: str, expected: str) -> StatesError:
    """The error for input of which a command can make nothing."""
    return StatesError(f"got {received}; expected {expected}")


def open_model(
    deepest: int | None,
    *,
    model: Annotated[str | None, Option(help="Ours, a folder, a hub name.")] = None,
    random_init: Annotated[
        bool, Option("--random-init", help="Weights drawn.")
    ] = False,
    model_dtype: Annotated[Format | None, Option(help="Of the computing.")] = None,
    weights: Annotated[Quantised | None, Option(help="Round on loading.")] = None,
    device_map: Annotated[str | None, Option(help="auto spreads the model.")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    seed: Seed = 0,
) -> LanguageModel:
    """The model that the options name, without the blocks after the deepest layer."""
    if device_map and device != "auto":
        raise bad(f"--device {device} with --device-map {device_map}", "one of them")
    if abs(seed) >= 2**62:
        raise bad(f"seed {seed}", "a whole number below 2**62")
    options = {"layers": deepest, "random_init": random_init, "seed": seed}
    options |= {"device": device, "device_map": device_map, "progress": True}
    # Quantised weights are multiplied in the format they come with.
    options["dtype"] = getattr(torch, model_dtype or WEIGHTS.get(weights, "float32"))
    if weights:
        # transformers has a switch for each.
        flag = {"int8": "load_in_8bit", "fp4": "load_in_4bit"}[weights]
        options["quantization_config"] = BitsAndBytesConfig(**{flag: True})
        options["device_map"] = device_map or "auto"
    return sl.load(model, **options)


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Make a function a command that also takes the options of ``open_model``.

    Its first parameter is ``open_model`` with these options filled in.
    """
    # The first parameter of either is not an option.
    shared = dict(inspect.signature(open_model).parameters)
    del shared["deepest"]
    own = dict(inspect.signature(function).parameters)
    del own["opened"]

    def run(**options: Any) -> int:
        opened = partial(open_model, **{name: options[name] for name in shared})
        return function(opened, **{name: options[name] for name in own})

    # Typer reads the options from here.
    every = [p.replace(kind=p.KEYWORD_ONLY) for p in (own | shared).values()]
    run.__signature__ = inspect.Signature(every)
    run.__annotations__ = {p.name: p.annotation for p in every}
    app.command(function.__name__, help=inspect.getdoc(function))(run)
    return function


@command
def demo(
    opened: Callable,
    layer: Layer = None,
    policy: Policy = "auto",
    seed: Seed = 0,
    figure: Figure = "sipit-lite-demo.png",
    as_json: Json = False,
) -> int:
    """Invert four prompts at every layer; 1 unless all come back exactly.

    sipit-lite demo --layer 3 --figure ""
    """
    check_place("figure", figure, ".png")
    model = opened(None)
    layers = list(range(model.n_layers + 1)) if layer is None else [layer]
    # One list, so that the bar knows how long the demo takes.
    cases = [(*prompt, at) for prompt in demo_prompts(model, seed) for at in layers]
    rows = []
    last = {}
    try:
        for name, ids, at in tqdm(cases, "demo", disable=None):
            states = model.states(ids, at)
            recovered = sl.invert(states, model, at, policy=POLICIES[policy], seed=seed)
            last[name] = recovered
            row = {"prompt": name, "layer": at, "tokens": len(recovered.tokens)}
            row["exact"] = torch.equal(recovered.tokens, ids.cpu())
            row["tested"] = float(recovered.tested.float().median())
            row["accepted"] = float(recovered.distance.max())
            row["runner-up"] = float(recovered.runner_up.min())
            rows.append(row | {"seconds": recovered.seconds, "text": recovered.text})
    finally:
        # After Ctrl-C as well.
        if rows and not as_json:
            print(table(rows, list(rows[0])))
    if figure:
        # All prompts in a row, at the last layer.
        joined = []
        for name in ("distance", "runner_up", "radius"):
            joined.append(torch.cat([getattr(r, name) for r in last.values()]).tolist())
        draw(figure, "distances", *joined)
    exact = sum(row["exact"] for row in rows)
    summary = {"model": model.name, "device": str(model.device)}
    summary |= {"exact": exact == len(rows), "rows": rows, "figure": figure or None}
    summary["peak memory GiB"] = checks.peak_memory()
    drawn = f", figure {figure}" if figure else ""
    show(summary, as_json, f"{exact} of {len(rows)} exact on {model.device}{drawn}")
    return 0 if exact == len(rows) else 1


def demo_prompts(model: LanguageModel, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The prompts of the demo; without a tokenizer the random one alone."""
    size = model.vocab_size
    # Some models have more rows of embeddings than there are tokens.
    if model.tokenizer is not None:
        size = min(size, len(model.tokenizer))
        for name, text in DEMO_TEXTS.items():
            yield name, model.encode(text)
    drawn = torch.randint(size, (20,), generator=torch.Generator().manual_seed(seed))
    yield "random tokens", drawn.to(model.device)


@command
def capture(
    opened: Callable,
    text: Annotated[str, Argument(help="The prompt, or - for standard input.")],
    layer: Layer = None,
    layers: Layers = None,
    output: Annotated[str, Option("-o", "--output")] = "states.safetensors",
    dtype: Annotated[Literal[Format, "int8"] | None, Option(help="On disk.")] = None,
    keep_text: Annotated[bool, Option("--keep-text", help="The text as well.")] = False,
    as_json: Json = False,
) -> int:
    """Write the hidden states of a text, and not the text, to a file.

    sipit-lite capture "My secret prompt" -o states.safetensors --layers 3 6
    """
    wanted = one_or_several(layer, layers)
    # Standard input keeps a prompt out of the shell's history.
    if text == "-":
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise bad(f"bytes that are not text ({error})", "UTF-8") from error
    model = opened(max(wanted, default=None))
    options = {
        "dtype": getattr(torch, dtype) if dtype else None,
        "keep_text": keep_text,
    }
    kept = sl.write_states(output, model, text, wanted or [model.n_layers], **options)
    states = kept.states[kept.layer]
    summary = {"file": output, "model": model.name, "layers": list(kept.states)}
    summary["shape"] = list(states.shape)
    summary["dtype"] = str(states.dtype).removeprefix("torch.")
    summary["text kept"] = keep_text
    line = "  ".join(f"{name}: {value}" for name, value in summary.items())
    show(summary, as_json, line)
    return 0


@command
def invert(
    opened: Callable,
    file: Annotated[str | None, Argument(help="What capture wrote.")] = None,
    text: Annotated[str | None, Option(help="Capture it first.")] = None,
    layer: Layer = None,
    policy: Policy = "auto",
    seed: Seed = 0,
    epsilon: Annotated[float | None, Option(help="Bound on the noise.")] = None,
    certify: Annotated[bool, Option("--certify", help="Test all tokens.")] = False,
    lens: Annotated[str | None, Option(help="A file; fitted if not there.")] = None,
    on_fail: Annotated[Literal["raise", "nearest"], Option(help="A guess?")] = "raise",
    last: Annotated[bool, Option("--last", help="From the last state alone.")] = False,
    length: Annotated[int | None, Option(help="With --last: tokens.")] = None,
    longest: Annotated[int | None, Option(help="With --last: most tokens.")] = None,
    seconds: Annotated[float | None, Option(help="With --last: at most.")] = None,
    restarts: Annotated[int | None, Option(help="With --last: at most.")] = None,
    as_json: Json = False,
) -> int:
    """Print the prompt whose hidden states are in a file.

    sipit-lite invert states.safetensors --lens lens.safetensors

    sipit-lite invert --text "a prompt" --last
    """
    if (file is None) == (text is None):
        raise bad("both or neither of a file and --text", "one of them")
    # What --last alone takes, and what it does not take.
    limits = {"length": length, "longest": longest}
    limits |= {"seconds": seconds, "restarts": restarts}
    limits = {name: value for name, value in limits.items() if value is not None}
    others = {"policy": policy != "auto", "certify": certify, "lens": lens is not None}
    others = [name for name, used in others.items() if used]
    others += ["on-fail"] if on_fail != "raise" else []
    if limits and not last:
        raise bad(f"--{next(iter(limits))} without --last", "them together")
    if others and last:
        raise bad(f"--last with --{others[0]}", "no option that needs all states")
    deepest = layer
    if text is None:
        captured = sl.read_states(file)
        opened = trusted(opened, captured.model, file)
        deepest = max(captured.states) if layer is None else layer
    # A lens is of the model with all its blocks.
    model = opened(None if lens else deepest)
    if text is not None:
        layer = model.n_layers if layer is None else layer
        captured = sl.Captured({layer: model.states(text, layer)}, model.name)
    at = captured.layer if layer is None else layer
    options = {"epsilon": epsilon, "seed": seed, "progress": True}
    if last:
        # One row, and nothing of the others.
        captured.check(model)
        row = captured.at(at)[-1:].flatten()
        recovered = sl.invert_last(row, model, at, **options, **limits)
    else:
        options |= {"policy": POLICIES[policy], "certify": certify, "on_fail": on_fail}
        options["lens"] = lens_of(lens, model, at) if lens else None
        # Without a layer, the cheapest one that does not refuse.
        recovered = captured.invert(model, layer, **options)
        at = recovered.layer
    show(vars(recovered) | {"model": model.name, "layer": at}, as_json, recovered.text)
    guessed = (~recovered.verified).nonzero()[:, 0].tolist()
    if last:
        names = ("distance", "radius", "runner_up")
        ends = [f"{name} {float(getattr(recovered, name)[-1]):.2g}" for name in names]
        say("verified", ", ".join(ends))
    elif guessed:
        positions = ", ".join(map(str, guessed))
        say("not verified, nearest tokens only", f"positions {positions}")
    # A lens that could not be kept takes no prompt with it.
    return 0 if lens is None or Path(lens).exists() else 1


def trusted(opened: partial, name: str, file: str) -> partial:
    """How to open the model of a states file; what is not ours has to be named."""
    # A file may come from anybody, and to load a model is to trust its folder.
    wanted = opened.keywords["model"]
    if wanted is None and name not in (POCKET, os.environ.get("SIPIT_LITE_MODEL")):
        received = f"{file!r} with states of the model {name!r}"
        raise bad(received, "--model with the name of a model that you trust")
    return partial(opened, model=wanted or name)


def lens_of(path: str, model: LanguageModel, layer: int) -> sl.Lens:
    """The lens of a file, or a new one, which is written to it if that is possible."""
    if Path(path).exists():
        return sl.Lens.load(path, model)
    # Before the fit, which takes half a minute.
    check_place("lens", path)
    model.check_layer(layer)
    lens = sl.Lens.fit(model, layer, progress=True)
    try:
        lens.save(path)
    except sl.LensError as error:
        say("sipit-lite invert", error)
    return lens


@command
def collisions(
    opened: Callable,
    prompts: Annotated[int, Option("-n", "--prompts", help="Distinct ones.")] = 2000,
    length: Annotated[int, Option(help="Tokens of each.")] = 24,
    kinds: Annotated[list[str], Option()] = ("prose", "code"),
    source: Annotated[Literal[*SOURCES], Option(help="Of the text.")] = "bundled",
    layers: Layers = None,
    closest: Annotated[int, Option(help="Pairs to report.")] = 10,
    exhaustive: Annotated[int, Option(min=0, help="Prompts to continue.")] = 0,
    shards: Shards = None,
    seed: Seed = 0,
    figure: Figure = "",
    as_json: Json = False,
) -> int:
    """Find the closest pairs among the last states of many prompts.

    sipit-lite collisions -n 1000 --layers 3 6 --exhaustive 2
    """
    check_place("figure", figure, ".png")
    model = opened(max(layers) if layers else None)
    layers = layers or list(range(1, model.n_layers + 1))
    where = {"kinds": kinds, "seed": seed, "source": source, "folder": shards}
    drawn = from_source(model.tokenizer, prompts, length, **where)
    states = sl.last_states(model, drawn, layers, folder=shards, progress=True)
    # Distances to the nearest neighbour cost time, and only the figure shows them.
    options = {"prompts": drawn, "nearest": bool(figure), "progress": True}
    rows = []
    nearest = []
    for layer, x in zip(layers, states, strict=True):
        report = sl.closest_pairs(x.to(model.device), closest, **options)
        row = {"layer": layer, "recomputed": report.recomputed} | counts([report])
        pairs = zip(report.distances.tolist(), report.pairs.tolist(), strict=True)
        near = []
        for distance, pair in pairs:
            texts = [model.decode(drawn[index]) for index in pair]
            near.append({"distance": distance, "texts": texts})
        rows.append(row | {"seconds": report.seconds, "closest": near})
        nearest.append(report.nearest)
    continued = []
    # The prompts of the closest pairs at the last layer.
    most = report.pairs.flatten().unique().tolist()[:exhaustive]
    chosen = [drawn[index] for index in most]
    for layer in layers if chosen else []:
        reports = list(sl.continuations(model, chosen, layer, progress=True))
        continued.append({"layer": layer, "prompts": len(chosen)} | counts(reports))
    if figure:
        draw(
            figure, "nearest_by_layer", layers, [x.numpy() for x in nearest], COLLISION
        )
    summary = {"model": model.name, "device": str(model.device), "prompts": len(drawn)}
    summary |= {"length": length, "layers": rows, "exhaustive": continued}
    names = ["layer", "compared", "minimum", "collisions", "practical"]
    lines = [table(part, names) for part in (rows, continued) if part]
    lines.append(table(rows[-1]["closest"][:3], ["distance", "texts"]))
    lines.append("collisions: ℓ2 distance below 1e-6; practical: torch.allclose")
    show(summary | {"figure": figure or None}, as_json, "\n".join(lines))
    return 0


def counts(reports: Sequence[sl.CollisionReport]) -> dict[str, float | int]:
    """What several reports of the detector say together."""
    total = {"minimum": min(report.minimum for report in reports)}
    for name in ("compared", "collisions", "practical"):
        total[name] = sum(getattr(report, name) for report in reports)
    return total


@command
def bench(
    opened: Callable,
    name: Annotated[Literal[*BENCHES], Argument(metavar="BENCH")],
    quick: Quick = False,
    seed: Seed = 0,
    figure: Figure = "",
    as_json: Json = False,
) -> int:
    """Measure something, side by side and against targets.

    sipit-lite bench inversion --quick --figure seconds.png
    """
    if figure and name not in ("inversion", "laststate"):
        raise bad(f"a figure for the bench {name!r}", "'inversion' or 'laststate'")
    check_place("figure", figure, ".png")
    model = opened(None)
    if model.tokenizer is None:
        raise bad(f"{model.name} without a readable tokenizer", "one for the prompts")
    lines, data = BENCHES[name](model, quick=quick, seed=seed, progress=True)
    if figure and name == "laststate":
        draw(figure, "success_by_length", curves(data["cells"]))
    elif figure:
        draw(figure, "time_ladder", *ladder(data["speed"]), "one forward pass")
    reported = [f"{key}: {value:.4g}" for key, value in data["reported"].items()]
    text = "\n".join([checks.verdicts(lines), *reported])
    show(checks.report(name, model, lines, data), as_json, text)
    return 0


def ladder(speed: dict[str, dict]) -> tuple[dict[str, float], float]:
    """Seconds a prompt of each way to invert, and of a forward pass, where all ran."""
    # The published loop runs at the last layer alone.
    row = [row for row in speed.values() if "published, seconds" in row][-1]
    ways = ("published", "newton", "auto without a lens", "auto")
    return {way: row[f"{way}, seconds"] for way in ways}, row["forward, seconds"]


@command
def reproduce(
    opened: Callable,
    experiment: Annotated[Literal[*EXPERIMENTS, "all"], Argument()],
    quick: Quick = False,
    prompts: Annotated[int | None, Option(help="How many.")] = None,
    length: Annotated[int | None, Option(help="Tokens of each.")] = None,
    lengths: Annotated[list[int] | None, Option(help="Of lengths, times.")] = None,
    layer: Layer = None,
    layers: Layers = None,
    ways: Annotated[list[str] | None, Option(help="To invert.")] = None,
    limit: Annotated[float | None, Option(help="Seconds, published ways.")] = None,
    source: Annotated[Literal[*SOURCES] | None, Option(help="Of the text.")] = None,
    shards: Shards = None,
    weights: Annotated[Quantised | None, Option(help="Quantised.")] = None,
    rounded: Annotated[Quantised | None, Option(help="Round the weights.")] = None,
    output: Annotated[str | None, Option("-o", "--output", help="A folder.")] = None,
    force: Annotated[bool, Option("--force", help="Overwrite another run.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> int:
    """Run an experiment of the paper on any model, and print its numbers beside.

    sipit-lite reproduce compared --quick --model gpt2

    sipit-lite reproduce layers --layers 1 6 12 --source corpora -o results
    """
    # What is not given stays as the paper has it.
    plan = {"prompts": prompts, "length": length, "limit": limit, "source": source}
    plan |= {"shards": shards, "lengths": lengths, "ways": ways}
    plan["layers"] = one_or_several(layer, layers)
    changes = {}
    for name, value in plan.items():
        if value not in (None, []):
            changes[name] = tuple(value) if isinstance(value, list) else value
    model = opened(None)
    label = weights or "full"
    if rounded:
        # The model keeps its name: the label says what was done to it.
        decoder = quantised(model, rounded).decoder
        model = LanguageModel(decoder, model.tokenizer, name=model.name)
        label = f"{rounded}, rounded"
    names = list(EXPERIMENTS) if experiment == "all" else [experiment]
    # Before the first run, not after it.
    paths = {}
    for name in names if output else []:
        paths[name] = result_path(output, model, name, label, force=force)
    common = {"quick": quick, "weights": label, "seed": seed, "progress": True}
    for name in names:
        wanted = changes
        # One list of options for all: each experiment takes those it has.
        if experiment == "all":
            parts = EXPERIMENTS[name].parts
            wanted = {part: changes[part] for part in parts if part in changes}
        run = run_experiment(name, model, **common, **wanted)
        if output:
            keep_result(run, paths[name])
        lines = paper.side_by_side([run], name)
        measured = [line for line in lines if line.measured is not None]
        show(run, as_json, paper.comparison(measured))
    return 0


def one_or_several(layer: int | None, layers: list[int] | None) -> list[int]:
    """The layers of ``--layer`` or of ``--layers``, none where neither is given."""
    if layer is not None and layers:
        raise bad(f"--layer {layer} with --layers {layers}", "one of them")
    return layers or ([] if layer is None else [layer])


def check_place(what: str, path: str, ending: str = "") -> None:
    """Refuse a file that cannot be written, before anything is computed for it."""
    place = Path(path)
    writable = os.access(place.parent, os.W_OK) and not place.is_dir()
    if path and not (path.endswith(ending) and writable):
        name = f"a name that ends in {ending}" if ending else "a name"
        raise bad(f"the {what} {path!r}", f"{name}, in a folder that can be written")


def table(rows: Sequence[dict], names: Sequence[str]) -> str:
    """Some columns of rows as text; numbers stand on the right."""
    cells = []
    for row in rows:
        cells.append([FORMS.get(name, str)(row[name]) for name in names])
    right = [name for name in names if isinstance(rows[0][name], int | float)]
    return checks.table(names, cells, right=right)


def draw(path: str, kind: str, *data: Any) -> None:
    """Write a figure of ours; its module is loaded only where something is drawn."""
    # No window is needed, whatever the caller's settings say.
    os.environ["MPLBACKEND"] = "agg"
    from sipit_lite.teaching import figures

    figure = getattr(figures, kind)(*data).figure
    figure.savefig(path, dpi=150, bbox_inches="tight")


def show(summary: dict, as_json: bool, text: str) -> None:
    """One JSON object, or text."""
    print(json.dumps(plain(summary), allow_nan=False) if as_json else text, flush=True)


def plain(value: Any) -> Any:
    """A value as JSON knows it: what is NaN or infinite was not measured, and is null.

    >>> plain({"margin": torch.tensor([0.5, torch.inf]), "layers": (1, 2)})
    {'margin': [0.5, None], 'layers': [1, 2]}
    """
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(name): plain(below) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [plain(below) for below in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


if __name__ == "__main__":
    sys.exit(main())
