"""A converted model while it is being written: tensor by tensor, going on where it was cut off.

A draft is a folder with a journal of the tensors that are done, and the folder of the model itself
with the file, at its full length from the start. The header comes last, with the checksums: until
then nothing opens the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import xxhash
from torch import Tensor

from coreinfer.backends.native.container import WEIGHTS, Manifest, Stored

JOURNAL, MODEL = "journal.jsonl", "model"
_CHUNK = 2**24


class Draft:
    """A converted model that is not whole yet.

    What a journal says is done is believed where the bytes still have their checksum. A draft of
    another model, another version of it, or another format is begun anew.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Begin, or go on with, the draft in a folder.

        Raises:
            OSError: if it cannot be written.
        """
        self.model = folder / MODEL
        self.model.mkdir(exist_ok=True)
        self._manifest = manifest
        self._header = manifest.header()
        self._tensors = manifest.tensors()
        self._file = _open(self.model / WEIGHTS)
        self._file.truncate(len(self._header) + manifest.data_bytes)
        self._journal_path = folder / JOURNAL
        self._identity = xxhash.xxh3_128_hexdigest(self._header)
        self._checksums = self._still_there(_read(self._journal_path, self._identity))
        self._journal = self._journal_path.open("w", encoding="utf-8")
        self._note({"draft": self._identity})
        for name, checksum in self._checksums.items():
            self._note({"tensor": name, "checksum": checksum})

    @property
    def done(self) -> frozenset[str]:
        """The tensors that are written."""
        return frozenset(self._checksums)

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Write a tensor, given as blocks of its rows in order.

        Raises:
            OSError: if there is no space, or the like.
        """
        stored = self._tensors[name]
        digest = xxhash.xxh3_64()
        self._file.seek(len(self._header) + stored.start)
        written = 0
        for block in blocks:
            data = block.contiguous().numpy().data.cast("B")
            self._file.write(data)
            digest.update(data)
            written += len(data)
        assert written == stored.stop - stored.start, name
        self._file.flush()
        self._checksums[name] = digest.hexdigest()
        self._note({"tensor": name, "checksum": self._checksums[name]})

    def finish(self) -> None:
        """Write the header: the file is whole, and on the disk."""
        assert self._checksums.keys() == self._tensors.keys()
        self._file.seek(0)
        self._file.write(self._manifest.header(self._checksums))
        self._file.flush()
        os.fsync(self._file.fileno())

    def discard(self) -> None:
        """Forget what is done: it is worth nothing."""
        self._journal_path.unlink()

    def close(self) -> None:
        """Let go of the files; they stay for another try."""
        self._file.close()
        self._journal.close()

    def _note(self, entry: Mapping[str, str]) -> None:
        self._journal.write(json.dumps(entry) + "\n")
        self._journal.flush()

    def _still_there(self, checksums: Mapping[str, str]) -> dict[str, str]:
        """Those of the tensors whose bytes are in the file."""
        return {
            name: checksum
            for name, checksum in checksums.items()
            if name in self._tensors and self._checksum_of(self._tensors[name]) == checksum
        }

    def _checksum_of(self, stored: Stored) -> str:
        digest = xxhash.xxh3_64()
        self._file.seek(len(self._header) + stored.start)
        left = stored.stop - stored.start
        while left and (chunk := self._file.read(min(left, _CHUNK))):
            digest.update(chunk)
            left -= len(chunk)
        return digest.hexdigest()


def _open(path: Path) -> BinaryIO:
    """For reading and writing, keeping what is there."""
    path.touch()
    return path.open("r+b")


def _read(journal: Path, identity: str) -> dict[str, str]:
    """Checksums of the tensors that a journal says are done; none if it is of another draft."""
    done: dict[str, str] = {}
    try:
        first, *rest = journal.read_text(encoding="utf-8").splitlines()
        if json.loads(first) != {"draft": identity}:
            return {}
        for line in rest:
            entry = json.loads(line)
            done[entry["tensor"]] = entry["checksum"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a last line that was cut short, or no journal yet
    return done
