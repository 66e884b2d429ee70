"""Prompts to feed a model: windows of text, or random tokens, all offline.

``"bundled"`` text is a few passages of the Python standard library, the same anywhere;
``"installed"`` text all docstrings and source files of the running Python.
"""

import ast
import gc
import json
import os
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import sha256
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sipit_lite.model import SipItError

KINDS = ("prose", "code", "random")
SPLITS = ("train", "held-out")
SOURCES = ("bundled", "installed")
HELD_OUT_ONE_IN = 16
MAX_FILE_BYTES = 200_000  # larger ones are generated tables, not code of people
# A line that begins and ends as sentences do; signs of code, tables, examples.
_SENTENCES = re.compile(r"[A-Z].*[.:!?]$")
_NOT_PROSE = re.compile(r">>>|\.\. |--|==|\|| {4}|[{}<>\\]")


class TextError(SipItError):
    """Text of an unknown kind, or too little of it."""


def prompts(
    tokenizer: Any,
    kind: str,
    length: int,
    *,
    seed: int = 0,
    source: str = "bundled",
    split: str = "held-out",
) -> Iterator[Int[Tensor, " pos"]]:
    """Yield windows of text that do not overlap, or random tokens without end.

    ``seed`` shuffles bundled passages or draws tokens. Raises ``TextError`` for what is
    not of ``KINDS``, ``SOURCES``, ``SPLITS`` (of installed text), or no length.
    """
    for value, known in ((kind, KINDS), (source, SOURCES), (split, SPLITS)):
        if value not in known:
            raise TextError(f"got {value!r}; expected one of {known}")
    if length < 1:
        raise TextError(f"got length={length}; expected one token or more")
    generator = torch.Generator().manual_seed(seed)
    while kind == "random":
        yield torch.randint(len(tokenizer), (length,), generator=generator)
    # Not shuffled, which would mean to read all files first.
    passages = installed(kind, split)
    if source == "bundled":
        texts = bundled(kind)
        passages = (texts[i] for i in torch.randperm(len(texts), generator=generator))
    for passage in passages:
        ids = tokenizer(passage, return_tensors="pt", verbose=False)["input_ids"][0]
        for first in range(0, len(ids) - length + 1, length):
            yield ids[first : first + length]


def windows(
    tokenizer: Any, count: int, length: int, *, kinds: Any = KINDS[:2], **options: Any
) -> list[Int[Tensor, " pos"]]:
    """``prompts`` of kinds in turn, until ``count`` differ; repeated ones stay in."""
    options = {"split": "train"} | options  # bulk work leaves held-out text alone
    streams = [prompts(tokenizer, kind, length, **options) for kind in kinds]
    taken = []
    seen = set()
    # ``zip_longest`` puts None where a kind has ended.
    for ids in filter(torch.is_tensor, chain.from_iterable(zip_longest(*streams))):
        if len(seen) >= count:
            break
        taken.append(ids)
        seen.add(tuple(ids.tolist()))
    return taken


def distinct(
    tokenizer: Any, count: int, length: int, **options: Any
) -> list[Int[Tensor, " pos"]]:
    """``windows`` without repeated ones; ``TextError`` where the text holds too few."""
    chosen = different(windows(tokenizer, count, length, **options))
    if len(chosen) < count:
        there = f"the text holds {len(chosen)} prompts of {length} tokens ({options})"
        raise TextError(f"got count={count}; {there}")
    return chosen


def different(prompts: Iterable[Tensor]) -> list[Tensor]:
    """The prompts without those that occurred before, in their order."""
    return list({tuple(ids.tolist()): ids for ids in prompts}.values())


@cache
def bundled(kind: str) -> tuple[str, ...]:
    """The held-out passages that travel with the package, of 300 characters or more."""
    path = files("sipit_lite") / "pocket_gpt2" / "held_out.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    return tuple(passage["text"] for passage in stored[kind])


def installed(kind: str, split: str = "train") -> Iterator[str]:
    """Yield the documents of the running Python, one per source file."""
    # No paragraph stands in both splits: licences and copies are in many files.
    unwanted = _held_out(kind) if split == "train" else frozenset()
    for text in _documents(kind, split):
        if wanted := [p for p in paragraphs(text) if p.strip() not in unwanted]:
            yield "\n\n".join(wanted)


def _documents(kind: str, split: str) -> Iterator[str]:
    """Text of the source files of one split, and of pydoc's topics as prose."""
    if kind == "prose":
        for name, text in sorted(topics.items()):
            if _split_of(f"pydoc_data/topics/{name}") == split:
                yield _prose([text])
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        names = []
        for place, folders, there in os.walk(folder):
            # Packages are a folder of their own; our own sources change too often.
            folders[:] = {*folders} - {"site-packages", "sipit_lite"}
            parts = Path(place).relative_to(folder).parts
            names += [(*parts, name) for name in there if name.endswith(".py")]
        for parts in sorted(names):
            if _split_of("/".join(parts)) == split:
                yield _read(Path(folder, *parts), kind)


def paragraphs(text: str) -> list[str]:
    """Split text at blank lines."""
    return [p for p in re.split(r"\n\s*\n", text.strip("\n")) if p.strip()]


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is English sentences, not a table, example or signature."""
    line = " ".join(paragraph.split())
    if len(paragraph) < 60 or not _SENTENCES.match(line):
        return False  # before each letter is looked at
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return not _NOT_PROSE.search(paragraph) and letters >= 0.88 * len(paragraph)


@cache
def _held_out(kind: str) -> frozenset[str]:
    gc.freeze()  # else all that is loaded is looked at again, amid thousands of trees
    documents = map(paragraphs, _documents(kind, "held-out"))
    unwanted = frozenset(map(str.strip, chain.from_iterable(documents)))
    gc.unfreeze()
    return unwanted


def _split_of(name: str) -> str:
    """The split of a file, by the hash of its name: no release moves it across."""
    byte = sha256(name.encode()).digest()[3]
    return "held-out" if byte % HELD_OUT_ONE_IN == 0 else "train"


def _read(path: Path, kind: str) -> str:
    """The source of a file, or the prose of its docstrings; empty where unreadable."""
    try:
        large = path.stat().st_size > MAX_FILE_BYTES
        source = "" if large else path.read_text(encoding="utf-8")
        if kind == "code":
            return source
        # Old sources warn of invalid escapes, which is not our caller's concern.
        with warnings.catch_warnings(action="ignore"):
            nodes = [ast.parse(source)]
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError):
        return ""
    # Docstrings stand in statements, and these in no expression: most is never visited.
    for node in nodes:
        for part in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes += getattr(node, part, ())
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return _prose(ast.get_docstring(x) or "" for x in nodes if isinstance(x, kinds))


def _prose(texts: Iterable[str]) -> str:
    """Join the paragraphs that are prose, each once, unwrapped to one line."""
    # Docstrings are copied from function to function.
    candidates = filter(is_prose, chain.from_iterable(map(paragraphs, texts)))
    return "\n\n".join(dict.fromkeys(" ".join(p.split()) for p in candidates))
