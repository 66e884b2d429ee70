"""What the first blocks make of each token, and what a few tokens then tell of all.

Tokens that a model takes alike have like states at depth, whatever stands before them.
So a kernel between their imprints predicts the states of all tokens from those read.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sipit_lite.model import LanguageModel
from sipit_lite.onestep import ROWS, OneStepMap

SHALLOW = 2  # layers after which tokens are compared
COORDINATES = 128  # of largest variance, where only a token's own state is compared
WIDTH = 2.0  # of the kernel that compares them, in median distances
RIDGE = 0.01  # of the regression for the others, beside a kernel that is 1 at most

Read = Int[Tensor, " read"]
Rows = Float[Tensor, "read numbers"]
Imprints = Float[Tensor, "vocab coordinates"]


def imprints(model: LanguageModel, layer: int, w: int) -> Imprints:
    """How the model takes each token v: the states of v and of the last in ⟨w, v, w⟩.

    After at most ``SHALLOW`` layers, less their means, in units of their spread.
    """
    layer = min(layer, SHALLOW)
    key = ("imprints", layer, w)
    if key not in model.measured:
        context = torch.tensor([w], device=model.device)
        start = OneStepMap.after(model, layer, context)
        rows = torch.stack([model.vocabulary, context.expand(model.vocab_size)], 1)
        states = torch.cat([start.branch(part)[0] for part in rows.split(ROWS)])
        states -= states.mean(0)
        states /= states.square().mean((0, 2), keepdim=True).sqrt().clamp_min(1e-30)
        model.measured[key] = states.flatten(1)
    return model.measured[key]


def own_imprints(model: LanguageModel, layer: int, *, first: bool = False) -> Imprints:
    """The states of v in ⟨w, v⟩, w an average token, or ``first``: of ⟨v⟩.

    The ``COORDINATES`` of largest variance, after at most ``SHALLOW`` layers.
    """
    layer = min(layer, SHALLOW)
    key = ("own imprints", layer, first)
    if key not in model.measured:
        away = model.embeddings - model.embeddings.mean(0)
        w = away.norm(dim=1).argmin(keepdim=True)
        start = OneStepMap.after(model, layer, w[:0] if first else w)
        states = start.tokens(model.vocabulary).float().nan_to_num()
        states -= states.mean(0)
        axes = torch.linalg.eigh(states.T @ states).eigenvectors
        model.measured[key] = states @ axes[:, -COORDINATES:]
    return model.measured[key]


def kernel(table: Imprints, read: Read) -> tuple[Tensor, Tensor]:
    """exp(−‖x_v − x_w‖² / 2s²), s ``WIDTH`` median distances: v all or read, w read."""
    apart = torch.cdist(table, table[read])
    scale = WIDTH * apart[read].median().clamp_min(torch.finfo(table.dtype).tiny)
    rows = (-(apart / scale).square() / 2).exp()
    return rows, rows[read] + RIDGE * torch.eye(len(read)).to(table)


def regressed(table: Imprints, read: Read, effects: Rows) -> Tensor:
    """Effects of all tokens from those of tokens read: kernel ridge regression."""
    rows, square = kernel(table, read)
    centre = effects.mean(0)
    others = centre + rows @ torch.linalg.solve(square, effects - centre)
    others[read] = effects  # what was read is known
    return others


def likely(
    table: Imprints, read: Read, states: Rows, observed: Float[Tensor, " numbers"]
) -> Float[Tensor, " vocab"]:
    """−½ of the squared distance of each token's predicted state to the observed one.

    In units of the errors of states read, each predicted without itself.
    """
    rows, square = kernel(table, read)
    centre = states.mean(0)
    inverse = torch.linalg.inv(square)
    slope = inverse @ (states - centre)
    whiten = whitening(slope / inverse.diagonal()[:, None])
    # All predictions lie in the span of the slope, which has few dimensions.
    basis, slope = torch.linalg.qr((slope @ whiten).T)
    away = (centre - observed) @ whiten @ basis
    return -(rows @ slope.T + away).square().sum(1) / 2


def whitening(errors: Rows, least: float | Tensor = 1e-30) -> Tensor:
    """Half way from errors to equal ones in all directions; ``least`` of a variance."""
    sample = errors.T @ errors / len(errors)
    size = sample.diagonal().mean() + least
    unit = torch.eye(len(sample)).to(sample)
    factor = torch.linalg.cholesky((sample + size * unit) / 2)
    return torch.linalg.solve_triangular(factor, unit, upper=False).T
