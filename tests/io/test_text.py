"""Prompts: the right length, the same for the same seed, held-out text apart."""

import sysconfig
from collections.abc import Iterator
from itertools import islice

import pytest
import torch

from sipit_lite import LanguageModel
from sipit_lite.io import text as io_text
from sipit_lite.io.text import (
    TextError,
    bundled,
    different,
    distinct,
    installed,
    is_prose,
    paragraphs,
    prompts,
    windows,
)


@pytest.fixture(autouse=True)
def all_text(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The packages as well, which other tests leave out."""
    monkeypatch.setattr(io_text, "sysconfig", sysconfig)
    io_text._held_out.cache_clear()
    yield
    io_text._held_out.cache_clear()


@pytest.mark.parametrize("kind", ["prose", "code", "random"])
@pytest.mark.parametrize("length", [1, 20, 256])
def test_length_and_seed(pocket: LanguageModel, kind: str, length: int) -> None:
    """Exactly so many tokens; the same seed gives the same prompts, another others."""
    one, two, other = (
        list(islice(prompts(pocket.tokenizer, kind, length, seed=s), 5))
        for s in (0, 0, 1)
    )
    assert len(one) == 5
    assert all(ids.shape == (length,) and ids.max() < pocket.vocab_size for ids in one)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_windows_do_not_overlap(pocket: LanguageModel) -> None:
    """As many as fit into each passage, each with the text that stands there."""
    taken = list(prompts(pocket.tokenizer, "prose", 20))
    fitting = sum(len(pocket.encode(text)) // 20 for text in bundled("prose"))
    assert len(taken) == fitting > 600
    texts = "".join(bundled("prose"))
    assert all(pocket.decode(ids) in texts for ids in taken[:50])


def test_kinds_in_turn_repetitions_kept_until_so_many_differ(
    pocket: LanguageModel,
) -> None:
    """One window is a token: they repeat, and the longer kind goes on alone."""
    taken = windows(pocket.tokenizer, 300, 1)
    assert len({int(ids) for ids in taken}) == 300 < len(taken)
    streams = [prompts(pocket.tokenizer, kind, 1) for kind in ("prose", "code")]
    for start, stream in enumerate(streams):
        wanted = list(islice(stream, len(taken[start::2])))
        assert torch.equal(torch.stack(wanted), torch.stack(taken[start::2]))
    unique = distinct(pocket.tokenizer, 300, 1)
    assert torch.equal(torch.stack(unique), torch.stack(different(taken)))
    counts = [
        sum(1 for _ in prompts(pocket.tokenizer, kind, 64))
        for kind in ("prose", "code")
    ]
    assert len(windows(pocket.tokenizer, 10**6, 64)) == sum(counts)


def test_text_that_is_too_short_is_an_error(pocket: LanguageModel) -> None:
    """What was wanted and what there is."""
    with pytest.raises(TextError, match=r"got count=9999; the text holds \d+ prompts"):
        distinct(pocket.tokenizer, 9999, 200, source="bundled")


def test_kinds_are_what_they_say() -> None:
    """Prose reads as sentences, code has lines of Python, and neither is the other."""
    assert all(is_prose(p) for text in bundled("prose") for p in paragraphs(text))
    signs = ("def ", "import ", "=")
    python = [any(sign in text for sign in signs) for text in bundled("code")]
    assert sum(python) > 0.95 * len(python)
    assert not any(is_prose(text) for text in bundled("code"))
    assert not is_prose("x : array_like, shape (n,)")


def test_installed_splits_are_disjoint() -> None:
    """No paragraph of the first training documents stands in the held-out ones."""
    held_out = set()
    for text in installed("code", "held-out"):
        held_out |= {p.strip() for p in paragraphs(text)}
    train = []
    for text in islice(installed("code", "train"), 200):
        train += [p.strip() for p in paragraphs(text)]
    assert len(held_out) > 100 and len(train) > 100
    assert held_out.isdisjoint(train)


def test_installed_prompts(pocket: LanguageModel) -> None:
    """Installed text serves for bulk: windows in the order of the files."""
    taken = list(islice(prompts(pocket.tokenizer, "code", 24, source="installed"), 300))
    assert len({tuple(ids.tolist()) for ids in taken}) > 250


@pytest.mark.parametrize(
    "bad", [{"kind": "verse"}, {"length": 0}, {"source": "hub"}, {"split": "test"}]
)
def test_bad_requests_are_refused(
    pocket: LanguageModel, bad: dict[str, object]
) -> None:
    """What was received is quoted."""
    options = {"kind": "prose", "length": 5} | bad
    with pytest.raises(TextError, match=f"got .*{next(iter(bad.values()))}"):
        next(prompts(pocket.tokenizer, **options))
