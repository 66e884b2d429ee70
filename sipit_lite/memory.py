"""What a model takes in memory, said before it is loaded, and what to do where it does not fit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

GIB = 2**30


@dataclass(frozen=True)
class Footprint:
    """Weights and memory, in bytes: of all weights, of one block, and what is free on the device.

    >>> print(Footprint(10**9, 4 * GIB, GIB, 3, torch.float32, "cpu", 2 * GIB))
    1,000,000,000 parameters, 3 blocks, take 4.00 GiB in float32 on cpu, where 2.00 GiB are free
    """

    parameters: int
    bytes: int
    bytes_per_block: int
    n_layers: int
    dtype: torch.dtype
    device: str
    free: int

    @classmethod
    def of(
        cls, parameters: int, stored: float, per_block: float, n_layers: int, dtype: torch.dtype, device: torch.device
    ) -> "Footprint":
        """From numbers of the format ``dtype``: ``stored`` of them in all, ``per_block`` in a block."""
        size = dtype.itemsize
        return cls(
            parameters, round(stored * size), round(per_block * size), n_layers, dtype, str(device), free_bytes(device)
        )

    @property
    def fits(self) -> bool:
        """Whether the weights alone are no larger than what is free."""
        return self.bytes <= self.free

    @property
    def advice(self) -> str:
        """What would fit: a coarser format, fewer layers, quantised weights.

        >>> Footprint(10**9, 4 * GIB, GIB, 3, torch.float32, "cpu", 2 * GIB).advice
        "dtype=torch.bfloat16 takes 2.00 GiB; layers=1 of 3 takes 2.00 GiB; device_map='auto' spreads it"
        """
        ways, rest = [], self.bytes - self.n_layers * self.bytes_per_block
        half = self.bytes * 2 // self.dtype.itemsize
        if self.dtype.itemsize > 2 and half <= self.free:
            ways.append(f"dtype=torch.bfloat16 takes {half / GIB:.2f} GiB")
        layers = (self.free - rest) // max(self.bytes_per_block, 1)
        if layers >= 1:
            ways.append(
                f"layers={layers} of {self.n_layers} takes {(rest + layers * self.bytes_per_block) / GIB:.2f} GiB"
            )
        return "; ".join([*ways, "device_map='auto' spreads it"])

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.parameters:,} parameters, {self.n_layers} blocks, take {self.bytes / GIB:.2f} GiB in {name} on "
            f"{self.device}, where {self.free / GIB:.2f} GiB are free"
        )


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a device.

    >>> free_bytes(torch.device("cpu")) > 0
    True
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that no memory could be had, on CUDA or on the CPU.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), is_out_of_memory(ValueError("x"))
    (True, False)
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


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
        coarser = f", or torch.bfloat16 in place of {dtype}" if dtype.itemsize > 2 else ""
        expected = f"expected fewer or shorter ones at a time, a lower layer{coarser}"
        raise kind(f"got {what}, which do not fit into memory; {expected}") from error
