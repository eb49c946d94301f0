"""The standard streams of a command: one that is full or closed is told in one line."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

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
    except OSError as error:
        error.filename = NAME
        raise


def prepare() -> None:
    """Make stdout name itself in its errors and write characters that its encoding lacks as escapes, and one that is
    closed take all: else the next file would become it."""
    out = sys.stdout
    if out is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the process ends)
    elif type(out) is io.TextIOWrapper:
        how = {"line_buffering": out.line_buffering, "write_through": out.write_through}
        errors = "backslashreplace" if out.errors == "strict" else out.errors  # else the user has chosen
        sys.stdout = _Stdout(out.buffer, out.encoding, errors, **how)


def show(text: str) -> None:
    """Print a text that a reader may leave in the middle of."""
    try:
        print(text, flush=True)
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
