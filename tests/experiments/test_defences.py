"""Defences: what is sent, what an attacker who knows it makes of it, what it costs."""

import math
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from sipit_lite import LanguageModel, ModelError, OneStepMap
from sipit_lite.acceptance import Observation
from sipit_lite.experiments.defences import (
    Defence,
    DefenceError,
    Dropping,
    Noise,
    Projection,
    Rounding,
    Score,
    continued,
    extra_losses,
    losses,
    recovery,
    recovery_of_dropped,
    repair,
    wilson,
)
from sipit_lite.experiments.perturb import twins
from sipit_lite.extensions.laststate import Search
from sipit_lite.io.text import bundled

SCRIPT = Path(__file__).parents[2] / "book" / "defences.py"
SPEC = spec_from_file_location("study", SCRIPT)
STUDY = module_from_spec(SPEC)
SPEC.loader.exec_module(STUDY)
Family = tuple[PreTrainedModel, LanguageModel]
MASKS = [Noise(0.3), Rounding(1), Rounding(4), Projection(8)]
ROWS = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
ROWS *= torch.logspace(-1, 1, 40)[:, None]


@pytest.fixture
def tied(family: Family) -> Family:
    """The families whose unembedding is their table of embeddings."""
    if not family[0].config.tie_word_embeddings:
        pytest.skip("the other families: test_continued_needs_a_tied_unembedding")
    return family


@pytest.mark.parametrize(
    ("successes", "low", "high"),
    [(8, 0.490162, 0.943318), (0, 0.0, 0.277533), (10, 0.722467, 1)],
)
def test_wilson_values_of_ten_trials(successes: int, low: float, high: float) -> None:
    """8 of 10 as in the tables; 0 of n ends at z²/(n + z²), worked out by hand."""
    assert wilson(successes, 10) == pytest.approx((low, high), abs=1e-6)


@pytest.mark.parametrize(("successes", "trials"), [(1, 2), (3, 7), (191, 192)])
def test_wilson_ends_solve_the_equation(successes: int, trials: int) -> None:
    """Both ends are 1.96 of their own standard errors from the share."""
    share = successes / trials
    low, high = wilson(successes, trials)
    for p in (low, high):
        square = 1.959963984540054**2 * p * (1 - p) / trials
        assert (share - p) ** 2 == pytest.approx(square)
    assert low < share < high


@pytest.mark.parametrize(("successes", "trials"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses(successes: int, trials: int) -> None:
    """Counts that cannot be."""
    with pytest.raises(DefenceError, match=f"got {successes} successes in {trials}"):
        wilson(successes, trials)


def test_noise_has_its_size_and_its_seed() -> None:
    """The mean squared error is size²·‖h‖²; a seed draws the same noise."""
    states = torch.ones(2000, 32, dtype=torch.float64) * 3
    sent = Noise(0.5).send(states, seed=1)
    error = (sent - states).square().sum(1).mean() / states[0].square().sum()
    assert float(error) == pytest.approx(0.25, rel=0.03)
    assert torch.equal(sent, Noise(0.5).send(states, seed=1))
    assert not torch.equal(sent, Noise(0.5).send(states, seed=2))


def test_noise_surprise_is_that_of_a_normal_law() -> None:
    """Up to a constant, −log of the density that torch.distributions has."""
    sent = Noise(0.3).send(ROWS[:1])[0]
    deviation = 0.3 * ROWS.double().norm(dim=1) / 32**0.5
    law = torch.distributions.Normal(ROWS.double(), deviation[:, None])
    apart = Noise(0.3).surprise(sent, ROWS, 1e-6) + law.log_prob(sent.double()).sum(1)
    assert torch.allclose(apart, apart[:1].expand_as(apart))


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_rounding_has_so_many_levels(bits: int) -> None:
    """At most 2^bits values a row, none zero or off by more than half a step."""
    sent = Rounding(bits).send(ROWS)
    half_step = ROWS.abs().amax(1, keepdim=True) / 2**bits
    assert max(len(row.unique()) for row in sent) <= 2**bits
    assert ((sent - ROWS).abs() <= half_step * (1 + 1e-3)).all()
    assert (sent.abs() >= half_step * (1 - 1e-3)).all()
    assert torch.equal(Rounding(bits).send(torch.zeros(1, 32)), torch.zeros(1, 32))


def test_projection_is_orthogonal() -> None:
    """Twice is once, what is lost is orthogonal to what is sent, the rank is right."""
    rows = ROWS.double()
    sent = Projection(5).send(rows)
    assert torch.allclose(Projection(5).send(sent), sent)
    assert int(torch.linalg.matrix_rank(sent)) == 5
    assert float((sent @ (rows - sent).T).abs().max()) < 1e-9
    assert not torch.allclose(Projection(5, key=1).send(rows), sent)


@pytest.mark.parametrize("defence", MASKS, ids=str)
def test_the_true_state_fits_and_surprises_least(defence: Defence) -> None:
    """Sent from each of forty states in turn: the true one fits, and is likeliest."""
    for i, sent in enumerate(defence.send(ROWS)):
        assert bool(defence.fits(sent, ROWS, 1e-6)[i])
        assert int(defence.surprise(sent, ROWS, 1e-6).argmin()) == i


def test_a_known_function_hides_nothing(tied: Family, prompt: torch.Tensor) -> None:
    """Two bits a number, or eight directions of 32: all tokens, no false proof."""
    for score in recovery(tied[1], [prompt[:6]], 2, [Rounding(2), Projection(8)]):
        certain = int(score.verified == 6)
        assert score == Score(6, 6, score.verified, 0, 1, 1, certain)
        assert score.verified >= 5


def test_loud_noise_verifies_nothing(tied: Family, prompt: torch.Tensor) -> None:
    """Noise of thirty times the norm: what is recovered was guessed."""
    [score] = recovery(tied[1], [prompt], 2, [Noise(30.0)])
    assert score.trials == 13 and score.recovered <= 4
    assert score.verified == score.false == 0


def test_scores_count_tokens_and_prompts() -> None:
    """Two prompts by hand, of two tokens and of one."""
    first = torch.tensor([[1, 1, 0], [0, 1, 1]]).bool()
    second = torch.tensor([[1, 0, 0]]).bool()
    assert Score.of([first, second]) == Score(3, 2, 2, 1, 2, 1, 1)
    with pytest.raises(DefenceError, match="got no prompts"):
        Score.of([])


def test_twins_are_not_verified(pocket: LanguageModel) -> None:
    """Two tokens with one state both fit, so that neither is called verified."""
    model = twins(pocket, 5, 6)
    masks = [Rounding(8), Projection(64)]
    for score in recovery(model, [torch.tensor([5, 7])], 1, masks):
        assert score.verified == 1 and score.false == 0


def test_continued_gives_the_logits_of_transformers(
    tied: Family, prompt: torch.Tensor
) -> None:
    """From the states of any layer, embeddings and last layer included."""
    untouched, model = tied
    with torch.no_grad():
        expected = untouched(prompt[None]).logits[0]
        for layer in range(model.n_layers + 1):
            logits = continued(model, model.states(prompt, layer), layer)
            assert torch.allclose(logits, expected, atol=1e-4), layer
        # No hook stays behind.
        assert torch.equal(untouched(prompt[None]).logits[0], expected)


def test_continued_needs_a_tied_unembedding(
    family: Family, prompt: torch.Tensor
) -> None:
    """Tied or refused: the unembedding of the others is not loaded."""
    untouched, model = family
    if untouched.config.tie_word_embeddings:
        logits = continued(model, model.states(prompt, 1), 1)
        assert logits.shape == (13, model.vocab_size)
        return
    with pytest.raises(ModelError, match="loaded without its unembedding"):
        continued(model, model.states(prompt, 1), 1)
    with pytest.raises(ModelError, match="loaded without its unembedding"):
        recovery(model, [prompt], 2, MASKS)


def test_dropped_rows_are_out_of_sight(pocket: LanguageModel) -> None:
    """From layer 0: as if dropped tokens were cut out, the others in their places."""
    ids = pocket.encode("the hidden states of all positions")
    positions = Dropping(2).positions(6)
    with torch.no_grad():
        expected = pocket.decoder(
            ids[positions][None], position_ids=positions[None].to(ids)
        ).last_hidden_state[0]
    logits = continued(pocket, pocket.states(ids, 0)[positions], 0, positions)
    assert torch.allclose(logits, expected @ pocket.embeddings.T, atol=1e-3)


def test_loss_is_that_of_transformers(tied: Family, prompt: torch.Tensor) -> None:
    """The mean is the loss that transformers computes from labels."""
    untouched, model = tied
    with torch.no_grad():
        expected = float(untouched(prompt[None], labels=prompt[None]).loss)
    loss = losses(model, prompt, 2, Defence()).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_extra_loss_of_almost_nothing_is_almost_nothing(pocket: LanguageModel) -> None:
    """Sixteen bits cost nothing, one bit does; dropped at the end, nothing."""
    text = pocket.encode(
        "Return the number of times that the value occurs in the list."
    )
    assert abs(extra_losses(pocket, [text], 3, Rounding(16)).mean()) < 1e-3
    assert extra_losses(pocket, [text], 3, Rounding(1)).mean() > 0.1
    last = extra_losses(pocket, [text], pocket.n_layers, Dropping(3))
    assert torch.allclose(last, torch.zeros_like(last), atol=1e-4)
    assert len(last) == (len(text) - 1) // 3
    with pytest.raises(DefenceError, match="got texts that predict no token"):
        extra_losses(pocket, [text[:1]], 3, Rounding(1))


def test_repair_recovers_the_only_pair(tied: Family, prompt: torch.Tensor) -> None:
    """Of all |V|² pairs after a prefix, the one whose last state was sent."""
    model = tied[1]
    pairs = torch.tensor(list(product(range(model.vocab_size), repeat=2)))
    pairs = pairs.to(model.device)
    level = torch.zeros(2, model.vocab_size, device=model.device).log_softmax(-1)
    observed = model.states(prompt[:4], 2)[-1:]
    step = OneStepMap.after(model, 2, prompt[:2])
    states = [step.branch(rows)[0][:, -1] for rows in pairs.split(600)]
    best = (torch.cat(states) - observed).norm(dim=1).argmin()
    assert torch.equal(pairs[best], prompt[2:4])

    observation = Observation.of(observed, model, 2)
    generator = torch.Generator().manual_seed(0)
    tokens, verified = repair(Search(step, observation, level, generator, {}))
    assert verified and torch.equal(tokens, prompt[2:4])
    # After another prefix no pair has that state: what comes back is called a guess.
    other = OneStepMap.after(model, 2, prompt[4:6])
    tokens, verified = repair(Search(other, observation, level, generator, {}))
    assert not verified and len(tokens) == 2


def test_single_gaps_are_repaired(pocket: LanguageModel) -> None:
    """Every second state dropped: all tokens; of a wider gap nothing false."""
    ids = pocket.encode("Return the number of times")[:5]
    score = recovery_of_dropped(pocket, [ids[:4]], 2, Dropping(2))
    assert score == Score(4, 4, 4, 0, 1, 1, 1)
    # The fifth token has no state behind it: it is lost.
    score = recovery_of_dropped(pocket, [ids], 2, Dropping(4))
    assert score.trials == 5 and 1 <= score.recovered < 5 and score.false == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Noise(0.0), r"got Noise\(size=0.0\); expected size from 1e-09 to"),
        (lambda: Noise(math.inf), r"got Noise\(size=inf\)"),
        (lambda: Noise(math.nan), r"got Noise\(size=nan\)"),
        (lambda: Rounding(0), r"got Rounding\(bits=0\); expected bits from 1 to 16"),
        (lambda: Rounding(17), r"got Rounding\(bits=17\)"),
        (lambda: Projection(0), r"got Projection\(dim=0, key=0\); expected dim from 1"),
        (lambda: Projection(33).send(ROWS), r"the states have 32 dimensions"),
        (lambda: Dropping(1), r"got Dropping\(period=1\); expected period from 2 to"),
        (lambda: Dropping(5).positions(4), r"of 4 states; none would be sent"),
    ],
)
def test_a_strength_without_sense_is_refused(make, message: str) -> None:
    """One line with what came and what was expected."""
    with pytest.raises(DefenceError, match=message):
        make()


def test_every_defence_has_five_strengths() -> None:
    """What the curves of the chapter need."""
    for kind in (Noise, Rounding, Projection, Dropping):
        assert sum(isinstance(defence, kind) for defence in STUDY.STRENGTHS) >= 5


def test_openings_are_of_different_passages(pocket: LanguageModel) -> None:
    """Each begins a bundled passage of its own, and the seed orders them alone."""
    texts = bundled("prose")
    starts = [pocket.decode(ids) for ids in STUDY.openings(pocket, 12)]
    assert len(set(starts)) > 40
    for start in starts:
        assert sum(text.startswith(start) for text in texts) == 1
    again = [pocket.decode(ids) for ids in STUDY.openings(pocket, 12, seed=1)]
    assert set(again) == set(starts) and again != starts


def test_study(tied: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a strength; counts without sense are refused."""
    model = tied[1]
    texts = [torch.arange(2, 14, device=model.device)] * 2
    monkeypatch.setattr(STUDY, "STRENGTHS", (Rounding(2), Dropping(2)))
    monkeypatch.setattr(STUDY, "openings", lambda *_: iter(texts))
    found = STUDY.study(model, 2, 12)
    assert [row["defence"] for row in found["rows"]] == ["rounding", "dropping"]
    assert [row["trials"] for row in found["rows"]] == [24, 24]
    assert found["layer"] == 1 and found["predicted"] == 22
    for count in (0, -1, 3):
        with pytest.raises(DefenceError, match=f"got {count} prompts; there are"):
            STUDY.study(model, count)
    with pytest.raises(ModelError, match="got layer 9"):
        STUDY.study(model, 2, layer=9)
