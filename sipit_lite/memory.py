"""What a model takes in memory, said before it is loaded, and what to do where it does not fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

GIB = 2**30


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory could be had, on CUDA or on the CPU.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), is_out_of_memory(ValueError("x"))
    (True, False)
    """
    return isinstance(
        error, torch.OutOfMemoryError | MemoryError
    ) or "can't allocate memory" in str(error)


@contextmanager
def advised(what: str, dtype: torch.dtype, kind: type[Exception]) -> Iterator[None]:
    """Turn running out of memory into an error of ``kind`` that names what was too much and what may fit.

    >>> with advised("8 prompts", torch.float32, ValueError):
    ...     raise torch.OutOfMemoryError("CUDA out of memory")
    Traceback (most recent call last):
    ValueError: got 8 prompts, which do not fit into memory; expected fewer or shorter ones at a time, a lower layer, \
or torch.bfloat16 in place of torch.float32
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        coarser = (
            f", or torch.bfloat16 in place of {dtype}" if dtype.itemsize > 2 else ""
        )
        expected = f"expected fewer or shorter ones at a time, a lower layer{coarser}"
        raise kind(f"got {what}, which do not fit into memory; {expected}") from error
