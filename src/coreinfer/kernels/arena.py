"""Memory for packed weights: large mappings on huge pages, which spare most address translation."""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and the widest vector load
_HUGE_PAGE = 1 << 21


class Mappings:
    """Large mappings that are handed out again once nothing uses them.

    A page that was written to before is there at once; a fresh one costs several times what filling
    it does. Prompt after prompt takes mappings of the same sizes, so what is kept is what is used:
    when none of those that are free fits, they are given back to the system.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def take(self, num_bytes: int) -> Tensor:
        """Memory aligned to a huge page, uint8; it is free again with the last view of it."""
        fitting = [m for m in self._free if num_bytes <= _usable(m) <= 2 * num_bytes]
        if fitting:
            mapped = min(fitting, key=len)
            self._free.remove(mapped)
        else:
            self._free.clear()
            # One page more: after the alignment, the rest begins and ends on page boundaries.
            mapped = mmap.mmap(
                -1, num_bytes + 2 * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
            with suppress(OSError):  # advice: a kernel may be built without huge pages
                mapped.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(mapped)
        weakref.finalize(view, self._free.append, mapped).atexit = False
        memory = torch.frombuffer(view, dtype=torch.uint8)  # which holds on to the view
        start = -memory.data_ptr() % _HUGE_PAGE
        return memory[start : start + num_bytes]


def _usable(mapped: mmap.mmap) -> int:
    return len(mapped) - 2 * _HUGE_PAGE


class Arena:
    """Hands out aligned pieces of large mappings; a mapping is freed with its last piece.

    Args:
        chunk_bytes: size of a mapping, unless a piece is larger.
        mappings: where mappings come from, to be used again; from the system unless given.
    """

    def __init__(self, chunk_bytes: int = 1 << 26, mappings: Mappings | None = None) -> None:
        self._chunk_bytes = chunk_bytes
        self._mappings = mappings or Mappings()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """A piece of `num_bytes`, uint8, aligned to 64 bytes; what is in it is undefined."""
        # At least a line: no two pieces share an address.
        rounded = max(1, -(-num_bytes // ALIGNMENT)) * ALIGNMENT
        if self._used + rounded > len(self._chunk):
            self._chunk, self._used = self._memory(max(rounded, self._chunk_bytes)), 0
        piece = self._chunk[self._used : self._used + num_bytes]
        self._used += rounded
        return piece

    def _memory(self, num_bytes: int) -> Tensor:
        # A small piece on its own would waste most of a huge page.
        if num_bytes >= _HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            return self._mappings.take(num_bytes)
        memory = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
        start = -memory.data_ptr() % ALIGNMENT
        return memory[start : start + num_bytes]
