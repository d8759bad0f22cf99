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
from coreinfer.jsonl import read_json_lines
from coreinfer.runtime.generation import generate
from coreinfer.runtime.sampling import SamplingParams
from coreinfer.selectors import Dense

DOCUMENT_TOKENS = 256
BATCH = 8


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
    file is the same for the same seed; where a part of it is there already, it is gone on with.

    Raises:
        UserError: if it cannot be written.
    """
    length = min(DOCUMENT_TOKENS, (backend.context_length or DOCUMENT_TOKENS) - 2)
    wanted = -(-tokens // length)
    done = _whole_lines(path)
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


def _batch(backend: Backend, number: int, length: int, seed: int) -> list[str]:
    """The documents of a batch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    start = _usual_start(backend.tokenizer)
    vocabulary = len(backend.tokenizer)
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


def _whole_lines(path: Path) -> int:
    """How many documents are there; a line that was cut off is removed."""
    if not path.exists():
        return 0
    whole = path.read_bytes()
    kept = whole[: whole.rfind(b"\n") + 1]
    if len(kept) < len(whole):
        path.write_bytes(kept)
    return sum(1 for _ in read_json_lines(path))
