"""Which real weights: folders and names of ``SIPIT_LITE_REAL``, or the paper's six."""

import os

import pytest

PAPER = (
    "gpt2",
    "roneneldan/TinyStories-33M",
    "meta-llama/Llama-3.1-8B",
    "mistralai/Mistral-7B-v0.1",
    "google/gemma-3-1b-pt",
    "microsoft/Phi-4-mini-instruct",
)  # one of each family
ASKED = os.environ.get("SIPIT_LITE_REAL", "")
MODELS = (
    list(PAPER)
    if ASKED == "paper"
    else [name for name in ASKED.split(os.pathsep) if name]
)


def pytest_configure() -> None:
    """Say in one line what is missing, before any test runs."""
    if not MODELS:
        raise pytest.UsageError(
            f"got SIPIT_LITE_REAL={ASKED!r}; expected 'paper' for {', '.join(PAPER)}, "
            f"or names and folders with {os.pathsep!r} between them"
        )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All tests of a model in a row, so that one model is in memory."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", MODELS, scope="module")


@pytest.fixture(scope="session", autouse=True)
def little_text() -> None:
    """All installed text, as everybody has it."""
