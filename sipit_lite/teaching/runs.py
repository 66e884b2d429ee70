"""One page's figures for this model, beside those that were stored for others."""

import json
from collections.abc import Callable
from pathlib import Path

from sipit_lite.model import LanguageModel

Figures = dict[str, float | int | str]
BUNDLED = "pocket-gpt2"  # runs on every page, so it is never stored


def beside(name: str | Path) -> Path:
    """What a page reads: beside it, or where it runs alone, from the package."""
    path = Path(name)
    return path if path.exists() else Path(__file__).parents[1] / "book" / path


def compare(
    page: str,
    headline: Callable[[LanguageModel], Figures],
    model: LanguageModel,
    folder: str | Path = "runs",
) -> None:
    """Print what ``headline`` measures on ``model``, a column beside the stored runs.

    A model other than the bundled one is added to ``folder/page.json``, in place of
    its older run. The keys of ``headline`` name layers as 1, L/2, L: depths differ.

    >>> from sipit_lite import load
    >>> compare("a_page", lambda model: {"layers": model.n_layers}, load())
            pocket-gpt2
    layers            6
    """
    name = Path(model.name).name
    path = Path(folder) / f"{page}.json"
    older = beside(path)
    stored = json.loads(older.read_text(encoding="utf-8")) if older.exists() else {}
    runs = {name: headline(model)}
    if name != BUNDLED:
        stored |= runs
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(stored, indent=1, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
    runs |= stored
    width = max(len(what) for what in runs[name])
    print(" " * width + "".join(f"{name:>13}" for name in runs))
    for what in runs[name]:
        # A run of an older page may lack what is measured now.
        values = [run.get(what, "-") for run in runs.values()]
        print(f"{what:{width}}" + "".join(f"{show(value):>13}" for value in values))


def show(value: float | int | str) -> str:
    """Three digits of a measurement; counts and words as they are."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
