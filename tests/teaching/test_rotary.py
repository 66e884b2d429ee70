"""Relative positions: the head of the proof, for every pair of short prompts."""

from itertools import combinations, product

import mpmath
import numpy as np
import pytest

from sipit_lite.teaching.rotary import RotaryHead, rotary_witness

PROMPTS = [
    prompt for length in range(1, 5) for prompt in product(range(3), repeat=length)
]


def share_by_rotation(prompt: tuple[int, ...], witness: RotaryHead) -> float:
    """The share from rotated queries and keys, as complex numbers, at each position."""
    positions = np.arange(len(prompt))
    query = np.exp(1j * witness.rate * positions[-1])
    keys = witness.strength * np.exp(1j * witness.rate * (positions + witness.offset))
    marked = np.array(prompt) == witness.token
    weights = np.exp(np.where(marked, (query * keys.conj()).real, 0.0))
    return float(weights[marked].sum() / weights.sum())


def test_every_pair_separates_except_constant_prompts_of_one_token() -> None:
    """All 7140 pairs of up to four tokens; the chapter takes those of up to five."""
    refused = []
    for s, t in combinations(PROMPTS, 2):
        try:
            head = rotary_witness(s, t)
        except ValueError:
            refused.append((s, t))
        else:
            assert abs(head.share(s) - head.share(t)) > 1e-3, (s, t)
    assert len(refused) == 3 * 6 and all(len({*s, *t}) == 1 for s, t in refused)


def test_shares_are_those_of_rotated_queries_and_keys() -> None:
    """Against complex numbers, with prompts in both orders."""
    for s, t in list(combinations(PROMPTS, 2))[::50]:
        for pair in ((s, t), (t, s)):
            if len({*s, *t}) > 1:
                head = rotary_witness(*pair, rate=0.7)
                shares = [head.share(prompt) for prompt in pair]
                expected = [share_by_rotation(prompt, head) for prompt in pair]
                assert np.allclose(shares, expected, rtol=1e-9, atol=1e-12)


def test_longer_prompts_separate_in_exact_arithmetic() -> None:
    """40 tokens that differ at one place: shares that round to 1, in 2000 digits."""
    s = np.random.default_rng(0).integers(3, size=40).tolist()
    t = [*s[:10], (s[10] + 1) % 3, *s[11:]]
    head = rotary_witness(s, t, rate=0.05)
    odds = []
    assert head.offset == 29
    with mpmath.workdps(2000):
        for prompt in (s, t):
            offsets = [d for d, v in enumerate(reversed(prompt)) if v == head.token]
            angles = [mpmath.mpf(head.rate) * (d - 29) for d in offsets]
            weights = [mpmath.exp(head.strength * mpmath.cos(a)) for a in angles]
            odds.append(mpmath.fsum(weights) / (len(prompt) - len(offsets)))
        # The strength is chosen for a ratio of at least e.
        assert max(odds) / min(odds) > mpmath.e * 0.999


@pytest.mark.parametrize(
    ("s", "t"),
    [((0,), (0, 0)), ((1, 1, 1), (1, 1)), ((0, 1), (0, 1)), ((), (1,)), ((2,), (2,))],
)
def test_pairs_that_no_head_tells_apart_are_refused(
    s: tuple[int, ...], t: tuple[int, ...]
) -> None:
    """Constant prompts of one token, equal ones, an empty one; the message has them."""
    with pytest.raises(ValueError, match="expected two different prompts") as refused:
        rotary_witness(s, t)
    assert str([list(s), list(t)]) in str(refused.value)


def test_a_plane_that_turns_by_whole_circles_is_refused() -> None:
    """At a rate of 2π all offsets look alike."""
    with pytest.raises(ValueError, match="whole circles"):
        rotary_witness((0, 1, 2), (1, 0, 2), rate=2 * np.pi)


def test_share_of_an_absent_token_is_zero() -> None:
    """And that of the only token is one."""
    head = RotaryHead(token=1, offset=0, rate=1.0, strength=2.0)
    assert head.share([0, 0]) == 0.0
    assert head.share([1, 1]) == 1.0
