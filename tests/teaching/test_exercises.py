"""The check of an exercise: what it prints, and that it checks something."""

import pytest
import torch

from sipit_lite.teaching.exercises import attempt


def half(answer: object) -> None:
    """The answer is half of eight."""
    assert 2 * answer == 8, f"twice {answer} is no 8"


def test_unfinished_and_wrong_answers_are_not_yet(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Dots, an error and a failed assertion each give a reason."""

    def to_write(x: int) -> int:
        """Its body is still to be written."""
        ...

    for answer in (..., to_write, None, 3):
        attempt(half, answer)
    # A fifth line is pytest's, which explains asserts.
    dots, body, error, wrong = capsys.readouterr().out.splitlines()[:4]
    assert dots == body == "not yet: your answer goes where the dots are"
    assert error.startswith("not yet: TypeError(")
    assert wrong == "not yet: twice 3 is no 8"


def test_right_answers_of_any_type(capsys: pytest.CaptureFixture[str]) -> None:
    """A number, a tensor, a function, and 0 where 0 is right."""

    def doubles(function: object) -> None:
        assert function(3) == 6

    def zero(number: object) -> None:
        assert number == 0

    attempt(half, 4)
    attempt(half, torch.tensor(4.0))
    attempt(doubles, lambda x: 2 * x)
    attempt(zero, 0)
    assert capsys.readouterr().out.splitlines() == ["right"] * 4


def test_a_check_that_checks_nothing_is_an_error() -> None:
    """For one answer of two, and for a function, too."""

    def first_alone(first: object, second: object) -> None:
        assert first == 4

    def calls(function: object) -> None:
        function(3)

    with pytest.raises(ValueError, match="first_alone accepts None as well"):
        attempt(first_alone, 4, 5)
    with pytest.raises(ValueError, match="calls accepts <function"):
        attempt(calls, lambda x: 2 * x)
