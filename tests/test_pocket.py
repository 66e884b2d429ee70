"""Training resumes where it was stopped, and ends where it would have ended."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sipit_lite.pocket_gpt2 import train as pocket


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
    """Ctrl-C after the checkpoint of step 2 of 3, then again from the start: the weights of an unbroken run."""
    monkeypatch.setattr(pocket, "BATCH", 2)
    data, honest = random_data(), pocket.batch
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = pocket.train(tmp_path / "whole", data, 3, save_every=1)

    def stops(data: dict[str, Tensor], step: int) -> Tensor:
        if step == 2:
            raise KeyboardInterrupt
        return honest(data, step)

    monkeypatch.setattr(pocket, "batch", stops)
    with pytest.raises(KeyboardInterrupt):
        pocket.train(tmp_path / "broken", data, 3, save_every=1)
    monkeypatch.setattr(pocket, "batch", honest)
    resumed = pocket.train(tmp_path / "broken", data, 3, save_every=1)
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
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
