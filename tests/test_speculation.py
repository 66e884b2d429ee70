"""Drafted prompts are verified like searched ones.

Exact or refused, alone or many at once.
"""

import dataclasses

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2Model, PreTrainedModel

from sipit_lite import (
    Ambiguous,
    Interrupted,
    LanguageModel,
    Lens,
    LensError,
    NotVerified,
    Recovery,
    StatesError,
    acceptance,
    invert,
    invert_many,
    load,
)
from sipit_lite.io.text import prompts

Family = tuple[PreTrainedModel, LanguageModel]


def random_prompts(model: LanguageModel, count: int = 60) -> list[Tensor]:
    """Prompts of random tokens that fit the small models."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randint(model.vocab_size, (30,), generator=generator)
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def lens(pocket: LanguageModel) -> Lens:
    """A small lens of the last layer: its drafts need repairs."""
    return Lens.fit(pocket, pocket.n_layers, tokens=6000, features=128)


def blind(lens: Lens) -> Lens:
    """A lens that sees nothing: it predicts the same embedding for every state."""
    return dataclasses.replace(lens, slope=torch.zeros_like(lens.slope))


def test_every_family_at_every_layer(family: Family, prompt: Tensor) -> None:
    """Exact, the lens good or blind, and nothing accepted outside its radius."""
    model = family[1]
    for layer in range(model.n_layers + 1):
        good = Lens.fit(model, layer, prompts=random_prompts(model), features=16)
        for lens in (good, blind(good)):
            found = invert(model.states(prompt, layer), model, layer, lens=lens)
            assert found.tokens.tolist() == prompt.tolist()
            assert (found.distance <= found.radius).all() and (
                found.runner_up > found.radius
            ).all()
            assert (
                found.verified.all()
                and (found.tested >= 1).all()
                and (found.tested <= model.vocab_size).all()
            )


def test_many_prompts_equal_one_at_a_time(pocket: LanguageModel, lens: Lens) -> None:
    """Ragged lengths, the full context among them.

    One with NaN and one of another layer fail alone.
    """
    lengths = (1, 3, 20, 7, 40, 12)
    drawn = [
        next(prompts(pocket.tokenizer, "random", n, seed=n)).to(pocket.device)
        for n in lengths
    ]
    states = [pocket.states(ids, lens.layer) for ids in drawn]
    states[3][2, 5] = torch.nan
    states[5] = pocket.states(drawn[5], 2)
    found = invert_many(states, pocket, lens.layer, lens=lens)
    assert isinstance(
        found[3], StatesError
    ) and "NaN or Inf in the state at position 2" in str(found[3])
    assert isinstance(found[5], NotVerified) and found[5].position == 0
    for i in (0, 1, 2, 4):
        assert isinstance(found[i], Recovery) and torch.equal(
            found[i].tokens, drawn[i].cpu()
        )


def test_many_prompts_without_a_lens(pocket: LanguageModel) -> None:
    """The same outcomes, searched one by one."""
    found = invert_many(
        [pocket.states("one", 1), torch.zeros(2, 3), pocket.states("two", 1)], pocket, 1
    )
    assert [f.text if isinstance(f, Recovery) else type(f) for f in found] == [
        "one",
        StatesError,
        "two",
    ]
    assert invert_many([], pocket, 1) == []


def test_a_corrupted_position_keeps_the_prefix(
    pocket: LanguageModel, lens: Lens
) -> None:
    """The position is named, the prefix before it comes with the error."""
    ids = pocket.encode("the prefix is kept, always")
    states = pocket.states(ids, lens.layer).clone()
    states[4, 0] += 5.0
    with pytest.raises(NotVerified, match="position 4: no token verifies") as refusal:
        invert(states, pocket, lens.layer, lens=lens)
    assert torch.equal(refusal.value.recovered.tokens, ids[:4].cpu())


def test_twin_embeddings_are_ambiguous_however_good_the_draft() -> None:
    """The draft verifies, and still its twin is found."""
    model = load("pocket-gpt2", device="cpu", random_init=True)
    with torch.no_grad():
        model.decoder.get_input_embeddings().weight[9] = (
            model.decoder.get_input_embeddings().weight[4]
        )
    lens = Lens.fit(model, 2, prompts=random_prompts(model, 200), features=0)
    with pytest.raises(Ambiguous, match="2 tokens verify") as refusal:
        invert(model.states(torch.tensor([8, 4, 7]), 2), model, 2, lens=lens)
    assert refusal.value.position == 1 and refusal.value.recovered.tokens.tolist() == [
        8
    ]


@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-5, 1e-7])
def test_no_silent_error_among_close_embeddings(spread: float) -> None:
    """Twelve tokens that nearly agree: the prompt, or a refusal with a true prefix."""
    model = load("pocket-gpt2", random_init=True, seed=1, device="cpu")
    with torch.no_grad():
        table = model.decoder.get_input_embeddings().weight
        table[:12] = table[:1] + spread * torch.randn(
            12, table.shape[1], generator=torch.Generator().manual_seed(1)
        )
    lens = Lens.fit(model, 1, prompts=random_prompts(model, 200), features=0)
    for seed in range(4):
        ids = torch.randint(12, (4,), generator=torch.Generator().manual_seed(seed))
        try:
            assert torch.equal(
                invert(model.states(ids, 1), model, 1, lens=lens).tokens, ids
            )
        except NotVerified as refusal:
            assert torch.equal(refusal.recovered.tokens, ids[: refusal.position])


def test_no_draft_is_trusted_beside_a_massive_dimension() -> None:
    """Where radii are as large as the gaps between tokens: the prompt, or a refusal."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    decoder = GPT2Model(config).eval().requires_grad_(False)
    decoder.wpe.weight[:, 0] += 120_000
    model, refused = LanguageModel(decoder, name="massive"), 0
    lens = Lens.fit(
        model, 0, prompts=[ids[:16] % 500 for ids in random_prompts(model)], features=0
    )
    for seed in range(20):
        ids = torch.randint(500, (2,), generator=torch.Generator().manual_seed(seed))
        try:
            assert torch.equal(
                invert(model.states(ids, 0), model, 0, lens=lens).tokens, ids
            )
        except NotVerified:
            refused += 1
    assert refused > 0


def test_a_lens_of_another_layer_is_refused(pocket: LanguageModel, lens: Lens) -> None:
    """Before anything is computed."""
    with pytest.raises(
        LensError, match="got a lens for layer 6; expected one for layer 3"
    ):
        invert(pocket.states("x", 3), pocket, 3, lens=lens)
    with pytest.raises(LensError, match="expected one for layer 3"):
        invert_many([pocket.states("x", 3)], pocket, 3, lens=lens)


def test_ctrl_c_keeps_what_is_known(
    pocket: LanguageModel, lens: Lens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verified prefixes in the order of the prompts, and the error of a failed one."""
    texts = ["first prompt of all", "second", "a third one, longer than the others"]
    states = [pocket.states(text, lens.layer) for text in texts]
    states[1] = states[1] * torch.nan

    def pressed(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(acceptance, "try_candidates", pressed)
    for reader in (blind(lens), lens):
        with pytest.raises(Interrupted) as stop:
            invert_many(states, pocket, lens.layer, lens=reader)
        known = stop.value.outcomes
        assert len(known) == 3 and isinstance(known[1], StatesError)
        assert all(
            text.startswith(o.text)
            for text, o in zip(texts, known, strict=True)
            if isinstance(o, Recovery)
        )
    with pytest.raises(Interrupted) as stop:
        invert(states[2], pocket, lens.layer, lens=blind(lens))
    assert texts[2].startswith(stop.value.recovered.text)


def test_the_whole_prompt_is_read_once_more(
    pocket: LanguageModel, lens: Lens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that a search found are compared in one pass too."""
    ids = next(prompts(pocket.tokenizer, "random", 6, seed=3)).to(pocket.device)
    states = pocket.states(ids, lens.layer)
    blinded = blind(lens)
    invert(states, pocket, lens.layer, lens=blinded)
    honest = LanguageModel.states
    monkeypatch.setattr(
        LanguageModel, "states", lambda *arguments: honest(*arguments) * 1.01
    )
    with pytest.raises(NotVerified, match="read in one pass, is"):
        invert(states, pocket, lens.layer, lens=blinded)


def test_a_prefix_that_comes_with_an_error_holds_no_twin() -> None:
    """A twin before the corrupted position is refused first.

    What was recovered is verified, and unambiguous.
    """
    model = load("pocket-gpt2", device="cpu", random_init=True)
    with torch.no_grad():
        model.decoder.get_input_embeddings().weight[9] = (
            model.decoder.get_input_embeddings().weight[4]
        )
    lens = Lens.fit(model, 2, prompts=random_prompts(model, 200), features=0)
    states = model.states(torch.tensor([8, 4, 7, 6]), 2).clone()
    states[3] += 1.0
    with pytest.raises(Ambiguous) as refusal:
        invert(states, model, 2, lens=lens)
    assert refusal.value.position == 1 and refusal.value.recovered.tokens.tolist() == [
        8
    ]
