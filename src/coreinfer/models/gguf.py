"""A GGUF file: its metadata and tensors, checked against the file's size before they are believed.

The `gguf` package's own reader walks a vocabulary with a numpy call a string (2.4 s for 49 k
tokens, against 0.1 s here) and trusts every count in the file, so that a damaged one can hold it
for hours. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_to_byte_shape
from numpy.typing import NDArray

from coreinfer.errors import UserError
from coreinfer.jsonl import open_to_read

MAGIC = b"GGUF"
_MAX_DIMS = 4  # of ggml
_STRING, _ARRAY = 8, 9
# Metadata value type -> how numpy spells it; all little-endian.
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
    6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_PLAIN = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies and how it is stored; `shape` is in torch's order, rows first."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int
    size: int


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file says of itself, and its mapped bytes."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data: NDArray[np.uint8]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def values(self, name: str, rows: slice = slice(None)) -> NDArray[np.float32]:
        """A tensor's numbers in float32, dequantised; all of it, or some of its rows.

        Raises:
            UserError: if it is stored in a way that the `gguf` package cannot dequantise.
        """
        tensor = self.tensors[name]
        raw = np.asarray(self.data[tensor.start : tensor.start + tensor.size])
        if plain := _PLAIN.get(tensor.kind):
            return raw.view(plain).reshape(tensor.shape)[rows].astype(np.float32)
        blocks = raw.reshape(quant_shape_to_byte_shape(tensor.shape, tensor.kind))[rows]
        try:
            with np.errstate(all="ignore"):  # a file may hold infinities
                return np.asarray(dequantize(blocks, tensor.kind), dtype=np.float32)
        except NotImplementedError:
            raise UserError(
                f"{str(self.path)!r}: tensor {name!r} is stored as {tensor.kind.name}, which "
                "cannot be read; convert the file to Q8_0 or F16"
            ) from None


def read_gguf(path: str | Path) -> GgufFile:
    """Read the header of a GGUF file; the tensors' bytes stay on disk until they are asked for.

    Raises:
        UserError: if the file is missing, is no GGUF file of version 2 or 3, is truncated, or
            states anything that its size or the format rules out.
    """
    path = Path(path)
    with open_to_read(path) as file:
        if file.read(4) != MAGIC:
            raise UserError(f"{str(path)!r} is not a GGUF file: it does not begin with 'GGUF'")
        data: NDArray[np.uint8] = np.memmap(file, dtype=np.uint8, mode="r")
    try:
        metadata, tensors = _Header(data).read()
    except _DamagedError as damage:
        raise UserError(
            f"{str(path)!r} is damaged or truncated: {damage}; get the file again"
        ) from None
    return GgufFile(path, metadata, tensors, data)


class _DamagedError(Exception):
    """What is wrong with a header."""


class _Header:
    """A cursor over the header's bytes."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self._bytes = memoryview(data)  # type: ignore[arg-type]
        self._at = len(MAGIC)

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        version = self._number("<I")
        if version not in (2, 3):
            raise _DamagedError(f"version {version}, where 2 and 3 are known")
        tensor_count = self._count("<Q", 24)
        metadata_count = self._count("<Q", 13)
        metadata: dict[str, Any] = {}
        for _ in range(metadata_count):
            key = self._string("a metadata key")
            if key in metadata:
                raise _DamagedError(f"{key!r} is there twice")
            metadata[key] = self._value(self._number("<I"), key)
        table: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(tensor_count):
            name = self._string("a tensor's name")
            if name in table:
                raise _DamagedError(f"tensor {name!r} is there twice")
            dims = self._number("<I")
            if not 1 <= dims <= _MAX_DIMS:
                raise _DamagedError(f"tensor {name!r} has {dims} dimensions")
            shape = tuple(self._number("<Q") for _ in range(dims))[::-1]
            table[name] = (shape, self._number("<I"), self._number("<Q"))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise _DamagedError(f"general.alignment is {alignment!r}")
        base = -(-self._at // alignment) * alignment
        return metadata, {name: self._tensor(name, base, *row) for name, row in table.items()}

    def _tensor(
        self, name: str, base: int, shape: tuple[int, ...], kind: int, offset: int
    ) -> GgufTensor:
        try:
            stored = GGMLQuantizationType(kind)
        except ValueError:
            raise _DamagedError(f"tensor {name!r} has the unknown type {kind}") from None
        per_block, block_bytes = GGML_QUANT_SIZES[stored]
        if 0 in shape or shape[-1] % per_block:
            raise _DamagedError(f"tensor {name!r} of type {stored.name} has shape {shape}")
        size = math.prod(shape) // per_block * block_bytes
        start = base + offset
        if start + size > len(self._bytes):
            raise _DamagedError(
                f"tensor {name!r} needs bytes up to {start + size}, the file has {len(self._bytes)}"
            )
        return GgufTensor(shape, stored, start, size)

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind in _SCALARS:
            return self._scalars(_SCALARS[kind], 1)[0]
        if kind != _ARRAY:
            raise _DamagedError(f"{key!r} has the unknown type {kind}")
        element = self._number("<I")
        if element == _STRING:
            return [self._string(key) for _ in range(self._count("<Q", 8))]
        if element not in _SCALARS:
            raise _DamagedError(f"{key!r} is an array of the unknown type {element}")
        width = np.dtype(_SCALARS[element]).itemsize
        return self._scalars(_SCALARS[element], self._count("<Q", width))

    def _scalars(self, kind: str, count: int) -> list[Any]:
        values = np.frombuffer(self._take(np.dtype(kind).itemsize * count), dtype=kind)
        if kind == "<f4":  # 1e-5 rather than 9.999999747378752e-06
            return [float(str(value)) for value in values]
        listed: list[Any] = values.tolist()
        return listed

    def _string(self, what: str) -> str:
        try:
            return str(self._take(self._number("<Q")), encoding="utf-8")
        except UnicodeDecodeError:
            raise _DamagedError(f"{what} is not UTF-8") from None

    def _count(self, kind: str, least: int) -> int:
        """A number of things that take at least `least` bytes each."""
        count = self._number(kind)
        if count * least > len(self._bytes) - self._at:
            raise _DamagedError(f"it announces {count} entries, more than it has bytes for")
        return count

    def _number(self, kind: str) -> int:
        (number,) = struct.unpack(kind, self._take(struct.calcsize(kind)))
        return int(number)

    def _take(self, size: int) -> memoryview:
        if size > len(self._bytes) - self._at:
            raise _DamagedError("the file ends inside its header")
        self._at += size
        return self._bytes[self._at - size : self._at]
