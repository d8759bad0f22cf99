"""Memory for packed weights: large mappings on huge pages, which spare most address translation."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and the widest vector load
_HUGE_PAGE = 1 << 21


class Arena:
    """Hands out aligned pieces of large mappings; a mapping is freed with its last piece.

    Args:
        chunk_bytes: size of a mapping, unless a piece is larger.
    """

    def __init__(self, chunk_bytes: int = 1 << 26) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """A piece of `num_bytes`, uint8, aligned to 64 bytes; what is in it is undefined."""
        # At least a line: no two pieces share an address.
        rounded = max(1, -(-num_bytes // ALIGNMENT)) * ALIGNMENT
        if self._used + rounded > len(self._chunk):
            self._chunk, self._used = _mapping(max(rounded, self._chunk_bytes)), 0
        piece = self._chunk[self._used : self._used + num_bytes]
        self._used += rounded
        return piece


def _mapping(num_bytes: int) -> Tensor:
    """Fresh memory, aligned to a huge page; pages take up room once they are written to."""
    # A small piece on its own would waste most of a huge page.
    if num_bytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        memory = torch.empty(num_bytes + ALIGNMENT, dtype=torch.uint8)
        start = -memory.data_ptr() % ALIGNMENT
        return memory[start : start + num_bytes]
    # One page more: after the alignment, the rest begins and ends on page boundaries.
    mapped = mmap.mmap(-1, num_bytes + 2 * _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapped, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE
    return memory[start : start + num_bytes]
