"""Imprints of tokens, and what the states of a few of them tell of all."""

import math

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from sipit_lite import LanguageModel, OneStepMap
from sipit_lite.extensions.imprints import (
    COORDINATES,
    RIDGE,
    SHALLOW,
    WIDTH,
    imprints,
    likely,
    own_imprints,
    regressed,
    whitening,
)

Family = tuple[PreTrainedModel, LanguageModel]


def test_imprints_are_states_of_transformers(family: Family) -> None:
    """Of v and of the last in ⟨w, v, w⟩, centred and scaled by hand."""
    untouched, model = family
    vocab = model.vocab_size
    rows = torch.tensor([[7, v, 7] for v in range(vocab)])
    with torch.no_grad():
        read = untouched(rows, output_hidden_states=True).hidden_states[1]
    expected = []
    for t in (1, 2):
        away = read[:, t].double() - read[:, t].double().mean(0)
        expected.append(away / away.square().mean().sqrt())
    ours = imprints(model, 1, 7)
    assert torch.allclose(ours.double(), torch.cat(expected, 1), atol=1e-4)
    deeper = imprints(model, model.n_layers, 7)
    assert deeper is imprints(model, SHALLOW, 7) and deeper is not ours


def test_regression_written_out() -> None:
    """The representer theorem, a term for each token read, in float64."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(7, 3, generator=generator).double()
    read = torch.tensor([4, 0, 6])
    effects = torch.randn(3, 3, generator=generator).double()
    others = regressed(table, read, effects)
    assert torch.equal(others[read], effects)
    apart = [float((table[v] - table[w]).norm()) for v in read for w in read]
    # Of nine distances, three of which are zero.
    scale = WIDTH * sorted(apart)[4]

    def alike(v: int, w: int) -> float:
        return math.exp(-float((table[v] - table[w]).square().sum()) / 2 / scale**2)

    square = [[alike(v, w) for w in read] for v in read]
    square = torch.tensor(square).double() + RIDGE * torch.eye(3).double()
    centre = effects.mean(0)
    weights = square.inverse() @ (effects - centre)
    for v in (1, 2, 3, 5):
        terms = [alike(v, int(w)) * weights[k] for k, w in enumerate(read)]
        assert torch.allclose(others[v], centre + sum(terms))


@pytest.mark.parametrize("first", [True, False])
def test_own_imprints_keep_distances(family: Family, first: bool) -> None:
    """Of states of transformers, behind an average token or alone, all that varies."""
    untouched, model = family
    table = model.embeddings.double()
    w = int((table - table.mean(0)).square().sum(1).argmin())
    rows = [[v] if first else [w, v] for v in range(model.vocab_size)]
    with torch.no_grad():
        read = untouched(torch.tensor(rows), output_hidden_states=True).hidden_states
    expected = torch.cdist(*[read[1][:, -1].double()] * 2)
    ours = own_imprints(model, 1, first=first)
    assert ours.shape[1] == min(COORDINATES, model.d_model)
    apart = torch.cdist(*[ours.double()] * 2)
    assert torch.allclose(apart, expected, atol=1e-4 * float(expected.max()))
    assert own_imprints(model, 1, first=first) is ours


def test_likely_written_out() -> None:
    """Predictions and errors from fits that leave one out, as numpy solves them."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(30, 3, generator=generator).double()
    read = torch.tensor([4, 0, 6, 17, 22, 9])
    states = torch.randn(6, 5, generator=generator).double()
    observed = torch.randn(5, generator=generator).double()
    x, y = table.numpy(), states.numpy()
    apart = np.linalg.norm(x[:, None] - x[read.numpy()], axis=2)
    # Of 36 distances torch takes the lower of the two in the middle.
    scale = WIDTH * np.sort(apart[read.numpy()], axis=None)[17]
    rows = np.exp(-((apart / scale) ** 2) / 2)
    square = rows[read.numpy()] + RIDGE * np.eye(6)
    centre = y.mean(0)
    errors = []
    for i in range(6):
        others = np.arange(6) != i
        weights = np.linalg.solve(square[others][:, others], (y - centre)[others])
        errors.append((y - centre)[i] - square[i, others] @ weights)
    sample = np.array(errors).T @ np.array(errors) / 6
    covariance = (sample + np.trace(sample) / 5 * np.eye(5)) / 2
    away = centre + rows @ np.linalg.solve(square, y - centre) - observed.numpy()
    inverse = np.linalg.inv(covariance)
    expected = torch.tensor([-d @ inverse @ d / 2 for d in away])
    score = likely(table, read, states, observed)
    # Up to a constant: the part of all distances that no prediction reaches.
    assert torch.allclose(score - score[0], expected - expected[0])


def test_errors_without_size_leave_numbers() -> None:
    """Also where all that was read has one state."""
    assert whitening(torch.zeros(4, 3)).isfinite().all()
    table = torch.randn(9, 2, generator=torch.Generator().manual_seed(3))
    score = likely(table, torch.arange(4), torch.ones(4, 3), torch.ones(3))
    assert not score.isnan().any()


def test_few_states_tell_the_token(pocket: LanguageModel) -> None:
    """Behind a prefix, in the last layer, from 128 tokens that nothing chose."""
    generator = torch.Generator().manual_seed(2)
    table = own_imprints(pocket, pocket.n_layers)
    ranks = []
    for _ in range(8):
        drawn = torch.randperm(pocket.vocab_size, generator=generator)[:135]
        ids, read = drawn.to(pocket.device).split([7, 128])
        step = OneStepMap.after(pocket, pocket.n_layers, ids[:-1])
        observed = step.tokens(ids[-1:])[0]
        score = likely(table, read, step.tokens(read), observed)
        ranks.append(int((score > score[ids[-1]]).sum()))
    assert sorted(ranks)[4] < 16, ranks
