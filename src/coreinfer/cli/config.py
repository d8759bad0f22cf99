"""`--config FILE`: settings from a TOML file, as if they had been typed before the others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from coreinfer.errors import UserError, meant

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


# Options whose place others take: of single layers those of all, of a given set a rule.
YIELDS_TO = MappingProxyType(
    {
        "--budgets": ("--beta", "--gamma"),
        "--active-budgets": ("--active",),
        "--core-set": ("--selector",),
    }
)
BESIDE = frozenset({"--calibration", "--clusters", "--core-set"})  # found from where the file lies


def expand_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Put the settings of the file that `--config` names right after the verb.

    A key is the name of a long option, with - or _; lists stand for comma-separated values (or for
    an option given several times, where it may be), a table for `key=value` pairs. What is typed
    comes later and so wins; an option for all layers wins over the file's budgets of single ones, a
    rule over its core set, one of several options of which one can be given over the others, and an
    option that can be given several times over the file's list. A setting of another verb is left
    out, so that one file can serve them all. Stores and core sets are looked for from the folder of
    the file, so that it serves wherever a command is started.

    Raises:
        UserError: if the file is missing or no TOML, or a key is no option of any verb.
    """
    verbs = _verbs(parser)
    path = _config_path(argv)
    if path is None or not argv or argv[0] not in verbs:
        return list(argv)
    known = {option for verb in verbs.values() for option in verb._option_string_actions}
    known -= {"--config", "--help"}
    verb = verbs[argv[0]]
    mine = verb._option_string_actions
    settings: list[str] = []
    for key, value in _read(path).items():
        option = f"--{key.replace('_', '-')}"
        if option not in known:
            hint = meant(key, sorted(one.removeprefix("--") for one in known))
            raise UserError(f"{path!r}: {key!r} is no setting; {hint}".rstrip("; "))
        if option in mine and not _is_typed(_stronger(verb, option), argv):
            if option in BESIDE:
                value = _from_folder(Path(path).parent, value)
            settings += _as_arguments(mine[option], option, value)
    return [argv[0], *settings, *argv[1:]]


def _stronger(verb: argparse.ArgumentParser, option: str) -> set[str]:
    """The options that take the place of this one in a settings file, when they are typed."""
    action = verb._option_string_actions[option]
    found = set(YIELDS_TO.get(option, ()))
    for group in verb._mutually_exclusive_groups:
        if action in group._group_actions:
            found.update(one for other in group._group_actions for one in other.option_strings)
    if isinstance(action, argparse._AppendAction):
        found.update(action.option_strings)
    return found


def _is_typed(options: Collection[str], argv: Sequence[str]) -> bool:
    return any(argument.split("=")[0] in options for argument in argv)


def _verbs(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return action.choices
    raise AssertionError("the parser has no verbs")


def _config_path(argv: Sequence[str]) -> str | None:
    for position, argument in enumerate(argv):
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
        if argument == "--config" and position + 1 < len(argv):
            return argv[position + 1]
    return None


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:  # noqa: PTH123  # tomllib wants an open file
            return tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"no settings file at {path!r}") from None
    except OSError as error:
        raise UserError(f"cannot read {path!r}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path!r} is not TOML: {error}") from None


def _from_folder(folder: Path, value: object) -> object:
    if isinstance(value, list):
        return [_from_folder(folder, item) for item in value]
    return str(folder / str(value))  # an absolute path stays as it is


def _as_arguments(action: argparse.Action, option: str, value: object) -> list[str]:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"the setting {option[2:]!r} is true or false, got {value!r}")
        return [option] if value else []
    if isinstance(action, argparse._AppendAction) and isinstance(value, list):
        return [f"{option}={_as_text(item)}" for item in value]
    return [f"{option}={_as_text(value)}"]


def _as_text(value: object) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_as_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ",".join(_as_text(item) for item in value)
    return str(value)
