"""Prompts from the paper's corpora on the hub, streamed by ``sipit-lite[datasets]``."""

from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from sipit_lite.io.loading import hub_in_reach
from sipit_lite.io.text import TextError
from sipit_lite.model import edge_tokens

# Name on the hub, configuration, column of the text; The Pile in its public copy.
CORPORA = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en", "text"),
    "C4": ("allenai/c4", "en", "text"),
    "The Pile": ("monology/pile-uncopyrighted", None, "text"),
    "python code": ("angie-chen55/python-github-code", None, "code"),
}
OTHERWISE = "or installed text, source='installed' (--source installed)"


def sampled(
    tokenizer: Any,
    count: int,
    length: int,
    streams: Mapping[str, Iterable[Mapping]],
    *,
    seed: int = 0,
) -> list[Int[Tensor, " pos"]]:
    """``count`` different prompts of ``length`` tokens, the streams in turn.

    A document gives one window, which ``seed`` and its text choose, behind the begin
    token of the tokenizer; the next one steps in where that prompt is there already.
    Raises ``TextError`` for a stream that breaks off or ends early.
    """
    begin, _ = edge_tokens(tokenizer)
    first = () if begin is None else (begin,)  # as the tokenizer itself would
    if count < 1 or not streams or length <= len(first):
        got = f"got count={count}, length={length}, {len(streams)} streams"
        more = f"beyond the {len(first)} tokens that the tokenizer puts first"
        raise TextError(f"{got}; expected one or more of each, and a length {more}")
    prompts: dict[tuple[int, ...], None] = {}  # a set that keeps its order
    texts = {name: _texts(name, stream) for name, stream in streams.items()}
    size = length - len(first)
    bar = tqdm(total=count, desc="prompts", disable=None)
    while len(prompts) < count:
        name = list(streams)[len(prompts) % len(streams)]  # shares stay even
        for text in texts[name]:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            hashed = sha256(f"{seed} {text}".encode(errors="replace")).digest()
            # One of the windows that do not overlap; of a text too short, all of it.
            number = int.from_bytes(hashed[:8], "big") % max(1, len(ids) // size)
            window = (*first, *ids[number * size : (number + 1) * size])
            if len(window) == length and window not in prompts:
                break
        else:
            got = f"got {name!r}, a stream that ended after {len(prompts)} prompts"
            raise TextError(f"{got} of {length} tokens; expected its share")
        prompts[window] = None
        bar.update()
    return [torch.tensor(ids) for ids in prompts]


def open_corpora(seed: int = 0) -> dict[str, Iterable[Mapping]]:
    """The corpora as streams, files shuffled; ``TextError`` where out of reach."""
    try:
        import datasets
    except ImportError as error:
        expected = f"expected pip install 'sipit-lite[datasets]', {OTHERWISE}"
        got = "got source='corpora' without the package datasets"
        raise TextError(f"{got}; {expected}") from error
    datasets.logging.set_verbosity_error()
    streams = {}
    for corpus, (name, configuration, column) in CORPORA.items():
        try:
            if not hub_in_reach():
                raise ConnectionError("no network")
            options = {"split": "train", "streaming": True}
            stream = datasets.load_dataset(name, configuration, **options)
            stream = stream.select_columns([column])
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())
            got = f"got source='corpora' and no way to {name} ({reason})"
            raise TextError(f"{got}; expected a network, {OTHERWISE}") from error
        if column != "text":
            stream = stream.rename_column(column, "text")
        streams[corpus] = stream.shuffle(seed=seed, buffer_size=1)  # of its files
    return streams


def _texts(name: str, stream: Iterable[Mapping]) -> Iterator[str]:
    """Text after text; whatever goes wrong in the stream is said in one line."""
    try:
        for document in stream:
            yield str(document["text"])
    # Every library has errors of its own for a network that fails.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise TextError(f"got {name!r}, whose stream broke off ({reason})") from error
