"""`--config FILE`: settings from a TOML file, as if they had been typed before the others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from coreinfer.errors import UserError, meant

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


# Options of single layers, by those of all.
BY_LAYER = MappingProxyType({"--budgets": ("--beta", "--gamma"), "--active-budgets": ("--active",)})


def expand_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Put the settings of the file that `--config` names right after the verb.

    A key is the name of a long option, with - or _; lists stand for comma-separated values (or for
    an option given several times, where it may be), a table for `key=value` pairs. What is typed
    comes later and so wins; an option for all layers wins over the file's budgets of single ones. A
    setting of another verb is left out, so that one file can serve them all.

    Raises:
        UserError: if the file is missing or no TOML, or a key is no option of any verb.
    """
    verbs = _verbs(parser)
    path = _config_path(argv)
    if path is None or not argv or argv[0] not in verbs:
        return list(argv)
    known = {option for verb in verbs.values() for option in verb._option_string_actions}
    known -= {"--config", "--help"}
    mine = verbs[argv[0]]._option_string_actions
    settings: list[str] = []
    for key, value in _read(path).items():
        option = f"--{key.replace('_', '-')}"
        if _is_typed(BY_LAYER.get(option, ()), argv):
            continue
        if option not in known:
            hint = meant(key, sorted(one.removeprefix("--") for one in known))
            raise UserError(f"{path!r}: {key!r} is no setting; {hint}".rstrip("; "))
        if option in mine:
            settings += _as_arguments(mine[option], option, value)
    return [argv[0], *settings, *argv[1:]]


def _is_typed(options: Sequence[str], argv: Sequence[str]) -> bool:
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
