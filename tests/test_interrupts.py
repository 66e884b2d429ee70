"""Ctrl-C at random moments: nothing is lost, half-written or changed."""

import gc
import inspect
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sipit_lite import (
    Interrupted,
    LanguageModel,
    Lens,
    Recovery,
    invert_many,
    last_states,
)
from sipit_lite.experiments.families import configuration, randomised
from sipit_lite.io import shards
from sipit_lite.model import PRODUCTS, USERS

# The usual method of the plugin needs the very timer that is used here.
pytestmark = [
    pytest.mark.usefixtures("bars"),
    pytest.mark.timeout(300, method="thread"),
    # Python itself drops a Ctrl-C that comes as an object is freed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
MOMENTS = 75  # for each of four computations
VOCAB = 200


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A small one."""
    decoder = randomised(configuration("Llama", VOCAB, 32, 24))
    return LanguageModel(decoder, name="small")


@pytest.fixture(scope="module")
def prompts() -> list[torch.Tensor]:
    """Of several lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = (3, 5, 1, 4, 2, 2, 6, 3, 1, 4)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


def fitted(model: LanguageModel) -> Lens:
    """A lens fitted on random prompts."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(VOCAB, (256, 8), generator=generator)
    return Lens.fit(model, 2, prompts=rows, features=16)


def nesting() -> int:
    """How many autocast contexts are open: more than the caller's keep stale casts."""
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def settings() -> tuple:
    """What belongs to the caller."""
    return (
        nesting(),
        torch.get_default_dtype(),
        *(product.fp32_precision for product in PRODUCTS),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_rng_state().sum().item(),
        len(USERS),
    )


def seconds(work: Callable[[], object]) -> float:
    """The time that it takes once all is warm."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def stopped(work: Callable[[], object], moment: float) -> object:
    """What it returns, or the Ctrl-C that comes after so many seconds."""

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    result = None
    earlier = signal.signal(signal.SIGALRM, press)
    try:
        signal.setitimer(signal.ITIMER_REAL, moment)
        result = work()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt as stop:
        # It may also come when the result is there already.
        result = stop if result is None else result
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    return result


def moments(duration: float) -> list[float]:
    """Random moments of a run, behind its first instructions."""
    draw = random.Random(0)
    return [draw.uniform(1e-4, duration) for _ in range(MOMENTS)]


def unchanged(before: tuple) -> bool:
    """Whether the caller's settings are as before, at the latest with the traceback."""
    if settings() != before:
        gc.collect()
    return settings() == before


def tidy(folder: Path, files: int) -> bool:
    """Whether a folder holds so many files, at the latest with the traceback."""
    if len(list(folder.iterdir())) != files:
        gc.collect()
    return len(list(folder.iterdir())) == files


@pytest.mark.parametrize("drafts", [False, True])
def test_inversions_keep_all_outcomes(
    model: LanguageModel, prompts: list[torch.Tensor], drafts: bool
) -> None:
    """One a prompt, in their order: a verified prefix, or the complete prompt."""
    prompts = prompts[:3]
    states = [model.states(ids, 2) for ids in prompts]
    lens = fitted(model) if drafts else None
    before = settings()

    # Without the checks of types around it, which Ctrl-C stops as well.
    bare = inspect.unwrap(invert_many)

    def work() -> object:
        return bare(states, model, 2, lens=lens)

    lengths = set()
    for moment in moments(seconds(work)):
        outcomes = stopped(work, moment)
        if not isinstance(outcomes, list):
            assert isinstance(outcomes, Interrupted)
            assert isinstance(outcomes.recovered, Recovery)
            outcomes = outcomes.outcomes
        assert len(outcomes) == len(prompts)
        for ids, outcome in zip(prompts, outcomes, strict=True):
            assert isinstance(outcome, Recovery) and bool(outcome.verified.all())
            assert torch.equal(outcome.tokens, ids[: len(outcome.tokens)])
        lengths.add(sum(len(outcome.tokens) for outcome in outcomes))
        assert unchanged(before)
    assert len(lengths) > 3, "the moments were all alike"


def test_last_states_go_on(
    model: LanguageModel,
    prompts: list[torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same states as without a stop, and no finished shard is computed again."""
    monkeypatch.setattr(shards, "SHARD", 2)
    honest = shards._last_states
    expected = last_states(model, prompts, [1, 3])
    computed = []
    folders = (tmp_path / str(number) for number in range(MOMENTS + 2))
    before = settings()

    def work() -> object:
        return last_states(model, prompts, [1, 3], folder=folder)

    def counted(*arguments: object) -> torch.Tensor:
        computed.append(arguments)
        return honest(*arguments)

    def fresh() -> object:
        return last_states(model, prompts, [1, 3], folder=next(folders))

    finished = set()
    for moment in moments(seconds(fresh)):
        folder = next(folders)
        stopped(work, moment)
        assert unchanged(before)
        done = sorted(folder.glob("shard-?????.safetensors"))
        finished.add(len(done))
        written = {path: path.stat().st_mtime_ns for path in done}
        computed.clear()
        with monkeypatch.context() as patched:
            patched.setattr(shards, "_last_states", counted)
            assert torch.equal(work(), expected)
        assert len(computed) == 5 - len(done)
        assert all(path.stat().st_mtime_ns == written[path] for path in done)
        assert tidy(folder, 5), "something half-written stays"
    assert len(finished) > 2, "the moments were all alike"


def test_a_lens_is_fitted_or_not(model: LanguageModel, tmp_path: Path) -> None:
    """No part of a file remains, the file is complete, and the next fit is the same."""
    expected = fitted(model)
    path = tmp_path / "lens.safetensors"
    expected.save(path)
    before = settings()

    def work() -> object:
        lens = fitted(model)
        lens.save(path)
        return lens

    stops = 0
    for moment in moments(seconds(work)):
        stops += isinstance(stopped(work, moment), KeyboardInterrupt)
        assert unchanged(before)
        assert torch.equal(Lens.load(path, model).slope, expected.slope)
        assert tidy(tmp_path, 1), "something half-written stays"
    assert stops > MOMENTS // 3
    assert torch.equal(fitted(model).slope, expected.slope)
