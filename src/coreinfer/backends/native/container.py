"""The file of a converted model: safetensors with a versioned header, opened by memory map.

Opening reads the header alone, which has a checksum of its own. A tensor's checksum (XXH3, 64 bit,
about 4 GB/s) is compared when the tensor is first asked for, so that a file of any size opens at
once and no damaged weight is ever used.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from coreinfer.backends.native.architecture import DecoderConfig
from coreinfer.backends.native.tensors import Role, TensorPlan, format_of, tensor_plans
from coreinfer.errors import UserError
from coreinfer.jsonl import open_to_read
from coreinfer.kernels.formats import WeightFormat

WEIGHTS = "model.safetensors"
KIND, VERSION = "coreinfer.native/", 2
NO_CHECKSUM = "0" * 16
_ALIGNMENT = 64  # of the first tensor; float32 tensors come first, so all of them are aligned
_LENGTH_BYTES = 8
_MADE_FROM = ("model", "model_fingerprint", "source")
_DTYPES = {"U8": torch.uint8, "F32": torch.float32}


@dataclass(frozen=True)
class Stored:
    """A tensor in the file: "U8" or "F32", and where its bytes lie after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Manifest:
    """What a converted model says of itself.

    Attributes:
        format: how its linears are stored.
        model: the name of the model it was made from.
        model_fingerprint: of that model, as `coreinfer.models.mlp.fingerprint` computes it.
        source: a hash of the files it was made from.
        decoder: the architecture; with the format it says which tensors there are.
    """

    format: WeightFormat
    model: str
    model_fingerprint: str
    source: str
    decoder: DecoderConfig

    def tensors(self) -> dict[str, Stored]:
        """Every tensor of the file, in its order: small float32 ones first, then the records."""
        plans = sorted(tensor_plans(self.decoder), key=lambda plan: plan.role is not Role.VECTOR)
        tensors, start = {}, 0
        for plan in plans:
            dtype, shape = stored_as(plan, self.format)
            stop = start + stored_bytes(plan, self.format)
            tensors[plan.name] = Stored(dtype, shape, start, stop)
            start = stop
        return tensors

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors together."""
        return max(stored.stop for stored in self.tensors().values())

    def header(self, checksums: Mapping[str, str] = MappingProxyType({})) -> bytes:
        """The beginning of the file; its length does not depend on the checksums."""
        tensors = self.tensors()
        metadata = {
            "format": f"{KIND}{VERSION}",
            "dtype": self.format.dtype,
            "group_size": str(self.format.group_size),
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "source": self.source,
            "architecture": self.decoder.to_json(),
            "checksums": json.dumps({name: checksums.get(name, NO_CHECKSUM) for name in tensors}),
        }
        table = {
            name: {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [t.start, t.stop]}
            for name, t in tensors.items()
        }
        metadata["header_checksum"] = _header_checksum(metadata, table)
        text = json.dumps({"__metadata__": metadata, **table}).encode()
        text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT)
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def stored_as(plan: TensorPlan, format_: WeightFormat) -> tuple[str, tuple[int, ...]]:
    """The dtype and the shape that a tensor has in the file.

    Raises:
        UserError: if its rows do not divide into the format's groups.
    """
    if plan.role is Role.VECTOR:
        return "F32", plan.shape
    rows, columns = plan.shape
    parts = len(plan.sources) if plan.role is Role.MLP else 1
    return "U8", (rows, parts * format_of(plan, format_).row_bytes(columns))


def stored_bytes(plan: TensorPlan, format_: WeightFormat) -> int:
    """Bytes that a tensor takes in the file."""
    dtype, shape = stored_as(plan, format_)
    return math.prod(shape) * _DTYPES[dtype].itemsize


def is_converted(folder: str | Path) -> bool:
    """Whether a folder holds a converted model, of any version; it may still be damaged."""
    path = Path(folder) / WEIGHTS
    try:
        with path.open("rb") as file:
            values, _ = _read_header(file, path.stat().st_size)
    except (OSError, ValueError):
        return False
    return str(_metadata(values).get("format", "")).startswith(KIND)


class Container(Mapping[str, Tensor]):
    """A converted model's file, mapped into memory: name -> tensor, read when it is used.

    A tensor is a view of the file, not to be written to. Asking for it raises UserError if its
    bytes are not those that were written.
    """

    def __init__(
        self, path: Path, manifest: Manifest, checksums: Mapping[str, str], data_start: int
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.tensors: Mapping[str, Stored] = manifest.tensors()
        self._checksums = checksums
        self._data_start = data_start
        self._verified: set[str] = set()
        with open_to_read(path) as file:
            self._bytes = _mapped(file.fileno())

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._bytes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        self.verify(name)
        stored = self.tensors[name]
        flat = torch.frombuffer(
            self._bytes,
            dtype=_DTYPES[stored.dtype],
            count=math.prod(stored.shape),
            offset=self._data_start + stored.start,
        )
        return flat.view(stored.shape)

    def verify(self, name: str) -> None:
        """Compare a tensor's checksum, once.

        Raises:
            UserError: if it is wrong, naming the tensor.
        """
        if name in self._verified:
            return
        start, stop = self._span(name)
        with memoryview(self._bytes) as whole, whole[start:stop] as part:
            found = xxhash.xxh3_64_hexdigest(part)
        if found != self._checksums[name]:
            raise UserError(
                f"{str(self.path)!r} is damaged: tensor {name!r} has the checksum {found}, "
                f"expected {self._checksums[name]}; remove the folder and convert the model again"
            )
        self._verified.add(name)

    def verify_all(self) -> None:
        """Compare every checksum; the pages that this reads are let go again."""
        for name in self.tensors:
            self.verify(name)
            self.release(name)

    def release(self, name: str) -> None:
        """Let go of a tensor's pages in memory; they are read again if they are used again."""
        if hasattr(self._bytes, "madvise"):
            start, stop = self._span(name)
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._bytes.madvise(mmap.MADV_DONTNEED, first, stop - first)

    def _span(self, name: str) -> tuple[int, int]:
        stored = self.tensors[name]
        return self._data_start + stored.start, self._data_start + stored.stop


def open_container(folder: str | Path, *, dtype: str | None = None) -> Container:
    """Open a converted model.

    Args:
        folder: as `coreinfer convert` wrote it.
        dtype: what its weights must be stored as; None for whatever they are.

    Raises:
        UserError: if there is none, it was made by a newer version, it is truncated or damaged, or
            its weights are of another dtype.
    """
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise UserError(f"no converted model at {str(folder)!r}; make one with 'coreinfer convert'")
    with open_to_read(path) as file:
        size = path.stat().st_size
        try:
            values, data_start = _read_header(file, size)
        except ValueError as error:
            raise _damaged(path, str(error)) from None
    metadata = _metadata(values)
    _check_version(path, metadata.get("format"))
    table = {name: entry for name, entry in values.items() if name != "__metadata__"}
    claimed = metadata.pop("header_checksum", None)
    if claimed != _header_checksum(metadata, table):
        raise _damaged(path, "its header does not have the checksum that it states")
    # What follows was written so: only a writer's mistake could make it fail.
    try:
        format_ = WeightFormat(metadata["dtype"], int(metadata["group_size"]))
        decoder = DecoderConfig.from_json(metadata["architecture"])
        if decoder.num_layers > len(table):
            raise ValueError(f"it announces {decoder.num_layers} layers")
        model, fingerprint, source = (metadata[key] for key in _MADE_FROM)
        manifest = Manifest(format_, model, fingerprint, source, decoder)
        checksums = json.loads(metadata["checksums"])
        if _table_of(table) != manifest.tensors() or checksums.keys() != table.keys():
            raise ValueError("its tensors are not those of its architecture")
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    needed = data_start + manifest.data_bytes
    if size != needed:
        what = "is truncated" if size < needed else "is damaged"
        raise UserError(
            f"{str(path)!r} {what}: it has {size} bytes, its header announces {needed}; "
            "remove the folder and convert the model again"
        )
    if dtype not in (None, format_.dtype):
        raise UserError(
            f"{str(folder)!r} holds {format_.dtype} weights, not {dtype}; "
            f"make one with 'coreinfer convert --dtype {dtype}'"
        )
    return Container(path, manifest, checksums, data_start)


def _mapped(descriptor: int) -> mmap.mmap:
    """The file, copied on write so that torch takes it; without reserving memory for the copy."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _read_header(file: BinaryIO, file_size: int) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file as JSON, and where its data begins; or ValueError."""
    length_bytes = file.read(_LENGTH_BYTES)
    length = int.from_bytes(length_bytes, "little")
    if len(length_bytes) < _LENGTH_BYTES or length > file_size - _LENGTH_BYTES:
        raise ValueError("it ends inside its header")
    try:
        values = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError("its header is no JSON object")
    return values, _LENGTH_BYTES + length


def _metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    metadata = values.get("__metadata__")
    return dict(metadata) if isinstance(metadata, dict) else {}


def _check_version(path: Path, format_: object) -> None:
    text = str(format_)
    if not text.startswith(KIND):
        raise UserError(
            f"{str(path)!r} is no converted model (format {format_!r}, expected "
            f"'{KIND}{VERSION}'); make one with 'coreinfer convert'"
        )
    if text != f"{KIND}{VERSION}":
        raise UserError(
            f"{str(path)!r} has the format {text!r}, this version of coreinfer reads "
            f"'{KIND}{VERSION}'; upgrade coreinfer, or convert the model again"
        )


def _header_checksum(metadata: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    text = json.dumps([dict(metadata), dict(table)], sort_keys=True)
    return xxhash.xxh3_64_hexdigest(text.encode())


def _table_of(table: Mapping[str, Any]) -> dict[str, Stored]:
    return {
        name: Stored(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        for name, entry in table.items()
    }


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{str(path)!r} is damaged or truncated: {' '.join(what.split())[:200]}; "
        "remove the folder and convert the model again"
    )
