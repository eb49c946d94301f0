"""Where a run's metrics go: JSON lines, and TensorBoard's event files beside them."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from efflm.cli import run_directory
from efflm.config import require

OWN = ".efflm"  # how the names of our event files end, so that no others are deleted


class Metrics:
    """One line a record in `file`, each step once and in ascending order, however often the run was resumed.

    Opened at the step a run (re)starts from, it drops the lines beyond it: those steps will be trained again. The JSON
    lines are what counts; event files are written anew from the kept lines, since what TensorBoard has once seen
    cannot be taken back line by line. With no file, nothing is written. Raises InputError for a file of something else.
    """

    def __init__(self, file: Path | None, tensorboard: Path | None, step: int):
        self.lines = self.events = None
        self.seconds = 0.0  # that the run had taken at the last kept line
        if file is None:
            return
        _require_own(file)
        kept = [(text, record) for text, record in read(file) if record["step"] <= step]
        self.seconds = kept[-1][1].get("seconds", 0.0) if kept else 0.0
        run_directory.write_whole(file, "".join(text + "\n" for text, _ in kept))
        self.lines = file.open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter  # here, for its only use: --help must not wait for it

            for old in tensorboard.glob(f"events.out.tfevents.*{OWN}"):
                old.unlink()
            self.events, now = SummaryWriter(str(tensorboard), max_queue=1, filename_suffix=OWN), time.time()
            for _, record in kept:
                self._show(record, now - self.seconds + record.get("seconds", 0.0))

    def write(self, record: dict[str, Any]) -> None:
        if self.lines:
            self.lines.write(run_directory.to_json(record) + "\n")
            self.lines.flush()
        if self.events:
            self._show(record, time.time())
            self.events.flush()

    def sync(self) -> None:
        """Put the lines on disk: a checkpoint must not outlive the lines before it."""
        if self.lines:
            os.fsync(self.lines.fileno())

    def close(self) -> None:
        for sink in (self.lines, self.events):
            if sink:
                sink.close()

    def _show(self, record: dict[str, Any], when: float) -> None:
        for name, value in record.items():
            if name != "step":
                value = math.nan if value is None else value  # the line of a number that was not finite
                self.events.add_scalar(f"train/{name}", value, record["step"], walltime=when)


def _require_own(file: Path) -> None:
    """Raise InputError for a file that is not of a run of ours: lines that are not known to be so would be dropped."""
    start = '{"step": '
    found = file.read_text(errors="replace")[: len(start)] if file.exists() else ""
    require(
        start.startswith(found),
        f"{file} holds something other than the metrics of a run: give another --run_dir, or rename it",
    )


def read(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """The whole lines of the file, as text and as records: the last one may have been cut off."""
    out = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            record = json.loads(text)
        except ValueError:
            break
        out.append((text, record))
    return out


def curve(file: Path, name: str = "loss") -> tuple[np.ndarray, np.ndarray]:
    """The steps and the values of one metric, where a line has it; NaN where it was not finite."""
    records = [record for _, record in read(file) if name in record]
    return tuple(np.array([record[key] for record in records], np.float64) for key in ("step", name))


def curves(folder: Path, name: str) -> list[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """The losses of the steps of a recipe that trained, of which each has a file in the folder, by name."""
    files = sorted(folder.glob("*.jsonl"))
    titles = [name if len(files) == 1 else f"{name}, {file.stem.partition('_')[2]}" for file in files]
    return [(title, found) for title, found in zip(titles, map(curve, files)) if len(found[0])]
