"""The standard streams of a command: one that is full, closed or has too few characters is told in one line."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

from efflm.config import InputError, require

SIGNS = "±–"  # that tables show beside ASCII
NAME = "<stdout>"


class _Stdout(io.TextIOWrapper):
    """Standard output, whose errors say that they are its: those of files that a run writes have no name either."""

    def write(self, text: str) -> int:
        with _named():
            return super().write(text)

    def flush(self) -> None:
        with _named():
            super().flush()


@contextlib.contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError as error:
        raise InputError(_lacks(error.object[error.start])) from None
    except OSError as error:
        error.filename = NAME
        raise


def prepare() -> None:
    """Make stdout name itself in its errors, and one that is closed take all: else the next file would become it."""
    out = sys.stdout
    if out is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
    elif type(out) is io.TextIOWrapper:
        how = {"line_buffering": out.line_buffering, "write_through": out.write_through}
        sys.stdout = _Stdout(out.buffer, out.encoding, out.errors, **how)


def require_signs() -> None:
    """Raise InputError if stdout cannot take what tables show: now, and not when the work is done."""
    for sign in SIGNS:
        require(_shown(sign) == sign, _lacks(sign))


def show(text: str) -> None:
    """Print a text that a reader may leave in the middle of, and in which a character may be missing."""
    try:
        print(_shown(text), flush=True)
    except BrokenPipeError:
        drop(sys.stdout)


def complain(line: str) -> None:
    """Print to stderr, where that is possible."""
    if sys.stderr is not None:
        try:
            print(line, file=sys.stderr, flush=True)
        except OSError:
            drop(sys.stderr)


def problem(error: BaseException) -> str:
    """The line for an error of stdout; "" for any other. What is still to be written to it is dropped."""
    if not isinstance(error, OSError) or error.filename != NAME:
        return ""
    drop(sys.stdout)
    return f"stdout cannot be written ({error.strerror}): send it elsewhere"


def drop(stream: Any) -> None:
    """Send nowhere what is left in the stream: the interpreter writes it out at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "utf-8"


def _shown(text: str) -> str:
    return text.encode(_encoding(), "replace").decode(_encoding())


def _lacks(sign: str) -> str:
    return f"stdout is encoded in {_encoding()}, which has no U+{ord(sign):04X}: set PYTHONIOENCODING=utf-8"
