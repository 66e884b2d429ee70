"""Prompts to feed a model: passages that travel with the package, text of the Python install, random tokens.

Two sources of text, both offline. ``"bundled"`` is a small fixed set of held-out passages of the Python
standard library, so that what the book quotes never changes. ``"installed"`` is every docstring and source
file of the running Python and its packages: millions of tokens for bulk work, different on every machine.
"""

import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from pydoc_data.topics import topics

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

KINDS, SPLITS, SOURCES = (
    ("prose", "code", "random"),
    ("train", "held-out"),
    ("bundled", "installed"),
)
HELD_OUT_ONE_IN = 16
MAX_FILE_BYTES = (
    200_000  # larger sources are generated tables, not code that people wrote
)
_SENTENCES = re.compile(r"[A-Z][^\n]*[.:!?]", re.DOTALL)
_NOT_PROSE = re.compile(r">>>|\.\. |--|==|\|| {4}|[{}<>\\]")


def prompts(
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    length: int,
    *,
    seed: int = 0,
    source: str = "bundled",
    split: str = "held-out",
) -> Iterator[Int[Tensor, " pos"]]:
    """Yield prompts of exactly ``length`` tokens: windows of text that do not overlap, or random tokens for ever.

    ``kind`` is prose, code or random; ``source`` bundled or installed; ``split``, of installed text, train or
    held-out. ``seed`` shuffles the passages; the same seed gives the same prompts. ``"installed"`` text comes in the
    order of the files, because shuffling it would mean reading all of it first.
    Raises ``ValueError`` for an unknown kind, source or split, or a length below one.

    >>> from sipit_lite import load
    >>> [len(ids) for ids, _ in zip(prompts(load().tokenizer, "prose", 8), range(3))]
    [8, 8, 8]
    """
    for name, value, known in (
        ("kind", kind, KINDS),
        ("source", source, SOURCES),
        ("split", split, SPLITS),
    ):
        if value not in known:
            raise ValueError(f"got {name}={value!r}; expected one of {known}")
    if length < 1:
        raise ValueError(f"got length={length}; a prompt has at least one token")
    generator = torch.Generator().manual_seed(seed)
    if kind == "random":
        while True:
            yield torch.randint(len(tokenizer), (length,), generator=generator)
    if source == "installed":
        passages: Iterable[str] = installed(kind, split)
    else:
        texts = bundled(kind)
        passages = (texts[i] for i in torch.randperm(len(texts), generator=generator))
    for passage in passages:
        ids = tokenizer(passage, return_tensors="pt", verbose=False)["input_ids"][0]
        yield from (
            ids[: len(ids) // length * length].split(length)
            if len(ids) >= length
            else ()
        )


def distinct(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    *,
    kinds: Sequence[str] = ("prose", "code"),
    seed: int = 0,
    source: str = "installed",
    split: str = "train",
) -> list[Int[Tensor, " pos"]]:
    """``count`` different prompts of ``length`` tokens, the kinds in turn; where one ends, the others go on.

    Raises ``ValueError`` where the text does not hold so many, and for what ``prompts`` refuses.

    >>> from sipit_lite import load
    >>> len({tuple(ids.tolist()) for ids in distinct(load().tokenizer, 50, 8, source="bundled")})
    50
    """
    streams = [
        prompts(tokenizer, kind, length, seed=seed, source=source, split=split)
        for kind in kinds
    ]
    found: dict[tuple[int, ...], Tensor] = {}
    for some in zip_longest(*streams):
        found |= {tuple(ids.tolist()): ids for ids in some if ids is not None}
        if len(found) >= count:
            return list(found.values())[:count]
    raise ValueError(
        f"got count={count}; the {source} {' and '.join(kinds)} hold {len(found)} prompts of {length} tokens"
    )


@cache
def bundled(kind: str) -> tuple[str, ...]:
    """The held-out passages of one kind that travel with the package (Python standard library, PSF licence).

    >>> all(len(passage) >= 300 for passage in bundled("prose"))
    True
    """
    stored = json.loads(
        (files("sipit_lite") / "pocket_gpt2" / "held_out.json").read_text(
            encoding="utf-8"
        )
    )
    return tuple(passage["text"] for passage in stored[kind])


def installed(kind: str, split: str = "train") -> Iterator[str]:
    """Yield documents of the running Python install, one per source file, of one kind and one split.

    A file belongs to one split by the hash of its name, so a patch release moves nothing across.
    Paragraphs of held-out files are cut out of the training files: no paragraph stands in both splits.

    >>> len(next(installed("code", "held-out"))) > 0
    True
    """
    held_out = _paragraphs_held_out(kind) if split == "train" else frozenset()
    for _, text in _documents(kind, split):
        kept = [p for p in paragraphs(text) if p.strip() not in held_out]
        if kept:
            yield "\n\n".join(kept)


def paragraphs(text: str) -> list[str]:
    """Split text at blank lines.

    >>> paragraphs("one\\n\\n\\ntwo\\nlines")
    ['one', 'two\\nlines']
    """
    return [p for p in re.split(r"\n\s*\n", text.strip("\n")) if p.strip()]


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English sentences rather than a table, an example or a signature.

    >>> is_prose("Return the number of times that the given value occurs in the list, as an integer.")
    True
    >>> is_prose("x : array_like, shape (n,)")
    False
    """
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return (
        len(paragraph) >= 60
        and letters >= 0.88 * len(paragraph)
        and _SENTENCES.fullmatch(" ".join(paragraph.split())) is not None
        and _NOT_PROSE.search(paragraph) is None
    )


@cache
def _paragraphs_held_out(kind: str) -> frozenset[str]:
    return frozenset(
        p.strip() for _, text in _documents(kind, "held-out") for p in paragraphs(text)
    )


def _split_of(name: str) -> str:
    digest = hashlib.sha256(name.encode()).digest()
    return (
        "held-out"
        if int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0
        else "train"
    )


def _documents(
    kind: str, split: str, roots: Iterable[Path] | None = None
) -> Iterator[tuple[str, str]]:
    everywhere = (standard_library(), Path(sysconfig.get_path("purelib")))
    if kind == "prose":
        yield from (
            (name, text)
            for name, text in _topics()
            if _split_of(name) == split and text
        )
    for name, path in _sources(roots or everywhere):
        text = _read(path, kind) if _split_of(name) == split else ""
        if text:
            yield name, text


def _topics() -> Iterator[tuple[str, str]]:
    for name, text in sorted(topics.items()):
        yield f"pydoc_data/topics/{name}", _prose(paragraphs(text))


def standard_library() -> Path:
    """The folder of the running Python's standard library.

    >>> (standard_library() / "ast.py").exists()
    True
    """
    return Path(sysconfig.get_path("stdlib"))


def standard_library_documents(kind: str) -> Iterator[tuple[str, str]]:
    """Held-out documents of the standard library alone, with their names: one source, one licence."""
    yield from _documents(kind, "held-out", [standard_library()])


def _sources(roots: Iterable[Path]) -> Iterator[tuple[str, Path]]:
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root)
            if "site-packages" not in name.parts and "sipit_lite" not in name.parts:
                yield name.as_posix(), path


def _read(path: Path, kind: str) -> str:
    try:
        source = (
            path.read_text(encoding="utf-8")
            if path.stat().st_size <= MAX_FILE_BYTES
            else ""
        )
    except (OSError, UnicodeDecodeError):
        return ""
    return (
        source
        if kind == "code"
        else _prose(chain.from_iterable(map(paragraphs, _docstrings(source))))
    )


def _docstrings(source: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ):
            yield ast.get_docstring(node) or ""


def _prose(candidates: Iterable[str]) -> str:
    """Join the paragraphs that are prose, each once, unwrapped to one line."""
    return "\n\n".join(
        dict.fromkeys(" ".join(p.split()) for p in candidates if is_prose(p))
    )
