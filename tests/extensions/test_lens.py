"""The lens is a ridge regression, ranks by Mahalanobis distance, and belongs to one model and layer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sipit_lite import (
    LanguageModel,
    Lens,
    LensError,
    ModelError,
    Newton,
    OneStepMap,
    load,
)
from sipit_lite.extensions.lens import RIDGE, own_prompts


@pytest.fixture(scope="module")
def lens(pocket: LanguageModel) -> Lens:
    """A small lens of the trained model's third layer."""
    return Lens.fit(pocket, 3, tokens=4000, features=64)


def seen_by(
    model: LanguageModel, layer: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """States and embeddings of the prompts that a lens of so many tokens is fitted on, in float64."""
    rows, count = [], 0
    for ids in own_prompts(model, 0):
        rows.append(ids)
        count += len(ids)
        if count >= tokens and count % 2048 == 0:
            break
    states = (
        torch.cat([model.states(ids, layer) for ids in rows]).double().cpu().numpy()
    )
    return states, model.embeddings[
        torch.cat(rows).to(model.device)
    ].double().cpu().numpy()


def test_equal_to_a_least_squares_solver(pocket: LanguageModel, lens: Lens) -> None:
    """NumPy's solver on the whole design matrix, ridge as extra rows; features written once more."""
    states, embeddings = seen_by(pocket, 3, 4000)
    normal = (states - states.mean(1, keepdims=True)) / np.sqrt(
        states.var(1, keepdims=True) + 1e-5
    )
    mixed = normal @ lens.directions.double().cpu().numpy()
    gelu = torch.nn.functional.gelu(torch.from_numpy(mixed)).numpy()
    design = np.concatenate([states, normal, gelu, np.ones((len(states), 1))], 1)
    size = (design**2).sum(0)
    ridge = np.diag(np.sqrt(RIDGE * (size + RIDGE * size.mean())))
    target = np.concatenate([embeddings, np.zeros((len(ridge), embeddings.shape[1]))])
    weight = np.linalg.lstsq(np.concatenate([design, ridge]), target, rcond=None)[0]
    found = (
        lens.embeddings(pocket.states("an unseen prompt of its own", 3))
        .double()
        .cpu()
        .numpy()
    )
    new = pocket.states("an unseen prompt of its own", 3).double().cpu().numpy()
    normal = (new - new.mean(1, keepdims=True)) / np.sqrt(
        new.var(1, keepdims=True) + 1e-5
    )
    gelu = torch.nn.functional.gelu(
        torch.from_numpy(normal @ lens.directions.double().cpu().numpy())
    ).numpy()
    expected = np.concatenate([new, normal, gelu, np.ones((len(new), 1))], 1) @ weight
    # The sums of products are made in float32 before they are added in float64.
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected).max()


def test_ranks_by_mahalanobis_distance(pocket: LanguageModel, lens: Lens) -> None:
    """The order of (E_v − ê)ᵀ C⁻¹ (E_v − ê), with C recomputed from the residuals."""
    states, embeddings = seen_by(pocket, 3, 4000)
    predicted = (
        lens.embeddings(torch.from_numpy(states).float().to(pocket.device))
        .double()
        .cpu()
        .numpy()
    )
    covariance = (embeddings - predicted).T @ (embeddings - predicted) / len(states)
    one = pocket.states("ranked", 3)[-1]
    apart = (
        pocket.embeddings.double().cpu().numpy()
        - lens.embeddings(one).double().cpu().numpy()
    )
    expected = np.einsum(
        "vi,ij,vj->v", apart, np.linalg.inv(covariance), apart
    ).argsort()[:20]
    assert lens.rank(one, 20).tolist() == expected.tolist()
    assert lens.draft(one).item() == expected[0]


def test_layer_zero_is_read_exactly(pocket: LanguageModel) -> None:
    """Embedding plus position: a regression has to find the token, whatever the position."""
    exact, ids = (
        Lens.fit(pocket, 0, tokens=8000, features=0),
        torch.randint(pocket.vocab_size, (60,)),
    )
    assert (exact.draft(pocket.states(ids, 0)).cpu() == ids).float().mean() > 0.95


def test_a_file_brings_it_back(
    pocket: LanguageModel, lens: Lens, tmp_path: Path
) -> None:
    """The same ranks after a round trip."""
    lens.save(tmp_path / "lens.safetensors")
    again, states = (
        Lens.load(tmp_path / "lens.safetensors", pocket),
        pocket.states("there and back", 3),
    )
    assert (
        torch.equal(again.rank(states, 50), lens.rank(states, 50)) and again.layer == 3
    )
    again.check(pocket, 3)


def test_every_token_is_proposed_exactly_once(
    pocket: LanguageModel, lens: Lens
) -> None:
    """The lens as a policy, and as the start of Newton: complete, without repetition, the lens's order first."""
    step, states = OneStepMap.after(pocket, 3), pocket.states("x", 3)
    for policy in (lens, Newton(max_steps=2, lens=lens)):
        found = torch.cat(
            list(policy.proposals(step, states[0], torch.Generator()))
        ).tolist()
        assert sorted(found) == list(range(pocket.vocab_size))
        assert found[:64] == lens.rank(states[0], 64).tolist()


def test_refused_for_another_model_or_layer(
    pocket: LanguageModel, lens: Lens, tmp_path: Path
) -> None:
    """What was received and what was expected are quoted."""
    other = load("pocket-gpt2", random_init=True, device=pocket.device)
    with pytest.raises(
        LensError, match="got a lens for layer 3; expected one for layer 2"
    ):
        lens.check(pocket, 2)
    with pytest.raises(
        LensError,
        match="fitted on pocket-gpt2, other weights; expected one for pocket-gpt2 at random",
    ):
        lens.check(other, 3)
    lens.save(tmp_path / "lens.safetensors")
    with pytest.raises(LensError, match="other weights"):
        Lens.load(tmp_path / "lens.safetensors", other)


def test_bad_files_and_settings_are_refused(
    pocket: LanguageModel, lens: Lens, tmp_path: Path
) -> None:
    """Missing, truncated, not a lens, nowhere to write, too little to fit, a bad layer."""
    path = tmp_path / "lens.safetensors"
    with pytest.raises(LensError, match="not a whole safetensors file"):
        Lens.load(path, pocket)
    lens.save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(LensError, match="not a whole safetensors file"):
        Lens.load(path, pocket)
    save_file({"states": torch.zeros(2)}, path)
    with pytest.raises(
        LensError,
        match=r"with tensors \['states'\]; expected a file of 'sipit-lite lens 1'",
    ):
        Lens.load(path, pocket)
    with pytest.raises(LensError, match="where no file can be written"):
        lens.save(tmp_path / "nowhere" / "lens.safetensors")
    with pytest.raises(
        LensError, match="got tokens=5, features=2048; expected at least 256"
    ):
        Lens.fit(pocket, 3, tokens=5)
    with pytest.raises(LensError, match="got prompts of 2 tokens in all"):
        Lens.fit(pocket, 3, prompts=[torch.tensor([1, 2])])
    with pytest.raises(ModelError, match="got layer 9"):
        Lens.fit(pocket, 9)
