"""Where texts come from, and the windows and documents that are cut from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from coreinfer.backends.base import Backend
from coreinfer.building.corpus import corpus_identity, read_corpus
from coreinfer.errors import UserError
from coreinfer.evaluation.continuations import Window, encoded_prefix, windows
from coreinfer.jsonl import read_jsonl, read_text, refuse

SHORTEST_PARAGRAPH = 200  # characters; what is shorter is mostly headings


@dataclass(frozen=True)
class Source:
    """Texts of one kind.

    Attributes:
        name: what figures call it.
        documents: its texts; one alone is cut into as many windows as are asked for.
        identity: plain JSON that changes with the texts.
    """

    name: str
    documents: tuple[str, ...]
    identity: Mapping[str, Any] = field(default_factory=dict)

    def half(self, which: int) -> Source:
        """The first (0) or the second (1) half: what is measured on one is learnt on the other."""
        if len(self.documents) > 1:
            middle = (len(self.documents) + 1) // 2
            parts = (self.documents[:middle], self.documents[middle:])
        else:
            text = self.documents[0]
            middle = text.find("\n", len(text) // 2)
            middle = len(text) // 2 if middle < 0 else middle
            parts = ((text[:middle],), (text[middle:],))
        return replace(self, documents=parts[which])

    def paragraphs(self) -> tuple[str, ...]:
        """Its documents; of a long text those of its lines that are paragraphs."""
        if len(self.documents) > 1:
            return self.documents
        lines = [line.strip() for line in self.documents[0].splitlines()]
        return tuple(line for line in lines if len(line) >= SHORTEST_PARAGRAPH)

    def windows(
        self, backend: Backend, count: int, prompt_tokens: int, continuation_tokens: int
    ) -> list[Window]:
        """Windows, evenly spaced: of one text, or at the beginnings of several.

        A document that is too short is joined with those that follow it.

        Raises:
            UserError: if there is too little text.
        """
        sizes = {"prompt_tokens": prompt_tokens, "continuation_tokens": continuation_tokens}
        if len(self.documents) == 1:
            try:
                return windows(backend, self.documents[0], count=count, **sizes)
            except UserError as error:
                raise UserError(f"{self.name}: {error}") from None
        passages = list(self._passages(backend, prompt_tokens + continuation_tokens))
        if len(passages) < count:
            raise UserError(
                f"{self.name} has {len(passages)} passages of {prompt_tokens} + "
                f"{continuation_tokens} tokens, {count} are needed; ask for fewer or shorter ones"
            )
        chosen = [passages[i * len(passages) // count] for i in range(count)]
        return [windows(backend, text, count=1, **sizes)[0] for text in chosen]

    def _passages(self, backend: Backend, size: int) -> Iterator[str]:
        """Documents, joined until they have `size` tokens."""
        held: list[str] = []
        tokens = 0
        for text in self.documents:
            ids = backend.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            held.append(text)
            tokens += len(ids) - 1  # joining may merge the last token with what follows
            if tokens >= size:
                yield "\n".join(held)
                held, tokens = [], 0


def text_source(spec: str) -> Source:
    """[NAME=]FILE: one long text.

    Raises:
        UserError: if the file is missing, empty or not UTF-8.
    """
    name, path = _named(spec)
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path!r} has no text")
    return Source(name or Path(path).stem, (text,), corpus_identity(path))


def prompts_source(spec: str) -> Source:
    """[NAME=]FILE.jsonl[:FIELD[+FIELD]]: a document a line, of one field or several joined.

    Without a field it is "text" or "prompt", whichever a line has.

    Raises:
        UserError: if the file is missing, or a line is damaged or lacks a field.
    """
    name, path = _named(spec)
    fields: list[str] = []
    if not Path(path).exists() and ":" in path:
        path, _, joined = path.rpartition(":")
        fields = joined.split("+")
    if fields:
        documents = ["\n".join(row[f] for f in fields) for _, row in read_jsonl(path, fields)]
    else:
        documents = [document.text for document in read_corpus(path, on_skip=refuse)]
    distinct = tuple(dict.fromkeys(text for text in documents if text.strip()))
    if len(distinct) < 2:
        raise UserError(f"{path!r} has {len(distinct)} distinct texts, at least 2 are needed")
    identity = {**corpus_identity(path), "fields": fields}
    return Source(name or Path(path).stem, distinct, identity)


def require_distinct(sources: Sequence[Source]) -> None:
    """Raises UserError where two sources have one name."""
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two texts are called {name!r}; name them, as in NAME=FILE")


def window_of(backend: Backend, text: str, tokens: int, continuation: Sequence[int]) -> Window:
    """The last `tokens` tokens of a text as the prompt of a continuation."""
    head = encoded_prefix(backend)
    ids = list(backend.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    return ending(backend, Window(head + ids, list(continuation), text), tokens)


def ending(backend: Backend, window: Window, tokens: int) -> Window:
    """The window with the last `tokens` tokens of its prompt alone (and what stands before all)."""
    head = encoded_prefix(backend)
    kept = window.prompt[len(head) :][-max(tokens - len(head), 1) :]
    return Window(head + kept, window.continuation, str(backend.tokenizer.decode(kept)))


def _named(spec: str) -> tuple[str, str]:
    """(name or "", path) of "NAME=FILE" or "FILE"."""
    name, equals, path = spec.partition("=")
    return (name, path) if equals and not Path(spec).exists() else ("", spec)
