"""`coreinfer chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coreinfer.cli import options, sampling
from coreinfer.cli.generate import summary
from coreinfer.cli.stand_in import add_stand_in_options, stand_in_from
from coreinfer.cli.terminal import note, warn
from coreinfer.errors import UserError

if TYPE_CHECKING:
    from coreinfer.runtime.conversation import Conversation
    from coreinfer.runtime.records import GenerationRecord
    from coreinfer.selectors import Selector

OWNERS = {"selector": "rule", "stand_in": "stand-in", "params": "sampling"}

HELP = """\
/help              this list
/set               the settings that can be changed, with their values
/set NAME VALUE    change one, for example: /set beta 0.6
/stats             what the last answer cost
/dense             decode with all neurons, or with the core neurons again
/save FILE         write the conversation as JSON
/reset             forget the conversation
/quit              leave (also Ctrl-D)"""


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "chat",
        help="a conversation in the terminal",
        description="Chat with a model through its chat template. Core neurons are chosen anew "
        "each turn, from the statistics of all turns.",
        epilog="Commands:\n" + HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--system", metavar="TEXT", help="system message (default: the template's)")
    sampling.add_sampling_options(parser)
    options.add_selection_options(parser)
    add_stand_in_options(parser)
    options.add_model_options(parser)
    parser.set_defaults(run=run, max_new_tokens=512)


def run(args: argparse.Namespace) -> int:
    from coreinfer.runtime.sampling import SamplingParams

    selector, stand_in = options.selector_from(args), stand_in_from(args)
    params = SamplingParams(**sampling.sampling_from(args))
    llm = options.load_model(args)
    start = [] if args.system is None else [{"role": "system", "content": args.system}]
    chat = Chat(
        new_conversation=lambda: llm.conversation(list(start)),
        settings={"selector": selector, "stand_in": stand_in, "params": params},
    )
    if sys.stdin.isatty():
        _enable_line_editing()
        note(f"{llm.name}, {selector.name}. /help lists the commands, Ctrl-D leaves.")
    while (line := _read_line()) is not None:
        try:
            if not chat.handle(line):
                break
        except UserError as error:
            warn(str(error))
        except KeyboardInterrupt:  # stops the answer, not the chat
            print()
            note("[interrupted; this turn is not part of the conversation]")
    return 0


class Chat:
    """The conversation with its settings; handles one line of input at a time."""

    def __init__(
        self, new_conversation: Callable[[], Conversation], settings: dict[str, Any]
    ) -> None:
        self._new_conversation = new_conversation
        self._conversation = new_conversation()
        self._settings = settings
        self._dense = False
        self._last: GenerationRecord | None = None

    def handle(self, line: str) -> bool:
        """Answer a message or obey a command; False to leave.

        Raises:
            UserError: for a command or a value that makes no sense.
        """
        if not line.strip():
            return True
        if not line.startswith("/"):
            self._say(line)
            return True
        command, _, rest = line.strip().partition(" ")
        if command in ("/quit", "/exit"):
            return False
        commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _rest: print(HELP),
            "/set": self._set,
            "/stats": self._stats,
            "/dense": self._toggle_dense,
            "/save": self._save,
            "/reset": self._reset,
        }
        if command not in commands:
            raise UserError(f"there is no command {command!r}; /help lists them")
        commands[command](rest.strip())
        return True

    @property
    def _selector(self) -> Selector:
        from coreinfer.selectors import Dense

        chosen: Selector = self._settings["selector"]
        return Dense.beside(chosen) if self._dense else chosen

    def _say(self, text: str) -> None:
        stand_in = None if self._dense else self._settings["stand_in"]
        pieces = self._conversation.reply(text, self._selector, stand_in, self._settings["params"])
        for piece in pieces:
            print(piece.text, end="", flush=True)
            if piece.record is not None:
                self._last = piece.record
                print(flush=True)

    def _set(self, rest: str) -> None:
        name, _, text = rest.partition(" ")
        values = self._changeable()
        if not name:
            for key, found in values.items():
                for owner, value in found.items():
                    print(f"{key} = {json.dumps(value)}" + _of([owner] if len(found) > 1 else []))
            return
        if name not in values:
            raise UserError(f"there is no setting {name!r}; there are {', '.join(values)}")
        owners = values[name]
        old = next(iter(owners.values()))
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, (int, float)) or isinstance(value, bool) != isinstance(old, bool):
            raise UserError(f"{name} needs a value such as {json.dumps(old)}, got {text!r}")
        if isinstance(old, int) and isinstance(value, float):
            raise UserError(f"{name} is a whole number, got {text!r}")
        # First all of them: one that refuses the value leaves the others as they are.
        changed = {owner: replace(self._settings[owner], **{name: value}) for owner in owners}
        self._settings.update(changed)
        print(f"{name} = {json.dumps(value)}" + _of(list(owners) if len(owners) > 1 else []))

    def _changeable(self) -> dict[str, dict[str, Any]]:
        """Number and switch settings: name -> what it belongs to, with its value there."""
        found: dict[str, dict[str, Any]] = {}
        for owner, thing in self._settings.items():
            for field in () if thing is None else fields(thing):
                value = getattr(thing, field.name)
                if isinstance(value, (bool, int, float)):
                    found.setdefault(field.name, {})[owner] = value
        return found

    def _stats(self, _rest: str) -> None:
        print("nothing was answered yet" if self._last is None else summary(self._last))

    def _toggle_dense(self, _rest: str) -> None:
        self._dense = not self._dense
        print(f"decoding with {'all' if self._dense else 'the core'} neurons")

    def _save(self, path: str) -> None:
        from coreinfer.files import replace_when_done

        if not path:
            raise UserError("/save needs a file name, as in /save talk.json")
        text = json.dumps({"messages": self._conversation.messages}, indent=2, ensure_ascii=False)
        with replace_when_done(path) as partial:
            Path(partial).write_text(text + "\n", encoding="utf-8")
        print(f"saved {len(self._conversation.messages)} messages to {path}")

    def _reset(self, _rest: str) -> None:
        self._conversation = self._new_conversation()
        print("the conversation starts anew")


def _of(owners: Sequence[str]) -> str:
    """What a setting belongs to, where several things have one of its name."""
    return f" ({' and '.join(OWNERS[owner] for owner in owners)})" if owners else ""


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        if sys.stdin.isatty():
            print()
        return None
    except KeyboardInterrupt:
        print()
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not UTF-8 ({error.reason})") from None


def _enable_line_editing() -> None:
    with suppress(ImportError):  # Windows has its own
        import readline  # noqa: F401  # gives input() history and cursor keys
