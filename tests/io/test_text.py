"""Prompts: the right length, the same for the same seed, held-out text apart from training text."""

from itertools import islice

import pytest
import torch

from sipit_lite import LanguageModel
from sipit_lite.io.text import bundled, installed, is_prose, paragraphs, prompts


@pytest.mark.parametrize("kind", ["prose", "code", "random"])
@pytest.mark.parametrize("length", [1, 20, 256])
def test_length_and_seed(pocket: LanguageModel, kind: str, length: int) -> None:
    """Exactly so many tokens; the same seed gives the same prompts, another seed others."""
    one, two, other = (
        list(islice(prompts(pocket.tokenizer, kind, length, seed=s), 5))
        for s in (0, 0, 1)
    )
    assert len(one) == 5 and all(
        ids.shape == (length,) and ids.max() < pocket.vocab_size for ids in one
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_windows_do_not_overlap(pocket: LanguageModel) -> None:
    """Put together again, the windows of a passage are its beginning."""
    texts = bundled("prose")
    found = list(prompts(pocket.tokenizer, "prose", 20))
    whole = sum(len(pocket.encode(text)) // 20 for text in texts)
    assert len(found) == whole > 600


def test_kinds_are_what_they_say() -> None:
    """Prose reads as sentences, code parses as lines of Python, and neither is the other."""
    assert all(is_prose(p) for text in bundled("prose") for p in paragraphs(text))
    assert sum(
        "def " in text or "import " in text or "=" in text for text in bundled("code")
    ) > 0.95 * len(bundled("code"))
    assert not any(is_prose(text) for text in bundled("code"))


def test_installed_splits_are_disjoint() -> None:
    """No paragraph of the first training documents stands in the held-out ones."""
    held_out = {
        p.strip() for text in installed("code", "held-out") for p in paragraphs(text)
    }
    train = [
        p.strip()
        for text in islice(installed("code", "train"), 200)
        for p in paragraphs(text)
    ]
    assert len(held_out) > 100 and len(train) > 100
    assert held_out.isdisjoint(train)


def test_installed_prompts(pocket: LanguageModel) -> None:
    """Installed text serves for bulk: windows in the order of the files."""
    some = list(islice(prompts(pocket.tokenizer, "code", 24, source="installed"), 300))
    assert len({tuple(ids.tolist()) for ids in some}) > 250


@pytest.mark.parametrize(
    "bad", [{"kind": "verse"}, {"length": 0}, {"source": "hub"}, {"split": "test"}]
)
def test_bad_requests_are_refused(
    pocket: LanguageModel, bad: dict[str, object]
) -> None:
    """What was received is quoted."""
    asked = {"kind": "prose", "length": 5} | bad
    with pytest.raises(ValueError, match=f"got .*{next(iter(bad.values()))}"):
        next(prompts(pocket.tokenizer, **asked))
