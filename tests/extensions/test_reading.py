"""How a lens reads a prompt: the law of the next token, and what it is worth."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from sipit_lite import LanguageModel, Lens, invert, load
from sipit_lite.extensions import reading
from sipit_lite.extensions.reading import (
    Reading,
    calibrated,
    final_states,
    log_law,
    unembedding,
)
from sipit_lite.io.text import prompts
from sipit_lite.onestep import OneStepMap

LAYER = 3


@pytest.fixture(scope="module")
def lens(pocket: LanguageModel) -> Lens:
    """Of few tokens: it misses some, so that the prior matters."""
    return Lens.fit(pocket, LAYER, tokens=3000, features=0)


def test_states_of_a_layer_give_the_law_of_every_next_token(
    family: tuple[PreTrainedModel, LanguageModel],
) -> None:
    """At every layer, the log-probabilities that the decoder and its head compute."""
    hf, loaded = family
    model = LanguageModel(hf)
    ids = torch.randint(model.vocab_size, (6,), generator=torch.Generator())
    with torch.no_grad():
        logits = hf(input_ids=ids[None], use_cache=False).logits[0]
    expected = torch.log_softmax(logits, -1)
    for layer in range(model.n_layers + 2):  # the last is what left the norm
        final = final_states(model, loaded.states(ids, layer), layer)
        law = log_law(model, final)
        torch.testing.assert_close(law, expected, rtol=1e-3, atol=1e-3)


def test_the_head_of_a_model_in_memory_is_known(pocket: LanguageModel) -> None:
    """Tied to the embeddings or not; a model whose last blocks are left out has none."""
    assert unembedding(pocket) is pocket.decoder.get_input_embeddings().weight
    untied = pocket.decoder.config.__class__(
        n_embd=8, n_head=2, n_layer=1, vocab_size=20, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    hf = AutoModelForCausalLM.from_config(untied)
    assert unembedding(LanguageModel(hf)) is hf.lm_head.weight
    assert unembedding(LanguageModel(hf.get_decoder())) is None
    assert unembedding(load(layers=2, device="cpu")) is None


def test_text_is_expected_and_random_tokens_are_not(
    pocket: LanguageModel, lens: Lens
) -> None:
    """The prior is used for the one and not for the other; the weight is learned."""
    assert lens.weight > 0 and 0.5 < lens.hits < 1
    for kind, useful in (("prose", True), ("code", True), ("random", False)):
        ids = next(prompts(pocket.tokenizer, kind, 24, seed=3)).to(pocket.device)
        one = Reading(lens, pocket.states(ids, LAYER))
        assert (one.before is not None) == useful
        if useful:
            assert torch.allclose(
                one.law(slice(0, 1)).exp() * pocket.vocab_size, torch.ones(1)
            )
            uniform = -math.log(pocket.vocab_size)
            assert one.law(slice(1, len(ids))).gather(1, ids[1:, None]).mean() > uniform


def test_the_posterior_ranks_better_than_either(
    pocket: LanguageModel, lens: Lens
) -> None:
    """Mean log-rank of true tokens of text, at the learned weight."""
    ranks = {"lens": [], "prior": [], "posterior": []}
    for seed in range(8):
        ids = next(prompts(pocket.tokenizer, "prose", 24, seed=seed)).to(pocket.device)
        one = Reading(lens, pocket.states(ids, LAYER))
        near = lens.nearness(one.states)[1:]
        law = one.law(slice(1, len(ids)))
        scores = {"lens": near, "prior": law, "posterior": near + lens.weight * law}
        for name, score in scores.items():
            ahead = score > score.gather(1, ids[1:, None])
            ranks[name].append(ahead.sum(1).add(1).log2())
    mean = {name: float(torch.cat(parts).mean()) for name, parts in ranks.items()}
    assert mean["posterior"] < min(mean["lens"], mean["prior"]), mean


def test_every_token_is_proposed_once(pocket: LanguageModel, lens: Lens) -> None:
    """With and without the prior, first those that lens, prior and both name first."""
    for kind in ("prose", "random"):
        ids = next(prompts(pocket.tokenizer, kind, 12)).to(pocket.device)
        states = pocket.states(ids, LAYER)
        step = OneStepMap.after(pocket, LAYER, ids[:5])
        one = Reading(lens, states)
        batches = list(one.proposals(step, states[5], torch.Generator()))
        assert sorted(torch.cat(batches).tolist()) == list(range(pocket.vocab_size))
        first = lens.nearness(states[5:6])[0].topk(16).indices
        assert set(first.tolist()) == set(batches[0].tolist())
        # Of prose the first of each order, else the lens's next alone.
        if kind == "prose":
            assert reading.BATCHES[1] <= len(batches[1]) <= 3 * reading.BATCHES[1]
        else:
            ranked = lens.nearness(states[5:6])[0].topk(16 + reading.ALONE).indices
            assert set(torch.cat(batches[:2]).tolist()) == set(ranked.tolist())


def test_a_prior_of_no_use_costs_nothing(
    pocket: LanguageModel, lens: Lens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lens that reads all tokens right never asks for it; weight 0 neither."""
    monkeypatch.setattr(reading, "final_states", None)  # a call would be an error
    ids = next(prompts(pocket.tokenizer, "prose", 12)).to(pocket.device)
    states = pocket.states(ids, 1)
    assert Reading(replace(lens, weight=0.0), states).before is None
    sure = replace(lens, hits=1.0)
    assert torch.equal(sure.read([states])[0][0], lens.draft(states))


class Plausible:
    """A lens whose first token is always a likely one, and whose second is the true one.

    Of text, the first prompt, it is the hundredth of the law, which lifts the true one.
    """

    fitted = True
    weight = 1.0
    layer = LAYER

    def __init__(self, model: LanguageModel, prompts: list[torch.Tensor]) -> None:
        self.model = model
        self.prompts = [(ids, model.states(ids, LAYER)) for ids in prompts]
        finals = [final_states(model, x, LAYER) for _, x in self.prompts]
        self.laws = [log_law(model, x) for x in finals]

    def nearness(self, states: torch.Tensor) -> torch.Tensor:
        """Ten for a wrong token, and nearly as much for the true one."""
        [i] = [i for i, (_, x) in enumerate(self.prompts) if torch.equal(x, states)]
        ids = self.prompts[i][0]
        before = self.laws[i].roll(1, 0)
        wrong = before.topk(1 if i else 100).indices[:, -1]
        near = torch.zeros_like(before)
        rows = range(len(ids))
        near[rows, wrong] = 10.0
        near[rows, ids] = 9.9
        return near


def test_random_tokens_have_no_vote_on_the_weight(pocket: LanguageModel) -> None:
    """Also where the lens reads them as likely ones; what it reads right counts all."""
    kinds = ("prose", "random", "random", "random")
    drawn = []
    for seed, kind in enumerate(kinds):
        ids = next(prompts(pocket.tokenizer, kind, 24, seed=seed))
        drawn.append(ids.to(pocket.device))
    lens = Plausible(pocket, drawn)
    for ids in drawn:  # judged by what is read, all would be text
        assert Reading(lens, pocket.states(ids, LAYER)).before is not None
    weight, hits = calibrated(lens, drawn)
    assert weight >= 1 and hits == 0
    assert calibrated(lens, drawn[1:]) == (0.0, 0.0)


def test_nothing_to_calibrate_on(lens: Lens) -> None:
    """Then the prior is not used, and the lens is taken at its word."""
    assert calibrated(lens, []) == (0.0, 1.0)


def test_prompts_come_back_with_the_prior(pocket: LanguageModel, lens: Lens) -> None:
    """Prose, code and random tokens, at the middle and at the last layer."""
    last = Lens.fit(pocket, pocket.n_layers, tokens=3000, features=0)
    for one in (lens, last):
        for kind in ("prose", "code", "random"):
            ids = next(prompts(pocket.tokenizer, kind, 16, seed=5)).to(pocket.device)
            found = invert(pocket.states(ids, one.layer), pocket, one.layer, lens=one)
            assert torch.equal(found.tokens, ids.cpu())
