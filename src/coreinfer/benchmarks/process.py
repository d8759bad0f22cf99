"""A row's own process, seen from the one that started it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import IO, Any

from coreinfer.benchmarks.job import Job
from coreinfer.benchmarks.measure import About, Repeat, Row, row_of

_COMMAND = (sys.executable, "-m", "coreinfer.benchmarks.worker")
_PATIENCE_S = 20


class RowError(Exception):
    """A row that could not be measured; the message is one line."""


class RowProcess:
    """Loads a job's model in a process of its own and runs it when told to.

    It waits without computing between runs, so that several can be alive and take turns.

    Raises:
        RowError: from every method, if the row cannot be measured.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._repeats: list[Repeat] = []
        self._messages: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # as long as this
        self._process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._messages,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(job.threads)},
        )

    def start(self) -> None:
        """Load the model and warm up."""
        self._ask(self.job.to_json())

    def repeat(self) -> None:
        """One more timed run."""
        self._repeats.append(Repeat(**self._ask("repeat")["repeat"]))

    def finish(self) -> Row:
        """The row that the runs make; the process ends."""
        answer = self._ask("finish")
        job = self.job
        row = row_of(
            self._repeats,
            About(**answer["about"]),
            engine=job.engine,
            model=job.model,
            threads=job.threads,
            prompt_tokens=job.prompt_tokens,
            peak_memory_bytes=answer["peak_memory_bytes"],
            synthetic=job.shape is not None,
        )
        self.close()
        return row

    def close(self) -> None:
        """End the process, whatever it does."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # it is gone already
                    pipe.close()
        try:
            self._process.wait(_PATIENCE_S if self._process.poll() is None else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._messages.close()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self.close()

    def _ask(self, command: str) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(command + "\n")
            stdin.flush()
        except OSError:
            raise RowError(self._last_words()) from None
        line = stdout.readline()
        if not line:
            raise RowError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RowError(" ".join(str(answer["error"]).split()))
        return answer

    def _last_words(self) -> str:
        """Why a process that says no more has ended."""
        code = self._process.wait()
        if code < 0:
            return f"its process was ended by signal {-code}, as when memory runs out"
        self._messages.seek(0)
        lines = self._messages.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f"its process ended with {code}: {said[-1] if said else 'it said nothing'}"
