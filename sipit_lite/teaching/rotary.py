"""Rotary positions: the attention head that tells two prompts apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from sipit_lite.model import SipItError


@dataclass(frozen=True)
class RotaryHead:
    """A head over rotary positions that looks for one token at one distance.

    The last position scores ``token`` at distance δ by ``strength``·cos(``rate``·(δ −
    ``offset``)), and any other token by 0.
    """

    token: int
    offset: int
    rate: float
    strength: float

    def share(self, prompt: Sequence[int]) -> float:
        """Attention weight that the token gets in total from the last position.

        >>> RotaryHead(token=1, offset=0, rate=1.0, strength=0.0).share([0, 1, 1, 0])
        0.5
        """
        scores = [0.0] * len(prompt)
        for distance, v in enumerate(reversed(prompt)):
            if v == self.token:
                angle = self.rate * (distance - self.offset)
                scores[distance] = self.strength * math.cos(angle)
        highest = max(scores)  # softmax does not change if all scores fall by as much
        weights = [math.exp(score - highest) for score in scores]
        backwards = zip(weights, reversed(prompt), strict=True)
        return sum(w for w, v in backwards if v == self.token) / sum(weights)


def rotary_witness(s: Sequence[int], t: Sequence[int], rate: float = 1.0) -> RotaryHead:
    """The head in the proof of the theorem on relative positions, for two prompts.

    ``rate`` is the angle per position in the plane of the head; every rotary model with
    default rates has a plane of rate 1. The shares of the two prompts differ as real
    numbers; as floats both may round to 1 where the prompts are longer than a few
    tokens. Raises ``SipItError`` where a prompt is empty, the two are equal, or both
    repeat one token, which no head tells apart; or where the plane turns by full
    circles between two copies that matter.

    >>> s, t = [0, 1], [0, 0, 1]
    >>> head = rotary_witness(s, t)
    >>> head.token, head.offset, [round(head.share(prompt), 2) for prompt in (s, t)]
    (0, 2, [0.76, 0.92])
    """
    s = list(s)
    t = list(t)
    if not s or not t or s == t or len({*s, *t}) == 1:
        raise SipItError(
            f"got {[s, t]}; expected two different prompts that are not constant "
            "prompts of one token"
        )
    # The first place, counted from the end, at which one prompt has another token.
    backwards = enumerate(zip_longest(reversed(s), reversed(t)))
    offset = next(distance for distance, (v, w) in backwards if v != w)
    # ``having`` is long enough to have a token there, which ``without`` lacks there.
    without, having = (s, t) if len(t) > offset else (t, s)
    token = having[-1 - offset]
    strength = _separating_strength(without, having, token, offset, rate)
    return RotaryHead(token, offset, rate, strength)


def _separating_strength(
    without: list[int], having: list[int], token: int, offset: int, rate: float
) -> float:
    """The strength β at which the odds of the token differ by a factor of e or more."""
    # Distances from the end at which the prompt without the token there has it.
    copies = [d for d, v in enumerate(reversed(without)) if v == token]
    others_without = len(without) - len(copies)
    others_having = len(having) - having.count(token)
    if not copies or not others_without or not others_having:
        return 0.0  # one of the shares is exactly 0 or 1 and the other is not
    gap = 1 - max(math.cos(rate * (distance - offset)) for distance in copies)
    if gap < 1e-12:
        raise SipItError(
            f"got rate {rate}; expected one whose multiples are not whole circles"
        )
    # Odds at least e^β / others in ``having``, at most copies · e^(β(1 − gap)) / others
    # in ``without``.
    ratio = others_having * len(copies) / others_without
    return max(0.0, (1 + math.log(ratio)) / gap)
