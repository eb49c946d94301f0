"""What a command says and writes of its run: lines with the seconds so far, results.json, and report.html."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from efflm.cli import run_directory
from efflm.report import page


@dataclasses.dataclass(frozen=True)
class Journal:
    """Of one run, from its beginning on. command: does it again."""

    run_dir: str
    command: str
    began: float = dataclasses.field(default_factory=time.perf_counter)

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        return run_directory.machine()

    @property
    def folder(self) -> Path:
        return Path(self.run_dir)

    def say(self, words: str) -> None:
        print(f"[{time.perf_counter() - self.began:4.0f} s] {words}", flush=True)

    def results(self, **found: Any) -> None:
        """Write results.json, in place of what it holds: `found`, the command and the versions."""
        given = {"command": self.command, "versions": self.versions}
        run_directory.write_json(self.folder / "results.json", found | given)

    def report(self, write: Callable[..., None] = page.write, *, made: dict[str, Any] | None = None, **shown: Any):
        """Write report.html and say where it is. write, shown: page.write or what has its arguments; made: what stands
        under "how it was made" beside the versions and the time."""
        took = page.duration(time.perf_counter() - self.began)
        how = page.made(self.versions, **(made or {}), total_time=took)
        write(self.folder / "report.html", **shown, made=how, command=self.command)
        self.say(f"done: open {self.folder / 'report.html'}")
