"""Quantities of the paper by brute force, which tests hold the package against."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor
from torch.linalg import vector_norm

from sipit_lite.collisions import closest_pairs
from sipit_lite.model import LanguageModel
from sipit_lite.onestep import OneStepMap


@dataclass(frozen=True, eq=False)
class Margins:
    """The margins of one prompt at one layer, one entry a position, float64.

    ``prefix`` is Δ_{π,t}; ``token`` the distance from the prompt's token to the nearest
    other one, the ``rival``. Noise below Δ_{π,t}/2 harms no token (Theorem 3.2), noise
    below ``token``/2 does not harm this one.
    """

    prefix: Float64[Tensor, " pos"]
    token: Float64[Tensor, " pos"]
    rival: Int[Tensor, " pos"]


def margins(model: LanguageModel, ids: Int[Tensor, " pos"], layer: int) -> Margins:
    """Scan the vocabulary after every prefix of a prompt, and compare all pairs."""
    step = OneStepMap.after(model, layer)
    rows = []
    for t, token in enumerate(ids.tolist()):
        states = step.tokens(model.vocabulary)
        apart = vector_norm(states.double() - states[token].double(), dim=1)
        apart[token] = torch.inf  # a token is no rival of itself
        rows.append((closest_pairs(states, 1).minimum, *apart.min(0)))
        if len(rows) < len(ids):  # the last token may fill the context
            step = step.follow(ids[t : t + 1].to(model.device))[1]
    prefix, distance, rival = torch.tensor(rows, dtype=torch.float64, device="cpu").T
    return Margins(prefix, distance, rival.long())
