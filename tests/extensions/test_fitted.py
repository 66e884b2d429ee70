"""Where no lens is given: searches that learn, and a lens where it saves time."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sipit_lite import LanguageModel, Lens, SipItError, invert, invert_many, load
from sipit_lite.extensions import fitted
from sipit_lite.extensions.fitted import Unfitted, lens_of, offered, place
from sipit_lite.extensions.reading import Reading
from sipit_lite.io.text import prompts
from sipit_lite.onestep import OneStepMap

LAYER = 3


@pytest.fixture
def model(
    pocket: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LanguageModel]:
    """One of a large vocabulary, as far as the rules go, and an empty cache."""
    monkeypatch.setattr(fitted, "FOLDER", tmp_path / "cache")
    monkeypatch.setattr(fitted, "TOKENS", 2000)
    monkeypatch.setattr(fitted, "FEATURES", 0)
    model = copy.copy(pocket)
    model.measured = pocket.measured.copy()
    forget(model)
    yield model
    forget(model)
    pocket.measured.update(model.measured)


def forget(model: LanguageModel) -> None:
    """What was fitted and counted: neither the noise of the weights, nor text."""
    kept = ("noise", "related", "prompts of a lens")
    for key in [key for key in model.measured if key[0] not in kept]:
        del model.measured[key]


def sample(model: LanguageModel, kind: str = "prose", length: int = 6) -> torch.Tensor:
    """A held-out prompt."""
    return next(prompts(model.tokenizer, kind, length, seed=4))


def test_a_small_vocabulary_is_searched_as_ever(pocket: LanguageModel) -> None:
    """The rule is about tests, so that pocket-gpt2 fits none for a few prompts."""
    assert offered(pocket, LAYER, 2000, fits=True) is None
    assert offered(pocket, LAYER, 20, fits=False) is None
    assert ("lens", LAYER) not in pocket.measured


def test_without_a_lens_what_is_tested_teaches(model: LanguageModel) -> None:
    """Text and random tokens come back, after few of all tests; nothing is fitted."""
    for kind in ("prose", "code", "random"):
        ids = sample(model, kind)
        for layer in (1, LAYER, model.n_layers):
            found = invert(model.states(ids, layer), model, layer, lens=False)
            assert torch.equal(found.tokens, ids)
            bound = len(ids) * model.vocab_size / 2
            assert kind == "random" or found.tested.sum() < bound / 4
    assert not fitted.FOLDER.exists()


def test_every_token_is_proposed_once(model: LanguageModel) -> None:
    """Also where each batch teaches the next one."""
    ids = sample(model)
    states = model.states(ids, LAYER)
    reading = Reading(Unfitted(model, LAYER, False), states)
    for t in (0, 5):
        step = OneStepMap.after(model, LAYER, ids[:t])
        batches = []
        for batch in reading.proposals(step, states[t], torch.Generator()):
            reading.learn(batch, step.tokens(batch))
            batches.append(batch)
        assert sorted(torch.cat(batches).tolist()) == model.vocabulary.tolist()


def test_a_lens_is_fitted_where_searches_would_cost_more(
    model: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Announced once, kept, and used at once by the next process."""
    monkeypatch.setattr(fitted, "BOUND", 15 * model.vocab_size)
    ids = sample(model)
    states = [model.states(ids, LAYER)] * 3
    assert all(
        torch.equal(x.tokens, ids)
        for x in invert_many(states, model, LAYER, lens=False)
    )
    forget(model)
    assert torch.equal(invert(states[0], model, LAYER).tokens, ids)
    assert capsys.readouterr().err == "" and not fitted.FOLDER.exists()
    for found in invert_many(states, model, LAYER):
        assert torch.equal(found.tokens, ids) and found.tested.sum() < 300
    said = [x for x in capsys.readouterr().err.splitlines() if "sipit-lite" in x]
    [line] = said
    assert "fits a lens of layer 3" in line and "lens=False" in line
    assert Lens.load(place(model, LAYER), model).layer == LAYER
    again = load("pocket-gpt2", device="cpu")
    monkeypatch.setattr(Lens, "fit", None)  # a call would be an error
    assert isinstance(offered(again, LAYER, 1, fits=True), Lens)
    assert isinstance(offered(again, LAYER, 1, fits=False), Unfitted)
    assert isinstance(offered(again, 2, 1, fits=True), Unfitted)


def test_a_long_search_goes_on_with_a_lens(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as one prompt has cost as many tests as the fit reads tokens."""
    monkeypatch.setattr(fitted, "TOKENS", 500)
    drafter = Unfitted(model, LAYER, True)
    assert drafter.after(499) is drafter
    assert isinstance(drafter.after(501), Lens)
    assert Unfitted(model, LAYER, False).after(10**9).fits is False
    ids = sample(model, "random", 12)
    forget(model)
    found = invert(model.states(ids, 6), model, 6)
    assert torch.equal(found.tokens, ids)
    assert ("lens", 6) in model.measured


def test_spoilt_files_are_fitted_anew(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands there; a folder that cannot be written loses no lens."""
    path = place(model, 1)
    path.parent.mkdir(parents=True)
    for spoilt in (b"", b"\xff" * 100):
        forget(model)
        path.write_bytes(spoilt)
        assert isinstance(lens_of(model, 1), Lens)
        assert Lens.load(path, model).layer == 1
    # The lens of another layer, under this name.
    forget(model)
    lens_of(model, 2)
    path.write_bytes(place(model, 2).read_bytes())
    assert lens_of(model, 1).layer == 1
    blocked = path.parent / "file"
    blocked.touch()
    monkeypatch.setattr(fitted, "FOLDER", blocked / "cache")
    forget(model)
    assert isinstance(lens_of(model, 1), Lens)


def test_interrupts_and_refusals_of_a_fit(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C leaves no file; a fit that cannot be made leaves the search."""

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fitted, "BOUND", 0)
    ids = sample(model)
    states = model.states(ids, LAYER)
    monkeypatch.setattr(Lens, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        invert(states, model, LAYER)
    assert not fitted.FOLDER.exists()

    def refused(*_: object, **__: object) -> None:
        raise SipItError("got no text")

    monkeypatch.setattr(Lens, "fit", refused)
    assert torch.equal(invert(states, model, LAYER).tokens, ids)
