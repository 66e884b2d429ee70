"""The lens: ridge regression, Mahalanobis distance; of one model and layer."""

import itertools
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import safe_open
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
from sipit_lite.extensions import lens as lens_module
from sipit_lite.extensions.lens import RIDGE, batched, training_prompts
from sipit_lite.io.text import prompts
from sipit_lite.model import SipItError

TOKENS = 4000


def text(model: LanguageModel) -> list[torch.Tensor]:
    """Prompts of three lengths, bundled prose and random tokens in turn."""
    rows = []
    for length in (64, 16, 4):
        for kind in ("prose", "random"):
            stream = prompts(model.tokenizer, kind, length)
            rows += itertools.islice(stream, 1200 // length)
    return rows


@pytest.fixture(scope="module")
def lens(pocket: LanguageModel) -> Lens:
    """A small lens of the trained model's third layer."""
    return Lens.fit(pocket, 3, prompts=text(pocket), tokens=TOKENS, features=64)


def seen_by(model: LanguageModel, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """States and embeddings of all that the lens was fitted on, in float64."""
    rows = []
    for ids in text(model):
        rows.append(ids)
        if sum(map(len, rows)) >= TOKENS:
            break
    states = torch.cat([model.states(ids, layer) for ids in rows])
    embeddings = model.embeddings[torch.cat(rows).to(model.device)]
    return states.double().cpu().numpy(), embeddings.double().cpu().numpy()


def test_equal_to_a_least_squares_solver(pocket: LanguageModel, lens: Lens) -> None:
    """NumPy's solver on the design matrix, ridge as extra rows, features anew."""
    states, embeddings = seen_by(pocket, 3)
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
    states, embeddings = seen_by(pocket, 3)
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
    assert lens.nearness(one[None])[0].topk(20).indices.tolist() == expected.tolist()
    assert lens.draft(one).item() == expected[0]


@pytest.mark.parametrize(
    ("group", "strange", "scored"), [(64, 40, 1), (63, 0, 0), (63, 40, 1)]
)
def test_a_draft_is_the_nearest_of_all(
    pocket: LanguageModel,
    lens: Lens,
    monkeypatch: pytest.MonkeyPatch,
    group: int,
    strange: int,
    scored: int,
) -> None:
    """By few coordinates where they decide, and by all; against distances in float64."""
    # For groups of 64 these are few tokens; strange states leave too many of them.
    monkeypatch.setattr(lens_module, "GROUP", group)
    lens = replace(lens)  # without what was worked out for other groups
    generator = torch.Generator().manual_seed(2)
    others = 30 * torch.randn(strange, pocket.d_model, generator=generator)
    states = torch.cat([pocket.states("read by few coordinates", 3).cpu(), others])
    whiten = lens.whiten.double().cpu()
    expected = lens.embeddings(states.to(pocket.device)).double().cpu() @ whiten
    table = pocket.embeddings.double().cpu() @ whiten
    apart = torch.stack([(table - e).square().sum(1) for e in expected])
    scores = Mock(wraps=lens.nearness)
    monkeypatch.setattr(Lens, "nearness", lambda _, rows: scores(rows))
    draft = lens.draft(states.to(pocket.device)).cpu()
    assert scores.call_count == scored
    chosen = apart.gather(1, draft[:, None])[:, 0]
    # Rounding may choose between tokens that are all but equally near.
    assert (chosen <= apart.min(1).values * (1 + 1e-4)).all()
    assert lens.draft(states[:0].to(pocket.device)).shape == (0,)


def test_layer_zero_is_read_exactly(pocket: LanguageModel) -> None:
    """Embedding plus position: the regression recovers the token at any position."""
    exact = Lens.fit(pocket, 0, prompts=text(pocket), tokens=8000, features=0)
    ids = torch.randint(
        pocket.vocab_size, (60,), generator=torch.Generator().manual_seed(9)
    )
    assert (exact.draft(pocket.states(ids, 0)).cpu() == ids).float().mean() > 0.95


def test_a_file_brings_it_back(
    pocket: LanguageModel, lens: Lens, tmp_path: Path
) -> None:
    """The same order after a round trip, over an earlier file; nothing else is left."""
    path = tmp_path / "lens.safetensors"
    path.write_text("an earlier file")
    lens.save(path)
    again = Lens.load(path, pocket)
    states = pocket.states("there and back", 3)
    assert again.nearness(states).equal(lens.nearness(states))
    again.check(pocket, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["lens.safetensors"]


def test_a_failed_save_leaves_the_earlier_file(
    lens: Lens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the disk is full."""

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    path = tmp_path / "lens.safetensors"
    path.write_text("an earlier file")
    monkeypatch.setattr(lens_module, "save_file", full)
    with pytest.raises(LensError, match=r"no file can be written .*No space left"):
        lens.save(path)
    assert path.read_text() == "an earlier file"
    assert [file.name for file in tmp_path.iterdir()] == ["lens.safetensors"]


def test_text_is_prepared_once_for_all_layers(
    pocket: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prose, random, code, random in turn; text that ends leaves random tokens."""
    calls = []

    def stream(tokenizer: object, kind: str, length: int, **options: str):
        calls.append((kind, options))
        return iter([torch.full((length,), 7)] * 4)

    monkeypatch.setattr(lens_module, "text_prompts", stream)
    model = LanguageModel(pocket.decoder, pocket.tokenizer)
    first = list(itertools.islice(training_prompts(model), 96 * 2))
    constant = [bool((ids == 7).all()) for ids in first]
    assert constant[:4] == [True, False, True, False]
    assert not any(constant[-20:])
    calls.clear()
    for layer in (0, 1, 2):
        Lens.fit(model, layer, tokens=600, features=0)
    installed = {"source": "installed", "split": "train"}
    assert calls == [("prose", installed), ("code", installed)]


def test_batches_hold_one_length() -> None:
    """Up to so many tokens, in passes of bounded size; endless prompts end."""
    endless = (torch.zeros(n, dtype=torch.long) for n in itertools.cycle((3, 5)))
    batches = batched(endless, 4000)
    assert {rows.shape[1] for rows in batches} == {3, 5}
    assert sum(rows.numel() for rows in batches) in range(4000, 4005)
    assert max(rows.numel() for rows in batches) <= lens_module.PASS


def test_every_token_is_proposed_exactly_once(
    pocket: LanguageModel, lens: Lens
) -> None:
    """The lens as a policy, and as the start of Newton: its order first."""
    step, states = OneStepMap.after(pocket, 3), pocket.states("x", 3)
    for policy in (lens, Newton(max_steps=2, lens=lens)):
        batches = list(policy.proposals(step, states[0], torch.Generator()))
        proposed = torch.cat(batches).tolist()
        assert sorted(proposed) == list(range(pocket.vocab_size))
        order = lens.nearness(states[:1])[0].argsort(descending=True)
        assert proposed[:64] == order[:64].tolist()


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
        match=r"fitted on pocket-gpt2, other weights; expected .* at random",
    ):
        lens.check(other, 3)
    lens.save(tmp_path / "lens.safetensors")
    with pytest.raises(LensError, match="other weights"):
        Lens.load(tmp_path / "lens.safetensors", other)


def bad_files(good: dict[str, torch.Tensor], written: dict[str, str]) -> dict:
    """Tensors and metadata of files that hold no lens, by what is wrong."""
    d = 256
    whiten = torch.zeros(d, d)
    without = {name: x for name, x in good.items() if name != "slope"}
    return {
        "no format": (good, {}),
        "another format": (good, written | {"format": "sipit-lite lens 0"}),
        "no layer": (good, {k: v for k, v in written.items() if k != "layer"}),
        "layer of letters": (good, written | {"layer": "three"}),
        "layer below": (good, written | {"layer": "-1"}),
        "layer beyond": (good, written | {"layer": "9"}),
        "layer of many digits": (good, written | {"layer": "9" * 5000}),
        "a tensor less": (without, written),
        "another width": (good | {"whiten": torch.zeros(9, 9)}, written),
        "too few rows": (good | {"slope": good["slope"][:-1].clone()}, written),
        "scalars": (good | {"directions": torch.tensor(1.0)}, written),
        "half precision": (good | {"slope": good["slope"].half()}, written),
        "integers": (good | {"whiten": whiten.long()}, written),
        "complex": (good | {"whiten": whiten.to(torch.complex64)}, written),
        "8 bits": (
            good | {"directions": good["directions"].to(torch.float8_e5m2)},
            written,
        ),
    }


def test_changed_files_are_refused_in_one_line(
    pocket: LanguageModel, lens: Lens, tmp_path: Path
) -> None:
    """Other metadata, widths and formats."""
    path = tmp_path / "lens.safetensors"
    lens.save(path)
    with safe_open(path, framework="pt") as stored:
        written = stored.metadata()
        good = {name: stored.get_tensor(name) for name in stored.keys()}
    for case, (tensors, metadata) in bad_files(good, written).items():
        save_file(tensors, path, metadata)
        with pytest.raises(
            LensError, match=r"got '.*', which holds no lens"
        ) as refusal:
            Lens.load(path, pocket)
        assert "\n" not in str(refusal.value), case
    save_file(good, path, {k: v for k, v in written.items() if k != "fingerprint"})
    with pytest.raises(LensError, match=r"no lens of .* \(fitted on .*, other weights"):
        Lens.load(path, pocket)


def test_bad_files_and_settings_are_refused(
    pocket: LanguageModel, lens: Lens, tmp_path: Path
) -> None:
    """Missing, truncated, no lens, nowhere to write, too little to fit, bad layer."""
    path = tmp_path / "lens.safetensors"
    with pytest.raises(LensError, match="which holds no lens"):
        Lens.load(path, pocket)
    lens.save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(LensError, match="which holds no lens"):
        Lens.load(path, pocket)
    save_file({"states": torch.zeros(2)}, path)
    expected = r"no lens of pocket-gpt2 \(expected a file of 'sipit-lite lens 3'"
    with pytest.raises(LensError, match=expected):
        Lens.load(path, pocket)
    with pytest.raises(LensError, match="where no file can be written"):
        lens.save(path / "lens.safetensors")
    few = [torch.tensor([1, 2])]
    for options in ({"prompts": few}, {"prompts": text(pocket), "tokens": 5}):
        with pytest.raises(
            LensError, match=r"got [25] tokens .*; expected at least 256"
        ):
            Lens.fit(pocket, 3, **options)
    with pytest.raises(LensError, match="features=-1"):
        Lens.fit(pocket, 3, prompts=text(pocket), features=-1)
    with pytest.raises(ModelError, match="got layer 9"):
        Lens.fit(pocket, 9)
    assert issubclass(LensError, SipItError)
