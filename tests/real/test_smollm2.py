"""SmolLM2-135M, which ``make real`` puts beside: as good as on pocket-gpt2.

All by ``make real-test``, in a few minutes on two cores.
"""

import json
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import sipit_lite as sl
from sipit_lite.experiments.perturb import noisy
from sipit_lite.io.files import fingerprint
from sipit_lite.io.loading import REAL, _place
from sipit_lite.io.text import distinct, prompts

LENGTH = 12
BOOK = Path(__file__).parents[2] / "book"


@pytest.fixture(scope="module")
def model() -> sl.LanguageModel:
    """The model with its head, as transformers reads it."""
    folder, gguf = _place(REAL)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **gguf)
    tokenizer = sl.load(REAL, layers=1).tokenizer
    return sl.LanguageModel(hf.eval().requires_grad_(False), tokenizer, name=REAL)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No lens of an earlier run."""
    from sipit_lite.extensions import fitted

    monkeypatch.setattr(fitted, "FOLDER", tmp_path)
    yield


def test_it_is_the_model_of_transformers(model: sl.LanguageModel) -> None:
    """The same weights by its name, and the same states at three layers."""
    assert fingerprint(sl.load(REAL)) == fingerprint(model)
    ids = next(prompts(model.tokenizer, "prose", LENGTH))
    with torch.no_grad():
        output = model.hf_model(ids[None], output_hidden_states=True)
    for layer in (0, 1, 15, 29):
        states = model.states(ids, layer)
        torch.testing.assert_close(states, output.hidden_states[layer][0])
    after_norm = model.states(ids, model.n_layers + 1)
    torch.testing.assert_close(after_norm, output.hidden_states[-1][0])


@pytest.mark.parametrize("what", ["keys", "values"])
def test_a_cache_gives_the_prompt_back(model: sl.LanguageModel, what: str) -> None:
    """Of three shared heads, 192 numbers a token: by a lens, in few passes."""
    ids = next(prompts(model.tokenizer, "prose", LENGTH))
    with torch.no_grad():
        cache = model.hf_model(ids[None], use_cache=True).past_key_values
    leaked = sl.Leaked(model, what)
    lens = sl.Lens.fit(leaked, 1, tokens=10_000)
    recovery = sl.invert(leaked.rows(cache, 1), leaked, 1, lens=lens)
    assert recovery.tokens.tolist() == ids.tolist()
    assert recovery.tested.double().mean() < 100


@pytest.mark.parametrize(
    ("kind", "layer", "saved"),
    [("prose", 1, 20), ("code", 1, 100), ("random", 15, 100)],
)
def test_prompts_come_back_without_a_lens(
    model: sl.LanguageModel, kind: str, layer: int, saved: int
) -> None:
    """Exactly, in so small a part of the tests of brute force."""
    ids = next(prompts(model.tokenizer, kind, LENGTH))
    recovery = sl.invert(model.states(ids, layer), model, layer, lens=False)
    assert recovery.tokens.tolist() == ids.tolist()
    assert recovery.tested.sum() <= LENGTH * model.vocab_size / 2 / saved


@pytest.mark.parametrize("layer", [15, 30])
def test_prompts_come_back_with_a_small_lens(
    model: sl.LanguageModel, layer: int
) -> None:
    """Prose and code, exactly, from the middle and from the last layer."""
    lens = sl.Lens.fit(model, layer, tokens=4000, features=512)
    drawn = [(kind, LENGTH, 0) for kind in ("prose", "code")]
    if layer == model.n_layers:  # a miss is dear there: short prompts, but more
        drawn = list(product(("prose", "code"), (4,), (2, 3, 4)))
    for kind, length, seed in drawn:
        ids = next(prompts(model.tokenizer, kind, length, seed=seed))
        recovery = sl.invert(model.states(ids, layer), model, layer, lens=lens)
        assert recovery.tokens.tolist() == ids.tolist()
        assert recovery.verified.all()


def test_a_generation_is_captured(model: sl.LanguageModel) -> None:
    """The prompt and what the model wrote behind it, from the states alone."""
    ids = model.encode("The capital of France is")[None]
    with sl.capture(model.hf_model, layers=[1], tokenizer=model.tokenizer) as tape:
        written = model.hf_model.generate(ids, max_new_tokens=6, do_sample=False)
    recovery = tape.captured().invert(model, lens=False)
    assert recovery.tokens.tolist() == written[0, :-1].tolist()


def test_no_collision_among_two_thousand_prompts(model: sl.LanguageModel) -> None:
    """Their last states at the middle layer, all pairs."""
    texts = distinct(model.tokenizer, 2000, 6, source="installed")
    [states] = sl.last_states(model, texts, [15])
    report = sl.closest_pairs(states, 1, prompts=texts)
    assert report.compared == 2000 * 1999 // 2
    assert report.collisions == report.practical == 0
    floor = sl.noise_floor(model, 15) * states.norm(dim=1).median()
    assert report.minimum > floor


def test_ordinary_tokens_certify(model: sl.LanguageModel) -> None:
    """Though rows that were never trained are equal, and refused by name."""
    ids = model.encode("hidden states")
    recovery = sl.invert(model.states(ids, 1), model, 1, certify=True)
    assert recovery.tokens.tolist() == ids.tolist()
    assert recovery.certified and not recovery.twins


def test_what_no_prompt_has_is_refused(model: sl.LanguageModel) -> None:
    """Noise without a bound, after all tokens; and not a word of another width."""
    ids = model.encode("hidden states")
    states = noisy(model.states(ids, 1), 0.1 * torch.ones(len(ids)), 0)
    with pytest.raises(sl.NotVerified, match="nearest of 49152 tested"):
        sl.invert(states, model, 1, lens=False)
    with pytest.raises(sl.StatesError, match="smollm2 has shape"):
        sl.invert(states[:, 1:], model, 1)


@pytest.mark.parametrize("page", ["positions", "since_the_paper"])
def test_a_page_measures_what_it_stores(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cell for every model repeats the column of SmolLM2, up to rounding."""
    spec = spec_from_file_location("every_model", BOOK / "every_model.py")
    every_model = module_from_spec(spec)
    spec.loader.exec_module(every_model)
    monkeypatch.setenv("SIPIT_LITE_MODEL", REAL)
    monkeypatch.chdir(tmp_path)
    exec(dict(every_model.cells())[page], {"__name__": page})
    runs = Path("runs") / f"{page}.json"
    measured = json.loads(runs.read_text(encoding="utf-8"))[REAL]
    stored = json.loads((BOOK / runs).read_text(encoding="utf-8"))[REAL]
    assert measured == pytest.approx(stored, rel=0.1, abs=1e-6)
