"""Relative positions: the head of the proof, for every pair of short prompts and inside real rotary models."""

from itertools import combinations, product

import mpmath
import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from sipit_lite.teaching.rotary import (
    RotaryWitness,
    plant_rotary_head,
    rotary_share,
    rotary_witness,
)

PROMPTS = [
    prompt for length in range(1, 6) for prompt in product(range(3), repeat=length)
]
SMALL = {
    "vocab_size": 3, "hidden_size": 8, "head_dim": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 8, "max_position_embeddings": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# The epsilon of 1 keeps Gemma's norm behind attention far from a step function, so that it can be undone.
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "gemma3": Gemma3TextConfig(**SMALL, rms_norm_eps=1.0),
}
FLOAT32_NORMS = (
    1e-5  # the norms of these models compute in float32, also in a float64 model
)


def share_by_rotation(prompt: tuple[int, ...], witness: RotaryWitness) -> float:
    """The share from rotated queries and keys at absolute positions: complex numbers instead of a cosine."""
    positions = np.arange(len(prompt))
    query = np.exp(1j * witness.rate * positions[-1])
    keys = witness.strength * np.exp(1j * witness.rate * (positions + witness.offset))
    marked = np.array(prompt) == witness.token
    weights = np.exp(np.where(marked, (query * keys.conj()).real, 0.0))
    return float(weights[marked].sum() / weights.sum())


def test_every_pair_separates_except_constant_prompts_of_one_token() -> None:
    """All 65 703 pairs of the 363 prompts: 30 are refused, the shares of the others are far apart."""
    refused = []
    for s, t in combinations(PROMPTS, 2):
        try:
            found = rotary_witness(s, t)
        except ValueError:
            refused.append((s, t))
        else:
            assert abs(found.shares[0] - found.shares[1]) > 1e-3, (s, t)
    assert len(refused) == 30 and all(len({*s, *t}) == 1 for s, t in refused)


def test_shares_are_those_of_rotated_queries_and_keys() -> None:
    """Against complex numbers, with prompts in both orders."""
    for s, t in list(combinations(PROMPTS, 2))[::500]:
        for pair in ((s, t), (t, s)):
            if len({*s, *t}) > 1:
                found = rotary_witness(*pair, rate=0.7)
                expected = [share_by_rotation(prompt, found) for prompt in pair]
                assert np.allclose(found.shares, expected, rtol=1e-9, atol=1e-12)


def test_longer_prompts_separate_in_exact_arithmetic() -> None:
    """A pair of 40 tokens that differ at one place: both shares round to 1, and 2000 digits tell them apart."""
    s = np.random.default_rng(0).integers(3, size=40).tolist()
    t = [*s[:10], (s[10] + 1) % 3, *s[11:]]
    found, odds = rotary_witness(s, t, rate=0.05), []
    assert found.offset == 29
    with mpmath.workdps(2000):
        for prompt in (s, t):
            offsets = [d for d, v in enumerate(reversed(prompt)) if v == found.token]
            scores = [
                found.strength * mpmath.cos(mpmath.mpf(found.rate) * (d - 29))
                for d in offsets
            ]
            odds.append(
                mpmath.fsum(map(mpmath.exp, scores)) / (len(prompt) - len(offsets))
            )
        assert (
            max(odds) / min(odds) > mpmath.e * 0.999
        )  # the strength is chosen for a ratio of at least e


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("s", "t"),
    [
        ((0, 1, 2), (1, 0, 2)),
        ((1, 2), (0, 1, 2)),
        ((0, 1), (0, 0, 1)),
        ((0, 0), (1, 0, 0)),
        ((2, 2, 1, 2), (1, 1, 0)),
        ((0, 0, 0, 1, 0), (1, 1, 1, 0, 0)),
    ],
)
def test_planted_head_gives_the_predicted_shares(
    name: str, s: tuple[int, ...], t: tuple[int, ...]
) -> None:
    """Transformers' own code is the oracle: grouped queries, norms of queries and keys, Gemma's extra norms."""
    config: PreTrainedConfig = FAMILIES[name]
    decoder, found = AutoModel.from_config(config).double().eval(), rotary_witness(s, t)
    plant_rotary_head(decoder, found)
    decoder.norm = nn.Identity()
    with torch.no_grad():
        states = [
            decoder(torch.tensor([prompt])).last_hidden_state[0, -1]
            for prompt in (s, t)
        ]
    shares = torch.tensor(found.shares, dtype=torch.float64)
    if name == "gemma3":
        shares = shares / (shares**2 / config.hidden_size + config.rms_norm_eps).sqrt()
    assert torch.allclose(torch.stack(states)[:, 3], shares, rtol=0, atol=FLOAT32_NORMS)


@pytest.mark.parametrize(
    ("s", "t"),
    [((0,), (0, 0)), ((1, 1, 1), (1, 1)), ((0, 1), (0, 1)), ((), (1,)), ((2,), (2,))],
)
def test_pairs_that_no_head_tells_apart_are_refused(
    s: tuple[int, ...], t: tuple[int, ...]
) -> None:
    """Constant prompts of one token, equal prompts, the empty prompt: the message repeats them."""
    with pytest.raises(ValueError, match="expected two different prompts") as refused:
        rotary_witness(s, t)
    assert str([list(s), list(t)]) in str(refused.value)


def test_a_plane_that_turns_by_whole_circles_is_refused() -> None:
    """At a rate of 2π all offsets look alike."""
    with pytest.raises(ValueError, match="whole circles"):
        rotary_witness((0, 1, 2), (1, 0, 2), rate=2 * np.pi)


def test_a_witness_of_another_rate_cannot_be_planted() -> None:
    """The first plane of a model with default rates turns by 1."""
    decoder = AutoModel.from_config(FAMILIES["llama"])
    with pytest.raises(ValueError, match=r"rate 0\.5; expected 1\.0"):
        plant_rotary_head(decoder, rotary_witness((0, 1, 2), (1, 0, 2), rate=0.5))


def test_share_of_an_absent_token_is_zero() -> None:
    """And that of the only token is one."""
    assert rotary_share([0, 0], 1, 0, 1.0, 2.0) == 0.0
    assert rotary_share([1, 1], 1, 0, 1.0, 2.0) == 1.0
