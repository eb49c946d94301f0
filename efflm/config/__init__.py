"""What a run is told: frozen dataclasses, validated when made. `flags` makes command lines of them."""

import dataclasses
import functools
import os
import typing
from typing import Any, Literal


class InputError(ValueError):
    """Something the user gave is wrong. The message is one line: the thing, its value, and the remedy."""


class Stopped(Exception):
    """A run was asked to stop and did so in good order: its message is for the user, and the exit code is 0."""


def flag(default: Any, help: str, internal: bool = False, path: bool = False, bare: bool = False) -> Any:
    """A dataclass field that the bridge turns into a flag with this default and help text.

    internal: scripts set it, so that --help leaves it out. path: it may name a file or folder, which may begin with ~.
    bare: a tuple of all arguments that are given without a name, in place of a flag.
    """
    found = {"help": help, "internal": internal, "path": path, "bare": bare}
    return dataclasses.field(default=default, metadata=found)


def at_home(path: str) -> str:
    """A path as the user gave it, with the home folder in place of a ~ or ~user that it begins with.

    Raises InputError if there is no such home: a folder of that name is never meant."""
    found = os.path.expanduser(path)
    require(
        not found.startswith("~"),
        f"{path} begins with ~, but the home folder it names is not known: write ./{path} for what is here",
    )
    return found


def require(condition: bool, message: str) -> None:
    """Raise InputError(message) unless the condition holds."""
    if not condition:
        raise InputError(message)


def require_positive(settings: Any, *names: str) -> None:
    """Raise InputError for a field of these names that is zero or less, or has such a value among several."""
    for name in names:
        value = getattr(settings, name)
        values = value if isinstance(value, tuple) else (value,)
        require(min(values) > 0, f"{name} is {','.join(map(str, values))}, but must be positive")


types = functools.cache(typing.get_type_hints)  # of the fields of a dataclass, by name


def require_choices(config: Any, prefix: str = "") -> None:
    """Raise InputError for a field whose type is a Literal and whose value is none of its choices."""
    for name, kind in types(type(config)).items():
        if typing.get_origin(kind) is Literal:
            value, choices = getattr(config, name), typing.get_args(kind)
            known = ", ".join(str(choice) for choice in choices if choice != "")
            require(value in choices, f"{prefix}{name} is {value!r:.60}: choose from {known}")


def require_seed(value: int) -> None:
    """JAX drops what is beyond 32 bits: without this, different seeds would give the same numbers."""
    require(0 <= value < 1 << 32, f"seed is {value}, but must be from 0 to {(1 << 32) - 1}")


def require_sparsity(value: float) -> None:
    require(0 <= value < 1, f"sparsity is {value}, but must be in [0, 1): the fraction of weights to remove")


Precision = Literal["float32", "bfloat16"]
AskedPrecision = Literal["", "float32", "bfloat16", "auto"]
PRECISION = (  # the flag's help
    "dtype of the operands of matmuls; auto measures for a second which one is faster on this machine; default: "
    "what the model was saved for"
)
