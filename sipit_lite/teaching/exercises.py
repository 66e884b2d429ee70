"""Exercises that answer: a check that says *not yet* until the answer is right."""

from collections.abc import Callable
from dis import get_instructions
from numbers import Number
from types import FunctionType

# What a check must never accept, unless it is the right answer itself.
WRONG = (None, 0, -1, "?", lambda *_: None)


def attempt(check: Callable[..., None], *answers: object) -> None:
    """Print ``right`` if an answer passes its check, else ``not yet`` and the reason.

    A starter cell calls it with dots, ``...``, or with a function that is not written
    yet; the solution calls it again. Whatever an unfinished answer raises is a reason.
    After a right answer wrong ones are tried in its place: a check that one of them
    passes as well checks nothing, and is a ValueError.

    >>> def even(number):
    ...     assert number % 2 == 0 and number > 0, f"{number} is odd or not positive"
    >>> attempt(even, ...)
    not yet: your answer goes where the dots are
    >>> attempt(even, 3)
    not yet: 3 is odd or not positive
    >>> attempt(even, 4)
    right
    """
    if any(_dots(answer) for answer in answers):
        print("not yet: your answer goes where the dots are")
        return
    try:
        check(*answers)
    except Exception as error:
        reason = str(error) if isinstance(error, AssertionError) else repr(error)
        print("not yet:", reason or "the answer does not pass")
        return
    for place, answer in enumerate(answers):
        for wrong in WRONG:
            if isinstance(answer, Number) and answer == wrong:
                continue
            if _passes(check, *answers[:place], wrong, *answers[place + 1 :]):
                raise ValueError(f"{check.__name__} accepts {wrong!r} as well")
    print("right")


def _dots(answer: object) -> bool:
    """Whether it is still dots, or a function with nothing else in it."""
    if not isinstance(answer, FunctionType):
        return answer is ...
    frame = ("RESUME", "RETURN_VALUE")
    steps = [step for step in get_instructions(answer) if step.opname not in frame]
    # A body of dots is compiled to nothing but a return of None.
    return [step.argval for step in steps] == [None]


def _passes(check: Callable[..., None], *answers: object) -> bool:
    """Whether the check accepts these answers."""
    try:
        check(*answers)
    except Exception:
        return False
    return True
