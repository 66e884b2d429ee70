"""Defences: what is sent, what an attacker who knows the defence makes of it, and what the model loses."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from sipit_lite import LanguageModel, ModelError, OneStepMap
from sipit_lite.experiments.defences import (
    STRENGTHS,
    DefenceError,
    Dropping,
    Noise,
    Projection,
    Rounding,
    Score,
    continued,
    extra_losses,
    keys_and_values,
    loss,
    main,
    openings,
    recovery,
    recovery_of_dropped,
    repair,
    study,
    wilson,
)
from sipit_lite.experiments.perturb import twins
from sipit_lite.io.text import bundled

Family = tuple[PreTrainedModel, LanguageModel]
ROWS = (
    torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    * torch.logspace(-1, 1, 40)[:, None]
)
MASKS = [Noise(0.3), Rounding(1), Rounding(4), Projection(8)]


@pytest.fixture
def tied(family: Family) -> Family:
    """The families whose unembedding is their table of embeddings."""
    if not family[0].config.tie_word_embeddings:
        pytest.skip(
            "an unembedding of its own: test_continued_needs_a_tied_unembedding"
        )
    return family


@pytest.mark.parametrize(
    ("successes", "low", "high"),
    [(8, 0.490162, 0.943318), (0, 0.0, 0.277533), (10, 0.722467, 1)],
)
def test_wilson_values_of_ten_trials(successes: int, low: float, high: float) -> None:
    """8 of 10 as in the tables; 0 of n ends at z²/(n + z²), worked out by hand."""
    assert wilson(successes, 10) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(
    ("successes", "trials"), [(1, 2), (3, 7), (96, 192), (191, 192)]
)
def test_wilson_ends_solve_the_equation(successes: int, trials: int) -> None:
    """Both ends are at 1.96 of their own standard errors from the share, on either side of it."""
    share, (low, high) = successes / trials, wilson(successes, trials)
    for p in (low, high):
        assert (share - p) ** 2 == pytest.approx(
            1.959963984540054**2 * p * (1 - p) / trials
        )
    assert low < share < high


@pytest.mark.parametrize(("successes", "trials"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses(successes: int, trials: int) -> None:
    """Counts that cannot be."""
    with pytest.raises(
        DefenceError, match=f"got {successes} successes in {trials} trials"
    ):
        wilson(successes, trials)


def test_noise_has_its_size_and_its_seed() -> None:
    """The mean squared error is size²·‖h‖², the same seed draws the same noise, and another seed other noise."""
    states = torch.ones(2000, 32, dtype=torch.float64) * 3
    sent = Noise(0.5).send(states, seed=1)
    assert float(
        (sent - states).square().sum(1).mean() / states[0].square().sum()
    ) == pytest.approx(0.25, rel=0.03)
    assert torch.equal(sent, Noise(0.5).send(states, seed=1)) and not torch.equal(
        sent, Noise(0.5).send(states, seed=2)
    )


def test_noise_surprise_is_that_of_a_normal_law() -> None:
    """Up to a constant, −log of the density that torch.distributions has."""
    sent = Noise(0.3).send(ROWS[:1])[0]
    deviation = 0.3 * ROWS.double().norm(dim=1) / 32**0.5
    law = torch.distributions.Normal(ROWS.double(), deviation[:, None])
    apart = Noise(0.3).surprise(sent, ROWS, 1e-6) + law.log_prob(sent.double()).sum(1)
    assert torch.allclose(apart, apart[:1].expand_as(apart))


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_rounding_has_so_many_levels(bits: int) -> None:
    """At most 2^bits values in a row, symmetric about zero, none further from its number than half a step."""
    sent = Rounding(bits).send(ROWS)
    step = ROWS.abs().amax(1, keepdim=True) / 2 ** (bits - 1)
    assert max(len(row.unique()) for row in sent) <= 2**bits
    assert ((sent - ROWS).abs() <= step / 2 * (1 + 1e-3)).all() and (
        sent.abs() >= step / 2 * (1 - 1e-3)
    ).all()
    assert torch.equal(Rounding(bits).send(torch.zeros(1, 32)), torch.zeros(1, 32))


def test_projection_is_orthogonal() -> None:
    """Projecting twice is projecting once, what is lost is orthogonal to what is kept, and the rank is right."""
    sent = Projection(5).send(ROWS.double())
    assert (
        torch.allclose(Projection(5).send(sent), sent)
        and int(torch.linalg.matrix_rank(sent)) == 5
    )
    assert torch.allclose(
        sent @ (ROWS.double() - sent).T,
        torch.zeros(40, 40, dtype=torch.float64),
        atol=1e-9,
    )
    assert not torch.allclose(Projection(5, key=1).send(ROWS.double()), sent)


@pytest.mark.parametrize("defence", MASKS, ids=str)
def test_the_true_state_fits_and_surprises_least(
    defence: Noise | Rounding | Projection,
) -> None:
    """Sent from each of forty states in turn: the true one always fits, and is the likeliest."""
    for i, sent in enumerate(defence.send(ROWS)):
        assert bool(defence.fits(sent, ROWS, 1e-6)[i])
        assert int(defence.surprise(sent, ROWS, 1e-6).argmin()) == i


def test_recovery_is_exact_where_the_defence_is_a_known_function(
    family: Family, prompt: torch.Tensor
) -> None:
    """Two bits a number, or eight directions of 32, hide no token of any architecture; nothing false is verified."""
    if not family[0].config.tie_word_embeddings:
        with pytest.raises(ModelError, match="an unembedding of its own"):
            recovery(family[1], [prompt], 2, MASKS)
        return
    for score in recovery(family[1], [prompt[:6]], 2, [Rounding(2), Projection(8)]):
        assert (
            score == Score(6, 6, 6, score.verified, 0, 1, 1, score.certain)
            and score.verified >= 5
        )
        assert score.certain == (score.verified == 6)


def test_loud_noise_verifies_nothing(tied: Family, prompt: torch.Tensor) -> None:
    """Noise of thirty times the norm: hardly a token is recovered, and none is called verified."""
    [score] = recovery(tied[1], [prompt], 2, [Noise(30.0)])
    assert (
        score.trials == 13
        and score.likelihood <= 4
        and score.verified == score.false == 0
    )


def test_twins_are_not_verified(pocket: LanguageModel) -> None:
    """Two tokens with one state both fit, so that neither is called verified."""
    model, ids = twins(pocket, 5, 6), torch.tensor([5, 7])
    for score in recovery(model, [ids], 1, [Rounding(8), Projection(64)]):
        assert score.verified == 1 and score.false == 0


def test_continued_gives_the_logits_of_transformers(
    tied: Family, prompt: torch.Tensor
) -> None:
    """From the states of any layer, embeddings and last layer included."""
    untouched, model = tied
    with torch.no_grad():
        expected = untouched(prompt[None]).logits[0]
    for layer in range(model.n_layers + 1):
        assert torch.allclose(
            continued(model, model.states(prompt, layer), layer), expected, atol=1e-4
        ), layer
    with torch.no_grad():
        assert torch.equal(
            untouched(prompt[None]).logits[0], expected
        )  # the hook is gone


def test_continued_needs_a_tied_unembedding(
    family: Family, prompt: torch.Tensor
) -> None:
    """Tied or refused: the unembedding of the others is not loaded."""
    untouched, model = family
    if untouched.config.tie_word_embeddings:
        assert continued(model, model.states(prompt, 1), 1).shape == (
            13,
            model.vocab_size,
        )
        return
    with pytest.raises(
        ModelError,
        match="with an unembedding of its own; expected one tied to the embeddings",
    ):
        continued(model, model.states(prompt, 1), 1)


def test_dropped_rows_are_out_of_sight(pocket: LanguageModel) -> None:
    """From layer 0 it is as if the dropped tokens had been cut out and the others had kept their positions."""
    ids, kept = pocket.encode("the hidden states of all positions"), Dropping(2).kept(6)
    with torch.no_grad():
        expected = pocket.decoder(
            ids[kept][None], position_ids=kept[None].to(ids)
        ).last_hidden_state[0]
    expected = expected @ pocket.embeddings.T
    assert torch.allclose(
        continued(pocket, pocket.states(ids, 0)[kept], 0, kept), expected, atol=1e-3
    )


def test_loss_is_that_of_transformers(tied: Family, prompt: torch.Tensor) -> None:
    """The mean is the loss that transformers computes from labels."""
    untouched, model = tied
    with torch.no_grad():
        expected = untouched(prompt[None], labels=prompt[None]).loss
    assert float(
        loss(model, prompt, model.states(prompt, 2), 2).mean()
    ) == pytest.approx(float(expected), rel=1e-4)


def test_extra_loss_of_almost_nothing_is_almost_nothing(pocket: LanguageModel) -> None:
    """Sixteen bits cost nothing, one bit does; dropping after the last block costs the positions kept nothing."""
    texts = [
        pocket.encode(
            "Return the number of times that the given value occurs in the list."
        )
    ]
    fine, coarse = (
        extra_losses(pocket, texts, 3, Rounding(bits)).mean() for bits in (16, 1)
    )
    assert abs(fine) < 1e-3 < 0.1 < coarse
    last = extra_losses(pocket, texts, pocket.n_layers, Dropping(3))
    assert (
        torch.allclose(last, torch.zeros_like(last), atol=1e-4)
        and len(last) == (len(texts[0]) - 1) // 3
    )
    with pytest.raises(DefenceError, match="got 1 texts that predict no token"):
        extra_losses(pocket, [texts[0][:1]], 3, Rounding(1))


def test_repair_finds_the_only_pair(tied: Family, prompt: torch.Tensor) -> None:
    """Of all |V|² pairs behind a prefix, the one whose last state was sent, or it says that it has not found it.

    A random model's own token is now and then misjudged behind an unknown one, so one prefix of two is asked for.
    """
    model, found = tied[1], []
    pairs = torch.tensor(
        list(product(range(model.vocab_size), repeat=2)), device=model.device
    )
    for start in (2, 5):
        step, observed = (
            OneStepMap.after(model, 2, prompt[:start]),
            model.states(prompt[: start + 2], 2)[-1],
        )
        distance = (
            torch.cat([step.branch(rows)[0][:, -1] for rows in pairs.split(600)])
            .sub(observed)
            .norm(dim=1)
        )
        assert (
            pairs[distance.argmin()].tolist() == prompt[start : start + 2].tolist()
            and float(distance.min()) < 1e-4
        )
        found.append(
            repair(
                step, observed, 1, torch.zeros(model.vocab_size, device=model.device)
            )
        )
        assert not found[-1].verified or torch.equal(
            found[-1].tokens, prompt[start : start + 2]
        )
    assert any(f.verified for f in found)


def test_a_state_of_another_prompt_is_not_repaired(pocket: LanguageModel) -> None:
    """A state that no run of tokens has is not called verified."""
    step, observed = (
        OneStepMap.after(pocket, 2),
        pocket.states("Return the", 2)[1] * 1.5,
    )
    assert not repair(
        step, observed, 1, torch.zeros(pocket.vocab_size), rounds=1
    ).verified


def test_single_gaps_are_repaired(pocket: LanguageModel) -> None:
    """Every second state dropped: all tokens come back, verified; of wider gaps only what is verified is said so."""
    ids = pocket.encode("Return the number of times")[:4]
    assert recovery_of_dropped(pocket, [ids], 2, Dropping(2)) == Score(
        4, 4, 4, 4, 0, 1, 1, 1
    )
    score = recovery_of_dropped(pocket, [ids], 2, Dropping(4))
    assert score.trials == 4 and score.likelihood >= 1 and score.false == 0


def test_keys_and_values_are_those_of_the_cache(
    family: Family, prompt: torch.Tensor
) -> None:
    """The candidate's row is what a pass over the whole prompt leaves in the cache, for every block."""
    model = family[1]
    for layer in range(1, model.n_layers + 1):
        cache = OneStepMap.after(model, layer, prompt).past[layer - 1]
        expected = torch.cat([x[0, :, 7].flatten() for x in cache])
        rows = keys_and_values(
            OneStepMap.after(model, layer, prompt[:7]), torch.arange(model.vocab_size)
        )
        assert torch.allclose(rows[prompt[7]], expected, atol=1e-5)
        assert int((rows - expected).norm(dim=1).argmin()) == int(prompt[7])
    with pytest.raises(ModelError, match="keys and values belong to a block"):
        keys_and_values(OneStepMap.after(model, 0), torch.arange(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Noise(0.0), "got noise of size 0.0; expected a finite number above 0"),
        (lambda: Noise(math.inf), "got noise of size inf"),
        (lambda: Noise(math.nan), "got noise of size nan"),
        (lambda: Rounding(0), "got 0 bits; expected 1 to 16"),
        (lambda: Rounding(17), "got 17 bits"),
        (
            lambda: Projection(0),
            "got a projection to 0 dimensions; expected at least 1",
        ),
        (
            lambda: Projection(33).send(ROWS),
            "got a projection to 33 dimensions; the states have 32",
        ),
        (lambda: Dropping(1), "got a period of 1; expected at least 2"),
        (
            lambda: Dropping(5).kept(4),
            "got a prompt of 4 tokens; a period of 5 would send no state at all",
        ),
    ],
)
def test_a_strength_without_sense_is_refused(make, message: str) -> None:
    """One line with what came and what was expected."""
    with pytest.raises(DefenceError, match=message):
        make()


def test_every_defence_has_five_strengths() -> None:
    """What the curves of the chapter need."""
    assert set(STRENGTHS) == {"noise", "rounding", "projection", "dropping"}
    assert min(map(len, STRENGTHS.values())) >= 5


def test_openings_are_of_different_passages(pocket: LanguageModel) -> None:
    """Each begins a bundled passage of its own, and the seed orders them alone."""
    found, texts = list(openings(pocket, 12)), bundled("prose")
    starts = [pocket.decode(ids) for ids in found]
    assert (
        all(sum(text.startswith(start) for text in texts) == 1 for start in starts)
        and len(set(starts)) > 40
    )
    assert {pocket.decode(ids) for ids in openings(pocket, 12, seed=1)} == set(starts)


def test_study_and_command_line(
    tied: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The file holds one row a strength; a bad layer ends with 2 and one line."""
    model = tied[1]
    few = {"rounding": (Rounding(2),), "dropping": (Dropping(2),)}
    monkeypatch.setattr(
        "sipit_lite.experiments.defences.STRENGTHS",
        {name: few.get(name, ()) for name in STRENGTHS},
    )
    monkeypatch.setattr(
        "sipit_lite.experiments.defences.load", lambda name, device: model
    )
    some = [torch.arange(2, 14, device=model.device)] * 2
    monkeypatch.setattr(
        "sipit_lite.experiments.defences.openings", lambda *_: iter(some)
    )
    assert main([str(tmp_path / "found.json"), "--prompts", "2", "--length", "12"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == study(model, 2, 12) and [
        row["defence"] for row in found["rows"]
    ] == ["rounding", "dropping"]
    assert [row["trials"] for row in found["rows"]] == [24, 12] and found["layer"] == 1
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "none.json"), "--layer", "9"])
    assert stop.value.code == 2 and "defences: got layer 9" in capsys.readouterr().err
