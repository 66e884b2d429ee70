"""Where the theorem needs absolute positions: the planted rotary head (chapter 4)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import sympy as sp
import torch
from torch import nn

Coefficient = int | float | sp.Expr


@dataclass(frozen=True)
class RotaryWitness:
    """One rotary head that tells two prompts apart, and what it should measure (chapter 4, relative positions).

    The last position scores token ``token`` at distance δ by ``strength``·cos(``rate``·(δ − ``offset``)) and any other
    token by 0; ``shares`` are the attention weights that ``token`` gets in total, in the first and the second prompt.
    """

    token: int
    offset: int
    rate: float
    strength: float
    shares: tuple[float, float]


def rotary_share(
    prompt: Sequence[int], token: int, offset: int, rate: float, strength: float
) -> float:
    """Attention weight that ``token`` gets in total from the last position of the prompt, under the head above.

    >>> rotary_share([0, 1, 1, 0], token=1, offset=0, rate=1.0, strength=0.0)
    0.5
    """
    scores = [
        strength * math.cos(rate * (d - offset)) if v == token else 0.0
        for d, v in enumerate(reversed(prompt))
    ]
    weights = [math.exp(score - max(scores)) for score in scores]
    return sum(
        w for w, v in zip(weights, reversed(prompt), strict=True) if v == token
    ) / sum(weights)


def rotary_witness(
    s: Sequence[int], t: Sequence[int], rate: float = 1.0
) -> RotaryWitness:
    """The head in the proof of the theorem on relative positions, for one pair of prompts (chapter 4).

    ``rate`` is the angle per position of the plane that the head uses; 1 is in every rotary model with default rates.
    The shares differ as real numbers; in floats both may round to 1 where the prompts are longer than a few tokens.
    Raises ``ValueError`` for an empty prompt, for equal prompts, for constant prompts of one token, which no head
    tells apart, and where the plane turns by a whole number of circles between two occurrences that matter.

    >>> found = rotary_witness([0, 1], [0, 0, 1])
    >>> found.token, found.offset, [round(share, 2) for share in found.shares]
    (0, 2, [0.76, 0.92])
    """
    pair = [list(s), list(t)]
    if not s or not t or pair[0] == pair[1] or len({*s, *t}) == 1:
        raise ValueError(
            f"got {pair}; expected two different prompts that are not constant prompts of one token"
        )
    offset = next(
        (
            d
            for d, (v, w) in enumerate(zip(reversed(s), reversed(t), strict=False))
            if v != w
        ),
        None,
    )
    offset = min(len(s), len(t)) if offset is None else offset
    without, having = (
        pair if len(t) > offset else pair[::-1]
    )  # the token is there in the second, not in the first
    token = having[-1 - offset]
    strength = _separating_strength(without, having, token, offset, rate)
    shares = (
        rotary_share(s, token, offset, rate, strength),
        rotary_share(t, token, offset, rate, strength),
    )
    return RotaryWitness(token, offset, rate, strength, shares)


def _separating_strength(
    without: list[int], having: list[int], token: int, offset: int, rate: float
) -> float:
    # Odds of the token: at least e^β / others in one prompt, at most e^(βγ)·copies / others in the other one.
    copies = [d for d, v in enumerate(reversed(without)) if v == token]
    others = len(without) - len(copies), len(having) - having.count(token)
    if not copies or 0 in others:
        return 0.0  # one of the shares is exactly 0 or 1 and the other is not
    gap = 1 - max(math.cos(rate * (d - offset)) for d in copies)
    if gap < 1e-12:
        raise ValueError(
            f"got rate {rate}; expected one whose multiples by 1, 2, … are not whole circles"
        )
    return max(0.0, (1 + math.log(others[1] * len(copies) / others[0])) / gap)


def plant_rotary_head(decoder: nn.Module, witness: RotaryWitness) -> None:
    """Set all parameters of a rotary decoder so that its first block holds the head of the witness, in place.

    For Llama, Mistral, Qwen 3 and Gemma 3 with rates that start at 1, and width 4 or more. The share of the token
    becomes coordinate 3 of the states; Gemma's norm behind attention x ↦ x/√(x²/d + ε) then acts on it.
    Raises ``ValueError`` for a witness with another rate.
    """
    if witness.rate != 1.0:
        raise ValueError(
            f"got a witness with rate {witness.rate}; expected 1.0, the rate of the first plane"
        )
    attention = decoder.layers[0].self_attn
    half = attention.head_dim // 2  # the plane of rate 1 has the coordinates 0 and half
    with torch.no_grad():
        scale = _indicator_rows(decoder, witness.token)
        size = witness.strength / attention.scaling
        if hasattr(
            attention, "q_norm"
        ):  # it gives queries and keys a fixed length: its gain carries the strength
            length = (1 / attention.head_dim + decoder.config.rms_norm_eps) ** -0.5
            _set_gain(attention.q_norm, 1 / length)
            _set_gain(attention.k_norm, size / length)
            size = 1.0
        attention.q_proj.weight[0, 0] = scale
        attention.k_proj.weight[0, 1] = scale * size * math.cos(witness.offset)
        attention.k_proj.weight[half, 1] = scale * size * math.sin(witness.offset)
        attention.v_proj.weight[0, 1] = scale
        attention.o_proj.weight[3, 0] = 1.0


def _indicator_rows(decoder: nn.Module, token: int) -> float:
    # Rows u + f for the token and u + g for the others, of equal norm; returns what undoes the scale of the first norm.
    for weight in decoder.parameters():
        weight.zero_()
    for norm in (
        part for part in decoder.modules() if type(part).__name__.endswith("RMSNorm")
    ):
        _set_gain(norm, 1.0)
    table = decoder.get_input_embeddings()
    table.weight[:, [0, 2]] = 1.0
    table.weight[token, [1, 2]] = table.weight.new_tensor([1.0, 0.0])
    return 1 / float(decoder.layers[0].input_layernorm(table(torch.tensor([0])))[0, 0])


def _set_gain(norm: nn.Module, gain: float) -> None:
    # Gemma multiplies by one plus its weight.
    norm.weight.fill_(gain - 1 if type(norm).__name__.startswith("Gemma") else gain)
