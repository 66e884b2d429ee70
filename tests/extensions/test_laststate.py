"""The prompt from the last state alone: exact, or an error."""

import copy
import dataclasses
import itertools
import math
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sipit_lite import (
    Interrupted,
    LanguageModel,
    LastStateError,
    ModelError,
    NotRecovered,
    SipItError,
    StatesError,
    invert_last,
    load,
)
from sipit_lite.acceptance import Observation, noise_floor
from sipit_lite.experiments.families import small
from sipit_lite.experiments.perturb import noisy, twins
from sipit_lite.extensions import laststate
from sipit_lite.extensions.laststate import (
    Collision,
    Ends,
    Search,
    _written,
    cooled,
    last_states,
    rivals,
)
from sipit_lite.io.text import prompts
from sipit_lite.onestep import OneStepMap

Family = tuple[PreTrainedModel, LanguageModel]
TRAINED = 6  # the last layer of pocket-gpt2
ABSOLUTE = (
    "gpt2",
    "gpt_neo",
)  # model types that add a vector for each absolute position; the others rotate


@pytest.fixture(scope="module")
def gpt2() -> LanguageModel:
    """A small random GPT-2 of 500 tokens, width 64 and three layers."""
    return small("GPT2", device="cpu")


def row(model: LanguageModel, ids: list[int] | Tensor, layer: int) -> Tensor:
    """The last-token state of a prompt."""
    return model.states(torch.as_tensor(ids), layer)[-1]


def quick(model: LanguageModel, layer: int, longest: int = 4) -> Ends:
    """A fit of a tenth of a second."""
    return Ends.fit(model, layer, longest, tokens=2000, features=32)


def some(model: LanguageModel, count: int, seed: int) -> Tensor:
    """So many random tokens."""
    return torch.randint(
        model.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)
    )


# Effects of single tokens, and their sums


def test_last_states_are_those_of_transformers(family: Family, prompt: Tensor) -> None:
    """The last row, after no prefix and after two tokens, at every layer but the last.

    There transformers applies the final norm.
    """
    untouched, model = family
    rows = torch.stack([prompt, torch.cat([prompt[:2], prompt[2:].flip(0)])])
    with torch.no_grad():
        expected = untouched(rows, output_hidden_states=True).hidden_states
    for layer in range(model.n_layers):
        for known in (0, 2):
            step = OneStepMap.after(model, layer, prompt[:known])
            states = last_states(step, rows[:, known:])
            assert torch.allclose(states, expected[layer][:, -1], atol=1e-5)


def a_search(model: LanguageModel, ids: Tensor, layer: int) -> Search:
    """For the last state of a prompt, by a law that knows nothing."""
    observed = Observation.of(row(model, ids, layer)[None], model, layer)
    level = torch.zeros(len(ids), model.vocab_size).log_softmax(-1)
    generator = torch.Generator().manual_seed(0)
    return Search(OneStepMap.after(model, layer), observed, level, generator, {})


def test_effects_are_exact_for_one_token(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens read: states of prompts with one token changed, by other passes.

    Of two changed tokens the sum is wrong by their interaction, which is not zero.
    """
    monkeypatch.setattr(laststate, "MEASURED", 6 * gpt2.vocab_size)
    ids = torch.tensor([3, 400, 77])
    search = a_search(gpt2, torch.tensor([3, 12, 77]), 2)
    likely = torch.zeros(3, gpt2.vocab_size)
    effects, near = search.effects(ids, ids[None], likely, {})
    assert near.ids.tolist() == [3, 12, 77] and search.agrees(near)
    assert near.tested == 3 * (gpt2.vocab_size + 1)  # the token there, once more
    changed = ids.repeat(7, 1)
    changed[range(1, 7), [0, 1, 2, 0, 1, 2]] = torch.tensor([9, 9, 9, 499, 0, 250])
    states = gpt2.states(changed, 2)[:, -1]
    assert torch.allclose(effects.sums(changed), states, atol=1e-4)
    two = torch.tensor([[9, 9, 77]])
    assert (effects.sums(two) - gpt2.states(two, 2)[:, -1]).norm() > 0.01


def test_what_was_measured_is_kept(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likeliest tokens that were not read before come next; all known are exact."""
    monkeypatch.setattr(laststate, "MEASURED", 48)
    ids = torch.tensor([3, 400, 77])
    search = a_search(gpt2, torch.tensor([3, 12, 77]), 2)
    likely = torch.arange(gpt2.vocab_size).float().repeat(3, 1)
    known: dict = {}
    for first, last in ((492, 500), (484, 492)):
        effects, _ = search.effects(ids, ids[None], likely, known)
        assert set(range(first, last)) <= set(known[0][0].tolist())
    counts = [len(known[t][0]) for t in range(3)]
    assert 30 < counts[0] <= 34 < 58 < counts[2] <= 98
    for t in range(3):
        tokens, measured = known[t]
        changed = ids.repeat(len(tokens), 1)
        changed[:, t] = tokens
        expected = gpt2.states(changed, 2)[:, -1] - gpt2.states(ids, 2)[-1]
        assert torch.allclose(measured, expected, atol=1e-4)
        assert torch.allclose(effects.each[t, tokens], expected, atol=1e-4)


def test_options_are_those_of_prompts_those_read_and_the_likeliest(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 500 tokens 60 a position; sums of changed ones by other passes."""
    monkeypatch.setattr(laststate, "MEASURED", 24)
    monkeypatch.setattr(laststate, "OPTIONS", 60)
    ids = torch.tensor([3, 400, 77])
    search = a_search(gpt2, torch.tensor([3, 12, 77]), 2)
    likely = torch.arange(500).float().log().repeat(3, 1)
    prompts = torch.tensor([[0, 1, 2], [5, 1, 77]])
    known: dict = {}
    effects, _ = search.effects(ids, prompts, likely, known)
    assert effects.options.shape == (3, 60) and effects.each.shape[:2] == (3, 60)
    assert (effects.options.diff() > 0).all()
    for t in range(3):
        read = known[t][0].tolist()
        options = effects.options[t].tolist()
        others = sorted(set(options) - set(read) - set(prompts[:, t].tolist()))
        rest = [v for v in range(499, -1, -1) if v not in read]
        assert set(read) | set(prompts[:, t].tolist()) <= set(options)
        assert others == sorted(rest[: len(others)])
        changed = ids.repeat(len(read), 1)
        changed[:, t] = known[t][0]
        sums = torch.searchsorted(effects.options[t], known[t][0])
        states = gpt2.states(changed, 2)[:, -1]
        assert torch.allclose(effects.each[t, sums] + effects.state, states, atol=1e-4)
        assert torch.allclose(effects.sums(changed)[-1], states[-1], atol=1e-3)


def test_half_of_what_is_read_is_drawn_by_frequency(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model writes fifty tokens of 500 nearly always, most draws are these."""
    monkeypatch.setattr(laststate, "MEASURED", 96)
    ids = torch.tensor([3, 400, 77])
    frequency = torch.full((500,), 1e-6)
    frequency[100:150] = 0.02
    search = a_search(gpt2, ids, 2)
    search = dataclasses.replace(search, law=frequency.log().repeat(3, 1))
    likely = torch.arange(500).float().log_softmax(0).repeat(3, 1)
    known: dict = {}
    search.effects(ids, ids[None], likely, known)
    for t, half in enumerate((16, 24, 48)):
        read = set(known[t][0].tolist())
        assert set(range(500 - half, 500)) <= read  # the likeliest
        assert len(read & set(range(100, 150))) > 0.9 * half


def test_frequency_is_the_mean_of_laws(family: Family) -> None:
    """Of transformers' next-token laws in what was written, and one even law."""
    _, model = family
    shape = (5, 4)
    written, frequency = _written(model, shape, torch.Generator().manual_seed(0))
    assert written.shape == shape
    laws = [torch.full((model.vocab_size,), 1 / model.vocab_size)]
    if model.decoder.config.tie_word_embeddings:
        table = model.decoder.get_input_embeddings().weight
        for t in range(1, shape[1]):
            with torch.no_grad():
                final = model.decoder(input_ids=written[:, :t], use_cache=False)
            law = (final.last_hidden_state[:, -1] @ table.T).softmax(-1)
            laws.append(law.mean(0))
    expected = torch.stack(laws).mean(0)
    assert torch.allclose(frequency, expected, atol=1e-6)


def test_all_that_is_read_fits_among_the_options() -> None:
    """What a base's rounds can read at a position, and the tokens of all prompts."""
    rounds = laststate.PATIENCE + 1
    most = rounds * (laststate.MEASURED + 1) + laststate.CHAINS
    assert most <= laststate.OPTIONS


def test_cooling_keeps_to_the_options() -> None:
    """Tokens drawn are options of their position; the law of others is least."""
    generator = torch.Generator().manual_seed(4)
    options = torch.tensor([[0, 2], [1, 3], [0, 3]])
    start = options[:, 1].repeat(300, 1)
    each = torch.zeros(3, 2, 1).double()
    law = a_law(4)
    free = torch.ones_like(start, dtype=torch.bool)
    goal = torch.zeros(1).double()
    drawn, likely = cooled(start, free, law, options, each, goal, generator)
    for t in range(3):
        assert set(drawn[:, t].tolist()) == set(options[t].tolist())
        outside = [v for v in range(4) if v not in options[t]]
        least = law[t, outside] + laststate.LEAST
        assert torch.equal(likely[t, outside], least)
        assert float(likely[t].exp().sum()) == pytest.approx(1.0)


def test_whitened_distances_are_mahalanobis() -> None:
    """In units of a covariance that is half that of the errors, half a multiple of I."""
    generator = torch.Generator().manual_seed(2)
    each = torch.randn(2, 5, 4, generator=generator).double()
    error = 0.3 * torch.randn(40, 4, generator=generator).double() + 1
    goal = torch.randn(4, generator=generator).double()
    options = torch.arange(5).repeat(2, 1)
    effects = laststate.Effects(torch.zeros(4).double(), options, each.clone())
    prompt = torch.tensor([[3, 1]])
    left = goal - effects.sums(prompt)[0] - error.mean(0)
    sample = (error - error.mean(0)).T.cov(correction=0)
    level = sample.trace() / 4 * torch.eye(4)
    covariance = (sample + level) / 2
    units, aim = effects.whitened(goal, error)
    seen = (aim - units[0, 3] - units[1, 1]).square().sum()
    assert float(seen) == pytest.approx(float(left @ covariance.inverse() @ left))
    # Prompts predicted without error leave numbers, if large ones.
    flat = laststate.Effects(torch.zeros(4).double(), options, each.clone())
    units, aim = flat.whitened(goal, torch.zeros(40, 4).double())
    assert units.isfinite().all() and aim.isfinite().all()


# The law of prompts, and draws


def a_law(vocab: int, seed: int = 0) -> Tensor:
    """Log-probabilities of each of three positions."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, vocab, generator=generator, dtype=torch.float64)
    return drawn.log_softmax(-1)


def shares(prompts: Tensor, vocab: int) -> Tensor:
    """How often each prompt of three tokens was drawn."""
    place = (prompts[:, 0] * vocab + prompts[:, 1]) * vocab + prompts[:, 2]
    return torch.bincount(place, minlength=vocab**3) / len(prompts)


def test_cooled_prompts_follow_the_law_of_sums(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At share 1 all the time: frequencies of all 64 prompts, against their densities.

    The oracle writes prior and normal density of each prompt out, token by token.
    """
    monkeypatch.setattr(laststate, "HOT", 1.0)
    monkeypatch.setattr(laststate, "COLD", 1.0)
    monkeypatch.setattr(laststate, "SWEEPS", 25)
    vocab, count = 4, 40_000
    law = a_law(vocab)
    generator = torch.Generator().manual_seed(4)
    each = 0.7 * torch.randn(3, vocab, 2, generator=generator).double()
    goal = torch.tensor([0.5, -1.0]).double()
    start = torch.zeros(count, 3, dtype=torch.long)
    free = torch.ones_like(start, dtype=torch.bool)
    options = torch.arange(vocab).repeat(3, 1)
    drawn, likely = cooled(start, free, law, options, each, goal, generator)
    weights = []
    for s in itertools.product(range(vocab), repeat=3):
        log = sum(float(law[t, s[t]]) for t in range(3))
        left = goal - sum(each[t, s[t]] for t in range(3))
        weights.append(math.exp(log - float(left @ left) / 2))
    expected = torch.tensor(weights) / sum(weights)
    spread = (expected * (1 - expected) / count).sqrt()
    assert ((shares(drawn, vocab) - expected).abs() < 5 * spread).all()
    # The mean laws of the last sweep are the marginals, with less noise.
    for t, marginal in enumerate(likely):
        counted = expected.view(4, 4, 4).transpose(0, t).sum((1, 2))
        assert torch.allclose(marginal.exp().float(), counted, atol=0.01)


def test_positions_that_are_not_free_stay() -> None:
    """And free ones are drawn."""
    generator = torch.Generator().manual_seed(4)
    start = torch.arange(3).repeat(500, 1)
    free = torch.rand(500, 3, generator=generator) < 0.5
    each = torch.zeros(3, 4, 1).double()
    goal = torch.zeros(1).double()
    options = torch.arange(4).repeat(3, 1)
    drawn, _ = cooled(start, free, a_law(4), options, each, goal, generator)
    assert torch.equal(drawn[~free], start[~free])
    assert 0.5 < float((drawn != start)[free].double().mean()) < 1


def test_the_law_of_a_prompt(gpt2: LanguageModel, monkeypatch) -> None:
    """By hand: half even, half frequency; the last token's evidence, with its floor."""
    frequency = torch.tensor([0.7, 0.2, 0.1, 0.0]).double()
    evidence = torch.tensor([-1000.0, 0.0, -5.0, -1000.0]).double()
    prior = frequency / 2 + 0.125
    law = laststate.prior_law(frequency, evidence, 3).exp()
    assert torch.allclose(law[:2], prior.expand(2, -1))
    said = (laststate.CALM * evidence).exp()
    said = said / said.sum() * (1 - laststate.HOPE) + prior * laststate.HOPE
    assert torch.allclose(law[2], said * prior / (said @ prior))
    assert laststate.prior_law(frequency, evidence, 1).shape == (1, 4)
    # And prompts are drawn by it, position by position.
    search = dataclasses.replace(a_search(gpt2, torch.arange(3), 1), law=law.log())
    monkeypatch.setattr(laststate, "CHAINS", 40_000)
    drawn = search.drawn(law.log())
    expected = torch.einsum("i,j,k->ijk", *law).flatten()
    spread = (expected * (1 - expected) / 40_000).sqrt()
    assert ((shares(drawn, 4) - expected).abs() < 5 * spread + 1e-9).all()


def test_a_part_of_a_prompt_is_drawn_anew(gpt2: LanguageModel) -> None:
    """Two to two thirds of its positions, each prompt its own, the rest stays.

    Of two positions one. A token that nothing speaks for is still drawn at times.
    """
    ids = torch.arange(9)
    likely = torch.full((9, gpt2.vocab_size), -torch.inf)
    likely[:, 400] = 0
    search = a_search(gpt2, ids, 1)
    for count, sizes in ((2, {1}), (3, {2}), (9, {2, 3, 4, 5, 6})):
        prompts, free = search.around(ids[:count], likely[:count])
        assert set(free.sum(1).tolist()) == sizes
    assert torch.equal(prompts[~free], ids.expand_as(prompts)[~free])
    drawn = [search.around(ids, likely) for _ in range(20)]
    same = torch.cat([prompts[free] == 400 for prompts, free in drawn])
    assert 0.9 < float(same.double().mean()) < 1


def test_errors_are_those_of_the_prompts_whose_sums_they_are(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every round, also of parts: true states less sums, of the same prompts."""
    goal = torch.tensor([3, 12, 77, 5])
    search = a_search(gpt2, goal, 2)
    summed = []
    rounds = []

    def sums(effects: laststate.Effects, prompts: Tensor) -> Tensor:
        summed.append((prompts, kept["sums"](effects, prompts)))
        return summed[-1][1]

    def whitened(effects: laststate.Effects, state: Tensor, error: Tensor) -> tuple:
        prompts, guessed = summed[-1]
        true = gpt2.states(prompts, 2)[:, -1]
        rounds.append(float((true - guessed - error).abs().max()))
        return kept["whitened"](effects, state, error)

    kept = dict(vars(laststate.Effects))
    monkeypatch.setattr(laststate.Effects, "sums", sums)
    monkeypatch.setattr(laststate.Effects, "whitened", whitened)
    monkeypatch.setattr(laststate, "MEASURED", 16)  # so few that it gets stuck
    monkeypatch.setattr(laststate, "CHAINS", 16)
    stuck = [guess.distance for guess in itertools.islice(search.steps(), 12)]
    assert len(rounds) == 12 and max(rounds) < 1e-4
    assert any(b >= a for a, b in itertools.pairwise(stuck))


# Lengths beside each other


def test_lengths_lend_tokens_in_their_order(gpt2: LanguageModel) -> None:
    """What is read: the last token stays last, the others keep their order."""
    seen: list[Tensor] = []

    class Seen(Search):
        def read(self, prompts: Tensor, states: Tensor) -> laststate.Guess:
            seen.append(prompts)
            return super().read(prompts, states)

    ids = torch.tensor([10, 11, 12, 13])
    for other in ([20, 21], [20, 21, 22, 23, 24, 25]):
        guess = laststate.Guess(torch.tensor(other), 1.0, 0)
        base = laststate.Guess(ids, 2.0, 0)
        search = Seen(**vars(a_search(gpt2, ids, 1)) | {"closest": {len(other): guess}})
        lent = search.lent(base)
        rows = seen.pop().tolist()
        assert lent.tested == len(rows) and lent.ids.tolist() in rows
        sizes = set()
        for prompt in rows:
            taken = [v for v in prompt if v >= 20]
            assert taken == sorted(taken) and set(taken) <= set(other)
            assert prompt[-1] in (13, other[-1])
            own = [prompt[t] == ids[t] for t in range(4) if prompt[t] < 20]
            assert all(own)  # what is not taken is the base's, where it was
            sizes.add(len(taken))
        assert {0, min(4, len(other))} <= sizes  # from none to all
        # Each once; of so few ways of putting two tokens there, all.
        distinct = {tuple(prompt) for prompt in rows}
        assert len(distinct) == len(rows)
        assert len(rows) == 8 if len(other) == 2 else 20 < len(rows) <= laststate.LENT


def test_a_restart_borrows_only_what_is_closer(gpt2: LanguageModel) -> None:
    """Else it would go back to where it was stuck; and of itself nobody borrows."""
    ids = torch.tensor([3, 12, 77])
    search = a_search(gpt2, ids, 1)
    base = laststate.Guess(ids, 5.0, 0)
    assert search.lent(base).tested == 0
    search.closest[3] = laststate.Guess(ids, 2.0, 0)
    assert search.lent(base).tested == 0
    search.closest[2] = laststate.Guess(ids[1:], 3.0, 0)
    assert search.lent(base).tested == 0  # 2 < 3: the restart is left alone
    assert search.lent(base._replace(distance=2.0)).tested > 0
    search.closest[2] = laststate.Guess(ids[1:], 1.0, 0)
    assert search.lent(base).tested > 0


def test_the_order_of_lengths_knows_no_unit() -> None:
    """Probable and short ones first, then where it came close, whatever the unit."""
    away = {2: [9.0] * 3, 3: [8.0, 2.0, 1.0, 0.0], 4: [9.0] * 9}
    likely = torch.tensor([1e-9, 0.5, 0.4, 0.1]).log()
    orders = []
    for unit in (1e-3, 1.0, 1e3):

        def steps(length: int, unit: float = unit) -> Iterator[laststate.Guess]:
            for distance in away[length]:
                ids = torch.zeros(length, dtype=torch.long)
                yield laststate.Guess(ids, unit * distance, 1)

        closest: dict = {}
        searches = {n: steps(n) for n in away}
        found = list(laststate._by_promise(searches, closest, likely))
        orders.append([len(guess.ids) for guess in found])
        kept = {n: guess.distance / unit for n, guess in closest.items()}
        assert kept == pytest.approx({2: 9.0, 3: 0.0, 4: 9.0})
    assert orders[0] == orders[1] == orders[2]
    # By hand: n · steps · distance / √probability, of 4 first the mean distance.
    assert orders[0] == [2, 3, 2, 3, 3, 3, 4, 2] + [4] * 8


# Last token and length


def test_ends_is_a_law_over_tokens_and_lengths(gpt2: LanguageModel) -> None:
    """It sums to one, and is the normal density of what the regression leaves."""
    ends = Ends.fit(gpt2, 2, longest=3, tokens=4000, features=16)
    state = row(gpt2, [7, 8], 2)
    likely = ends.read(state)
    assert likely.shape == (500, 3) and float(likely.exp().sum()) == pytest.approx(
        1, abs=1e-4
    )
    seen = ends.predict(state)
    inverse = ends.whiten.double() @ ends.whiten.double().T
    for (v, n), (w, m) in (((8, 2), (7, 2)), ((8, 2), (8, 3)), ((100, 1), (3, 3))):
        far = []
        for token, length in ((v, n), (w, m)):
            left = (
                torch.cat([gpt2.embeddings[token], torch.eye(3)[length - 1]]).double()
                - seen.double()
            )
            far.append(float(left @ inverse @ left))
        said = float(likely[v, n - 1] - likely[w, m - 1])
        assert said == pytest.approx(
            -laststate.TRUST / 2 * (far[0] - far[1]), rel=1e-3, abs=1e-3
        )
    assert (
        int(likely.logsumexp(0).argmax()) == 1
        and 8 in likely.logsumexp(1).topk(20).indices
    )
    assert float(ends.frequency.sum()) == pytest.approx(1, abs=1e-5) and bool(
        (ends.frequency > 0).all()
    )


def test_ends_of_another_layer_model_or_length_are_refused(gpt2: LanguageModel) -> None:
    """It says which it got and which it needs."""
    ends = Ends.fit(gpt2, 2, longest=3, tokens=2000, features=0)
    state = row(gpt2, [7, 8], 3)
    with pytest.raises(
        LastStateError,
        match=r"for layer 2 and up to 3 tokens of this model; expected .*layer 3",
    ):
        invert_last(state, gpt2, 3, length=2, ends=ends)
    with pytest.raises(
        LastStateError,
        match=r"up to 3 tokens of this model; expected one for layer 2 .* and 4 tokens",
    ):
        invert_last(state, gpt2, 2, length=4, ends=ends)
    with pytest.raises(
        LastStateError,
        match="of another model; expected one for layer 2 of small GPT2, seed 1",
    ):
        invert_last(state, small("GPT2", seed=1, device="cpu"), 2, length=2, ends=ends)


# Whole prompts, against exhaustive search


def everything(
    model: LanguageModel, layer: int, state: Tensor, longest: int
) -> tuple[list[list[int]], list[int]]:
    """All prompts up to ``longest`` tokens within the noise floor, and the closest."""
    inside, best = [], (math.inf, [])
    for length in range(1, longest + 1):
        rows = torch.cartesian_prod(*[torch.arange(model.vocab_size)] * length).view(
            -1, length
        )
        far = (model.states(rows, layer)[:, -1] - state).norm(dim=1)
        inside += rows[(far <= noise_floor(model, layer) * state.norm()).cpu()].tolist()
        best = min(best, (float(far.min()), rows[int(far.argmin())].tolist()))
    return inside, best[1]


def test_every_family_against_all_prompts(family: Family) -> None:
    """All 3660 prompts are read: what is returned is the only one that fits."""
    model, found = family[1], 0
    chosen = [[5], [9, 30], [41, 2], [7, 7]]
    for layer in (1, model.n_layers):
        ends = quick(model, layer, 2)
        for ids in chosen:
            state = row(model, ids, layer)
            inside, best = everything(model, layer, state, 2)
            assert ids in inside
            try:
                recovered = invert_last(
                    state, model, layer, ends=ends, longest=2, seconds=3.0
                )
                assert inside == [recovered.tokens.tolist()] == [best] == [ids]
                found += 1
            except Collision as refusal:
                assert sorted(inside) == sorted(
                    [refusal.recovered.tokens.tolist(), refusal.other.tolist()]
                )
            except NotRecovered as refusal:
                assert refusal.recovered.tokens.tolist() not in inside
    # A constant prompt of a rotary model fits at both lengths, as its token does.
    assert found == (8 if model.decoder.config.model_type in ABSOLUTE else 4), found


def test_constant_prompts_of_rotary_models(family: Family) -> None:
    """With the length they are unique, without it they are not, as the error says."""
    model = family[1]
    if model.decoder.config.model_type in ABSOLUTE:
        return
    state, ends = row(model, [7, 7], 2), quick(model, 2)
    assert invert_last(state, model, 2, 2, ends=ends).tokens.tolist() == [7, 7]
    with pytest.raises(
        Collision,
        match=r"\(. tokens\) is .* away, radius .*; so is '[t7 ]+' \(. tokens\)",
    ) as refusal:
        invert_last(state, model, 2, ends=ends, longest=4)
    lengths = len(refusal.value.recovered.tokens), len(refusal.value.other)
    assert (
        abs(lengths[0] - lengths[1]) == 1 and not refusal.value.recovered.verified.any()
    )
    assert (
        set(refusal.value.recovered.tokens.tolist())
        == set(refusal.value.other.tolist())
        == {7}
    )


def test_rivals(gpt2: LanguageModel) -> None:
    """Near embeddings at each position; no empty prompt, none beyond the longest."""
    table = gpt2.embeddings
    near, *_ = rivals(gpt2, torch.tensor([5, 6]), None)
    for t, token in enumerate((5, 6)):
        changed = near[near[:, t] != token, t]
        apart = (table - table[token]).norm(dim=1)
        nearest = apart.topk(laststate.RIVALS + 1, largest=False).indices[1:]
        assert sorted(changed.tolist()) == sorted(nearest.tolist())
    for ids, longest, expected in (
        ([5], 1, []),
        ([5], 2, [[[5, 5]]]),
        ([5, 6], 2, [[[6]]]),
        ([5, 6], None, []),
    ):
        others = rivals(gpt2, torch.tensor(ids), longest)[1:]
        assert [rows.tolist() for rows in others] == expected


@pytest.mark.parametrize("layer", [1, 3])
def test_three_and_four_tokens_of_a_small_gpt2(gpt2: LanguageModel, layer: int) -> None:
    """One of 125 million, length not given; half the prompts have a token twice."""
    ends = quick(gpt2, layer, 8)
    for seed in range(4):
        ids = some(gpt2, 3 + seed % 2, seed)
        ids[0] = ids[1] if seed > 1 else ids[0]
        assert torch.equal(
            invert_last(
                row(gpt2, ids, layer), gpt2, layer, ends=ends, longest=8
            ).tokens,
            ids,
        )


@pytest.fixture(scope="module")
def trained(pocket: LanguageModel) -> Ends:
    """A fit of a second for the last layer of the trained model."""
    return Ends.fit(pocket, TRAINED, 3, tokens=3000, features=64)


@pytest.mark.parametrize("kind", ["random", "prose"])
def test_the_trained_model(pocket: LanguageModel, trained: Ends, kind: str) -> None:
    """One to three tokens from the last layer alone, length not given: alone inside."""
    for length in (1, 2, 3):
        ids = next(prompts(pocket.tokenizer, kind, length, seed=3))
        options = {"ends": trained, "longest": 3}
        recovered = invert_last(row(pocket, ids, TRAINED), pocket, **options)
        assert torch.equal(recovered.tokens, ids.cpu())
        assert recovered.text == pocket.decode(ids)
        distance, radius, runner_up = (
            float(x[-1])
            for x in (recovered.distance, recovered.radius, recovered.runner_up)
        )
        assert distance <= radius < runner_up
        assert recovered.layer == TRAINED and recovered.verified.all()
        assert recovered.tested[-1] > 0
        assert recovered.distance[:-1].isnan().all()
        assert recovered.radius[:-1].isnan().all()


def test_seeds_and_the_default_fit(gpt2: LanguageModel) -> None:
    """The same seed reads the same prompts, another seed recovers the same tokens."""
    ids = some(gpt2, 3, 11)
    state = row(gpt2, ids, 3)
    first, again = (invert_last(state, gpt2, length=3, seed=5) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.tested, again.tested)
    assert torch.equal(invert_last(state, gpt2, length=3, seed=6).tokens, ids)
    fitted = [key for key in gpt2.measured if key[0] == "ends"]
    assert fitted == [("ends", 3, laststate.LONGEST)]


def test_layer_zero_knows_the_last_token_alone(gpt2: LanguageModel) -> None:
    """Refused unless the prompt has one token."""
    for length in (None, 2):
        with pytest.raises(LastStateError, match=r"got layer 0, .*; expected length=1"):
            invert_last(row(gpt2, [3, 4], 0), gpt2, 0, length)
    assert invert_last(
        row(gpt2, [9], 0), gpt2, 0, length=1, ends=quick(gpt2, 0, 16)
    ).tokens.tolist() == [9]


def test_double_precision() -> None:
    """A model that computes in float64 is inverted in float64, in a smaller radius."""
    coarse = small("GPT2", device="cpu")
    decoder = copy.deepcopy(coarse.decoder).double()
    model = LanguageModel(decoder, name="double")
    found = invert_last(
        row(model, [3, 400], 2), model, 2, ends=quick(model, 2), longest=4
    )
    assert found.tokens.tolist() == [3, 400] and float(found.radius[-1]) < 1e-10


# What cannot be answered


def refusal_of_twins(gpt2: LanguageModel) -> Collision:
    """The error for a prompt with a token whose embedding another one has."""
    model = twins(gpt2, 20, 30)
    with pytest.raises(Collision, match="so is") as refusal:
        invert_last(row(model, [5, 20], 3), model, ends=quick(model, 3), longest=4)
    return refusal.value


def test_twins_collide(gpt2: LanguageModel) -> None:
    """Two tokens of one embedding: both prompts are named, none is verified."""
    collision = refusal_of_twins(gpt2)
    named = [collision.recovered.tokens.tolist(), collision.other.tolist()]
    assert sorted(named) == [[5, 20], [5, 30]]
    assert not collision.recovered.verified.any()
    assert "5 20" in str(collision) and "5 30" in str(collision)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_coarse_formats_are_never_wrong(
    gpt2: LanguageModel, dtype: torch.dtype
) -> None:
    """Rounding is an interval, not noise: mostly exact, else a named refusal."""
    exact = 0
    for seed in range(4):
        ids = some(gpt2, 2, seed)
        try:
            assert torch.equal(
                invert_last(
                    row(gpt2, ids, 3).to(dtype), gpt2, length=2, seconds=2.0
                ).tokens,
                ids,
            )
            exact += 1
        except NotRecovered as refusal:
            assert (
                isinstance(refusal, Collision)
                or refusal.recovered.distance[-1] > refusal.recovered.radius[-1]
            )
    assert exact >= 3


@pytest.mark.parametrize("spread", [1e-2, 1e-5, 1e-8])
def test_close_embeddings_are_never_wrong(spread: float) -> None:
    """Twelve tokens that hardly differ, stored coarsely: exact, or a named refusal."""
    model = small("GPT2", device="cpu")
    table, refused = model.decoder.get_input_embeddings().weight, 0
    table[:12] = table[:1] + spread * torch.randn(
        12, 64, generator=torch.Generator().manual_seed(0)
    )
    ends = quick(model, 2, 2)
    for seed in range(3):
        ids = some(model, 2, seed) % 12
        try:
            state = row(model, ids, 2).to(torch.bfloat16)
            assert torch.equal(
                invert_last(state, model, 2, length=2, ends=ends, seconds=1.0).tokens,
                ids,
            )
        except NotRecovered:
            refused += 1
    assert refused == {1e-2: 0, 1e-5: 3, 1e-8: 3}[spread]


def hopeless(gpt2: LanguageModel) -> dict[str, tuple[Tensor, LanguageModel]]:
    """States of layer 3 that no prompt has there, and the model that is asked."""
    state = row(gpt2, [3, 4], 3)
    return {
        "noise": (noisy(state[None], 0.1)[0], gpt2),
        "no prompt": (
            torch.randn(64, generator=torch.Generator().manual_seed(0)),
            gpt2,
        ),
        "zero": (torch.zeros(64), gpt2),
        "another layer": (row(gpt2, [3, 4], 2), gpt2),
        "another model": (state, small("GPT2", seed=1, device="cpu")),
        "huge": (state * 1e6, gpt2),
    }


def test_states_of_no_prompt_end_in_an_error_with_the_best(gpt2: LanguageModel) -> None:
    """The closest prompt comes with its distance, not verified, also when pickled."""
    for case, (state, model) in hopeless(gpt2).items():
        with pytest.raises(
            NotRecovered, match=r"the closest of \d+ read, .* is .* away, radius"
        ) as refusal:
            invert_last(state, model, 3, ends=quick(model, 3), longest=4, seconds=0.2)
        best = refusal.value.recovered
        assert not isinstance(refusal.value, Collision) and not best.verified.any(), (
            case
        )
        assert best.distance[-1] > best.radius[-1] and 1 <= len(best.tokens) <= 4, case
        far = (row(model, best.tokens, 3) - state).norm()
        assert float(best.distance[-1]) == pytest.approx(float(far), rel=1e-4), case
        assert best.text in str(refusal.value)
        copied = pickle.loads(pickle.dumps(refusal.value))
        assert str(copied) == str(refusal.value) and torch.equal(
            copied.recovered.tokens, best.tokens
        )
    # Noise did not lead astray: the prompt is the closest, and still not verified.
    with pytest.raises(NotRecovered) as refusal:
        invert_last(
            noisy(row(gpt2, [3, 4], 3)[None], 0.1)[0], gpt2, length=2, seconds=1.0
        )
    assert refusal.value.recovered.tokens.tolist() == [3, 4]
    assert float(refusal.value.recovered.distance[-1]) == pytest.approx(0.1, rel=1e-3)


def test_a_collision_travels_between_processes(gpt2: LanguageModel) -> None:
    """With both prompts."""
    collision = refusal_of_twins(gpt2)
    copied = pickle.loads(pickle.dumps(collision))
    assert type(copied) is Collision and str(copied) == str(collision)
    assert torch.equal(copied.other, collision.other)
    assert torch.equal(copied.recovered.tokens, collision.recovered.tokens)


BAD = r"got a state of shape .*; expected .*\(64,\)"
REFUSED: list[tuple[dict, type[SipItError], str]] = [
    ({"state": torch.full((64,), torch.nan)}, StatesError, "got NaN or Inf"),
    ({"state": torch.zeros(63)}, StatesError, r"got states of shape \(1, 63\)"),
    ({"state": torch.zeros(2, 64)}, StatesError, BAD),
    ({"state": torch.tensor(1.0)}, StatesError, BAD),
    ({"state": torch.zeros(64).long()}, StatesError, "got states of torch.int64"),
    ({"state": torch.zeros(0)}, StatesError, r"got states of shape \(1, 0\)"),
    ({"layer": 5}, ModelError, "got layer 5; .* has layers 0"),
    ({"layer": -1}, ModelError, "got layer -1"),
    ({"length": 0}, LastStateError, "got length=0; .* reads 1 to 48 tokens"),
    ({"length": 49}, LastStateError, "got length=49; .* reads 1 to 48 tokens"),
    ({"longest": 49}, LastStateError, "got longest=49; .* reads 1 to 48 tokens"),
    ({"seconds": 0.0}, LastStateError, "got seconds=0.0; expected a budget above 0"),
    ({"seconds": -1.0}, LastStateError, "got seconds=-1.0; expected a budget"),
    ({"seconds": math.nan}, LastStateError, "got seconds=nan; expected a budget"),
]


def test_bad_questions_are_refused(gpt2: LanguageModel) -> None:
    """At once, before anything is fitted; the line says what was expected."""
    good = {"state": row(gpt2, [3, 4], 3), "layer": 3}
    for options, error, piece in REFUSED:
        with pytest.raises(error, match=piece):
            invert_last(model=gpt2, **good | options)
    assert issubclass(LastStateError, SipItError)


def test_models_of_sixteen_bits_are_refused() -> None:
    """Their noise floor is too wide, and nothing is factorised in their formats."""
    model = load(device="cpu", dtype=torch.bfloat16, layers=1)
    with pytest.raises(
        LastStateError,
        match=r"computes in torch.bfloat16; expected torch.float32 or torch.float64",
    ):
        invert_last(row(model, [3], 1), model, 1)


def test_a_short_budget_ends_soon(pocket: LanguageModel, trained: Ends) -> None:
    """After the first step: a second or two, not minutes."""
    nowhere = torch.randn(256, generator=torch.Generator().manual_seed(1))
    with pytest.raises(NotRecovered) as refusal:
        invert_last(nowhere, pocket, ends=trained, longest=3, seconds=1e-3)
    assert refusal.value.recovered.seconds < 20


@pytest.mark.parametrize("pressed", [0, 2])
def test_ctrl_c_returns_the_best(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch, pressed: int
) -> None:
    """Still a KeyboardInterrupt; its prompt is the closest so far, not verified."""
    honest, calls = laststate.cooled, []

    def press(*given: object) -> tuple[Tensor, Tensor]:
        calls.append(given)
        if len(calls) > pressed:
            raise KeyboardInterrupt
        return honest(*given)

    monkeypatch.setattr(laststate, "cooled", press)
    state = torch.randn(64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        KeyboardInterrupt, match="interrupted after 0 verified tokens"
    ) as stop:
        invert_last(state, gpt2, 3, longest=2)
    best = stop.value.recovered
    assert isinstance(stop.value, Interrupted) and not best.verified.any()
    far = (row(gpt2, best.tokens, 3) - state).norm()
    assert float(best.distance[-1]) == pytest.approx(float(far), rel=1e-4)


def test_ctrl_c_during_the_last_look_keeps_the_prompt(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found, but not checked yet."""
    state = row(gpt2, [3, 4], 3)
    invert_last(
        state, gpt2, length=2
    )  # measures the noise floor, which reads states too

    def pressed(self: LanguageModel, prompt: object, layer: int) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "states", pressed)
    with pytest.raises(Interrupted) as stop:
        invert_last(state, gpt2, length=2)
    assert (
        stop.value.recovered.tokens.tolist() == [3, 4]
        and not stop.value.recovered.verified.any()
    )


def test_the_prompt_is_read_once_more(
    gpt2: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the map were wrong, the pass over the whole prompt would show it."""
    state = row(gpt2, [3, 4], 3)
    invert_last(state, gpt2, length=2)
    honest = LanguageModel.states
    monkeypatch.setattr(
        LanguageModel,
        "states",
        lambda self, prompt, layer: honest(self, prompt, layer) * 1.01,
    )
    with pytest.raises(NotRecovered, match="no prompt was found"):
        invert_last(state, gpt2, length=2)
