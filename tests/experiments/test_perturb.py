"""Rounding against formats computed by hand, twin tokens against the detector."""

import pytest
import torch

from sipit_lite import LanguageModel, ModelError, StatesError, closest_pairs
from sipit_lite.experiments.perturb import noisy, quantised, rounded, twins


@pytest.mark.parametrize(("form", "steps"), [("int8", 127), ("int4", 7)])
def test_integers_are_multiples_of_a_scale_for_each_row(form: str, steps: int) -> None:
    """No value is off by more than half a step; a row has at most 2·steps + 1."""
    x = torch.randn(20, 300, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-3, 3, 20)[:, None]
    found = rounded(x, form)
    step = x.abs().amax(1, keepdim=True) / steps
    assert ((found - x).abs() <= 0.5001 * step).all()
    assert all(len(row.unique()) <= 2 * steps + 1 for row in found)
    assert torch.equal(rounded(torch.zeros(2, 3), form), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("form", "bits"), [("float16", 11), ("bfloat16", 8), ("float8", 4)]
)
def test_floats_keep_so_many_significant_bits(form: str, bits: int) -> None:
    """The relative error is at most half a unit in the last place."""
    x = torch.rand(1000, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    assert ((rounded(x, form) - x).abs() <= x * 2.0**-bits).all()
    assert not torch.equal(rounded(x, form), x)


def test_twins_collide_and_stop_colliding(pocket: LanguageModel) -> None:
    """Equal rows: exact collisions at every layer. A small shift: none."""
    prompts = torch.tensor([[5, 9, 7], [5, 9, 8], [5, 9, 11]])
    model = twins(pocket, 7, 8)
    # The original is untouched.
    assert not torch.equal(pocket.embeddings[7], pocket.embeddings[8])
    for layer in range(pocket.n_layers + 1):
        report = closest_pairs(model.states(prompts, layer)[:, -1], 1)
        assert report.minimum == 0.0 and report.collisions == 1
        assert report.pairs.tolist() == [[0, 1]]
    moved = twins(pocket, 7, 8, apart=1e-2)
    shift = float((moved.embeddings[7] - moved.embeddings[8]).norm())
    assert shift == pytest.approx(1e-2, rel=1e-3)
    assert closest_pairs(moved.states(prompts, 6)[:, -1], 1).collisions == 0


def test_bad_input(pocket: LanguageModel) -> None:
    """Each refusal quotes what came."""
    with pytest.raises(StatesError, match="got the format 'int3'"):
        rounded(torch.zeros(2, 2), "int3")
    with pytest.raises(StatesError, match=r"float16 cannot hold"):
        rounded(torch.full((2, 2), 1e6), "float16")
    with pytest.raises(ModelError, match="tokens are 0 to 4095"):
        twins(pocket, 5, 4096)


def test_noise_has_the_size_asked_for() -> None:
    """One size for all rows, or one each; seeded; refused when it is no size."""
    states = torch.randn(5, 40, dtype=torch.float64)
    sizes = torch.tensor([0.0, 1e-3, 1.0, 7.0, 100.0], dtype=torch.float64)
    assert torch.allclose((noisy(states, sizes, seed=3) - states).norm(dim=1), sizes)
    two = torch.full((5,), 2.0, dtype=torch.float64)
    assert torch.allclose((noisy(states, 2.0) - states).norm(dim=1), two)
    assert torch.equal(noisy(states, 1.0, seed=3), noisy(states, 1.0, seed=3))
    assert not torch.equal(noisy(states, 1.0, seed=3), noisy(states, 1.0, seed=4))
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(StatesError, match="expected finite sizes, not negative"):
            noisy(states, bad)


def test_fp4_takes_the_nearest_of_its_levels(pocket: LanguageModel) -> None:
    """Blocks of 64 numbers against all sixteen levels; embeddings and vectors stay."""
    small = quantised(pocket, "fp4")
    before = pocket.decoder.h[0].mlp.c_fc.weight
    after = small.decoder.h[0].mlp.c_fc.weight
    sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]).to(before)
    blocks = zip(before.view(-1, 64)[:50], after.view(-1, 64)[:50], strict=True)
    for block, levelled in blocks:
        levels = torch.cat([sizes, -sizes]) * block.abs().max() / 6
        best = (block[:, None] - levels).abs().min(1).values
        assert torch.allclose((block - levelled).abs(), best, atol=1e-6)
    assert torch.equal(small.embeddings, pocket.embeddings)
    assert torch.equal(small.decoder.ln_f.weight, pocket.decoder.ln_f.weight)
    assert not torch.equal(before, after) and "fp4 weights" in small.name


def test_int8_weights_are_rounded_rows(pocket: LanguageModel) -> None:
    """As ``rounded`` does for states; an unknown format is refused by name."""
    small = quantised(pocket, "int8")
    weight = pocket.decoder.h[1].attn.c_attn.weight
    assert torch.equal(small.decoder.h[1].attn.c_attn.weight, rounded(weight, "int8"))
    with pytest.raises(StatesError, match="got the format 'int3'"):
        quantised(pocket, "int3")
