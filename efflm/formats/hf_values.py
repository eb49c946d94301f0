"""Values of a config.json, checked for what a field of ours can be."""

from typing import Any

from efflm.config import require
from efflm.config.model import RANGES

NEEDED = object()  # of a key that must be there
MOST = 2**31 - 1  # of any number that counts something


def check(key: str, name: str, value: Any, most: int = MOST) -> None:
    """Raise InputError unless the value is of the kind that a field of this name has."""
    if name in ("tied", "parallel", "renormalized", "truncate"):
        good, wanted = isinstance(value, bool), "true or false"
    elif name in RANGES:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        good, wanted = number and 0 < value < 1e30, "a positive number"
    else:
        counts = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= most
        good, wanted = counts, f"a whole number from 1 to {most:,}"
    require(good, f"{key} is {shown(value)}, but must be {wanted}")


def shown(value: Any) -> str:
    return f"{value!r:.60}"
