"""`coreinfer VERB ...`: parsing, dispatch and exit codes."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from coreinfer import __version__
from coreinfer.cli import (
    analyze,
    bench,
    calibrate,
    chat,
    cluster,
    convert,
    generate,
    info,
    pull,
    score,
    select,
    tune,
)
from coreinfer.cli import eval as evaluate
from coreinfer.cli.config import expand_config
from coreinfer.cli.terminal import warn
from coreinfer.errors import UserError
from coreinfer.files import describe_os_error

VERBS = (
    generate, chat, select, cluster, calibrate, score, evaluate, bench, tune, analyze, info, pull,
    convert,
)  # fmt: skip

DESCRIPTION = """\
Decode large language models with their core neurons: the few MLP neurons that matter
for a prompt, found while the prompt is prefilled (arXiv 2410.18311).
"""


class Parser(argparse.ArgumentParser):
    """Reports a mistake as one line, like every other mistake of the user.

    Options are typed in full, those of verbs too: `--config` looks for what is typed.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see '{self.prog} --help'")


def build_parser() -> Parser:
    parser = Parser("coreinfer", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"coreinfer {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in VERBS:
        verb.add_parser(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done, 2 the user's mistake (one line on stderr), 130 after Ctrl-C. Anything else that
        goes wrong is a bug: it raises, which Python turns into a traceback and exit code 1.
    """
    _show_any_text()
    try:
        parser = build_parser()
        args = parser.parse_args(expand_config(parser, sys.argv[1:] if argv is None else argv))
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        warn(str(error))
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone: nothing is left to say
        _drop_output()
        return 0
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _drop_output()
        warn(describe_os_error(error, error.filename or "stdout"))
        return 2


def _show_any_text() -> None:
    """Let stdout show a ? for what its encoding does not have: a model may say anything."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def _drop_output() -> None:
    """Send what is left in stdout's buffer nowhere, so that Python does not fail on it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
