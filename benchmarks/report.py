"""What every result file carries: the machine, the versions, the command; and how it is written."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from coreinfer import __version__
from coreinfer.files import replace_when_done


def provenance(module: str) -> dict[str, Any]:
    """Where a result comes from. File names are given without their folders."""
    arguments = [Path(part).name if os.sep in part else part for part in sys.argv[1:]]
    return {
        "command": " ".join(["python -m", module, *arguments]),
        "coreinfer": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    with replace_when_done(path) as partial:
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    with replace_when_done(path) as partial:
        partial.write_text(text, encoding="utf-8")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = rows
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
