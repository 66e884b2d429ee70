"""Which model a file belongs to: its weights, its configuration, what leaks of it."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, MistralConfig

from sipit_lite import LanguageModel, Leaked, Lens, LensError, last_states
from sipit_lite.experiments.perturb import twins
from sipit_lite.io.files import fingerprint

SIZES = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 40,
}  # fmt: skip


def configured(**changes: object) -> LanguageModel:
    """The same weights in every configuration of one shape."""
    torch.manual_seed(0)
    return LanguageModel(AutoModel.from_config(MistralConfig(**SIZES | changes)))


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rms_norm_eps": 1e-2},
        {"hidden_act": "gelu"},
        {"sliding_window": 3},
        {"num_attention_heads": 2, "num_key_value_heads": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_fingerprint_covers_the_configuration(change: dict, tmp_path: Path) -> None:
    """Each field changes states that the weights alone do not tell apart."""
    one = configured()
    other = configured(**change)
    ids = torch.arange(12)
    assert not torch.equal(one.states(ids, 2), other.states(ids, 2))
    assert fingerprint(one) != fingerprint(other)
    # What goes by it: shards are computed anew, a lens is refused.
    kept = last_states(one, [ids], [2], folder=tmp_path)
    found = last_states(other, [ids], [2], folder=tmp_path)
    assert not torch.equal(kept, found)
    assert torch.equal(found, last_states(other, [ids], [2]))
    rows = one.vocabulary.repeat(20).split(12)
    Lens.fit(one, 2, prompts=rows, features=0).save(tmp_path / "lens")
    with pytest.raises(LensError, match="other weights"):
        Lens.load(tmp_path / "lens", other)


def test_the_fingerprint_covers_every_bit(pocket: LanguageModel) -> None:
    """One bit of one number, and two equal rows; but nothing that changes no state."""
    decoder = copy.deepcopy(pocket.decoder)
    assert fingerprint(LanguageModel(decoder)) == fingerprint(pocket)
    decoder.config.use_cache = False
    decoder.config._attn_implementation = "eager"
    assert fingerprint(LanguageModel(decoder)) == fingerprint(pocket)
    weight = decoder.h[3].mlp.c_fc.weight.view(torch.int32)
    weight[17, 33] ^= 1
    assert fingerprint(LanguageModel(decoder)) != fingerprint(pocket)
    assert fingerprint(twins(pocket, 5, 6)) != fingerprint(pocket)


def test_the_fingerprint_tells_what_leaks(pocket: LanguageModel) -> None:
    """States, keys and values are read by different lenses."""
    leaks = [pocket, Leaked(pocket, "keys"), Leaked(pocket, "values")]
    assert len({fingerprint(leak) for leak in leaks}) == 3
    assert fingerprint(Leaked(pocket, "keys")) == fingerprint(leaks[1])
