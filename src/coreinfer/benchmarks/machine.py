"""What this machine is, and how fast it reads memory."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

_LEAST_BUFFER = 1 << 30
_TIMES_THE_CACHE = 4  # what was read last stays in the caches: only a larger buffer measures memory


def describe_machine() -> dict[str, Any]:
    """Processor, memory, system and versions, as plain JSON."""
    import transformers

    from coreinfer import __version__
    from coreinfer.kernels.library import kernel_path

    return {
        "processor": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "last_cache_bytes": last_cache_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "coreinfer": __version__,
        "kernels": kernel_path(),
    }


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Bytes of memory in the machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's own name for itself, where the system tells it."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def last_cache_bytes(caches: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int | None:
    """Bytes of the largest cache; None where the system does not say."""
    sizes = []
    for file in caches.glob("index*/size"):
        try:
            text = file.read_text().strip()
            sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
        except (OSError, ValueError, IndexError):
            continue
    return max(sizes, default=None)


class ReadMeter:
    """Measures read bandwidth: sums over a buffer much larger than the caches.

    Args:
        threads: that read; torch's number of threads is the same again after each sweep.
        size: bytes of the buffer; by default 1 GiB, or four times the largest cache.
        clock: in seconds.
    """

    def __init__(
        self, threads: int, size: int | None = None, clock: Callable[[], float] = perf_counter
    ) -> None:
        least = max(_LEAST_BUFFER, _TIMES_THE_CACHE * (last_cache_bytes() or 0))
        self._buffer = torch.ones((size or least) // 8, dtype=torch.int64)
        self._threads = threads
        self._clock = clock
        self._best: float | None = None

    def sweep(self) -> float:
        """Read the buffer once; GB/s of this sweep."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            began = self._clock()
            self._buffer.sum()
            speed = self._buffer.nbytes / (self._clock() - began) / 1e9
        finally:
            torch.set_num_threads(before)
        self._best = max(speed, self._best or 0.0)
        return speed

    @property
    def best(self) -> float:
        """The limit: GB/s of the fastest sweep; other programs only ever make one slower."""
        return self._best or self.sweep()
