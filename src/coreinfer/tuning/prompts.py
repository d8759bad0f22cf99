"""The prompts to tune on: some to search with, others to report on."""

from __future__ import annotations

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
        prompt_tokens: of each window of a text; prompts of a .jsonl file stay whole.
        continuation_tokens: that quality is measured on, at most; the first of them is the dense
            prefill's and does not count.
        raw: prompts are sent as they are, without the model's chat template.
    """

    search: int = 16
    report: int = 40
    prompt_tokens: int = 200
    continuation_tokens: int = 60
    raw: bool = False

    def __post_init__(self) -> None:
        least = {"search": 1, "report": 1, "prompt_tokens": 1, "continuation_tokens": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                what = name.replace("_", " ")
                raise UserError(f"{what} must be at least {low}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Split:
    """Two lists of windows that share no prompt and no piece of text."""

    search: list[Window]
    report: list[Window]


def read_split(backend: Backend, path: str | Path, amount: Amount, on_skip: OnSkip) -> Split:
    """Prompts with what follows them, in two parts.

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
    parts = []
    for what, piece in (("search", text[:middle]), ("report", text[middle:])):
        try:
            parts.append(
                windows(
                    backend,
                    piece,
                    count=getattr(amount, what),
                    prompt_tokens=amount.prompt_tokens,
                    continuation_tokens=amount.continuation_tokens,
                )
            )
        except UserError as error:
            raise UserError(f"{str(path)!r}, the half to {what} with: {error}") from None
    return Split(*parts)


def _split_prompts(backend: Backend, path: str | Path, amount: Amount, on_skip: OnSkip) -> Split:
    given: dict[str, str | None] = {}
    wanted = 2 * max(amount.search, amount.report)
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
    parts = [
        _with_continuations(backend, prompts[0::2][: amount.search], amount, on_skip),
        _with_continuations(backend, prompts[1::2][: amount.report], amount, on_skip),
    ]
    if not all(parts):
        raise UserError(
            f"{str(path)!r} has {len(prompts)} different prompts with an answer of two tokens or "
            "more; at least 2 are needed, one to search with and one to report on"
        )
    return Split(*parts)


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
