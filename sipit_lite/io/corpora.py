"""Prompts from the corpora of the paper, streamed from the Hugging Face hub: wikipedia, C4, The Pile, Python code.

A corpus is a stream of documents, read as they are needed and never downloaded whole; the seed fixes the order of its
files and which window of a document becomes a prompt. Needs the extra ``sipit-lite[datasets]`` and a network; any other
iterables of documents go the same way without either.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sipit_lite.io.loading import hub_in_reach
from sipit_lite.io.text import distinct
from sipit_lite.model import edge_tokens

Document = Mapping[str, object]  # its text is under "text"
# Name on the hub, configuration, column of the text: those that the paper names, The Pile in the copy that is public.
CORPORA = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en", "text"),
    "C4": ("allenai/c4", "en", "text"),
    "The Pile": ("monology/pile-uncopyrighted", None, "text"),
    "python code": ("angie-chen55/python-github-code", None, "code"),
}
SOURCES = ("bundled", "installed", "corpora")
FILE = "prompts.safetensors"
SAVE_EVERY = 4096  # prompts
OTHERWISE = (
    "or the text of this Python install, source='installed' (--source installed)"
)


class CorporaError(ValueError):
    """Corpora that cannot be reached, or that hold too little."""


def from_source(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    *,
    kinds: Sequence[str] = ("prose", "code"),
    seed: int = 0,
    source: str = "bundled",
    folder: str | Path | None = None,
) -> list[Int[Tensor, " pos"]]:
    """``count`` different prompts of ``length`` tokens from any source: ``sampled`` for corpora, else ``distinct``.

    ``folder`` keeps what was streamed, so that an interrupted run goes on; ``kinds`` are those of ``distinct``.
    Raises what these two raise.

    >>> from sipit_lite import load
    >>> len(from_source(load(device="cpu").tokenizer, 5, 8))
    5
    """
    if source == "corpora":
        path = None if folder is None else Path(folder) / FILE
        return sampled(
            tokenizer,
            count,
            length,
            open_corpora(seed),
            seed=seed,
            path=path,
            progress=True,
        )
    return distinct(tokenizer, count, length, kinds=kinds, seed=seed, source=source)


def sampled(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    streams: Mapping[str, Iterable[Document]],
    *,
    seed: int = 0,
    path: str | Path | None = None,
    progress: bool = False,
) -> list[Int[Tensor, " pos"]]:
    """``count`` different prompts of ``length`` tokens, the streams in turn, one window of a document at most.

    A tokenizer's begin-of-text token comes first and counts. ``seed`` and the text choose the window. A prompt that was
    there before is left out, and the next document takes its place, so that the streams stay even. With ``path``, the
    prompts and the place in each stream are kept in a safetensors file, also when an error or Ctrl-C ends the run, and
    the same call goes on from there, by ``state_dict`` where a stream has one and by counting documents elsewhere.
    Raises ``CorporaError`` for a stream that ends before its share is found or that breaks off.

    >>> from sipit_lite import load
    >>> streams = {"a": [{"text": "one two three"}] * 2 + [{"text": "the prompt"}], "b": [{"text": "hidden states"}]}
    >>> tokenizer = load(device="cpu").tokenizer
    >>> [tokenizer.decode(ids) for ids in sampled(tokenizer, 3, 2, streams)]
    ['one two', 'hidden states', 'the prompt']
    """
    window = _Window(tokenizer, length, edge_tokens(tokenizer)[0], seed)
    if count < 1 or not streams or length <= len(window.first):
        raise CorporaError(
            f"got count={count}, length={length}, {len(streams)} streams; expected one or more of each, and a length "
            f"beyond the {len(window.first)} tokens that the tokenizer puts first"
        )
    of = json.dumps([window.name, list(streams)])
    found, places = _kept(path, of) if path is not None else ({}, {})
    readers = [
        _Reader(name, stream, **places.get(name, {}))
        for name, stream in streams.items()
    ]
    bar = tqdm(
        total=count,
        initial=min(len(found), count),
        desc="prompts",
        disable=None if progress else True,
    )
    try:
        while len(found) < count:
            reader = readers[len(found) % len(readers)]
            found[reader.next(window, found)] = None
            reader.mark()
            bar.update()
            if path is not None and len(found) % SAVE_EVERY == 0:
                _keep(path, of, found, readers)
    finally:
        if path is not None and found:
            _keep(path, of, found, readers)
    return [torch.tensor(ids) for ids in islice(found, count)]


def open_corpora(seed: int = 0) -> dict[str, Iterable[Document]]:
    """The four corpora as streams of the package ``datasets``; the seed shuffles the order of their files.

    Raises ``CorporaError`` without that package, or where the hub is out of reach.
    """
    try:
        import datasets
    except ImportError as error:
        raise CorporaError(
            "got source='corpora' without the package datasets; expected pip install 'sipit-lite[datasets]', "
            f"{OTHERWISE}"
        ) from error
    datasets.logging.set_verbosity_error()  # it warns that a shuffle buffer is lost on resuming: one of size 1 is empty
    streams = {}
    for corpus, (name, configuration, column) in CORPORA.items():
        try:
            if not hub_in_reach():
                raise ConnectionError("no network")
            stream = datasets.load_dataset(
                name, configuration, split="train", streaming=True
            ).select_columns([column])
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise CorporaError(
                f"got source='corpora' and no way to {name} on the Hugging Face hub ({_line(error)}); expected a "
                f"network, {OTHERWISE}"
            ) from error
        stream = stream if column == "text" else stream.rename_column(column, "text")
        streams[corpus] = stream.shuffle(
            seed=seed, buffer_size=1
        )  # a larger buffer would be lost on resuming
    return streams


@dataclass(frozen=True)
class _Window:
    """Which tokens of a document become a prompt."""

    tokenizer: PreTrainedTokenizerBase
    length: int
    begin: int | None
    seed: int

    @property
    def first(self) -> list[int]:
        """What stands before the text."""
        return [] if self.begin is None else [self.begin]

    @property
    def name(self) -> list:
        """What has to be the same for prompts to go on with."""
        words = json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
        return [sha256(words).hexdigest(), self.length, self.begin, self.seed]

    def of(self, text: str) -> tuple[int, ...] | None:
        """One window of the text, in which they do not overlap; None where it is too short for any."""
        size = self.length - len(self.first)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < size:
            return None
        drawn = int.from_bytes(
            sha256(f"{self.seed} {text}".encode(errors="replace")).digest()[:8], "big"
        )
        start = drawn % (len(ids) // size) * size
        return (*self.first, *ids[start : start + size])


class _Reader:
    """A stream of documents, and where to go on after the last prompt that was taken from it."""

    def __init__(
        self,
        name: str,
        stream: Iterable[Document],
        read: int = 0,
        state: dict | None = None,
    ):
        self.name, self.stream, self.read, self.place = (
            name,
            stream,
            read,
            {"read": read, "state": state},
        )
        knows = state is not None and hasattr(stream, "load_state_dict")
        if knows:
            stream.load_state_dict(state)
        self.texts = self._texts(islice(stream, 0 if knows else read, None))

    def _texts(self, documents: Iterator[Document]) -> Iterator[str]:
        while True:
            try:
                document = next(documents, None)
            except (
                Exception
            ) as error:  # whatever a library raises where the network fails
                raise CorporaError(
                    f"got {self.name!r}, whose stream broke off after {self.read} documents ({_line(error)}); expected "
                    "one that can be read on: with a path, the same call goes on from what it kept"
                ) from error
            if document is None:
                return
            if "text" not in document:
                raise CorporaError(
                    f"got {self.name!r} with a document of {list(document)}; expected one with 'text'"
                )
            self.read += 1
            yield str(document["text"])

    def mark(self) -> None:
        """Go on from here."""
        state = self.stream.state_dict() if hasattr(self.stream, "state_dict") else None
        self.place = {"read": self.read, "state": state}

    def next(
        self, window: _Window, found: Mapping[tuple[int, ...], None]
    ) -> tuple[int, ...]:
        """The next prompt that is not there yet."""
        for text in self.texts:
            ids = window.of(text)
            if ids is not None and ids not in found:
                return ids
        raise CorporaError(
            f"got {self.name!r}, a stream that ended after {self.read} documents and {len(found)} prompts of "
            f"{window.length} tokens from all streams; expected one that holds its share"
        )


def _kept(
    path: str | Path, of: str
) -> tuple[dict[tuple[int, ...], None], dict[str, dict]]:
    """Prompts and places from the file, where it is whole and of the same streams, seed, length and tokenizer."""
    try:
        with safe_open(path, framework="pt") as stored:
            ids, told = stored.get_tensor("ids"), stored.metadata() or {}
    except (OSError, SafetensorError):
        return {}, {}  # not there yet, or damaged: made anew
    if told.get("of") != of:
        return {}, {}
    return dict.fromkeys(map(tuple, ids.tolist())), json.loads(told["places"])


def _keep(
    path: str | Path,
    of: str,
    found: Mapping[tuple[int, ...], None],
    readers: Sequence[_Reader],
) -> None:
    places = json.dumps({reader.name: reader.place for reader in readers})
    half = Path(path).with_suffix(
        ".part"
    )  # only a whole file gets the name that is read
    try:
        half.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {"ids": torch.tensor(list(found))}, half, {"of": of, "places": places}
        )
        half.replace(path)
    except (OSError, SafetensorError) as error:
        raise CorporaError(
            f"got the path {str(path)!r}, where no prompts can be written ({_line(error)})"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
