"""Prompts: the right length, the same for the same seed, held-out text apart."""

import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sipit_lite import LanguageModel
from sipit_lite.io import text as io_text
from sipit_lite.io.text import (
    SPLITS,
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


def test_docstrings_of_all_statements_are_read(tmp_path: Path) -> None:
    """In whatever statement a function stands, the outer ones first, as they come."""
    # Sixty letters and more, or it would be no paragraph of prose.
    names = ("module", "if", "else", "while", "with", "for", "try", "handler")
    names += ("otherwise", "finally", "case", "async", "method", "inner", "starred")
    text = {
        name: f"What stands in the {name} is read {'and ' * 10}kept." for name in names
    }
    source = '''"""{module}"""
if 1:
    def f(x=lambda: 0):
        """{if}"""
        class Inner:
            def method(self):
                """{method}"""
                if x:
                    def inner(): """{inner}"""
else:
    class C: """{else}"""
while 0:
    def f(): """{while}"""
with 1:
    async def f(): """{with}"""
for _ in ():
    def f(): """{for}"""
try:
    def f(): """{try}"""
except ValueError:
    def f(): """{handler}"""
else:
    def f(): """{otherwise}"""
finally:
    def f(): """{finally}"""
match 1:
    case 1:
        def f(): """{case}"""
async def f():
    """{async}"""
try:
    pass
except* ValueError:
    def f(): """{starred}"""
'''.format(**text)
    path = tmp_path / "documented.py"
    path.write_text(source)
    depths = ("module", "async")
    depths += ("if", "else", "while", "with", "for", "try", "otherwise", "finally")
    depths += ("handler", "case", "starred", "method", "inner")
    expected = "\n\n".join(text[name] for name in depths)
    assert sorted(io_text._read(path, "prose").split("\n\n")) == sorted(text.values())
    assert io_text._read(path, "prose") == expected


def test_files_come_sorted_part_by_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As paths are, not as their names; neither other packages nor our own."""
    names = ["a.py", "a/b.py", "a-b/c.py", "a/b/c.py", "b.py", "a/b-c.py", "B/x.py"]
    for name in (*names, "site-packages/no.py", "a/sipit_lite/no.py", "a/no.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}")
    (tmp_path / "none").mkdir()
    folders = {"stdlib": str(tmp_path), "purelib": str(tmp_path / "none")}
    monkeypatch.setattr(io_text, "sysconfig", SimpleNamespace(get_path=folders.get))
    splits = [list(io_text._documents("code", split)) for split in SPLITS]
    order = sorted(names, key=lambda name: Path(name).parts)
    assert sorted(splits[0] + splits[1]) == sorted(f"# {name}" for name in names)
    for split in splits:
        assert split == [f"# {name}" for name in order if f"# {name}" in split]


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
