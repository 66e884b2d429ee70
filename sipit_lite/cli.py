"""The command line: ``sipit-lite demo · capture · invert · collisions · bench · reproduce``."""

import argparse
import io
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from transformers import BitsAndBytesConfig

from sipit_lite.collisions import (
    COLLISION,
    CollisionReport,
    closest_pairs,
    continuations,
)
from sipit_lite.experiments import checks as bench
from sipit_lite.experiments.collision_speed import collisions
from sipit_lite.experiments.families import families
from sipit_lite.experiments.inversion import inversion
from sipit_lite.experiments.last_states import curves, laststate
from sipit_lite.experiments.paper import comparison, side_by_side
from sipit_lite.experiments.perturb import quantised
from sipit_lite.experiments.reach import reach
from sipit_lite.experiments.reproduce import (
    EXPERIMENTS,
    WAYS,
    keep_result,
    reproduce,
    result_path,
)
from sipit_lite.experiments.scale import scale
from sipit_lite.extensions.laststate import (
    LONGEST,
    RESTARTS,
    LastStateError,
    Stopped,
    invert_last,
)
from sipit_lite.extensions.lens import Lens
from sipit_lite.io.capture import Captured, read_states, write_states
from sipit_lite.io.corpora import SOURCES, from_source
from sipit_lite.io.loading import load
from sipit_lite.io.shards import last_states
from sipit_lite.io.text import KINDS, prompts
from sipit_lite.model import LanguageModel, ModelError, SipItError, StatesError
from sipit_lite.policies import Gradient, Newton, Policy, Random
from sipit_lite.recovery import Interrupted, NotVerified, Recovery
from sipit_lite.sipit import invert

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POLICIES: dict[str, Policy | str] = {
    "auto": "auto",
    "gradient": Gradient(),
    "newton": Newton(),
    "published": Gradient(1),
    "random": Random(),
}
BENCHES = {
    "exactness": bench.exactness, "scan": bench.scan, "collisions": collisions, "inversion": inversion, "scale": scale,
    "families": families, "laststate": laststate, "reach": reach,
}  # fmt: skip
DEMO_TEXTS = {
    "english": "A hidden state is not a summary: the prompt can be read back, word for word.",
    "python": "def area(radius: float) -> float:\n    return 3.14159 * radius**2\n",
    "emoji and scripts": "naïve 🙂 привет, 世界!",
}
DEMO_RANDOM_TOKENS = 20
WEIGHTS = {
    "int8": torch.float16,
    "fp4": torch.bfloat16,
}  # and the format their products are computed in
ROUNDED = ("int8", "fp4")
DTYPES = ("float32", "float16", "bfloat16", "float64", "int8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 1 for a demo that is not exact, 2 for bad input, 130 for Ctrl-C.

    >>> main(["invert", "--text", "hidden states", "--layer", "3", "--device", "cpu"])
    hidden states
    0
    """
    options = parser().parse_args(argv)
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # a terminal that cannot show a character still gets the rest
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if abs(options.seed) >= 2**62:
            raise ModelError(
                f"got seed {options.seed}; expected a whole number below 2**62"
            )
        return options.run(options)
    except (SipItError, NotVerified, LastStateError) as error:
        print(f"sipit-lite {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        told = stop if isinstance(stop, Interrupted | Stopped) else "interrupted"
        print(f"sipit-lite {options.command}: {told}", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--model",
        help="pocket-gpt2 (default), a folder, or a name on the Hugging Face hub",
    )
    shared.add_argument(
        "--random-init",
        action="store_true",
        help="weights as drawn at initialisation; for gpt2, no file",
    )
    shared.add_argument(
        "--layer",
        type=int,
        help="0 (embeddings) to L; the demo takes all, the others the last",
    )
    shared.add_argument(
        "--policy",
        choices=POLICIES,
        default="auto",
        help="the order in which tokens are tried",
    )
    shared.add_argument(
        "--model-dtype",
        choices=DTYPES[:4],
        help="the format the model computes in (default: float32)",
    )
    shared.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="quantised weights; needs sipit-lite[quantised]",
    )
    shared.add_argument(
        "--device-map",
        help="auto spreads the weights over devices; needs sipit-lite[quantised]",
    )
    shared.add_argument(
        "--device",
        default="auto",
        help="auto (CUDA where there is one), cpu, cuda, ...",
    )
    shared.add_argument("--seed", type=int, default=0, help="below 2**62")
    shared.add_argument(
        "--json", action="store_true", help="one JSON object instead of text"
    )
    top = argparse.ArgumentParser(
        prog="sipit-lite", description="Hidden states that give back the prompt."
    )
    commands = top.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo", parents=[shared], help="invert four prompts at every layer"
    )
    demo.add_argument(
        "--figure",
        default="sipit-lite-demo.png",
        help="where the figure goes; empty for none",
    )
    demo.set_defaults(run=run_demo)

    capture = commands.add_parser(
        "capture", parents=[shared], help="text to a file of hidden states"
    )
    capture.add_argument("text", help="the prompt, or - to read it from standard input")
    capture.add_argument("-o", "--output", default="states.safetensors")
    capture.add_argument(
        "--layers",
        type=int,
        nargs="+",
        help="several layers in one file, in place of --layer",
    )
    capture.add_argument(
        "--dtype",
        choices=DTYPES,
        help="store the states in this format (default: the model's)",
    )
    capture.add_argument(
        "--keep-text",
        action="store_true",
        help="write the text and its ids beside the states",
    )
    capture.set_defaults(run=run_capture)

    back = commands.add_parser(
        "invert", parents=[shared], help="hidden states back to the prompt"
    )
    source = back.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "file",
        nargs="?",
        help="a file that capture wrote; it names its model and layer",
    )
    source.add_argument("--text", help="capture this text first, then invert")
    back.add_argument(
        "--epsilon", type=float, help="bound on the noise that was added to each state"
    )
    back.add_argument(
        "--certify",
        action="store_true",
        help="test the whole vocabulary, measure the margins",
    )
    back.add_argument(
        "--lens",
        help="a file with the lens of this model and layer; fitted and written if not there yet",
    )
    back.add_argument(
        "--on-fail",
        choices=("raise", "nearest"),
        default="raise",
        help="nearest: guess, and mark it",
    )
    back.add_argument(
        "--last", action="store_true", help="from the state of the last token alone"
    )
    back.add_argument(
        "--length",
        type=int,
        help="with --last: tokens of the prompt, where that is known",
    )
    back.add_argument(
        "--longest",
        type=int,
        help=f"with --last: tokens of the longest that is tried ({LONGEST})",
    )
    back.add_argument(
        "--seconds", type=float, help="with --last: when to give up (300)"
    )
    back.add_argument(
        "--restarts",
        type=int,
        help=f"with --last: how often a search may begin ({RESTARTS})",
    )
    back.set_defaults(run=run_invert)

    search = commands.add_parser(
        "collisions",
        parents=[shared],
        help="the closest pairs among many prompts' states",
    )
    search.add_argument(
        "-n",
        "--prompts",
        type=int,
        default=2000,
        help="distinct prompts, the kinds in turn",
    )
    search.add_argument("--length", type=int, default=24, help="tokens of each prompt")
    search.add_argument("--kinds", nargs="+", choices=KINDS, default=["prose", "code"])
    search.add_argument(
        "--source",
        choices=SOURCES,
        default="bundled",
        help="installed text holds far more; corpora: the hub's",
    )
    search.add_argument(
        "--layers", type=int, nargs="+", help="the default is all of them, from 1"
    )
    search.add_argument(
        "--closest", type=int, default=10, help="how many pairs to report"
    )
    search.add_argument(
        "--exhaustive",
        type=int,
        default=0,
        metavar="M",
        help="each token after M of the closest",
    )
    search.add_argument(
        "--shards",
        help="a folder that keeps the states, so that an interrupted run goes on",
    )
    search.add_argument(
        "--figure", default="", help="a .png of nearest-neighbour distances by layer"
    )
    search.set_defaults(run=run_collisions)

    measure = commands.add_parser(
        "bench", parents=[shared], help="measurements, side by side in one run"
    )
    measure.add_argument("bench", choices=BENCHES)
    measure.add_argument(
        "--quick", action="store_true", help="a smoke run of a few seconds"
    )
    measure.add_argument(
        "--figure", default="", help="a .png, for the benches inversion and laststate"
    )
    measure.set_defaults(run=run_bench)

    again = commands.add_parser(
        "reproduce",
        parents=[shared],
        help="the paper's experiments, beside its numbers",
    )
    again.add_argument("experiment", choices=[*EXPERIMENTS, "all"])
    again.add_argument(
        "--quick",
        action="store_true",
        help="a smoke run of seconds; else as many prompts as the paper",
    )
    again.add_argument("--prompts", type=int, help="how many")
    again.add_argument(
        "--length", type=int, help="tokens of each, the begin-of-text token not counted"
    )
    again.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        help="for lengths and times, in place of --length",
    )
    again.add_argument(
        "--layers",
        type=int,
        nargs="+",
        help="in place of those of the paper's table, and of --layer",
    )
    again.add_argument("--ways", nargs="+", choices=WAYS, help="of inverting")
    again.add_argument(
        "--limit", type=float, help="seconds that a published way gets for a prompt"
    )
    again.add_argument(
        "--source",
        choices=SOURCES,
        help="of the text; corpora are the paper's, from the hub",
    )
    again.add_argument(
        "--shards",
        help="a folder that keeps states and streamed text, so that a stopped run goes on",
    )
    again.add_argument(
        "--rounded",
        choices=ROUNDED,
        help="round the weights of a loaded model; needs no more packages",
    )
    again.add_argument(
        "-o", "--output", help="a folder that gets one JSON file for each experiment"
    )
    again.add_argument(
        "--force", action="store_true", help="replace earlier files there"
    )
    again.set_defaults(run=run_reproduce)
    return top


def run_demo(options: argparse.Namespace) -> int:
    """Invert English, Python, other scripts and random tokens at every layer; 1 unless all come back exactly."""
    if options.figure:
        _check_figure(options.figure)
    model = _model(options)
    layers = range(model.n_layers + 1) if options.layer is None else [options.layer]
    rows, found = [], {}
    for name, ids in demo_prompts(model, options.seed):
        for layer in layers:
            recovery = invert(
                model.states(ids, layer),
                model,
                layer,
                policy=POLICIES[options.policy],
                seed=options.seed,
                progress=True,
            )
            found[name] = recovery
            rows.append(
                _demo_row(
                    name, layer, recovery, torch.equal(recovery.tokens, ids.cpu())
                )
            )
            if not options.json:
                print(_demo_line(rows[-1], header=len(rows) == 1), flush=True)
    exact = all(row["exact"] for row in rows)
    if options.figure:
        demo_figure(found, layers[-1], model.vocab_size, options.figure)
    summary = {
        "model": model.name,
        "device": str(model.device),
        "exact": exact,
        "rows": rows,
        "peak memory GiB": bench.peak_memory(),
        "figure": options.figure or None,
    }
    print(json.dumps(summary) if options.json else _demo_end(summary))
    return 0 if exact else 1


def run_capture(options: argparse.Namespace) -> int:
    """Write the hidden states of a text at one or more layers."""
    asked = options.layers or [] if options.layer is None else [options.layer]
    model = _model(options, max(asked, default=None))
    text = sys.stdin.read() if options.text == "-" else options.text
    dtype = getattr(torch, options.dtype) if options.dtype else None
    captured = write_states(
        options.output,
        model,
        text,
        asked or [model.n_layers],
        dtype=dtype,
        keep_text=options.keep_text,
    )
    states = captured.states[captured.layer]
    summary = {
        "file": options.output,
        "model": model.name,
        "layers": list(captured.states),
        "shape": list(states.shape),
        "dtype": str(states.dtype).removeprefix("torch."),
        "text kept": options.keep_text,
    }
    print(
        json.dumps(summary)
        if options.json
        else "  ".join(f"{k}: {v}" for k, v in summary.items())
    )
    return 0


def run_invert(options: argparse.Namespace) -> int:
    """Print the prompt whose hidden states are in a file, or of a text just captured."""
    limits = _limits(options)
    layer = options.layer
    if options.text is None:
        states = read_states(options.file)
        options.model = states.model if options.model is None else options.model
        model = _model(
            options,
            None if options.lens else max(states.states) if layer is None else layer,
        )
    else:
        model = _model(options, None if options.lens else layer)
        layer = _layer(options, model)
        states = model.states(options.text, layer)
    if options.last:
        return _run_last(options, states, model, layer, limits)
    recovery = invert(
        states,
        model,
        layer,
        policy=POLICIES[options.policy],
        seed=options.seed,
        epsilon=options.epsilon,
        certify=options.certify,
        lens=_lens(options.lens, model, states.layer if layer is None else layer)
        if options.lens
        else None,
        on_fail=options.on_fail,
        progress=True,
    )
    told = as_json(recovery) | {
        "model": model.name,
        "layer": layer if recovery.layer is None else recovery.layer,
    }
    print(json.dumps(told) if options.json else recovery.text)
    if not recovery.verified.all():
        guessed = (~recovery.verified).nonzero()[:, 0].tolist()
        print(
            f"not verified, nearest tokens only: positions {', '.join(map(str, guessed))}",
            file=sys.stderr,
        )
    return 0


def _limits(options: argparse.Namespace) -> dict[str, int | float]:
    """The options of ``--last`` that were given, which nothing else takes; what ``--last`` does not take is refused."""
    given = {
        name: getattr(options, name)
        for name in ("length", "longest", "seconds", "restarts")
    }
    given = {name: value for name, value in given.items() if value is not None}
    if given and not options.last:
        raise StatesError(
            f"got --{next(iter(given))} without --last; expected them together"
        )
    others = {"policy": options.policy != "auto", "certify": options.certify, "lens": options.lens is not None,
              "on-fail": options.on_fail != "raise"}  # fmt: skip
    if options.last and any(others.values()):
        raise StatesError(
            f"got --last with --{next(name for name, used in others.items() if used)}, which needs the states of all "
            "positions; expected --epsilon, --length, --longest, --seconds or --restarts"
        )
    return given


def _run_last(
    options: argparse.Namespace,
    states: Captured | torch.Tensor,
    model: LanguageModel,
    layer: int | None,
    limits: dict[str, int | float],
) -> int:
    """Print the prompt found from the last row alone, and how it was verified."""
    if isinstance(states, Captured):
        states.check(model)
        layer = states.layer if layer is None else layer
        if layer in states.scales:
            raise StatesError(
                f"got layer {layer} in 8-bit integers with --last; expected a floating-point format"
            )
        states = states.at(layer)
    if states.ndim != 2 or not len(states):
        raise StatesError(
            f"got states of shape {tuple(states.shape)}; expected (T, {model.d_model}), the last row used"
        )
    found = invert_last(
        states[-1],
        model,
        layer,
        epsilon=options.epsilon,
        seed=options.seed,
        progress=True,
        **limits,
    )
    told = as_json(found) | {"model": model.name, "layer": layer}
    print(json.dumps(told) if options.json else found.text)
    at_the_end = {
        name: float(getattr(found, name)[-1])
        for name in ("distance", "radius", "runner_up")
    }
    print(
        "verified: "
        + ", ".join(f"{name} {value:.2g}" for name, value in at_the_end.items()),
        file=sys.stderr,
    )
    return 0


def run_collisions(options: argparse.Namespace) -> int:
    """Compare all pairs of many prompts at the layers asked for; with ``--exhaustive``, all continuations of some."""
    if options.figure:
        _check_figure(options.figure)
    model = _model(options, max(options.layers) if options.layers else None)
    if model.tokenizer is None:
        raise ModelError(
            f"got {model.name} without a readable tokenizer; the prompts need one"
        )
    layers = options.layers or list(range(1, model.n_layers + 1))
    try:
        asked = from_source(
            model.tokenizer,
            options.prompts,
            options.length,
            kinds=options.kinds,
            seed=options.seed,
            source=options.source,
            folder=options.shards,
        )
    except ValueError as error:
        raise StatesError(str(error)) from error
    states = last_states(model, asked, layers, folder=options.shards, progress=True)
    reports = [
        closest_pairs(
            x.to(model.device),
            options.closest,
            prompts=asked,
            nearest=bool(options.figure),
            progress=True,
        )
        for x in states
    ]
    rows = [
        _collision_row(model, layer, report, asked)
        for layer, report in zip(layers, reports, strict=True)
    ]
    chosen = [
        asked[row]
        for row in reports[-1].pairs.flatten().unique().tolist()[: options.exhaustive]
    ]
    exhaustive = [
        {
            "layer": layer,
            "prompts": len(chosen),
            **_least(continuations(model, chosen, layer, progress=True)),
        }
        for layer in (layers if chosen else [])
    ]
    if options.figure:
        collision_figure(layers, reports, options.figure)
    summary = {
        "model": model.name,
        "device": str(model.device),
        "prompts": len(asked),
        "length": options.length,
    }
    summary |= {
        "layers": rows,
        "exhaustive": exhaustive,
        "figure": options.figure or None,
    }
    print(json.dumps(summary) if options.json else "\n".join(_collision_lines(summary)))
    return 0


def collision_figure(
    layers: Sequence[int], reports: Sequence[CollisionReport], path: str
) -> None:
    """Nearest-neighbour distances of all prompts at each layer, with the minimum and the collision threshold."""
    plt, plots = _drawing()
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    plots.nearest_by_layer(
        layers, [report.nearest.numpy() for report in reports], COLLISION, ax
    )
    _save(figure, path)


def _collision_row(
    model: LanguageModel,
    layer: int,
    report: CollisionReport,
    asked: Sequence[torch.Tensor],
) -> dict:
    closest = [
        {"distance": distance, "texts": [model.decode(asked[row]) for row in pair]}
        for distance, pair in zip(
            report.distances.tolist(), report.pairs.tolist(), strict=True
        )
    ]
    counts = {
        name: getattr(report, name)
        for name in ("compared", "recomputed", "collisions", "practical", "seconds")
    }
    return {"layer": layer, "minimum": report.minimum, **counts, "closest": closest}


def _least(reports: Iterator[CollisionReport]) -> dict:
    """What the reports of several prompts say together."""
    found = list(reports)
    return {
        "minimum": min(report.minimum for report in found),
        "compared": sum(report.compared for report in found),
        "collisions": sum(report.collisions for report in found),
        "practical": sum(report.practical for report in found),
    }


def _collision_lines(summary: dict) -> Iterator[str]:
    for title, rows in (
        ("last-token states", summary["layers"]),
        ("one-token continuations", summary["exhaustive"]),
    ):
        if rows:
            yield f"{title:<24}{'layer':>6}{'pairs':>14}{'minimum':>12}{'collisions':>12}{'practical':>11}"
            for row in rows:
                counts = f"{row['collisions']:>12}{row['practical']:>11}"
                yield f"{'':<24}{row['layer']:>6}{row['compared']:>14}{row['minimum']:>12.3e}{counts}"
    last = summary["layers"][-1]
    yield f"closest at layer {last['layer']}:"
    for pair in last["closest"][:3]:
        yield f"{pair['distance']:.4f}  " + "  |  ".join(
            json.dumps(text, ensure_ascii=False) for text in pair["texts"]
        )
    yield "collisions: ℓ2 distance below 1e-6; practical: torch.allclose (rtol 1e-5, atol 1e-8)"
    if summary["figure"]:
        yield f"figure {summary['figure']}"


def run_bench(options: argparse.Namespace) -> int:
    """Run one bench and print its table of checks, or its JSON object."""
    if options.figure and options.bench not in ("inversion", "laststate"):
        raise StatesError(
            f"got a figure for the bench {options.bench!r}; expected one for 'inversion' or 'laststate'"
        )
    if options.figure:
        _check_figure(options.figure)
    model = _model(options)
    if model.tokenizer is None:
        raise ModelError(
            f"got {model.name} without a readable tokenizer; the benches need one for their prompts"
        )
    checks, data = BENCHES[options.bench](
        model, quick=options.quick, seed=options.seed, progress=True
    )
    if options.figure:
        draw = success_figure if options.bench == "laststate" else speed_figure
        draw(data["cells" if options.bench == "laststate" else "speed"], options.figure)
    if options.json:
        print(json.dumps(bench.report(options.bench, model, checks, data)))
    else:
        print(
            bench.verdicts(checks),
            *(f"{name}: {value:.4g}" for name, value in data["reported"].items()),
            sep="\n",
        )
    return 0


def speed_figure(speed: dict[str, dict], path: str) -> None:
    """Seconds a prompt of each way to invert, from the published loop to ``auto``, at the last layer."""
    plt, plots = _drawing()
    rows = {
        name: row
        for name, row in speed.items()
        if "published, seconds" in row and "forward, seconds" in row
    }
    figure, axes = plt.subplots(
        1, len(rows), figsize=(6 * len(rows), 3.5), layout="constrained", squeeze=False
    )
    for ax, (name, row) in zip(axes[0], rows.items(), strict=True):
        ways = ("published", "newton", "auto without a lens", "auto")
        plots.time_ladder(
            {way: row[f"{way}, seconds"] for way in ways},
            row["forward, seconds"],
            "one forward pass",
            ax,
        )
        ax.set_xlabel(f"seconds per prompt, {name}")
    _save(figure, path)


def success_figure(cells: list[dict], path: str) -> None:
    """Shares of prompts that came back from their last state, by length, with 95 % intervals."""
    plt, plots = _drawing()
    figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    plots.success_by_length(curves(cells), ax)
    _save(figure, path)


def run_reproduce(options: argparse.Namespace) -> int:
    """Run one experiment of the paper or all of them, and print the numbers with the paper's where it has them."""
    model, weights = _model(options), options.weights or "full"
    if options.rounded:
        # The model keeps its name: what was done to the weights is told beside it.
        model, weights = (
            LanguageModel(
                quantised(model, options.rounded).decoder,
                model.tokenizer,
                name=model.name,
            ),
            f"{options.rounded}, rounded",
        )
    names = ("prompts", "length", "lengths", "ways", "limit", "source", "shards")
    changes = {name: getattr(options, name) for name in names}
    changes["layers"] = options.layers or (
        None if options.layer is None else [options.layer]
    )
    changes = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in changes.items()
        if value is not None
    }
    experiments = [options.experiment]
    if options.experiment == "all":
        experiments = list(EXPERIMENTS)
    # Before the first run, not after it.
    paths = {}
    if options.output:
        for name in experiments:
            paths[name] = result_path(
                options.output, model, name, weights, force=options.force
            )
    for experiment in experiments:
        wanted = changes
        if options.experiment == "all":
            parts = EXPERIMENTS[experiment].parts
            wanted = {name: value for name, value in changes.items() if name in parts}
        run = reproduce(
            experiment,
            model,
            quick=options.quick,
            weights=weights,
            seed=options.seed,
            progress=True,
            **wanted,
        )
        if options.output:
            keep_result(run, paths[experiment])
        lines = [
            line
            for line in side_by_side([run], experiment)
            if line.measured is not None
        ]
        print(json.dumps(run) if options.json else comparison(lines), flush=True)
    return 0


def demo_prompts(model: LanguageModel, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The prompts of the demo; a model without a tokenizer gets the random one alone."""
    if model.tokenizer is not None:
        yield from ((name, model.encode(text)) for name, text in DEMO_TEXTS.items())
        yield (
            "random tokens",
            next(prompts(model.tokenizer, "random", DEMO_RANDOM_TOKENS, seed=seed)).to(
                model.device
            ),
        )
    else:
        generator = torch.Generator().manual_seed(seed)
        yield (
            "random tokens",
            torch.randint(
                model.vocab_size, (DEMO_RANDOM_TOKENS,), generator=generator
            ).to(model.device),
        )


def demo_figure(
    found: dict[str, Recovery], layer: int, vocab_size: int, path: str
) -> None:
    """Candidates tested per position, and accepted distance against runner-up, at one layer."""
    plt, plots = _drawing()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    plots.candidates(
        [r.tested.tolist() for r in found.values()], list(found), vocab_size, left
    )
    joined = {
        k: torch.cat([getattr(r, k) for r in found.values()]).tolist()
        for k in ("distance", "runner_up", "radius")
    }
    plots.distances(joined["distance"], joined["runner_up"], joined["radius"], right)
    right.set_xlabel(f"position, all prompts in a row, layer {layer}")
    _save(figure, path)


def as_json(recovery: Recovery) -> dict:
    """A recovery as plain numbers and lists.

    >>> one, none = torch.ones(1), torch.full((1,), torch.nan)
    >>> told = as_json(Recovery(torch.tensor([7]), "a", one, one, one, torch.tensor([3]), one > 0, none, 0.5))
    >>> told["tokens"], told["margin"]
    ([7], [None])
    """
    return {name: _plain(value) for name, value in vars(recovery).items()}


def _plain(value: object) -> object:
    if not isinstance(value, torch.Tensor):
        return value
    # JSON knows neither NaN nor infinity: what was not measured is null.
    return [
        x if not isinstance(x, float) or math.isfinite(x) else None
        for x in value.tolist()
    ]


def _check_figure(path: str) -> None:
    if Path(path).suffix != ".png" or not Path(path).parent.is_dir():
        raise StatesError(
            f"got the figure {path!r}; expected a name that ends in .png in a folder that exists"
        )


def _drawing() -> tuple[ModuleType, ModuleType]:
    """Matplotlib without a display, loaded only by commands that draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from sipit_lite.teaching import figures as plots

    return plt, plots


def _save(figure: "Figure", path: str) -> None:
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise StatesError(
            f"got the path {path!r}, where no figure can be written ({error})"
        ) from error
    finally:
        figure.clear()


def _model(options: argparse.Namespace, layers: int | None = None) -> LanguageModel:
    """The model asked for; ``layers`` is the last one that the command looks at."""
    dtype = options.model_dtype or str(
        WEIGHTS.get(options.weights, torch.float32)
    ).removeprefix("torch.")
    return load(
        options.model,
        device=options.device,
        dtype=getattr(torch, dtype),
        layers=layers,
        device_map=options.device_map or ("auto" if options.weights else None),
        quantization_config=_quantised(options.weights) if options.weights else None,
        random_init=options.random_init,
        seed=options.seed,
        progress=True,
    )


def _quantised(weights: str) -> BitsAndBytesConfig:
    try:
        return BitsAndBytesConfig(
            load_in_8bit=weights == "int8", load_in_4bit=weights == "fp4"
        )
    except ImportError as error:
        raise ModelError(
            f"got --weights {weights}; it needs pip install 'sipit-lite[quantised]' ({error})"
        ) from error


def _lens(path: str, model: LanguageModel, layer: int) -> Lens:
    if Path(path).exists():
        return Lens.load(path, model)
    model.check_layer(layer)
    lens = Lens.fit(model, layer, progress=True)
    lens.save(path)
    return lens


def _layer(options: argparse.Namespace, model: LanguageModel) -> int:
    return model.n_layers if options.layer is None else options.layer


def _demo_row(name: str, layer: int, recovery: Recovery, exact: bool) -> dict:
    return {
        "prompt": name,
        "layer": layer,
        "tokens": len(recovery.tokens),
        "exact": exact,
        "tested": float(recovery.tested.float().median()),
        "accepted": float(recovery.distance.max()),
        "runner-up": float(recovery.runner_up.min()),
        "seconds": recovery.seconds,
        "text": recovery.text,
    }


def _demo_line(row: dict, header: bool) -> str:
    head = (
        "prompt",
        "layer",
        "tokens",
        "exact",
        "tested",
        "accepted",
        "runner-up",
        "seconds",
        " text",
    )
    cells = (row["prompt"], row["layer"], row["tokens"], "yes" if row["exact"] else "NO", f"{row['tested']:.0f}",
             f"{row['accepted']:.1e}", f"{row['runner-up']:.1e}", f"{row['seconds']:.2f}",
             " " + json.dumps(row["text"], ensure_ascii=False)[:40])  # fmt: skip
    form = "{:<18}{:>5}{:>8}{:>7}{:>8}{:>10}{:>11}{:>9} {}"
    return (form.format(*head) + "\n" if header else "") + form.format(*cells)


def _demo_end(summary: dict) -> str:
    count = sum(row["exact"] for row in summary["rows"])
    memory = (
        f", peak memory {summary['peak memory GiB']:.2f} GiB"
        if summary["peak memory GiB"]
        else ""
    )
    figure = f", figure {summary['figure']}" if summary["figure"] else ""
    return (
        f"{count} of {len(summary['rows'])} exact on {summary['device']}{memory}{figure}\n"
        "tested: median candidates a token; accepted: largest distance; runner-up: smallest distance of another token"
    )


if __name__ == "__main__":
    sys.exit(main())
