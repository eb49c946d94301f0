"""How far something long has come: a bar with the time left on a terminal and in a notebook; elsewhere, as in a log, a
line on stderr now and then."""

import contextlib
import dataclasses
import datetime
import html
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 30.0  # seconds before the first line of a log, and between lines
REDRAWN = 0.25  # seconds between the states of a notebook's bar

Bar = contextlib.AbstractContextManager[Callable[..., None]]


def bar(title: str, total: float | None = None, live: bool = True, done: float = 0.0) -> Bar:
    """A bar while the context lasts. What it gives is told how much of `total` is done, and what else to say:
    update(done, words="").

    total: None: not known. live: False draws it only when it is told something, for what is being timed: no thread runs
    beside that. done: at the beginning, of work that was begun earlier.
    """
    console, work = Console(file=sys.stderr), _Work(title, total, done)  # stderr as it is now: others may replace it
    if _in_notebook():
        return _widget(work)
    return _on_terminal(work, console, live) if console.is_terminal else _in_log(work, sys.stderr, live)


def shown(
    items: Iterable[Any], title: str, total: float, size: Callable[[Any], float] = lambda item: 1, live: bool = True
) -> Iterator[Any]:
    """The items, with a bar of how much of `total`, the sum of their sizes, has been handed out and come back from."""
    drawn = bar(title, total, live)

    def each() -> Iterator[Any]:
        done = 0
        with drawn as update:
            for item in items:
                yield item
                done += size(item)
                update(done)

    return each()


@dataclasses.dataclass
class _Work:
    """What is done, of how much, and how much of it was done at the beginning."""

    title: str
    total: float | None
    done: float
    words: str = ""

    def __post_init__(self):
        self.first, self.began = self.done, time.monotonic()

    @property
    def share(self) -> float | None:
        return min(self.done / self.total, 1.0) if self.total else None

    def __str__(self) -> str:
        seconds = time.monotonic() - self.began
        clock = lambda seconds: str(datetime.timedelta(seconds=round(seconds)))
        said = ["" if self.share is None else f"{self.share:.0%}", f"{clock(seconds)} so far"]
        if self.total and self.done > self.first:
            said.append(f"{clock(seconds * max(self.total - self.done, 0) / (self.done - self.first))} left")
        return f"{self.title}: {', '.join(filter(None, [*said, self.words]))}"


@contextlib.contextmanager
def _on_terminal(work: _Work, console: Console, live: bool) -> Iterator[Callable[..., None]]:
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"), TimeElapsedColumn()]
    if work.total is not None:
        columns.insert(2, TaskProgressColumn())
        columns += [TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False)]
    progress = Progress(
        *columns,
        console=console,
        transient=True,
        auto_refresh=live,
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # else what is printed would go to stderr
    )
    with progress:
        task = progress.add_task(work.title, total=work.total, completed=work.done, words="")
        yield lambda done, words="": progress.update(task, completed=done, words=words, refresh=not live)


@contextlib.contextmanager
def _in_log(work: _Work, stderr: Any, live: bool) -> Iterator[Callable[..., None]]:
    told, ended = time.monotonic(), threading.Event()

    def say() -> None:
        nonlocal told
        told = time.monotonic()
        if stderr is not None:
            with contextlib.suppress(OSError, ValueError):  # a log that is full or closed stops no work
                print(work, file=stderr, flush=True)

    def update(done: float, words: str = "") -> None:
        work.done, work.words = done, words
        if not live and time.monotonic() - told >= EVERY:
            say()

    def watch() -> None:
        while not ended.wait(EVERY):
            say()

    if live:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield update
    finally:
        ended.set()


def _in_notebook() -> bool:
    """Whether this is a kernel of IPython, which Jupyter, Colab and others have behind a notebook."""
    python = sys.modules.get("IPython")
    return hasattr(python.get_ipython(), "kernel") if python else False


@contextlib.contextmanager
def _widget(work: _Work) -> Iterator[Callable[..., None]]:
    """The output of a cell, which its kernel replaces; empty in the end."""
    from IPython.display import display  # which a kernel has imported

    def drawn() -> dict[str, str]:
        value = "" if work.share is None else f' value="{work.share:.4f}"'
        return {"text/plain": str(work), "text/html": f"<progress{value}></progress> {html.escape(str(work))}"}

    told, shown = time.monotonic(), display(drawn(), raw=True, display_id=True)

    def update(done: float, words: str = "") -> None:
        nonlocal told
        work.done, work.words = done, words
        if time.monotonic() - told >= REDRAWN:
            told = time.monotonic()
            shown.update(drawn(), raw=True)

    try:
        yield update
    finally:
        shown.update({"text/plain": "", "text/html": ""}, raw=True)
