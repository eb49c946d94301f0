"""The one bridge from dataclasses to absl flags, and from there into an experiment."""

import dataclasses
import difflib
import shlex
import sys
import traceback
import typing
from collections.abc import Callable
from typing import Any

from absl import flags

from efflm.cli import help_text, signals, stdio
from efflm.config import InputError, Stopped, at_home, require, written
from efflm.config.machine import MachineConfig
from efflm.config.parallel import HostsConfig
from efflm.ops.kernels.cpu import build
from efflm.parallel import processes


def parse(argv: list[str], **groups: Any) -> dict[str, Any]:
    """Parse argv[1:] into copies of the given dataclass instances, whose values are the defaults.

    The groups named `run` and `machine` have bare flags (--seed); any other has its name before each (--train.steps).
    A group given as a class comes back as a dict of just the fields the user set. Raises InputError for anything that
    does not parse or validate, and HelpWanted.
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "", flag_values=values, short_name="h")
    flags.DEFINE_boolean("helpfull", False, "", flag_values=values)
    kinds: dict[str, Any] = {}
    paths: set[str] = set()
    bare = ""  # the name of the field that takes the arguments without one
    for group, default in groups.items():
        hints = typing.get_type_hints(default if isinstance(default, type) else type(default))
        for field in dataclasses.fields(default):
            name = _prefix(group) + field.name
            if field.metadata.get("bare"):
                bare = name
                continue
            kinds[name] = hints[field.name]
            if field.metadata.get("path"):
                paths.add(name)
            # absl reads names and true or false; other values it leaves as they are written.
            define = flags.DEFINE_boolean if kinds[name] is bool else flags.DEFINE_string
            define(name, None, "", flag_values=values)
    try:
        rest = values(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise InputError(f"unknown flag --{error.flagname}: {_hint(error.flagname, list(kinds))}") from None
    except flags.IllegalFlagValueError as error:
        name, _, value = str(error).removeprefix("flag --").partition(": ")[0].partition("=")
        raise InputError(f"--{name} is {value!r}, but must be true or false") from None
    except flags.Error as error:
        raise InputError(" ".join(str(error).split())) from None
    require(bool(bare) or not rest, f"unexpected argument {rest[0] if rest else ''!r}: flags are given as --name=value")
    if values.help or values.helpfull:
        raise HelpWanted([(_prefix(group), default) for group, default in groups.items()], values.helpfull)
    given = {
        name: written.value(f"--{name}", kind, written.text(values[name].value))
        for name, kind in kinds.items()
        if values[name].present
    }
    if rest:
        given[bare] = tuple(written.value(bare, str, at_home(each)) for each in rest)
    for name in paths & given.keys():
        try:
            given[name] = at_home(given[name])
        except InputError as error:
            raise InputError(f"--{name}={error}") from None
    out = {}
    for group, default in groups.items():
        names = [field.name for field in dataclasses.fields(default)]
        mine = {name: given[_prefix(group) + name] for name in names if _prefix(group) + name in given}
        try:
            out[group] = mine if isinstance(default, type) else dataclasses.replace(default, **mine)
        except InputError as error:  # a dataclass calls its fields by their names
            first = str(error).partition(" ")[0]
            found = next((name for name in (first, _prefix(group) + first) if name in kinds), None)
            raise InputError(f"--{found}{str(error).removeprefix(first)}" if found else str(error)) from None
    return out


class HelpWanted(Exception):
    """--help or --helpfull was given; the arguments are those of help_text.text."""


def _prefix(group: str) -> str:
    return "" if group in ("run", "machine") else f"{group}."


def _hint(name: str, known: list[str]) -> str:
    """What an unknown flag may have meant: those that end in it (--steps: --train.steps), else the one closest."""
    close = [one for one in known if one.rpartition(".")[2] == name]
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"did you mean {' or '.join(f'--{one}' for one in close)}?" if close else "--help lists the flags"


def launch(main: Callable[..., None], doc: str, argv: list[str] | None = None, **groups: Any) -> None:
    """Run main(**groups) with the flags applied; what fails ends with the code that processes.exit_code has for it.

    That is one line on stderr: a user's mistake, what the operating system refuses (a full disk, a missing
    permission), a stdout that takes nothing, memory that does not suffice, a machine that was lost, Ctrl-C. Anything
    else is our own bug and keeps its traceback. A run that was told to stop, and has left a checkpoint, says so and
    exits with code 0 or that of hosts.stopped. A group named `hosts` is not main's: it says which other processes this
    one belongs to (efflm.parallel.processes). Nor are the flags of MachineConfig, which every program has.
    """
    argv = sys.argv if argv is None else argv
    several = any("hosts.coordinator" in arg for arg in argv[1:])  # the flags may be what is wrong: nothing is parsed
    stdio.prepare()
    try:
        code = _run(main, doc, argv, groups)
    except KeyboardInterrupt:
        signals.interrupted()
        processes.leave(processes.INTERRUPTED, several)
    except Exception as error:
        told = stdio.problem(error)
        code = processes.MISTAKE if told else processes.exit_code(error)
        if code != processes.BUG:
            stdio.complain(f"error: {told or processes.explain(error, code)}")
        elif several:
            traceback.print_exc()
        else:
            raise
        processes.leave(code, several)
    if code:
        sys.exit(code)


def _run(main: Callable[..., None], doc: str, argv: list[str], groups: dict[str, Any]) -> int:
    """The exit code of what ends well. Raises all else."""
    with signals.second_interrupt_ends():
        try:
            given = parse(argv, **groups, machine=MachineConfig())
        except HelpWanted as wanted:
            stdio.show(help_text.text(doc, *wanted.args))
            return 0
        build.choose(given.pop("machine").kernels)
        others = given.pop("hosts", HostsConfig())
        processes.start(others)
        try:
            main(**given)
        except Stopped as stopped:
            print(stopped, flush=True)
            return others.stopped
        sys.stdout.flush()
        return 0


def command_line(module: str, argv: list[str]) -> str:
    """The command that does this run again."""
    return shlex.join(["bash", "launch/run.sh", module, *argv[1:]])
