"""The command line: results on standard output, bars and errors on standard error.

Rooms are imported by the commands that need them: torch takes seconds, help takes none.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option

import sipit_lite as sl

POLICIES = "auto gradient newton published random".split()
# The module and the function of each.
BENCHES = {"inversion": "inversion:inversion", "safety": "safety:safety"}
BENCHES |= {"real": "real:real", "laststate": "last_states:laststate"}
BENCHES |= {"collisions": "collision_speed:detector"}
BENCHES |= {"device": "collision_speed:device"}
EXPERIMENTS = "layers lengths continuations inversion compared splits times".split()
EXPERIMENTS += ["same-answer", "shape"]
SOURCES = "bundled installed corpora".split()
DEMO_TEXTS = {
    "english": "A hidden state is not a summary: the prompt comes back, word for word.",
    "python": "def area(radius: float) -> float:\n    return 3.14159 * radius**2\n",
    "emoji and scripts": "naïve 🙂 привет, 世界!",
}
# The format that products are computed in, and the switch of transformers.
WEIGHTS = {"int8": ("float16", "load_in_8bit"), "fp4": ("bfloat16", "load_in_4bit")}
# Options that several commands share.
Format = Literal["float32", "float16", "bfloat16", "float64"]
Quantised = Literal[*WEIGHTS]
Layer = Annotated[int | None, Option(help="0 (embeddings) to L + 1.")]
Layers = Annotated[list[int] | None, Option(help="Several: --layers 3 6.")]
Quick = Annotated[bool, Option("--quick", help="A smoke run of seconds.")]
Shards = Annotated[str | None, Option(help="A folder, where a stopped run goes on.")]
Source = Annotated[Literal[*SOURCES] | None, Option(help="Of the text.")]

app = typer.Typer(add_completion=False, help="Hidden states that give back the prompt.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: 1 a demo or lens failed, 2 refused, 130 Ctrl-C, 141 pipe."""
    # Threads of torch wait for each other by spinning, 14 ms each time as a rule, which
    # takes 20 times as long where another program runs on one of two cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    for name in [name for name in os.environ if name.startswith("TQDM_")]:
        del os.environ[name]  # tqdm ends the program at a malformed one
    arguments = sys.argv[1:] if argv is None else list(argv)
    label = " ".join(["sipit-lite", *arguments[:1]])
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # Not by typer's own main, which would draw boxes and hide what Ctrl-C carries.
        commands = typer.main.get_command(app)
        with commands.make_context("sipit-lite", spread(arguments)) as context:
            return commands.invoke(context) or 0
    except typer.Exit as after_help:
        return after_help.exit_code
    except typer.TyperException as error:
        # Typer reads values by pydantic, which keeps what it was given.
        errors = getattr(error.__cause__, "errors", list)()
        received = f"got {errors[0]['input']!r}; " if errors else ""
        return say(label, received + error.format_message())
    except ValueError as error:
        # The hub's settings are read as transformers is imported, before our model.
        if "sipit_lite.model" not in sys.modules:
            error = f"got {error}; is HF_ENDPOINT an address?"
        elif not isinstance(error, sl.SipItError):
            raise
        return say(label, error)
    except KeyboardInterrupt as stop:
        # An inversion that was stopped carries what it has.
        best = getattr(stop, "recovered", None)
        text = f": {best.text!r}" if best else ""
        return say(label, f"{str(stop) or 'interrupted'}{text}", 130)
    except OSError as error:
        # What Python would still flush at its end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141 if isinstance(error, BrokenPipeError) else say(label, f"got {error}")


def say(label: str, message: object, code: int = 2) -> int:
    """Print one line on standard error, and return the exit code."""
    # A message may quote several lines.
    print(f"{label}: {' '.join(str(message).splitlines())}", file=sys.stderr)
    return code


def spread(arguments: Sequence[str]) -> list[str]:
    """Make ``--layers 3 6`` what typer reads, ``--layers 3 --layers 6``."""
    written: list[str] = []
    option = ""
    for argument in arguments:
        # The values end where the next option starts.
        if argument.startswith("-"):
            option = argument
        elif option in ("--layers", "--lengths", "--ways") and written[-1] != option:
            written.append(option)
        written.append(argument)
    return written


@dataclass
class Session:
    """The options that all commands take, and what is done with them."""

    model: Annotated[str | None, Option(help="Ours, a folder, a hub name.")] = None
    model_dtype: Annotated[Format | None, Option(help="Of the computing.")] = None
    weights: Annotated[Quantised | None, Option(help="Round on loading.")] = None
    device_map: Annotated[str | None, Option(help="auto spreads the model.")] = None
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto"
    seed: Annotated[int, Option(min=0, max=2**62, help="Of what is drawn.")] = 0
    as_json: Annotated[bool, Option("--json", help="JSON instead of text.")] = False

    def open(self, deepest: int | None = None) -> "sl.LanguageModel":
        """The model, without the blocks after the deepest layer."""
        import torch
        from transformers import BitsAndBytesConfig

        if self.device_map and self.device != "auto":
            raise sl.StatesError(f"got --device {self.device} with --device-map")
        options = {"device": self.device, "device_map": self.device_map}
        usual, switch = WEIGHTS.get(self.weights, ("float32", None))
        if switch:
            options["quantization_config"] = BitsAndBytesConfig(**{switch: True})
            options["device_map"] = self.device_map or "auto"
        options["dtype"] = getattr(torch, self.model_dtype or usual)
        return sl.load(self.model, layers=deepest, progress=True, **options)

    def show(self, summary: dict, text: str) -> None:
        """Print text, or one strict JSON object; NaN and infinity are null there."""
        if self.as_json:
            written = json.dumps(summary, default=lambda x: x.tolist())
            # What is not finite was not measured.
            text = json.dumps(json.loads(written, parse_constant=lambda name: None))
        print(text, flush=True)


def command(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Make a function of a ``Session`` a command that takes the options of both."""
    shared = inspect.signature(Session).parameters
    every = inspect.signature(function).parameters | shared

    def run(**options: Any) -> int | None:
        session = Session(**{name: options.pop(name) for name in shared})
        return function(session, **options)

    # Typer reads the options from here.
    options = [p.replace(kind=p.KEYWORD_ONLY) for p in every.values()]
    run.__signature__ = inspect.Signature(options[1:])  # all but the session
    run.__annotations__ = {p.name: p.annotation for p in options}
    return app.command(function.__name__, help=inspect.getdoc(function))(run)


@command
def demo(session: Session, layer: Layer = None) -> int:
    """Invert four prompts at every layer; 1 unless all come back exactly.

    sipit-lite demo --layer 3
    """
    from sipit_lite.experiments import checks, inversion

    model = session.open()
    layers = range(model.n_layers + 1) if layer is None else [layer]
    prompts = {name: model.encode(text) for name, text in DEMO_TEXTS.items()}
    [prompts["random tokens"]] = inversion.sample(model, "random", 1, 20, session.seed)
    rows = []
    for (name, ids), at in product(prompts.items(), layers):
        recovered = sl.invert(model.states(ids, at), model, at, seed=session.seed)
        row = {"prompt": name, "layer": at, "tokens": len(recovered.tokens)}
        row["exact"] = recovered.tokens.equal(ids.cpu())
        row["accepted"] = float(recovered.distance.max())
        row["runner-up"] = float(recovered.runner_up.min())
        rows.append(row | {"seconds": recovered.seconds, "text": recovered.text})
        # At once, so that Ctrl-C takes nothing away.
        if not session.as_json:
            verdict = "exact" if row["exact"] else "NOT EXACT"
            place = f"{name}, layer {at}: {verdict} in {recovered.seconds:.2f} s"
            print(f"{place:44}{recovered.text!r:.40}", flush=True)
    exact = sum(row["exact"] for row in rows)
    summary = checks.setting(model) | {"exact": exact == len(rows), "rows": rows}
    session.show(summary, f"{exact} of {len(rows)} exact on {model.device}")
    return 0 if exact == len(rows) else 1


@command
def capture(
    session: Session,
    text: Annotated[str, Argument(help="The prompt, or - for standard input.")],
    layers: Annotated[list[int] | None, Option("--layer", "--layers")] = None,
    output: Annotated[str, Option("-o", "--output")] = "states.safetensors",
    dtype: Annotated[Literal[Format, "int8"] | None, Option(help="On disk.")] = None,
) -> None:
    """Write the hidden states of a text, and not the text, to a file.

    sipit-lite capture "My secret prompt" -o states.safetensors --layers 3 6
    """
    import torch

    # Standard input keeps a prompt out of the shell's history.
    if text == "-":
        # What is no UTF-8 becomes surrogates, which no tokenizer takes.
        text = sys.stdin.buffer.read().decode(errors="surrogateescape")
    model = session.open(max(layers) if layers else None)
    form = getattr(torch, dtype) if dtype else None
    saved = sl.write_states(output, model, text, layers or [model.n_layers], dtype=form)
    summary = {"file": output, "model": model.name, "layers": list(saved.states)}
    summary["dtype"] = str(saved.at(min(saved.states)).dtype).removeprefix("torch.")
    session.show(summary, "  ".join(f"{key}: {summary[key]}" for key in summary))


@command
def invert(
    session: Session,
    file: Annotated[str | None, Argument(help="What capture wrote.")] = None,
    text: Annotated[str | None, Option(help="Capture it first.")] = None,
    layer: Layer = None,
    policy: Annotated[Literal[*POLICIES], Option(help="Of search.")] = "auto",
    epsilon: Annotated[float | None, Option(help="Bound on the noise.")] = None,
    lens: Annotated[str | None, Option(help="A file to keep one in, or none.")] = None,
    on_fail: Annotated[Literal["raise", "nearest"], Option(help="A guess?")] = "raise",
    certify: Annotated[bool, Option("--certify", help="Test all tokens.")] = False,
    last: Annotated[bool, Option("--last", help="From the last state alone.")] = False,
    length: Annotated[int | None, Option(help="With --last: tokens.")] = None,
    leaked: Annotated[str | None, Option(help="keys, values, unit, ...")] = None,
) -> int:
    """Print the prompt whose hidden states are in a file; surest with --certify.

    sipit-lite invert states.safetensors --lens lens.safetensors
    """
    from sipit_lite.io import loading

    if (file is None) == (text is None):
        raise sl.StatesError("got both or no file and --text; expected one of them")
    others = {"policy": policy, "lens": lens, "certify": certify, "on-fail": on_fail}
    for name, given in others.items():  # each needs all states
        if last and given not in ("auto", None, False, "raise"):
            raise sl.StatesError(f"got --last with --{name}; expected one of them")
    if length is not None and not last:
        raise sl.StatesError("got --length without --last; expected both")
    deepest = layer
    if text is None:
        captured = sl.read_states(file, None if layer is None else [layer])
        # A file may come from anybody, and to load a model is to trust its folder.
        ours = (loading.POCKET, loading.REAL, os.environ.get("SIPIT_LITE_MODEL"))
        if session.model is None and captured.model not in ours:
            received = f"got {file!r} with states of the model {captured.model!r}"
            raise sl.StatesError(f"{received}; expected --model with the name of one")
        session.model = session.model or captured.model
        deepest = max(captured.states) if layer is None else layer
    # A lens is of all blocks; without one, those above expect what comes next.
    alone = not leaked and (policy != "auto" or lens == "none")
    model = session.open(deepest if alone else None)
    model = sl.Leaked(model, leaked) if leaked else model
    if text is not None:
        layer = model.n_layers if layer is None else layer
        captured = sl.Captured({layer: model.states(text, layer)}, model.name)
    at = min(captured.states) if layer is None else layer
    stored = captured.at(at)
    rows = model.rows(stored, at) if leaked and text is None else stored
    captured = replace(captured, states={**captured.states, at: rows})
    options = {"epsilon": epsilon, "seed": session.seed, "progress": True}
    if last:
        captured.check(model)
        row = captured.at(at)[-1:].flatten()
        recovered = sl.invert_last(row, model, at, length, **options)
    else:
        order = policy if policy == "auto" else getattr(sl, policy.title())()
        options |= {"policy": order, "on_fail": on_fail, "certify": certify}
        options["lens"] = lens and lens != "none" and lens_of(lens, model, at)
        # Without a layer, the cheapest one that does not refuse.
        recovered = captured.invert(model, layer, **options)
    more = {"model": model.name, "certified": recovered.certified}
    session.show(vars(recovered) | more, recovered.text)
    guesses = (~recovered.verified).nonzero()[:, 0].tolist()
    if last:
        ends = f"distance {recovered.distance[-1]:.2g}, "
        say("verified", ends + f"runner-up {recovered.runner_up[-1]:.2g}")
    elif guesses:
        say("not verified, nearest tokens only", f"positions {guesses}")
    elif certify:
        say("certified", f"{recovered.certified}, room {recovered.headroom.min():.2g}")
    # A lens that could not be kept takes no prompt with it.
    return 0 if lens in (None, "none") or Path(lens).exists() else 1


def lens_of(path: str, model: "sl.LanguageModel", layer: int) -> "sl.Lens":
    """The lens of a file, or a new one, which is written to it if that is possible."""
    if Path(path).exists():
        return sl.Lens.load(path, model)
    # Before the fit, which takes half a minute.
    if not os.access(Path(path).parent, os.W_OK):
        raise sl.StatesError(f"got the lens {path!r}; expected a writable folder there")
    lens = sl.Lens.fit(model, layer, progress=True)
    try:
        lens.save(path)
    except sl.LensError as error:
        say("sipit-lite invert", error)
    return lens


@command
def collisions(
    session: Session,
    prompts: Annotated[int, Option("-n", "--prompts", help="Distinct ones.")] = 2000,
    length: Annotated[int, Option(help="Tokens of each.")] = 24,
    source: Source = "bundled",
    layers: Layers = None,
    closest: Annotated[int, Option(help="Pairs to report.")] = 10,
    exhaustive: Annotated[int, Option(min=0, help="Prompts to continue.")] = 0,
    shards: Shards = None,
) -> None:
    """Find the closest pairs among the last states of many prompts.

    sipit-lite collisions -n 1000 --layers 3 6 --exhaustive 2
    """
    from sipit_lite.experiments import survey

    model = session.open(max(layers) if layers else None)
    layers = layers or list(range(1, model.n_layers + 1))
    options = {"source": source, "seed": session.seed}
    drawn = survey.from_source(model.tokenizer, prompts, length, **options)
    states = sl.last_states(model, drawn, layers, folder=shards, progress=True)
    rows = []
    for layer, x in zip(layers, states, strict=True):
        x = x.to(model.device)
        report = sl.closest_pairs(x, closest, prompts=drawn, progress=True)
        near = survey.closest_texts(model, drawn, report)
        rows.append({"layer": layer, "closest": near} | survey.counts(report))
    # The prompts of the closest pairs at the last layer, all pairs within each.
    chosen = [drawn[i] for i in report.pairs.flatten().unique().tolist()[:exhaustive]]
    longer = []
    for layer in layers if chosen else []:
        reports = sl.continuations(model, chosen, layer, progress=True)
        for ids, report in zip(chosen, reports, strict=True):
            place = {"layer": layer, "after": model.decode(ids)}
            longer.append(place | survey.counts(report))
    line = "layer {layer}: {compared} pairs, minimum {minimum:.3e}, "
    line += "{collisions} collisions, {practical} practical"
    lines = ["collisions: ℓ2 distance below 1e-6; practical: torch.allclose"]
    lines += [line.format(**row) for row in rows]
    lines += [f"after {row['after']!r}, {line.format(**row)}" for row in longer]
    lines += [f"{pair['distance']:.3e} {pair['texts']}" for pair in near[:3]]
    summary = {"model": model.name, "device": str(model.device), "prompts": len(drawn)}
    summary |= {"length": length, "layers": rows, "exhaustive": longer}
    session.show(summary, "\n".join(lines))


@command
def bench(
    session: Session,
    name: Annotated[Literal[*BENCHES], Argument(metavar="BENCH")],
    quick: Quick = False,
) -> None:
    """Measure something, side by side and against targets.

    sipit-lite bench inversion --quick
    """
    from sipit_lite.experiments import checks
    from sipit_lite.io.loading import REAL

    session.model = session.model or (REAL if name == "real" else None)
    model = session.open()
    if model.tokenizer is None:
        raise sl.StatesError(f"got {model.name} without a readable tokenizer")
    measure = resolve_name(f"sipit_lite.experiments.{BENCHES[name]}")
    lines, data = measure(model, quick=quick, seed=session.seed, progress=True)
    reported = [f"{key}: {value:.4g}" for key, value in data["reported"].items()]
    text = "\n".join([checks.verdicts(lines), *reported, *data.get("table", [])])
    session.show(checks.report(name, model, lines, data), text)


@command
def reproduce(
    session: Session,
    experiment: Annotated[Literal[*EXPERIMENTS, "all"], Argument()],
    quick: Quick = False,
    prompts: Annotated[int | None, Option(help="How many.")] = None,
    length: Annotated[int | None, Option(help="Tokens of each.")] = None,
    lengths: Annotated[list[int] | None, Option(help="For lengths, times.")] = None,
    layers: Layers = None,
    ways: Annotated[list[str] | None, Option(help="To invert.")] = None,
    limit: Annotated[float | None, Option(help="Seconds, published ways.")] = None,
    source: Source = None,
    shards: Shards = None,
    rounded: Annotated[Quantised | None, Option(help="Round the weights.")] = None,
    output: Annotated[str | None, Option("-o", "--output", help="A folder.")] = None,
    force: Annotated[bool, Option("--force", help="Overwrite another run.")] = False,
) -> None:
    """Run an experiment of the paper on any model, and print its numbers beside.

    sipit-lite reproduce layers --layers 1 6 12 --source corpora -o results
    """
    from sipit_lite.experiments import paper, perturb
    from sipit_lite.experiments import reproduce as lab

    plan = {"prompts": prompts, "length": length, "limit": limit, "source": source}
    plan |= {"shards": shards, "lengths": lengths, "layers": layers, "ways": ways}
    # What is not given stays as the paper has it.
    given = {name: value for name, value in plan.items() if value not in (None, [])}
    changes = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    model = session.open()
    label = f"{rounded}, rounded" if rounded else session.weights or "full"
    if rounded:
        # The model keeps its name: the label says what was done to it.
        model = perturb.quantised(model, rounded, name=model.name)
    names = EXPERIMENTS if experiment == "all" else [experiment]
    paths = {}
    for name in names if output else []:
        file = f"{Path(model.name).name}-{name}-{label}.json".replace(", ", "-")
        paths[name] = lab.free_path(Path(output, file.replace(" ", "-")), force=force)
    common = {"quick": quick, "weights": label, "seed": session.seed, "progress": True}
    for name in names:
        # One list of options for all: each experiment takes those it has.
        parts = changes if experiment != "all" else lab.EXPERIMENTS[name].parts
        wanted = {part: changes[part] for part in changes if part in parts}
        run = lab.reproduce(name, model, **common, **wanted)
        if output:
            lab.keep_result(run, paths[name])
        lines = [x for x in paper.side_by_side([run], name) if x.measured is not None]
        session.show(run, paper.comparison(lines))
