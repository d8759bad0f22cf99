"""The prompts to tune on: some to search with, others to report on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coreinfer.api import LLM
from coreinfer.backends.base import Backend
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Window, windows
from coreinfer.jsonl import OnSkip, is_text, read_jsonl, read_text
from coreinfer.runtime.text import encode_prompt
from coreinfer.selectors import Dense


@dataclass(frozen=True)
class Amount:
    """How much is read.

    Attributes:
        search, report: prompts to search with and to report on, at most.
        descent: prompts that the budgets of layers descend on, at most; they may be among those to
            search with, never among those to report on.
        prompt_tokens: of each window of a text; prompts of a .jsonl file stay whole.
        continuation_tokens: that quality is measured on, at most; the first of them is the dense
            prefill's and does not count.
        raw: prompts are sent as they are, without the model's chat template.
    """

    search: int = 16
    report: int = 40
    descent: int = 160
    prompt_tokens: int = 200
    continuation_tokens: int = 60
    raw: bool = False

    def __post_init__(self) -> None:
        least = {
            "search": 1,
            "report": 1,
            "descent": 1,
            "prompt_tokens": 1,
            "continuation_tokens": 2,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                what = name.replace("_", " ")
                raise UserError(f"{what} must be at least {low}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Split:
    """Lists of windows; those to report on share no prompt and no piece of text with the others."""

    search: list[Window]
    report: list[Window]
    descent: list[Window]


def read_split(backend: Backend, path: str | Path, amount: Amount, on_skip: OnSkip) -> Split:
    """Prompts with what follows them, in two parts: to report on, and the others.

    A `.jsonl` file has a prompt a line, {"prompt": ...}, and may have the "continuation" that
    quality is measured on; without one it is the model's own dense answer. Its prompts, each once,
    go to the two parts by turns. Any other file is one text: windows of its first half are
    searched with, windows of its second half reported on.

    Raises:
        UserError: if the file is missing, damaged or too short to be split.
    """
    if Path(path).suffix.lower() == ".jsonl":
        return _split_prompts(backend, path, amount, on_skip)
    text = read_text(path)
    middle = len(text) // 2
    middle = text.find("\n", middle) + 1 or middle

    def cut(what: str, piece: str, count: int) -> list[Window]:
        try:
            return windows(
                backend,
                piece,
                count=count,
                prompt_tokens=amount.prompt_tokens,
                continuation_tokens=amount.continuation_tokens,
            )
        except UserError as error:
            raise UserError(f"{str(path)!r}, the half to {what} with: {error}") from None

    first, second = text[:middle], text[middle:]
    tokens = len(backend.tokenizer(first, add_special_tokens=False, verbose=False).input_ids)
    room = tokens // (amount.prompt_tokens + amount.continuation_tokens)
    search = cut("search", first, amount.search)
    descent = cut("search", first, max(min(amount.descent, room), 1))
    random.Random(0).shuffle(descent)  # neighbours are alike: a step is to see different ones
    return Split(search, cut("report", second, amount.report), descent)


def _split_prompts(backend: Backend, path: str | Path, amount: Amount, on_skip: OnSkip) -> Split:
    given: dict[str, str | None] = {}
    wanted = 2 * max(amount.search, amount.report, amount.descent)
    for line, row in read_jsonl(path, ["prompt"], on_skip):
        continuation = row.get("continuation")
        if not row["prompt"].strip():
            on_skip(f"{str(path)!r}: line {line} has an empty prompt")
        elif continuation is not None and not is_text(continuation):
            on_skip(f"{str(path)!r}: line {line} has a 'continuation' that is not text")
        else:
            given.setdefault(row["prompt"], continuation)
        if len(given) == wanted:
            break
    prompts = list(given.items())
    others = prompts[0::2][: max(amount.search, amount.descent)]
    learnt = _with_continuations(backend, others, amount, on_skip)
    report = _with_continuations(backend, prompts[1::2][: amount.report], amount, on_skip)
    if not learnt or not report:
        raise UserError(
            f"{str(path)!r} has {len(prompts)} different prompts with an answer of two tokens or "
            "more; at least 2 are needed, one to search with and one to report on"
        )
    return Split(learnt[: amount.search], report, learnt[: amount.descent])


def _with_continuations(
    backend: Backend,
    prompts: Sequence[tuple[str, str | None]],
    amount: Amount,
    on_skip: OnSkip,
) -> list[Window]:
    unanswered = [prompt for prompt, continuation in prompts if continuation is None]
    answers = LLM(backend).generate(
        unanswered, Dense(), None, raw=amount.raw, max_new_tokens=amount.continuation_tokens
    )
    tokens = dict(zip(unanswered, (answer.token_ids for answer in answers), strict=True))
    made = []
    for prompt, continuation in prompts:
        if continuation is not None:
            ids = backend.tokenizer(continuation, add_special_tokens=False, verbose=False).input_ids
            tokens[prompt] = list(ids)[: amount.continuation_tokens]
        if len(tokens[prompt]) < 2:
            on_skip(f"the prompt {prompt[:40]!r} has an answer of fewer than 2 tokens")
            continue
        ids = list(encode_prompt(backend.tokenizer, prompt, raw=amount.raw))
        made.append(Window(ids, tokens[prompt], prompt))
    return made
