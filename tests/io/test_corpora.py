"""Prompts from streams: even, seeded, each once; a refusal without network names the way out."""

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from test_capture import with_begin
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from sipit_lite import LanguageModel, cli, load
from sipit_lite.experiments.survey import from_source
from sipit_lite.io import corpora
from sipit_lite.io.corpora import CORPORA, open_corpora, sampled
from sipit_lite.io.text import TextError, bundled

PAGES = [
    {"text": text} for text in (*bundled("prose")[:40], *bundled("prose")[:5])
]  # five come twice
CODE = [
    {"text": text} for text in ("x = 1", "", *bundled("code")[:40])
]  # and two hold no prompt


def streams() -> dict:
    """Two streams of documents."""
    return {"pages": PAGES, "code": CODE}


def listed(found: list[Tensor]) -> list[list[int]]:
    """The prompts as lists."""
    return [ids.tolist() for ids in found]


def test_even_distinct_and_of_the_right_length(pocket: LanguageModel) -> None:
    """Counted by hand: the prompts stand in the documents of their stream, one of each, the streams in turn."""
    found = sampled(pocket.tokenizer, 60, 9, streams())
    assert len({tuple(ids) for ids in listed(found)}) == 60 and {
        len(ids) for ids in found
    } == {9}
    for start, documents in enumerate((PAGES, CODE)):
        texts = [
            d["text"]
            for d in documents
            if len(pocket.tokenizer(d["text"])["input_ids"]) >= 9
        ]
        for ids, text in zip(found[start::2], texts[:30], strict=True):
            windows = pocket.encode(text).cpu().unfold(0, 9, 9)
            assert bool((windows == ids).all(1).any())


def test_the_seed_chooses_the_windows(pocket: LanguageModel) -> None:
    """The same seed, the same prompts; another, others; a shorter run is the beginning of a longer one."""
    one, two, other = (
        listed(sampled(pocket.tokenizer, 40, 9, streams(), seed=seed))
        for seed in (0, 0, 1)
    )
    assert one == two and one != other
    assert listed(sampled(pocket.tokenizer, 11, 9, streams())) == one[:11]


def test_repeated_prompts_are_replaced_from_their_own_stream(
    pocket: LanguageModel,
) -> None:
    """Token by token equal is repeated, whatever the text; the shares stay equal."""
    one = [{"text": "hidden states"}] * 7 + [{"text": "the prompt"}]
    found = sampled(
        pocket.tokenizer,
        4,
        2,
        {"twice": one, "code": [{"text": "hidden states"}, *CODE]},
    )
    assert [pocket.decode(ids) for ids in found[::2]] == ["hidden states", "the prompt"]
    assert len({tuple(ids.tolist()) for ids in found}) == 4


def test_the_begin_of_text_token_comes_first(tmp_path: Path) -> None:
    """Once, whatever the window, and it counts: what the model's own tokenizer would make of the window's text."""
    model = with_begin(tmp_path, 3)
    model.tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    for seed in range(8):
        [found] = sampled(
            model.tokenizer, 1, 3, {"a": [{"text": "t5 t6 t7 t8"}]}, seed=seed
        )
        assert found.tolist() in (
            model.encode("t5 t6").tolist(),
            model.encode("t7 t8").tolist(),
        )
    with pytest.raises(
        TextError,
        match=r"length=1, 1 streams; expected .* beyond the 1 tokens that the tokenizer",
    ):
        sampled(model.tokenizer, 1, 1, {"a": [{"text": "t1"}]})


def broken() -> Iterator[dict]:
    """A stream whose network fails after twelve documents."""
    yield from islice(PAGES, 12)
    raise ConnectionError("the line is\ndead")


def test_a_stream_that_breaks_off_is_named(pocket: LanguageModel) -> None:
    """With what its library says, in one line."""
    with pytest.raises(
        TextError,
        match=r"got 'pages', whose stream broke off \(ConnectionError: the line is dead",
    ):
        sampled(pocket.tokenizer, 60, 9, streams() | {"pages": broken()})


def test_streams_that_hold_too_little(pocket: LanguageModel) -> None:
    """The stream that ended is named, and what it held."""
    with pytest.raises(
        TextError,
        match=r"got 'code', a stream that ended after \d+ prompts of 9 tokens",
    ):
        sampled(
            pocket.tokenizer,
            99,
            9,
            {
                "pages": PAGES * 2 + [{"text": t} for t in bundled("prose")[40:60]],
                "code": CODE,
            },
        )
    with pytest.raises(
        TextError,
        match=r"got 'a', whose stream broke off \(KeyError: 'text'\)",
    ):
        sampled(pocket.tokenizer, 1, 9, {"a": [{"content": "x"}]})
    for count, of in ((0, streams()), (1, {})):
        with pytest.raises(
            TextError,
            match=f"got count={count}, length=9, {len(of)} streams; expected one or more",
        ):
            sampled(pocket.tokenizer, count, 9, of)


class Hub:
    """What ``datasets.load_dataset(..., streaming=True)`` gives, as far as it is used here."""

    def __init__(self, column: str, name: str):
        self.documents = [
            {column: f"{name} {i} {text}", "id": i}
            for i, text in enumerate(bundled("prose"))
        ]

    def __iter__(self) -> Iterator[dict]:
        return iter(self.documents)

    def select_columns(self, columns: list[str]) -> "Hub":
        """The documents with these columns alone."""
        self.documents = [
            {column: d[column] for column in columns} for d in self.documents
        ]
        return self

    def rename_column(self, old: str, new: str) -> "Hub":
        """A column under another name."""
        self.documents = [
            {new if key == old else key: value for key, value in d.items()}
            for d in self.documents
        ]
        return self

    def shuffle(self, seed: int, buffer_size: int) -> "Hub":
        """Another order for another seed."""
        assert buffer_size == 1, "a shuffle of files alone"
        self.documents = self.documents[seed:] + self.documents[:seed]
        return self


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A stand-in for the package and the network; what was asked of it."""
    calls: list[tuple] = []

    def load_dataset(
        name: str, configuration: str | None, *, split: str, streaming: bool
    ) -> Hub:
        calls.append((name, configuration, split, streaming))
        return Hub(
            next(column for path, _, column in CORPORA.values() if path == name), name
        )

    package = ModuleType("datasets")
    package.load_dataset = load_dataset
    package.logging = SimpleNamespace(set_verbosity_error=lambda: None)
    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.setattr(corpora, "hub_in_reach", lambda: True)
    return calls


def test_the_corpora_are_streamed(hub: list[tuple], pocket: LanguageModel) -> None:
    """All four, never downloaded whole, their text under one name, in an order that the seed chooses."""
    opened = open_corpora(seed=2)
    assert list(opened) == ["wikipedia", "C4", "The Pile", "python code"]
    assert hub == [
        (name, configuration, "train", True)
        for name, configuration, _ in CORPORA.values()
    ]
    for stream, (name, _, _) in zip(opened.values(), CORPORA.values(), strict=True):
        assert next(iter(stream))["text"].startswith(f"{name} 2 ")
    found = sampled(pocket.tokenizer, 8, 9, opened)
    assert len(found) == 8


def test_the_command_line_takes_them(
    hub: list[tuple],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Collisions among their prompts, kept beside the shards; without a network one line, which names the way out."""
    command = [
        "collisions",
        "-n",
        "8",
        "--length",
        "9",
        "--layers",
        "1",
        "--source",
        "corpora",
        "--device",
        "cpu",
    ]
    assert cli.main([*command, "--shards", str(tmp_path)]) == 0
    assert "28" in capsys.readouterr().out
    monkeypatch.setattr(corpora, "hub_in_reach", lambda: False)
    assert cli.main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert (
        len(lines) == 1
        and "no way to wikimedia/wikipedia" in lines[0]
        and "--source installed" in lines[0]
    )


def test_without_the_package_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one line, with the command that installs it and the source that needs neither."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        TextError, match=r"pip install 'sipit-lite\[datasets\]'.*source='installed'"
    ) as refusal:
        open_corpora()
    assert "\n" not in str(refusal.value)


def test_a_refusal_of_the_hub_is_one_line(
    hub: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the package says is quoted."""
    monkeypatch.setattr(
        sys.modules["datasets"],
        "load_dataset",
        lambda *_, **__: (_ for _ in ()).throw(ConnectionError("off\nline")),
    )
    with pytest.raises(
        TextError,
        match=r"no way to wikimedia/wikipedia .*\(off line\); expected a network, or inst",
    ):
        open_corpora()


def test_a_model_without_a_tokenizer_is_named() -> None:
    """Text without a tokenizer is no prompt."""
    with pytest.raises(TextError, match="got a model without a tokenizer"):
        from_source(None, 5, 8)


def test_only_who_asks_imports_the_package() -> None:
    """Bundled and installed text need neither the package nor the network."""
    assert "datasets" not in sys.modules
    assert torch.is_tensor(from_source(load(device="cpu").tokenizer, 1, 8)[0])
    assert "datasets" not in sys.modules
