"""The command line: ``sipit-lite demo · capture · invert · bench``."""

import argparse
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from sipit_lite import bench
from sipit_lite.capture import read_states, write_states
from sipit_lite.models import LanguageModel, ModelError, load
from sipit_lite.policies import Gradient, Policy, Random
from sipit_lite.prompts import prompts
from sipit_lite.sipit import Interrupted, NotVerified, Recovery, invert
from sipit_lite.verify import StatesError

POLICIES: dict[str, Policy] = {"gradient": Gradient(), "published": Gradient(1), "random": Random()}
DEMO_TEXTS = {
    "english": "A hidden state is not a summary: the prompt can be read back, word for word.",
    "python": "def area(radius: float) -> float:\n    return 3.14159 * radius**2\n",
    "emoji and scripts": "naïve 🙂 привет, 世界!",
}
DEMO_RANDOM_TOKENS = 20
DTYPES = ("float32", "float16", "bfloat16", "float64")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns 0, 1 for a demo that is not exact, 2 for bad input, 130 for Ctrl-C.

    >>> main(["invert", "--text", "hidden states", "--layer", "3", "--device", "cpu"])
    hidden states
    0
    """
    options = parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that cannot show a character still gets the rest
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if abs(options.seed) >= 2**62:
            raise ModelError(f"got seed {options.seed}; expected a whole number below 2**62")
        return options.run(options)
    except (ModelError, StatesError, NotVerified) as error:
        print(f"sipit-lite {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(
            f"sipit-lite {options.command}: {stop if isinstance(stop, Interrupted) else 'interrupted'}", file=sys.stderr
        )
        return 130


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--model", help="pocket-gpt2 (default), a folder, or a name on the Hugging Face hub")
    shared.add_argument(
        "--random-init", action="store_true", help="weights as drawn at initialisation; for gpt2, no file"
    )
    shared.add_argument("--layer", type=int, help="0 (embeddings) to L; the demo takes all, the others the last")
    shared.add_argument("--policy", choices=POLICIES, default="gradient", help="the order in which tokens are tried")
    shared.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, ...")
    shared.add_argument("--seed", type=int, default=0, help="below 2**62")
    shared.add_argument("--json", action="store_true", help="one JSON object instead of text")
    top = argparse.ArgumentParser(prog="sipit-lite", description="Hidden states that give back the prompt.")
    commands = top.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", parents=[shared], help="invert four prompts at every layer")
    demo.add_argument("--figure", default="sipit-lite-demo.png", help="where the figure goes; empty for none")
    demo.set_defaults(run=run_demo)

    capture = commands.add_parser("capture", parents=[shared], help="text to a file of hidden states")
    capture.add_argument("text", help="the prompt, or - to read it from standard input")
    capture.add_argument("-o", "--output", default="states.safetensors")
    capture.add_argument("--dtype", choices=DTYPES, help="store the states in this format (default: the model's)")
    capture.add_argument("--keep-text", action="store_true", help="write the text and its ids beside the states")
    capture.set_defaults(run=run_capture)

    back = commands.add_parser("invert", parents=[shared], help="hidden states back to the prompt")
    source = back.add_mutually_exclusive_group(required=True)
    source.add_argument("file", nargs="?", help="a file that capture wrote; it names its model and layer")
    source.add_argument("--text", help="capture this text first, then invert")
    back.add_argument("--epsilon", type=float, help="bound on the noise that was added to each state")
    back.add_argument("--certify", action="store_true", help="test the whole vocabulary at each position")
    back.set_defaults(run=run_invert)

    measure = commands.add_parser("bench", parents=[shared], help="measurements, side by side in one run")
    measure.add_argument("bench", choices=bench.BENCHES)
    measure.add_argument("--quick", action="store_true", help="a smoke run of a few seconds")
    measure.set_defaults(run=run_bench)
    return top


def run_demo(options: argparse.Namespace) -> int:
    """Invert English, Python, other scripts and random tokens at every layer; 1 unless all come back exactly."""
    if options.figure and (Path(options.figure).suffix != ".png" or not Path(options.figure).parent.is_dir()):
        raise StatesError(
            f"got the figure {options.figure!r}; expected a name that ends in .png in a folder that exists"
        )
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
            rows.append(_demo_row(name, layer, recovery, torch.equal(recovery.tokens, ids.cpu())))
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
        "peak memory GiB": peak_memory(),
        "figure": options.figure or None,
    }
    print(json.dumps(summary) if options.json else _demo_end(summary))
    return 0 if exact else 1


def run_capture(options: argparse.Namespace) -> int:
    """Write the hidden states of a text at one layer."""
    model = _model(options)
    text = sys.stdin.read() if options.text == "-" else options.text
    dtype = getattr(torch, options.dtype) if options.dtype else None
    captured = write_states(
        options.output, model, text, _layer(options, model), dtype=dtype, keep_text=options.keep_text
    )
    summary = {
        "file": options.output,
        "model": model.name,
        "layer": captured.layer,
        "shape": list(captured.states.shape),
        "dtype": str(captured.states.dtype).removeprefix("torch."),
        "text kept": options.keep_text,
    }
    print(json.dumps(summary) if options.json else "  ".join(f"{k}: {v}" for k, v in summary.items()))
    return 0


def run_invert(options: argparse.Namespace) -> int:
    """Print the prompt whose hidden states are in a file, or of a text just captured."""
    if options.text is None:
        stored = read_states(options.file)
        options.model = stored.model if options.model is None else options.model
        model, layer, states = _model(options), stored.layer if options.layer is None else options.layer, stored.states
    else:
        model = _model(options)
        layer = _layer(options, model)
        states = model.states(options.text, layer)
    recovery = invert(
        states,
        model,
        layer,
        policy=POLICIES[options.policy],
        seed=options.seed,
        epsilon=options.epsilon,
        certify=options.certify,
        progress=True,
    )
    print(json.dumps(as_json(recovery) | {"model": model.name, "layer": layer}) if options.json else recovery.text)
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Run one bench and print its table of checks, or its JSON object."""
    model = _model(options)
    if model.tokenizer is None:
        raise ModelError(f"got {model.name} without a readable tokenizer; the benches need one for their prompts")
    checks, data = bench.BENCHES[options.bench](model, quick=options.quick, seed=options.seed, progress=True)
    if options.json:
        print(json.dumps(bench.report(options.bench, model, checks, data)))
    else:
        print(bench.table(checks), *(f"{name}: {value:.4g}" for name, value in data["reported"].items()), sep="\n")
    return 0


def demo_prompts(model: LanguageModel, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The prompts of the demo; a model without a tokenizer gets the random one alone."""
    if model.tokenizer is not None:
        yield from ((name, model.encode(text)) for name, text in DEMO_TEXTS.items())
        yield "random tokens", next(prompts(model.tokenizer, "random", DEMO_RANDOM_TOKENS, seed=seed)).to(model.device)
    else:
        generator = torch.Generator().manual_seed(seed)
        yield (
            "random tokens",
            torch.randint(model.vocab_size, (DEMO_RANDOM_TOKENS,), generator=generator).to(model.device),
        )


def demo_figure(found: dict[str, Recovery], layer: int, vocab_size: int, path: str) -> None:
    """Candidates tested per position, and accepted distance against runner-up, at one layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from sipit_lite import plots

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    plots.candidates([r.tested.tolist() for r in found.values()], list(found), vocab_size, left)
    joined = {
        k: torch.cat([getattr(r, k) for r in found.values()]).tolist() for k in ("distance", "runner_up", "radius")
    }
    plots.distances(joined["distance"], joined["runner_up"], joined["radius"], right)
    right.set_xlabel(f"position, all prompts in a row, layer {layer}")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise StatesError(f"got the path {path!r}, where no figure can be written ({error})") from error
    finally:
        plt.close(figure)


def as_json(recovery: Recovery) -> dict:
    """A recovery as plain numbers and lists.

    >>> one = torch.ones(1)
    >>> as_json(Recovery(torch.tensor([7]), "a", one, one, one, torch.tensor([3]), 0.5))["tokens"]
    [7]
    """
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in vars(recovery).items()
    }


def peak_memory() -> float | None:
    """Peak resident memory of this process so far, GiB; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _model(options: argparse.Namespace) -> LanguageModel:
    return load(options.model, device=options.device, random_init=options.random_init, seed=options.seed)


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
    head = ("prompt", "layer", "tokens", "exact", "tested", "accepted", "runner-up", "seconds", " text")
    cells = (row["prompt"], row["layer"], row["tokens"], "yes" if row["exact"] else "NO", f"{row['tested']:.0f}",
             f"{row['accepted']:.1e}", f"{row['runner-up']:.1e}", f"{row['seconds']:.2f}",
             " " + json.dumps(row["text"], ensure_ascii=False)[:40])  # fmt: skip
    form = "{:<18}{:>5}{:>8}{:>7}{:>8}{:>10}{:>11}{:>9} {}"
    return (form.format(*head) + "\n" if header else "") + form.format(*cells)


def _demo_end(summary: dict) -> str:
    count = sum(row["exact"] for row in summary["rows"])
    memory = f", peak memory {summary['peak memory GiB']:.2f} GiB" if summary["peak memory GiB"] else ""
    figure = f", figure {summary['figure']}" if summary["figure"] else ""
    return (
        f"{count} of {len(summary['rows'])} exact on {summary['device']}{memory}{figure}\n"
        "tested: median candidates a token; accepted: largest distance; runner-up: smallest distance of another token"
    )


if __name__ == "__main__":
    sys.exit(main())
