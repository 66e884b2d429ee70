"""Running out of memory, said in one line with what may fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory could be had, on CUDA or on the CPU."""
    exhausted = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return exhausted or "can't allocate memory" in str(error)


@contextmanager
def advised(what: str, dtype: torch.dtype, kind: type[Exception]) -> Iterator[None]:
    """Turn running out of memory into an error of ``kind`` that says what may fit."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        ways = "expected fewer or shorter ones at a time, or a lower layer"
        if dtype.itemsize > 2:
            ways += f", or torch.bfloat16 in place of {dtype}"
        raise kind(f"got {what}, which do not fit into memory; {ways}") from error
