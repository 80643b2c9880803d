"""Small tables that a kernel reads from the device, and that follow lists on the host."""

import array
import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def bits(values: Sequence[float]) -> list[int]:
    """float64 numbers as the 8-byte words that hold them."""
    return array.array("q", array.array("d", values).tobytes()).tolist()


def words_of(tensor: Tensor) -> "ctypes.Array[ctypes.c_int64]":
    """The elements of a tensor on the CPU, to be written from a list: `array.array` takes twice as long."""
    return (ctypes.c_int64 * tensor.numel()).from_address(tensor.data_ptr())


class _Staging:
    """Page-locked memory that one upload is copied from."""

    def __init__(self, length: int) -> None:
        self.tensor = torch.empty(length, dtype=torch.int64, device="cpu", pin_memory=True)
        self.words = words_of(self.tensor)
        new_event: Any = torch.cuda.Event  # torch leaves its constructor untyped
        self.copied = new_event()
        self.idle = True  # never used

    def upload(self, words: list[int], target: Tensor) -> None:
        self.idle = False
        self.words[:] = words  # type: ignore[assignment]
        target.copy_(self.tensor, non_blocking=True)


class Table:
    """8-byte words on a device. `write` uploads them if they changed, without waiting for the device.

    An upload never goes through memory that another one may still be read from.
    """

    def __init__(self, device: torch.device) -> None:
        self._staged = device.type == "cuda"  # whether an upload is a copy that the host does not wait for
        self._tensor = torch.empty(0, dtype=torch.int64, device=device if self._staged else "cpu")
        self._written: list[int] | None = None
        self._staging: list[_Staging] = []

    def write(self, words: list[int], *, captured: list[object] | None = None) -> Tensor:
        """The words on the device, uploaded if they changed.

        captured: the list that keeps what a CUDA graph reads, while one is captured; else None. The graph repeats the
        copy at every replay, from memory of its own.
        """
        if captured is not None:
            staging, tensor = self._free_staging(len(words), capturing=True), torch.empty_like(self._tensor)
            staging.upload(words, tensor.resize_(len(words)))
            captured.append((staging, tensor))
            return tensor
        if words != self._written:
            if self._staged:
                staging = self._free_staging(len(words))
                staging.upload(words, self._tensor.resize_(len(words)))
                staging.copied.record()
                self._staging.append(staging)
            else:
                words_of(self._tensor.resize_(len(words)))[:] = words  # type: ignore[assignment]
            self._written = words
        return self._tensor

    def reserve(self, length: int) -> None:
        """Make sure that a graph's capture, of up to eight steps, finds page-locked memory: it can't allocate any."""
        if self._staged:
            idle = sum(staging.idle and len(staging.words) == length for staging in self._staging)
            self._staging += [_Staging(length) for _ in range(8 - idle)]

    def _free_staging(self, length: int, capturing: bool = False) -> _Staging:
        """Staging memory that nothing reads any more; of its events nothing may be asked during a capture."""
        for i, staging in enumerate(self._staging):
            free = staging.idle if capturing else not staging.idle and staging.copied.query()
            if free and len(staging.words) == length:
                return self._staging.pop(i)
        return _Staging(length)
