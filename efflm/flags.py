"""The one bridge from dataclasses to absl flags, and from there into an experiment."""

import dataclasses
import difflib
import shlex
import sys
import traceback
import typing
from collections.abc import Callable
from typing import Any, Literal

from absl import flags

from efflm import hosts
from efflm.config import HostsConfig, InputError, Stopped, require

_DEFINERS = {bool: flags.DEFINE_boolean, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string}


def _define(values: flags.FlagValues, prefix: str, default: Any) -> None:
    for field in dataclasses.fields(default):
        kind = typing.get_type_hints(default if isinstance(default, type) else type(default))[field.name]
        name, value, text = f"{prefix}{field.name}", getattr(default, field.name), field.metadata["help"]
        if typing.get_origin(kind) is Literal:
            flags.DEFINE_enum(name, value, list(typing.get_args(kind)), text, flag_values=values)
        else:
            _DEFINERS[kind](name, value, text, flag_values=values)


def parse(argv: list[str], **groups: Any) -> dict[str, Any]:
    """Parse argv[1:] into copies of the given dataclass instances, whose values are the defaults.

    The group named `run` has bare flags (--seed); any other has its name before each (--train.steps). A group given
    as a class comes back as a dict of just the fields the user set. Raises InputError for anything that does not
    parse or validate.
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "print this help", flag_values=values, short_name="h")
    for group, default in groups.items():
        _define(values, _prefix(group), default)
    try:
        rest = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        close = difflib.get_close_matches(error.flagname, list(values), n=1, cutoff=0.7)
        hint = f"did you mean --{close[0]}?" if close else "--help lists the flags"
        raise InputError(f"unknown flag --{error.flagname}: {hint}") from None
    except flags.Error as error:
        raise InputError(" ".join(str(error).split())) from None
    require(not rest, f"unexpected argument {rest[0] if rest else ''!r}: flags are given as --name=value")
    if values.help:
        raise HelpWanted(_help(values, groups))
    out = {}
    for group, default in groups.items():
        given = {field.name: values[_prefix(group) + field.name] for field in dataclasses.fields(default)}
        if isinstance(default, type):
            out[group] = {name: item.value for name, item in given.items() if item.present}
        else:
            out[group] = dataclasses.replace(default, **{name: item.value for name, item in given.items()})
    return out


def _prefix(group: str) -> str:
    return "" if group == "run" else f"{group}."


class HelpWanted(Exception):
    """--help was given; the text is its argument."""


def _help(values: flags.FlagValues, groups: dict[str, Any]) -> str:
    lines = []
    for group, default in groups.items():
        kind = default if isinstance(default, type) else type(default)
        lines.append(f"\n{kind.__doc__.splitlines()[0]}")
        for field in dataclasses.fields(default):
            item = values[_prefix(group) + field.name]
            choices = f" [{'|'.join(item.parser.enum_values)}]" if hasattr(item.parser, "enum_values") else ""
            shown = str(item.value).lower() if isinstance(item.value, bool) else item.value
            lines.append(f"  --{item.name}={shown}{choices}\n        {item.help}")
    return "\n".join(lines)


def launch(main: Callable[..., None], doc: str, argv: list[str] | None = None, **groups: Any) -> None:
    """Run main(**groups) with the flags applied; what fails ends with the code that hosts.exit_code has for it.

    That is one line on stderr: a user's mistake, what the operating system refuses (a full disk, a missing
    permission), memory that does not suffice, a machine that was lost. Anything else is our own bug and keeps its
    traceback. A run that was told to stop, and has left a checkpoint, says so and exits with code 0 or that of
    hosts.stopped. A group named `hosts` is not main's: it says which other processes this one belongs to (efflm.hosts).
    """
    others = HostsConfig()
    argv = sys.argv if argv is None else argv
    several = any("hosts.coordinator" in arg for arg in argv[1:])  # the flags may be what is wrong: nothing is parsed
    try:
        given = parse(argv, **groups)
        others = given.pop("hosts", others)
        hosts.start(others)
        main(**given)
    except HelpWanted as wanted:
        print(f"{doc.strip()}\n{wanted}")
    except Stopped as stopped:
        print(stopped)
        if others.stopped:
            sys.exit(others.stopped)
    except (Exception, KeyboardInterrupt) as error:
        code = hosts.exit_code(error)
        if code != hosts.BUG:
            print(f"error: {hosts.explain(error, code)}", file=sys.stderr)
        elif several:
            traceback.print_exc()
        else:
            raise
        hosts.leave(code, several)


def command_line(module: str, argv: list[str]) -> str:
    """The command that does this run again."""
    return shlex.join(["python", "-m", module, *argv[1:]])
