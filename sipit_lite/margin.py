"""Margins: how far apart the states of different tokens are after a prefix, so how much noise SipIt survives."""

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor
from tqdm import tqdm

from sipit_lite.collisions import closest_pairs
from sipit_lite.models import LanguageModel
from sipit_lite.onestep import EXACT, OneStepMap


@dataclass(frozen=True, eq=False)
class Margins:
    """The margins of one prompt at one layer, one entry a position, float64 on the CPU.

    ``prefix`` is Δ_{π,t}, the smallest distance between the states of any two tokens after the prefix π; ``token`` the
    distance from the prompt's own token to the nearest other one, the ``rival``, which is never smaller. Noise below
    Δ_{π,t}/2 harms no token (Theorem 3.2), noise below ``token``/2 does not harm this one.
    """

    prefix: Float64[Tensor, " pos"]
    token: Float64[Tensor, " pos"]
    rival: Int[Tensor, " pos"]


def margins(model: LanguageModel, ids: Int[Tensor, " pos"], layer: int, *, progress: bool = False) -> Margins:
    """Scan the vocabulary after every prefix of a prompt: T·|V| one-token steps, and all pairs of their states.

    Raises ``ModelError`` for a layer outside 0..L or ids that are no prompt.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> found = margins(model, model.encode("hidden states"), 3)
    >>> bool((found.token >= found.prefix).all() and (found.prefix > 0).all())
    True
    """
    model.check_ids(ids)
    step, rows = OneStepMap.after(model, layer), []
    for token in tqdm(ids.tolist(), "margins", disable=None if progress else True):
        states = step.tokens(torch.arange(model.vocab_size, device=model.device))
        apart = torch.cdist(states[token, None].double(), states.double(), compute_mode=EXACT)[0]
        apart[token] = torch.inf
        rows.append((closest_pairs(states, 1).minimum, float(apart.min()), int(apart.argmin())))
        step = step.extend(token) if len(rows) < len(ids) else step
    prefix, own, rival = zip(*rows, strict=True)
    return Margins(
        torch.tensor(prefix, dtype=torch.float64), torch.tensor(own, dtype=torch.float64), torch.tensor(rival)
    )
