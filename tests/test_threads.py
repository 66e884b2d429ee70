"""Four threads with one model: right results, and the caller's settings stay."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import PreTrainedModel

from sipit_lite import LanguageModel, Lens, capture, invert, invert_many, last_states
from sipit_lite.experiments.families import configuration, randomised
from sipit_lite.model import PRODUCTS, plain_settings

VOCAB = 200
RUNS = 100
LAYERS = (1, 3)


@pytest.fixture(scope="module", params=["GPT2", "Gemma3Text"])
def decoder(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A small decoder."""
    return randomised(configuration(request.param, VOCAB, 32, 24))


def settings() -> tuple:
    """What all threads share."""
    precisions = [product.fp32_precision for product in PRODUCTS]
    return (torch.get_default_dtype(), *precisions)


def test_four_threads_and_one_model(decoder: PreTrainedModel) -> None:
    """States, last states, inversions with and without a lens, beside one capture."""
    model = LanguageModel(decoder, name="small")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(VOCAB, (256, 8), generator=generator)
    lens = Lens.fit(model, 3, prompts=rows, features=0)
    prompts = []
    for number in range(RUNS):
        length = 1 + number % 7
        prompts.append(torch.randint(VOCAB, (length,), generator=generator))
    # By another object with the same weights, before any thread runs.
    alone = LanguageModel(copy.deepcopy(decoder), name="alone")
    expected = [{at: alone.states(ids, at) for at in LAYERS} for ids in prompts]

    def states(number: int) -> None:
        for layer, right in expected[number].items():
            torch.testing.assert_close(model.states(prompts[number], layer), right)

    def last(number: int) -> None:
        several = prompts[number : number + 5]
        rows = last_states(model, several, LAYERS)
        for layer, found in zip(LAYERS, rows, strict=True):
            for place, row in enumerate(found):
                right = expected[number + place][layer][-1]
                torch.testing.assert_close(row, right)

    def inverted(number: int) -> None:
        observed = expected[number][1]
        assert torch.equal(invert(observed, model, 1).tokens, prompts[number])

    def drafted(number: int) -> None:
        several = [expected[at % RUNS][3] for at in (number, number + 1)]
        outcomes = invert_many(several, model, 3, lens=lens)
        for place, outcome in enumerate(outcomes):
            assert torch.equal(outcome.tokens, prompts[(number + place) % RUNS])

    def captured(number: int) -> None:
        with torch.no_grad(), capture(decoder, layers=[0, 3]) as tape:
            decoder(input_ids=prompts[number][None])
        stored = tape.captured()
        assert stored.passes == (len(prompts[number]),)
        torch.testing.assert_close(stored.at(3), expected[number][3])

    # One thread captures at a time: who runs the decoder itself is captured.
    works: list[Callable[[int], None]] = [states, last, inverted, drafted]

    def run(thread: int) -> None:
        for number in range(thread, RUNS, 4):
            (captured if thread == 0 else works[number // 4 % 4])(number)

    # A caller whose settings are not the plain ones.
    before = settings()
    torch.set_default_dtype(torch.float64)
    try:
        with ThreadPoolExecutor(4) as threads:
            for outcome in threads.map(run, range(4)):
                assert outcome is None
        assert settings() == (torch.float64, *before[1:])
    finally:
        torch.set_default_dtype(before[0])
    blocks = getattr(decoder, model.parts[0])
    assert not any(block._forward_hooks for block in blocks)


def test_the_last_to_leave_puts_the_settings_back() -> None:
    """Whoever came first may leave first; the other still has plain settings."""
    before = settings()
    torch.set_default_dtype(torch.float64)
    first = plain_settings()
    second = plain_settings()
    try:
        with first:
            plain = settings()
            second.__enter__()
        assert settings() == plain == (torch.float32, "ieee", "ieee")
        second.__exit__(None, None, None)
        assert settings() == (torch.float64, *before[1:])
    finally:
        torch.set_default_dtype(before[0])
