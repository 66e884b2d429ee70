"""Exercises that answer: a check that says *not yet* until the answer is right."""

from collections.abc import Callable


def attempt(check: Callable[..., None], *answers: object) -> None:
    """Print ``right`` if an answer passes its check, else ``not yet`` and the reason.

    A starter cell calls it with dots, ``...``, or with a function that is not written
    yet; the solution calls it again. Whatever an unfinished answer raises is a reason.

    >>> def even(number):
    ...     assert number % 2 == 0, f"{number} is odd"
    >>> attempt(even, ...)
    not yet: your answer goes where the dots are
    >>> attempt(even, 3)
    not yet: 3 is odd
    >>> attempt(even, 4)
    right
    """
    if any(answer is ... for answer in answers):
        print("not yet: your answer goes where the dots are")
        return
    try:
        check(*answers)
    except Exception as error:
        reason = str(error) if isinstance(error, AssertionError) else repr(error)
        print("not yet:", reason or "the answer does not pass")
    else:
        print("right")
