"""A corpus that the model writes itself, where there is no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from coreinfer.backends.base import Backend
from coreinfer.errors import UserError
from coreinfer.files import describe_os_error
from coreinfer.journal import key_of
from coreinfer.runtime.generation import generate
from coreinfer.runtime.sampling import SamplingParams
from coreinfer.selectors import Dense

WRITTEN = "corpus*.jsonl"  # what the files are called
DOCUMENT_TOKENS = 256
BATCH = 8


def own_corpus(
    backend: Backend,
    folder: Path,
    tokens: int,
    seed: int,
    on_note: Callable[[str], None] = lambda _note: None,
    progress: bool = True,
) -> Path:
    """The file in a folder with what this very model writes, as `write_corpus` does; gone on with.

    Its name says whose text it is: what another model or seed has written is removed.

    Raises:
        UserError: if it cannot be written.
    """
    whose = (backend.fingerprint, backend.name, backend.dtype, _document_tokens(backend), seed)
    path = folder / f"corpus-{key_of(*whose)}.jsonl"
    for other in folder.glob(WRITTEN):
        if other != path:
            on_note(
                f"the text in {str(folder)!r} was written with another model, backend, dtype or "
                "seed; writing it anew"
            )
            other.unlink()
    write_corpus(backend, path, tokens, seed, on_note, progress)
    return path


def write_corpus(
    backend: Backend,
    path: Path,
    tokens: int,
    seed: int,
    on_note: Callable[[str], None] = lambda _note: None,
    progress: bool = True,
) -> None:
    """Let the model write documents of 256 tokens, one JSON line each, until there are enough.

    Each begins with a random token, drawn anew for each, and goes on as the model would at
    temperature 1 (as LLM-QAT does, arXiv 2305.17888), past its own end-of-sequence tokens. The
    file is the same for the same seed; where a part of it is there already, it is gone on with, and
    where there is more than is asked for, the rest is removed.

    Raises:
        UserError: if it cannot be written.
    """
    length = _document_tokens(backend)
    wanted = -(-tokens // length)
    done = _whole_lines(path, wanted)
    if 0 < done < wanted:
        on_note(f"going on after {done} documents written")
    with tqdm(
        desc="writing", unit="doc", initial=done, total=wanted, disable=None if progress else True
    ) as bar:
        while done < wanted:
            texts = _batch(backend, done // BATCH, length, seed)[done % BATCH :][: wanted - done]
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            except OSError as error:
                raise UserError(describe_os_error(error, path)) from error
            done += len(texts)
            bar.update(len(texts))


def _document_tokens(backend: Backend) -> int:
    return min(DOCUMENT_TOKENS, (backend.context_length or DOCUMENT_TOKENS) - 2)


def _batch(backend: Backend, number: int, length: int, seed: int) -> list[str]:
    """The documents of a batch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    start = _usual_start(backend.tokenizer)
    # A tokenizer may have tokens that the model has not, and the other way round.
    vocabulary = min(len(backend.tokenizer), backend.vocab_size)
    first = torch.randint(vocabulary, (BATCH,), generator=generator).tolist()
    drawn = int(torch.randint(2**31, (1,), generator=generator))
    params = SamplingParams(max_new_tokens=length - 1, temperature=1.0, seed=drawn, ignore_eos=True)
    prompts = [[*start, token] for token in first]
    pieces = generate(backend, prompts, Dense(), None, params)
    records = {piece.index: piece.record for piece in pieces if piece.record is not None}
    return [
        str(backend.tokenizer.decode([first[row], *records[row].token_ids])) for row in range(BATCH)
    ]


def _usual_start(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text, if that is a BOS token."""
    ids = list(tokenizer("a", verbose=False).input_ids)
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _whole_lines(path: Path, most: int) -> int:
    """How many documents are there; a line that was cut off is removed, and what is too much."""
    if not path.exists():
        return 0
    found = path.read_bytes()
    lines = [line for line in found.splitlines(keepends=True) if line.endswith(b"\n")][:most]
    if sum(map(len, lines)) < len(found):
        path.write_bytes(b"".join(lines))
    return len(lines)
