"""The native library: found, checked, and the instruction set that it is to use."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from coreinfer.errors import UserError
from coreinfer.kernels.abi import ABI_VERSION, PATHS

VARIABLE = "COREINFER_KERNELS"  # forces a path: "twin" or one of `abi.PATHS`


@dataclass(frozen=True)
class Native:
    """The library, and the path that its functions are called with."""

    functions: ctypes.CDLL
    path: int


def kernel_path() -> str:
    """What computes: "avx512", "avx2", "portable", or "twin" (plain torch).

    Raises:
        UserError: if the environment forces a path that is not there.
    """
    found = native()
    return "twin" if found is None else PATHS[found.path]


def native() -> Native | None:
    """The native library with the path to use; None for the torch twins.

    Raises:
        UserError: if the environment forces a path that is not there.
    """
    return _resolve(os.environ.get(VARIABLE, ""))


def supported_paths() -> tuple[str, ...]:
    """Paths that work here, the fastest first; "twin" always does."""
    functions = _load()
    if isinstance(functions, str):
        return ("twin",)
    fitting = [path for index, path in enumerate(PATHS) if functions.ci_supports(index)]
    return (*reversed(fitting), "twin")


def missing() -> str | None:
    """Why plain torch computes, and what would do; None where it does not, or was asked to."""
    found = _load()
    return found if isinstance(found, str) and not os.environ.get(VARIABLE) else None


def num_threads(threads: int | None) -> int:
    """The threads asked for, or torch's own number."""
    return torch.get_num_threads() if threads is None else max(1, threads)


@cache
def _resolve(forced: str) -> Native | None:
    supported = supported_paths()
    if forced and forced not in supported:
        raise UserError(
            f"{VARIABLE}={forced}: no such kernels here; one of {', '.join(supported)} would do"
        )
    path = forced or supported[0]
    functions = _load()
    if isinstance(functions, str) or path == "twin":
        return None
    return Native(functions, PATHS.index(path))


@cache
def _load() -> ctypes.CDLL | str:
    """The library; where there is none that serves, why and what would do, in one line."""
    file = _find()
    if sys.byteorder != "little":
        return "the kernels are for little-endian processors"
    if file is None:
        return "the kernels were not built; install a C++ compiler, then coreinfer anew"
    try:
        functions = ctypes.CDLL(file)
        version = functions.ci_abi_version()
    except OSError as error:  # built for another machine
        return f"{str(error).splitlines()[0]}; install coreinfer anew on this machine"
    except AttributeError:
        version = None
    if version != ABI_VERSION:
        return f"{file!r} is of another version of coreinfer; install it anew"
    _share_threads(functions)
    return functions


def _share_threads(functions: ctypes.CDLL) -> None:
    """Let the kernels run on torch's own threads: a second set of them would be in its way.

    The runtime is looked up through torch's library, whatever its file is called there. Where it
    has other entry points (macOS), the kernels keep threads of their own.
    """
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        entries = [ctypes.cast(getattr(torch_cpu, name), ctypes.c_void_p) for name in names]
    except (OSError, AttributeError):
        return
    functions.ci_use_openmp(*entries)


def _find() -> str | None:
    """The library, where the import system would look for it: an editable one is elsewhere."""
    spec = find_spec("coreinfer.kernels.libcoreinfer_kernels")
    return None if spec is None or spec.origin is None else spec.origin
