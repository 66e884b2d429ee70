"""Exercises that answer: a check that says *not yet* until the answer is right."""

from collections.abc import Callable
from dis import get_instructions
from types import FunctionType

# No check may accept these in place of a right answer, unless one is the answer.
WRONG = (None, 0, -1, "?", lambda *_: 0)


def attempt(check: Callable[..., None], *answers: object) -> None:
    """Print ``right`` if an answer passes its check, else ``not yet`` and the reason.

    A starter cell calls it with dots, ``...``, or with a function that is not written
    yet; the solution calls it again. Whatever an unfinished answer raises is a reason.
    A check that accepts a wrong answer as well checks nothing, and is a ValueError.

    >>> def even(number):
    ...     assert number % 2 == 0 and number > 0, f"{number} is odd or not positive"
    >>> attempt(even, ...)
    not yet: your answer goes where the dots are
    >>> attempt(even, 3), attempt(even, 4)
    not yet: 3 is odd or not positive
    right
    (None, None)
    """
    refusal = _refusal(check, *answers)
    if refusal:
        print("not yet:", refusal)
        return
    for place, answer in enumerate(answers):
        for wrong in WRONG:
            trial = (*answers[:place], wrong, *answers[place + 1 :])
            # A comparison with a tensor is a tensor, and no True.
            if (wrong == answer) is not True and not _refusal(check, *trial):
                raise ValueError(f"{check.__name__} accepts {wrong!r} as well")
    print("right")


def _refusal(check: Callable[..., None], *answers: object) -> str:
    """Why the check refuses these answers; empty if it does not."""
    if any(_dots(answer) for answer in answers):
        return "your answer goes where the dots are"
    try:
        check(*answers)
    except Exception as error:
        reason = str(error) if isinstance(error, AssertionError) else repr(error)
        return reason or "the answer does not pass"
    return ""


def _dots(answer: object) -> bool:
    """Whether it is still dots, or a function with nothing else in it."""
    if not isinstance(answer, FunctionType):
        return answer is ...
    # A body of dots is compiled to nothing but a return of None.
    steps = [step.argval for step in get_instructions(answer)][1:]
    return steps in ([None], [None, None])
