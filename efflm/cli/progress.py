"""A bar with the time left for what takes long, on stderr and only where that is a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def bar(
    title: str, total: float | None = None, live: bool = True
) -> contextlib.AbstractContextManager[Callable[[float], None]]:
    """A bar while the context lasts; what it gives is told how much of `total` is done. total: None: not known.

    live: False draws it only when it is told something, for what is being timed: no thread runs beside that.
    """
    console = Console(file=sys.stderr)  # stderr as it is now: others may replace it meanwhile
    columns = [TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    if total is not None:
        columns.insert(2, TaskProgressColumn())
        columns += [TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False)]
    progress = Progress(
        *columns,
        console=console,
        disable=not console.is_terminal,
        transient=True,
        auto_refresh=live,
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # else what is printed would go to stderr
    )

    @contextlib.contextmanager
    def drawn() -> Iterator[Callable[[float], None]]:
        with progress:
            task = progress.add_task(title, total=total)
            yield lambda done: progress.update(task, completed=done, refresh=not live)

    return drawn()


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
