"""The process that measures one row, so that its peak memory is the row's own.

It is told what to do by lines on stdin and answers by lines of JSON: a job makes it load the model
and run once to warm up, "repeat" makes it run once more, "finish" makes it say what it decoded
with and how much memory it took.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, TextIO

from coreinfer.benchmarks.job import Job
from coreinfer.errors import UserError


def serve(commands: Iterator[str], answers: TextIO) -> None:
    """Measure the job that the first command describes."""

    def say(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    try:
        job = Job.from_json(next(commands))
        for answer in measured(job, commands):
            say(**answer)
    except UserError as error:
        say(error=str(error))
    except (ImportError, MemoryError) as error:
        say(error=f"{type(error).__name__}: {error}")


def measured(job: Job, commands: Iterator[str]) -> Iterator[dict[str, Any]]:
    """What is answered to each command."""
    import torch

    from coreinfer.benchmarks.engines import open_hf_engine, open_native_engine
    from coreinfer.benchmarks.measure import random_tokens
    from coreinfer.benchmarks.peers import PEERS
    from coreinfer.runtime.records import peak_memory_bytes

    torch.set_num_threads(job.threads)
    openers = {"native": open_native_engine, "hf": open_hf_engine}
    openers |= {name: peer.open for name, peer in PEERS.items()}
    engine = openers[job.engine](job)
    tokens = random_tokens(engine.vocab_size, job.prompt_tokens + job.decode_tokens)
    prompt, answer = tokens[: job.prompt_tokens], tokens[job.prompt_tokens :]
    engine.repeat(prompt, answer)  # the warm-up
    yield {"ready": True}
    for command in commands:
        if command.strip() == "finish":
            peak = peak_memory_bytes()
            yield {"about": asdict(engine.about()), "peak_memory_bytes": peak}
            return
        yield {"repeat": asdict(engine.repeat(prompt, answer))}


def main() -> None:
    """Answers go where stdout was; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(iter(sys.stdin.readline, ""), answers)


if __name__ == "__main__":
    main()
