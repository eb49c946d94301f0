"""What --help says: the docstring, the flags of the commands in it first, then all others by group."""

import dataclasses
import os
import re
import shutil
import textwrap
import typing
from typing import Any, Literal

from efflm.config import written

LABEL = 28  # columns of a flag with its default; the help of a longer one begins on the next line
WIDEST = 100  # a wider terminal is not filled: long lines are hard to read
HOW = "Flags are given as --name=value; those that are true or false also as --name or --noname."


def text(doc: str, groups: list[tuple[str, Any]], everything: bool = False) -> str:
    """The help of a command. groups: (prefix of the flags, dataclass or an instance that holds the defaults) of each.

    Flags that scripts set, and those that a step has like every step that trains, are left out unless `everything` is
    asked for.
    """
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    titles, entries, hidden = [], {}, 0
    for prefix, default in groups:
        kind = default if isinstance(default, type) else type(default)
        titles.append(kind.__doc__.splitlines()[0].rstrip("."))
        for field in dataclasses.fields(default):
            of_all = isinstance(default, type) and field.name not in {*kind.__annotations__, "steps", "learning_rate"}
            if (field.metadata.get("internal") or of_all) and not everything:
                hidden += 1
                continue
            entries[prefix + field.name] = (titles[-1], _entry(prefix, field, default, kind, width))
    blocks = doc.strip().split("\n\n")
    used = re.findall(r"--([\w.]+)", "\n".join(block for block in blocks if _is_code(block)))
    first = dict.fromkeys(name if name in entries else name.removeprefix("no") for name in used)
    first = [name for name in first if name in entries]
    lines = ["\n\n".join(block if _is_code(block) else _filled(block, width) for block in blocks)]
    if first:
        lines += ["\nTo know first", "", *(entries.pop(name)[1] for name in first)]
    for title in titles:
        of_group = [entry for group, entry in entries.values() if group == title]
        if of_group:
            lines += ["", _filled(title, width), "", *of_group]
    more = f" --helpfull shows {hidden} more, which scripts set or every step that trains has." if hidden else ""
    return "\n".join([*lines, "", _filled(HOW + more, width)])


def _is_code(block: str) -> bool:
    return block.startswith("    ")


def _filled(words: str, width: int, indent: str = "", first: str = "") -> str:
    how = {"initial_indent": first or indent, "subsequent_indent": indent, "break_on_hyphens": False}
    return textwrap.fill(" ".join(words.split()), width, **how)


def _entry(prefix: str, field: dataclasses.Field, default: Any, kind: type, width: int) -> str:
    value, hint = getattr(default, field.name), typing.get_type_hints(kind)[field.name]
    # A path below the current directory is shown as one gives it from here.
    plain = written.text(value) if isinstance(value, bool | tuple) else str(value)
    shown, hint = plain.removeprefix(os.getcwd() + os.sep), typing.get_args(hint)[0] if type(value) is tuple else hint
    choices = [str(choice) for choice in typing.get_args(hint) if choice] if typing.get_origin(hint) is Literal else []
    words = field.metadata["help"] + (f" [{', '.join(choices)}]" if choices else "")
    label = f"  {field.name} ..." if field.metadata.get("bare") else f"  --{prefix}{field.name}={shown}"
    indent = " " * (LABEL + 2)
    if len(label) <= LABEL:
        return _filled(words, width, indent, label.ljust(len(indent)))
    return f"{_filled(label, width, '      ', '  ')}\n{_filled(words, width, indent)}"
