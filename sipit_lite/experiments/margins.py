"""The states of all tokens after one prefix: their closest pairs, and their margins."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int
from torch import Tensor
from torch.linalg import vector_norm
from tqdm import tqdm

from sipit_lite.collisions import CollisionReport, closest_pairs
from sipit_lite.model import LanguageModel
from sipit_lite.onestep import OneStepMap


def continuations(
    model: LanguageModel, prompts: Sequence[Tensor], layer: int, progress: bool = False
) -> Iterator[CollisionReport]:
    """For each prompt, the closest of its |V| one-token continuations (Fig. 4).

    Yields a report a prompt, whose rows are tokens: its ``minimum`` is the margin
    Δ_{π,t}. Raises ``ModelError`` for a bad layer or prompt.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> report = next(continuations(model, [model.encode("hidden")], 1))
    >>> report.compared == 4096 * 4095 // 2
    True
    """
    for prompt in tqdm(prompts, "continuations", disable=None if progress else True):
        step = OneStepMap.after(model, layer, prompt)
        # All pairs of tokens, since any two may be the closest.
        yield closest_pairs(step.tokens(model.vocabulary), 1)


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
    """Scan the vocabulary after every prefix of a prompt, and compare all pairs.

    Raises ``ModelError`` for a bad layer or ids.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> scanned = margins(model, model.encode("hidden"), 1)
    >>> bool((scanned.token >= scanned.prefix).all() and (scanned.prefix > 0).all())
    True
    """
    model.check_ids(ids)
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
