"""Speculation: draft whole prompts with a lens, read them in one pass, and repair what the pass refutes.

A position is verified when its state, and the states of all positions before it, agree with the observed ones; one
pass over a draft therefore verifies everything up to the first mismatch. Later positions were read after a wrong token
and prove nothing, but their residuals still tell good candidates from bad ones, so all of them are repaired at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sipit_lite.lens import Lens
from sipit_lite.models import LanguageModel
from sipit_lite.verify import Observation

CLEAR = 0.25  # a token further out than this share of the radius is accepted only after the whole vocabulary was tested
RELATED = 0.1  # embeddings nearer to each other than this share of their distance from the mean embedding are related
SMALL = 2**13  # vocabularies up to this size are compared with themselves at once
WIDE = 7  # further candidates a position that are read side by side, once for each prompt that needs them
PASS = 4096  # tokens in a pass
_RELATED: WeakKeyDictionary[LanguageModel, Int[Tensor, " vocab"]] = WeakKeyDictionary()


@dataclass(eq=False)
class Draft:
    """One prompt on its way: ``tokens`` are the best known, of which the first ``verified`` are verified.

    ``distance`` is each token's ‖F(v) − ĥ_t‖ when it was last read, ``runner_up`` the smallest of another token tested
    after the verified prefix, ``tested`` how many were; ``searched`` says whether a search of its own found a token.
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
        self.runner_up, self.tested = self.distance.clone(), torch.ones_like(self.tokens)

    @property
    def done(self) -> bool:
        """Whether the whole prompt is verified."""
        return self.verified == len(self.tokens)

    def look(self, states: Float[Tensor, "read d_model"], first: int) -> None:
        """Compare the states of all positions from ``first`` on, the prefix before it being verified.

        A token that has a near relative is left to a search, which tests its relatives too.
        """
        self.distance[first:] = self.apart(states, first)
        agrees = self.distance[first:] <= CLEAR * self.observed.radius[first:]
        agrees &= ~related(self.tokens[first:], self.model)
        self.verified = first + int(agrees.cumprod(0).sum())
        if not self.done:
            t = self.verified
            self.runner_up[t] = torch.minimum(self.runner_up[t], self.distance[t])

    def apart(self, states: Float[Tensor, "read d_model"], first: int = 0) -> Float[Tensor, " read"]:
        """Distances of states from the observed ones, position by position."""
        found = torch.linalg.vector_norm((states - self.observed.states[first:]).float(), dim=1)
        return found.nan_to_num(nan=torch.inf, posinf=torch.inf)

    def settle(self, token: int, distance: float, runner_up: float, tested: int) -> None:
        """Accept a token at the first position that is not verified: it was found by a search of its own."""
        t = self.verified
        self.tokens[t], self.distance[t], self.runner_up[t], self.tested[t] = token, distance, runner_up, tested
        self.verified, self.searched = t + 1, True


def draft(observed: Sequence[Observation], lens: Lens, model: LanguageModel) -> list[Draft]:
    """What the lens reads off the states alone, all prompts at once; nothing is verified yet."""
    tokens = lens.draft(torch.cat([o.states for o in observed])).split([len(o) for o in observed])
    return [Draft(model, o, ids.clone()) for o, ids in zip(observed, tokens, strict=True)]


def speculate(drafts: Sequence[Draft], model: LanguageModel, layer: int, lens: Lens) -> None:
    """Verify drafts, in place, as far as the lens's first candidates reach.

    >>> from sipit_lite import load
    >>> model = load(device="cpu")
    >>> seen = Observation.of(model.states("hidden states", 1), model, 1)
    >>> lens = Lens.fit(model, 1, tokens=4000, features=0)
    >>> drafts = draft([seen], lens, model)
    >>> speculate(drafts, model, 1, lens)
    >>> drafts[0].done, model.decode(drafts[0].tokens)
    (True, 'hidden states')
    """
    _verify(drafts, model, layer)
    left = [d for d in drafts if not d.done]
    _widen(left, model, layer, lens)
    _verify(left, model, layer)


def _verify(drafts: Sequence[Draft], model: LanguageModel, layer: int) -> None:
    """Read each draft as it is, and count how far it is verified."""
    for d, states in zip(drafts, _read([d.tokens for d in drafts], model, layer), strict=True):
        d.look(states, 0)


def _widen(drafts: Sequence[Draft], model: LanguageModel, layer: int, lens: Lens) -> None:
    """Read the lens's next candidates at all positions that do not agree, side by side; keep the best of each."""
    variants = [_variants(d, lens) for d in drafts]
    states = iter(_read([ids for rows in variants for ids in rows], model, layer))
    for d, rows in zip(drafts, variants, strict=True):
        tokens = torch.cat([d.tokens[None], rows])
        distance = torch.stack([d.distance, *(d.apart(next(states)) for _ in rows)])
        best = distance[:, d.verified :].argmin(0)
        d.tokens[d.verified :] = tokens[:, d.verified :].gather(0, best[None])[0]
        others = distance[:, d.verified].clone()
        others[best[0]] = torch.inf
        d.runner_up[d.verified] = torch.minimum(d.runner_up[d.verified], others.min())
        d.tested[d.verified] += len(rows)


def _variants(d: Draft, lens: Lens) -> Int[Tensor, "rows pos"]:
    ranked = lens.rank(d.observed.states, min(1 + WIDE, len(lens.table)))[:, 1:].T
    return torch.where(d.distance > CLEAR * d.observed.radius, ranked, d.tokens)


def _read(prompts: Sequence[Tensor], model: LanguageModel, layer: int) -> list[Float[Tensor, "pos d_model"]]:
    """States of prompts of any lengths: the shorter ones of a pass are padded behind, where no position looks."""
    order, found = sorted(range(len(prompts)), key=lambda row: len(prompts[row])), {}
    while order:
        longest = len(prompts[order[-1]])
        rows, order = order[-max(1, PASS // longest) :], order[: -max(1, PASS // longest)]
        states = model.states(pad_sequence([prompts[row] for row in rows], batch_first=True), layer)
        found |= {row: kept[: len(prompts[row])] for row, kept in zip(rows, states, strict=True)}
    return [found[row] for row in range(len(prompts))]


def related(tokens: Int[Tensor, " pos"], model: LanguageModel) -> Bool[Tensor, " pos"]:
    """Whether another embedding is so near to a token's own that it might share its states; remembered by model.

    >>> from sipit_lite import load
    >>> bool(related(torch.arange(9), load(device="cpu")).any())
    False
    """
    known = _RELATED.setdefault(model, torch.full((model.vocab_size,), -1, dtype=torch.int8, device=model.device))
    all_at_once = model.vocab_size <= SMALL and bool((known[tokens] < 0).any())
    new = torch.arange(model.vocab_size, device=model.device) if all_at_once else tokens[known[tokens] < 0].unique()
    if len(new):
        table = model.embeddings.float()
        centred = table - table.mean(0)
        squares = centred.square().sum(1)
        apart = torch.addmm(squares, centred[new], centred.T, alpha=-2).scatter_(1, new[:, None], torch.inf).amin(1)
        known[new] = (apart + squares[new] < RELATED**2 * squares[new]).to(known)
    return known[tokens] > 0
