"""Whether a model fits into the memory that is there, asked before it is loaded."""

from __future__ import annotations

import math
from pathlib import Path

from coreinfer.backends.native.architecture import DecoderConfig
from coreinfer.backends.native.tensors import tensor_plans
from coreinfer.errors import UserError

_ROOM = 1 << 28  # for the interpreter, the tokenizer, a KV cache, activations
_COMPUTE_BYTES = 2  # of a weight that a prefill multiplies with
_SMALLER = {"bfloat16": "--dtype int8 or int4", "int8": "--dtype int4", "int4": "a smaller model"}


def needed_memory(config: DecoderConfig, stored: int) -> int:
    """Bytes that dense decoding takes: every weight once, and the largest one dequantised.

    The mapped file itself is not counted: its pages are given back when they are needed elsewhere.

    Args:
        config: the model.
        stored: bytes of its tensors.
    """
    largest = max(math.prod(plan.shape) for plan in tensor_plans(config))
    return stored + largest * _COMPUTE_BYTES + _ROOM


def require_memory(needed: int, name: str, dtype: str, available: int | None = None) -> None:
    """Raises UserError if a model needs more memory than there is.

    Args:
        needed: bytes.
        name, dtype: of the model, for the message.
        available: bytes that are there; asked of the system unless given.
    """
    available = available_memory() if available is None else available
    if available is not None and needed > available:
        raise UserError(
            f"{name} in {dtype} needs {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB "
            f"are free; use {_SMALLER[dtype]}, or end other programs"
        )


def available_memory(
    meminfo: Path = Path("/proc/meminfo"), control_group: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Bytes that can be taken without swapping; None where the system does not say.

    The least of what the machine and the process's control group have left.
    """
    try:
        found = _fields(meminfo)["MemAvailable:"] * 1024
    except (OSError, ValueError, KeyError):
        return None
    try:
        limit = int((control_group / "memory.max").read_text())
        used = int((control_group / "memory.current").read_text())
        cached = _fields(control_group / "memory.stat")["file"]  # files can be let go
        return min(found, limit - used + cached)
    except (OSError, ValueError, KeyError):  # no limit, or another kind of system
        return found


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}
