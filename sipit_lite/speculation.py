"""Speculation: draft whole prompts with a lens, read them in one pass, and repair what the pass refutes.

A position is verified when its state, and the states of all positions before it, agree with the observed ones; one
pass over a draft therefore verifies everything up to the first mismatch. Later positions were read after a wrong token
and prove nothing: they are read again, over the cache of the verified prefix, once the mismatch is repaired.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sipit_lite.acceptance import Observation
from sipit_lite.extensions.lens import Lens
from sipit_lite.model import LanguageModel
from sipit_lite.onestep import OneStepMap

CLEAR = 0.25  # a token further out than this share of the radius is accepted only after the whole vocabulary was tested
RELATED = 0.1  # embeddings nearer to each other than this share of their distance from the mean embedding are related
SMALL = 2**13  # vocabularies up to this size are compared with themselves at once
PASS = 4096  # tokens in a pass
_RELATED: WeakKeyDictionary[LanguageModel, Int[Tensor, " vocab"]] = WeakKeyDictionary()


@dataclass(eq=False)
class Draft:
    """One prompt on its way: ``tokens`` are the best known, of which the first ``verified`` are verified.

    ``distance`` is each token's ‖F(v) − ĥ_t‖ when it was last read; ``runner_up`` the smallest of the other tokens that
    a search tested, and ``tested`` how many it did; ``searched`` says whether a search of its own found a token.
    """

    model: LanguageModel
    observed: Observation
    tokens: Int[Tensor, " pos"]
    verified: int = 0
    searched: bool = False
    distance: Float[Tensor, " pos"] = field(init=False)
    runner_up: Float[Tensor, " pos"] = field(init=False)
    tested: Int[Tensor, " pos"] = field(init=False)

    def __post_init__(self) -> None:
        self.distance = torch.full_like(self.observed.radius, torch.inf)
        self.runner_up, self.tested = (
            self.distance.clone(),
            torch.ones_like(self.tokens),
        )

    @property
    def done(self) -> bool:
        """Whether the whole prompt is verified."""
        return self.verified == len(self.tokens)

    def look(self, states: Float[Tensor, "read d_model"], first: int) -> None:
        """Compare the states of all positions from ``first`` on, the prefix before it being verified.

        A token that has a near relative is left to a search, which tests its relatives too.
        """
        apart = torch.linalg.vector_norm(
            (states - self.observed.states[first:]).float(), dim=1
        )
        self.distance[first:] = apart.nan_to_num(nan=torch.inf, posinf=torch.inf)
        agrees = self.distance[first:] <= CLEAR * self.observed.radius[first:]
        agrees &= ~related(self.tokens[first:], self.model)
        self.verified = first + int(agrees.cumprod(0).sum())

    def settle(
        self, token: int, distance: float, runner_up: float, tested: int
    ) -> None:
        """Accept a token at the first position that is not verified: it was found by a search of its own."""
        t = self.verified
        self.tokens[t], self.distance[t], self.runner_up[t], self.tested[t] = (
            token,
            distance,
            runner_up,
            tested,
        )
        self.verified, self.searched = t + 1, True


def draft(
    observed: Sequence[Observation], lens: Lens, model: LanguageModel
) -> list[Draft]:
    """What the lens reads off the states alone, all prompts at once; nothing is verified yet."""
    tokens = lens.draft(torch.cat([o.states for o in observed])).split(
        [len(o) for o in observed]
    )
    return [
        Draft(model, o, ids.clone()) for o, ids in zip(observed, tokens, strict=True)
    ]


def read(
    prompts: Sequence[Int[Tensor, " _"]], model: LanguageModel, layer: int
) -> Iterator[tuple[int, Float[Tensor, "pos d_model"], OneStepMap]]:
    """Read prompts of any lengths, as many a pass as fit; yield each one's number, its states, the map after it.

    The longest come first. The shorter ones of a pass are padded behind, where no position looks.

    >>> from sipit_lite import load
    >>> asked = [torch.tensor([5, 6]), torch.tensor([7, 8, 9])]
    >>> [(i, states.shape[0], step.position) for i, states, step in read(asked, load(device="cpu"), 1)]
    [(0, 2, 2), (1, 3, 3)]
    """
    order, start = (
        sorted(range(len(prompts)), key=lambda row: len(prompts[row])),
        OneStepMap.after(model, layer),
    )
    while order:
        fitting = max(1, PASS // len(prompts[order[-1]]))
        rows, order = order[-fitting:], order[:-fitting]
        states, steps = start.branch(
            pad_sequence([prompts[row] for row in rows], batch_first=True)
        )
        for row, kept, step in zip(rows, states, steps, strict=True):
            length = len(prompts[row])
            yield row, kept[:length], step.crop(length)


def related(tokens: Int[Tensor, " pos"], model: LanguageModel) -> Bool[Tensor, " pos"]:
    """Whether another embedding is so near to a token's own that it might share its states; remembered by model.

    >>> from sipit_lite import load
    >>> bool(related(torch.arange(9), load(device="cpu")).any())
    False
    """
    known = _RELATED.setdefault(
        model,
        torch.full((model.vocab_size,), -1, dtype=torch.int8, device=model.device),
    )
    all_at_once = model.vocab_size <= SMALL and bool((known[tokens] < 0).any())
    new = (
        torch.arange(model.vocab_size, device=model.device)
        if all_at_once
        else tokens[known[tokens] < 0].unique()
    )
    if len(new):
        table = model.embeddings.float()
        centred = table - table.mean(0)
        squares = centred.square().sum(1)
        apart = (
            torch.addmm(squares, centred[new], centred.T, alpha=-2)
            .scatter_(1, new[:, None], torch.inf)
            .amin(1)
        )
        known[new] = (apart + squares[new] < RELATED**2 * squares[new]).to(known)
    return known[tokens] > 0
