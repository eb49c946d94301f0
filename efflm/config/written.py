"""Values of settings as they are written: on the command line, in the grammar of chains, in its files; and bytes."""

import math
import typing
from typing import Any, Literal

from efflm.config import InputError, require


def value(name: str, kind: Any, text: str) -> Any:
    """What `text` says of the setting `name`, of the type `kind`. Raises InputError."""
    refuse = lambda must: InputError(f"{name} is {text!r}, but must {must}")
    if typing.get_origin(kind) is tuple:
        return tuple(value(name, typing.get_args(kind)[0], each) for each in text.split(","))
    if typing.get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in typing.get_args(kind)}  # texts, or numbers as they are written
        if text not in choices:
            raise refuse(f"be one of {', '.join(filter(None, choices))}")
        return choices[text]
    if kind is bool:
        if text not in ("true", "false"):
            raise refuse("be true or false")
        return text == "true"
    if kind is int:
        try:
            number = int(text)
        except ValueError:
            raise refuse("be a whole number") from None
        require(-(1 << 63) <= number < 1 << 63, f"{name} is {number}, but must lie within 64 bits")
        return number
    if kind is float:
        try:
            number = float(text)
        except ValueError:
            raise refuse("be a number") from None
        if not math.isfinite(number):
            raise refuse("be a finite number")
        return number
    if kind is str:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # Python has made surrogates of the bytes that it could not decode
            byte = ord(text[error.start]) & 0xFF
            raise InputError(
                f"{name} is not UTF-8 (byte {byte:#04x} at character {error.start}): give it in UTF-8"
            ) from None
    return text


def text(value: Any) -> str:
    """How `value` above reads it: 4.0 is 4."""
    if isinstance(value, tuple):
        return ",".join(map(text, value))
    return str(value).lower() if isinstance(value, bool) else str(value).removesuffix(".0")


def size(nbytes: float) -> str:
    """Bytes in the decimal unit that suits them."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.2f} {name}"
    return f"{nbytes:.0f} B"


def nbytes(name: str, text: str) -> float:
    """The bytes that `text` says, as `size` writes them: 60MB, 1.5 GB. Raises InputError."""
    units = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "KB": 1e3, "B": 1.0}
    unit = next((each for each in units if text.strip().upper().endswith(each)), "")
    number = value(name, float, text.strip()[: len(text.strip()) - len(unit)].strip())
    require(number > 0, f"{name} is {text!r}, but must be positive")
    return number * units.get(unit, 1.0)


def share(name: str, text: str) -> float:
    """The share that `text` says: 1% or 0.01. Raises InputError."""
    number = value(name, float, text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    require(number >= 0, f"{name} is {text!r}, but must not be negative")
    return number
