"""What a command says and writes of its run: lines with the seconds so far, results.json, and report.html."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
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

    @property
    def folder(self) -> Path:
        return Path(self.run_dir)

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        return run_directory.machine()

    def say(self, words: str) -> None:
        print(f"[{time.perf_counter() - self.began:4.0f} s] {words}", flush=True)

    def results(self, facts: Sequence[str], **found: Any) -> None:
        """Write results.json, in place of what it holds. found: rows, other dataclasses, and what JSON has;
        seed, or how many seeds."""
        how = {"protocol": facts, "command": self.command, "versions": self.versions}
        run_directory.write_json(self.folder / "results.json", found | how)

    def report(self, facts: Sequence[str], write: Callable[..., None] = page.write, made: Any = None, **shown: Any):
        """Write report.html and say where it is. write, shown: page.write or what has its arguments; made: what stands
        under "how it was made" beside the versions and the time."""
        took = page.duration(time.perf_counter() - self.began)
        how = page.made(self.versions, **(made or {}), total_time=took)
        write(self.folder / "report.html", facts=facts, made=how, command=self.command, **shown)
        self.say(f"done: open {self.folder / 'report.html'}")
