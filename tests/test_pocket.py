"""Training resumes where it was stopped, and ends where it would have ended."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

import sipit_lite
import train_pocket as pocket
from sipit_lite import load
from sipit_lite.io.text import bundled


def random_data() -> dict[str, Tensor]:
    """Enough random tokens for the windows of a batch."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{kind} train": torch.randint(pocket.VOCAB, (2000,), generator=generator)
        for kind in ("prose", "code")
    }


def test_an_interrupted_training_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C after the checkpoint of step 2 of 3, then the same call again."""
    monkeypatch.setattr(pocket, "BATCH", 2)
    data, honest = random_data(), pocket.batch
    for name in ("unbroken", "broken"):
        (tmp_path / name).mkdir()
    state = torch.get_rng_state()
    unbroken = pocket.train(tmp_path / "unbroken", data, 3, save_every=1)
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator"

    def stops(data: dict[str, Tensor], step: int) -> Tensor:
        if step == 2:
            raise KeyboardInterrupt
        return honest(data, step)

    monkeypatch.setattr(pocket, "batch", stops)
    with pytest.raises(KeyboardInterrupt):
        pocket.train(tmp_path / "broken", data, 3, save_every=1)
    monkeypatch.setattr(pocket, "batch", honest)
    resumed = pocket.train(tmp_path / "broken", data, 3, save_every=1)
    for one, two in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_training_lowers_the_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps on a text of one repeated token: the model learns it."""
    monkeypatch.setattr(pocket, "BATCH", 2)
    data = {name: torch.full((2000,), 7) for name in ("prose train", "code train")}
    rows = torch.full((2, 20), 7)
    model = pocket.train(tmp_path, data, 10)
    assert pocket.loss_of(model, rows).item() < 2 < math.log(pocket.VOCAB)


def test_it_writes_what_the_package_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a corpus of the bundled passages: one step, and a folder that loads."""
    monkeypatch.setattr(pocket, "BATCH", 2)
    monkeypatch.setattr(pocket.prompts, "installed", lambda kind, _: bundled(kind)[:12])
    pocket.main(tmp_path, steps=1)
    shipped = Path(sipit_lite.__file__).parent / "pocket_gpt2"
    names = {path.name for path in (tmp_path / "pocket_gpt2").iterdir()}
    there = {path.name for path in shipped.iterdir() if path.is_file()}
    assert names == there - {"__init__.py", "card.md", "LICENSE-PSF"}
    assert load(tmp_path / "pocket_gpt2", device="cpu").n_layers == 6
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "pocket_gpt2")
    assert model.num_parameters() == 5_853_184
    card = (tmp_path / "pocket_gpt2" / "README.md").read_text(encoding="utf-8")
    published = (shipped / "README.md").read_text(encoding="utf-8")
    headings = [line for line in published.splitlines() if line.startswith("## ")]
    assert [line for line in card.splitlines() if line.startswith("## ")] == headings
    end = headings[-2]
    assert card.split(end)[1] == published.split(end)[1], "words without a number"


def test_until_takes_the_fewest_texts_that_suffice() -> None:
    """Three characters of texts of two: two texts; more than there are: all."""
    texts = ["ab", "cd", "ef"]
    counts = {0: 1, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3, 7: 3}
    for characters, count in counts.items():
        assert pocket.until(texts, characters) == texts[:count]
    assert pocket.until([], 5) == []


def test_the_rate_rises_and_falls() -> None:
    """Its peak is at the end of the warm-up, and it never is zero."""
    first, last = pocket.rate(0, 1000), pocket.rate(999, 1000)
    assert 0 < first < pocket.rate(pocket.WARMUP, 1000) == pocket.PEAK_RATE > last > 0


def test_its_activation_is_that_of_gpt2() -> None:
    """One function, computed in other steps: equal up to rounding."""
    from transformers.activations import ACT2FN

    x = torch.linspace(-9, 9, 2001, dtype=torch.float64)
    ours = ACT2FN[pocket.CONFIG.activation_function](x)
    torch.testing.assert_close(ours, ACT2FN["gelu_new"](x), rtol=0, atol=1e-14)
