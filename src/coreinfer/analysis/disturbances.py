"""What can befall a prompt: its sentences out of order, typing errors, other topics among it."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence

from coreinfer.evaluation.continuations import Window

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def shuffled_sentences(text: str, seed: int) -> str:
    """The sentences of a text in another order (of a text of one sentence, its words)."""
    sentences = [part for part in SENTENCE_END.split(text.strip()) if part]
    parts = sentences if len(sentences) > 1 else text.split()
    random.Random(seed).shuffle(parts)
    return " ".join(parts)


def typos(text: str, rate: float, seed: int) -> str:
    """Each letter is, at this rate, left out, doubled, replaced, or swapped with the next."""
    generator = random.Random(seed)
    letters = list(text)
    out: list[str] = []
    while letters:
        letter = letters.pop(0)
        if not letter.isalpha() or generator.random() >= rate:
            out.append(letter)
            continue
        kind = generator.randrange(4)
        if kind == 1:
            out += [letter, letter]
        elif kind == 2:
            out.append(generator.choice(string.ascii_lowercase))
        elif kind == 3:
            out += [letters.pop(0), letter] if letters else [letter]
    return "".join(out)


def mixed(windows: Sequence[Window], pieces: int, head: int) -> list[Window]:
    """Each window's prompt with all but its last piece taken from the windows after it.

    Args:
        windows: of one prompt length, ordered so that neighbours differ in topic.
        pieces: of which a prompt then consists, as long as each other as can be.
        head: tokens at the beginning that stay (what the tokenizer puts there).
    """
    made = []
    for place, window in enumerate(windows):
        length = len(window.prompt) - head
        cuts = [head + length * i // pieces for i in range(pieces + 1)]
        prompt = window.prompt[:head]
        for piece in range(pieces):
            # The last piece is the window's own: its continuation still follows from something.
            other = windows[(place + pieces - 1 - piece) % len(windows)]
            prompt = prompt + other.prompt[cuts[piece] : cuts[piece + 1]]
        made.append(Window(prompt, window.continuation, ""))
    return made
