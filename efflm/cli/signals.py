"""Ctrl-C and SIGTERM: a training run writes one last checkpoint, anything else ends; a second Ctrl-C ends at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

from efflm.parallel import processes

T = TypeVar("T")
NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


@contextlib.contextmanager
def second_interrupt_ends() -> Iterator[None]:
    """The first Ctrl-C is a KeyboardInterrupt in here, or what `stop_requests` makes of it; a second ends the process.

    It does so from a thread, since the main one may be far away in a compiler, where Python handles no signals.
    """
    if not _listens():
        yield
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    other = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        interrupts = 0
        while number := os.read(read, 1):
            interrupts += number[0] == signal.SIGINT
            if interrupts > 1:
                os._exit(processes.INTERRUPTED)
        os.close(read)

    threading.Thread(target=watch, name="second Ctrl-C", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(other)
        signal.signal(signal.SIGINT, handler)
        os.close(write)  # which ends the thread


@contextlib.contextmanager
def interrupts_are_handled(wanted: bool) -> Iterator[Callable[[Callable[[], T]], T | None]]:
    """Gives attempt(work): what work() gives, or None where Ctrl-C ended it. It ends nothing else in here, a second one
    neither: an `except KeyboardInterrupt` alone would leave moments, as that of entering it, in which it does. Not
    wanted: attempt(work) is work(), and Ctrl-C what it was.
    """
    if not (wanted and _listens()):
        yield lambda work: work()
        return
    attempted = False

    def told(*_) -> None:
        if attempted:
            raise KeyboardInterrupt

    def attempt(work: Callable[[], T]) -> T | None:
        nonlocal attempted
        try:
            attempted = True
            return work()
        except KeyboardInterrupt:
            return None
        finally:
            attempted = False  # no call comes before it: Python handles signals at calls

    handler, other = signal.signal(signal.SIGINT, told), signal.set_wakeup_fd(-1)
    try:
        yield attempt
    finally:
        signal.set_wakeup_fd(other)
        signal.signal(signal.SIGINT, handler)


@contextlib.contextmanager
def stop_requests() -> Iterator[Callable[[int], str]]:
    """Gives asked(step): "SIGTERM" or "Ctrl-C" if the run was told to stop by one, which then no longer ends it; or "".

    On several hosts the signal, which may reach only one of them, is caught by jax.distributed, and all agree on the
    step at which to stop: call it once a step, on each of them.
    """
    several = jax.process_count() > 1
    if threading.current_thread() is not threading.main_thread():  # only the main thread may catch signals
        yield lambda step: _agreed(step) if several else ""
        return
    signals: list[int] = []

    def told(number: int, _) -> None:
        first = number not in signals
        signals.append(number)
        if number == signal.SIGINT and first:
            if processes.is_first():
                _say("stopping with a last checkpoint; another Ctrl-C ends at once")
            if several:
                os.kill(os.getpid(), signal.SIGTERM)  # which jax.distributed waits for

    caught = [signal.SIGTERM] if not several else []
    caught += [signal.SIGINT] if _listens() else []
    before = {number: signal.signal(number, told) for number in caught}
    try:
        yield lambda step: _agreed(step) if several else NAMES[signals[0]] if signals else ""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted() -> None:
    """Tell that Ctrl-C ends this process, which a further one then does without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _say("stopped by Ctrl-C: what was written until now stays")


def _say(line: str) -> None:
    """Print to stderr, from a signal handler too, which may have interrupted a print."""
    below = "\n" if os.isatty(2) else ""  # the terminal has shown ^C
    with contextlib.suppress(OSError):
        os.write(2, f"{below}{line}\n".encode())


def _agreed(step: int) -> str:
    return NAMES[signal.SIGTERM] if multihost_utils.reached_preemption_sync_point(step) else ""


def _listens() -> bool:
    """Whether Ctrl-C is for this process: not where it was started in the background of a script."""
    here = threading.current_thread() is threading.main_thread()
    return here and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
