"""What watches a training: a bar, lines of metrics, a profile, validation, a watchdog.

A callback is a function of the Training that gives a context manager: entered before the first step, left after the
last one or on an error. What it yields is called after every step. It may add scalars to `training.metrics`, and to
`training.sinks` a function of each line of metrics, a dict that the sinks after it see as it leaves it.
"""

import collections
import contextlib
import dataclasses
import hashlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from efflm import malloc
from efflm.config import InputError, require
from efflm.config.train import TrainConfig
from efflm.parallel import processes, sharding
from efflm.train.losses import LossFn
from efflm.train.metrics import Metrics
from efflm.train.optimizer import evaluation_params
from efflm.train.step import TrainState, place


@dataclasses.dataclass(kw_only=True)
class Training:
    """A training under way. It fetches metrics some steps late, checks every step's, and makes the lines that are due.

    first: the step it started or was resumed at; step: how many are done. metrics: of the last step, on the device
    until they are fetched. rate: step -> learning rate. sinks: are given every line. before_save: called once all lines
    are written, before a checkpoint that would outlive them. Seconds are counted from the end of the first step, which
    compiles; `paused` of them do not count.
    """

    train: TrainConfig
    loss_fn: LossFn
    frozen: Any
    mesh: Mesh
    title: str
    remedy: str
    first: int
    rate: Callable[[Any], Any] | None
    scaled: bool
    leaves: list[str]
    step: int = 0
    state: TrainState | None = None
    sinks: list[Callable[[dict[str, Any]], None]] = dataclasses.field(default_factory=list)
    before_save: list[Callable[[], None]] = dataclasses.field(default_factory=list)
    earlier: float = 0.0  # seconds that the run had taken when it was resumed
    paused: float = 0.0

    def __post_init__(self):
        self.step = self.first
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self._due: set[int] = set()
        self._start_counting()

    @property
    def last(self) -> bool:
        return self.step == self.train.steps

    @property
    def metrics(self) -> dict[str, Any]:
        return self._waiting[-1][1]

    def add(self, state: TrainState, metrics: dict[str, jax.Array]) -> None:
        """One more step was dispatched."""
        if self._due:
            self.fetch()
        self.state, self.step = state, self.step + 1
        self._waiting.append((self.step, dict(metrics)))
        if self.last or self.step % self.train.log_every == 0:
            self.show()
        if self.step == self.first + 1:
            jax.block_until_ready(state)
            self._start_counting()

    def show(self) -> None:
        """Make a line of this step."""
        self._due.add(self.step)

    def fetch(self) -> None:
        """Wait for the steps added so far. Raises InputError for the first that was not finite."""
        waiting, self._waiting = self._waiting, []
        fetched = jax.device_get([metrics for _, metrics in waiting])
        now = time.perf_counter() - self.paused  # now that they are done: the host runs ahead of the device
        measured = self._measured(waiting, fetched, now)
        for (step, _), metrics in zip(waiting, fetched):
            values = {name: float(value) for name, value in metrics.items()}
            leaf = int(values.pop("nonfinite"))
            values.pop("tokens", None)
            if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
                self._require_excuse(step, values, leaf)
            if step in self._due:
                self._due.discard(step)
                if self.rate:
                    values["learning_rate"] = float(self.rate(step - 1 - values.get("skipped", 0)))
                line = {"step": step, **values, **measured}
                for sink in self.sinks:
                    sink(line)
            require(
                values.get("skipped", 0) < self.train.steps,
                f"none of the {step} steps changed a weight: the loss or a gradient was not finite at each: "
                f"{self.remedy}",
            )

    def _start_counting(self) -> None:
        """Count seconds from now, and the tokens of the steps after this one."""
        self._began = self._window = time.perf_counter()
        self._counted_from, self._tokens, self._steps, self.paused = self.step, 0.0, 0, 0.0

    def _measured(self, waiting: Any, fetched: list[dict[str, Any]], now: float) -> dict[str, Any]:
        """Of the lines that are due: what the clock and the memory say, rates since the last lines before them."""
        counted = [metrics for (step, _), metrics in zip(waiting, fetched) if step > self._counted_from]
        self._tokens, self._steps = (
            self._tokens + sum(float(m.get("tokens", 0)) for m in counted),
            self._steps + len(counted),
        )
        if not self._due:
            return {}
        out, window = {"seconds": round(self.earlier + now - self._began, 4)}, now - self._window
        if self._steps:
            out |= {"tokens_per_second": round(self._tokens / window, 1), "step_seconds": window / self._steps}
        held = [(device.memory_stats() or {}).get("bytes_in_use") for device in jax.local_devices()]
        memory = {"process_bytes": malloc.resident(), "device_bytes": max(filter(None, held), default=None)}
        self._window, self._tokens, self._steps = now, 0.0, 0
        return out | {name: value for name, value in memory.items() if value is not None}

    def _require_excuse(self, step: int, values: dict[str, float], leaf: int) -> None:
        """That is, a lower loss scale to try (1 is the lowest that LossScale does), or on_nan."""
        overflowed = self.scaled and not math.isfinite(values["gradient_norm"]) and values["loss_scale"] > 1
        where = f"the first such gradient is that of {self.leaves[leaf]}" if leaf >= 0 else "no gradient is at fault"
        scale = f" at the lowest loss scale, {values['loss_scale']}" if "loss_scale" in values else ""
        require(
            overflowed or self.train.on_nan == "skip",
            f"the loss is {values['loss']} at step {step}, the gradient's norm {values['gradient_norm']}{scale} "
            f"({where}): {self.remedy}",
        )


Callback = Callable[[Training], contextlib.AbstractContextManager[Callable[[], None]]]


def nothing() -> None:
    pass


@contextlib.contextmanager
def bar(training: Training) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal; a line now and then elsewhere."""
    console, title, steps, began = Console(), training.title, training.train.steps, time.perf_counter()
    words, shown = "", training.first * 5 // steps
    columns = [
        TextColumn(text) for text in ("{task.description}", "{task.completed}/{task.total}", "{task.fields[words]}")
    ]
    columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
    drawn = Progress(columns[0], BarColumn(), *columns[1:], console=console, disable=not console.is_terminal)
    task = drawn.add_task(title, total=steps, completed=training.first, words="")

    def show(line: dict[str, Any]) -> None:
        nonlocal words
        words = f"loss {line['loss']:.3f}"
        words += f"  validation {line['validation_loss']:.3f}" if "validation_loss" in line else ""
        words += f"  {line['tokens_per_second']:,.0f} tokens/s" if line.get("tokens_per_second") else ""
        drawn.update(task, words=words)

    def after() -> None:
        nonlocal shown
        step = training.step
        if training.last:  # so that the last words are those of the last line
            training.fetch()
        drawn.update(task, completed=step)
        if not console.is_terminal and (training.last or step * 5 // steps > shown):
            shown = step * 5 // steps
            left = (time.perf_counter() - began) / (step - training.first) * (steps - step)
            print(f"  {title}: step {step}/{steps}  {words}  {left:.0f} s left", flush=True)

    training.sinks.append(show)
    with drawn:
        yield after


def lines(file: Path | None, tensorboard: Path | None = None) -> Callback:
    """Metrics as JSON lines, one every train.log_every steps and one for the last, and as event files in a folder."""

    @contextlib.contextmanager
    def callback(training: Training) -> Iterator[Callable[[], None]]:
        with contextlib.closing(
            Metrics(file if processes.is_first() else None, tensorboard, training.first)
        ) as metrics:
            training.earlier = metrics.seconds
            training.sinks.append(metrics.write)
            training.before_save.append(metrics.sync)
            yield nothing

    return callback


def utilization(step_flops: float, peak: float) -> Callback:
    """In each line the share of `peak`, FLOP/s of all devices, that a step's FLOPs are. To come before `lines`."""

    def sink(line: dict[str, Any]) -> None:
        if "step_seconds" in line:
            line["flop_utilization"] = round(step_flops / line["step_seconds"] / peak, 4)

    @contextlib.contextmanager
    def callback(training: Training) -> Iterator[Callable[[], None]]:
        training.sinks.append(sink)
        yield nothing

    return callback


def profile(first: int, last: int, folder: Path) -> Callback:
    """A trace of these steps for TensorBoard and Perfetto: of those of them that this life of the run has."""

    @contextlib.contextmanager
    def callback(training: Training) -> Iterator[Callable[[], None]]:
        traced = False

        def switch() -> None:
            nonlocal traced
            if traced != (first <= training.step <= last):  # the next step's number
                jax.block_until_ready(training.state)
                traced = not traced
                jax.profiler.start_trace(
                    str(folder), create_perfetto_trace=True
                ) if traced else jax.profiler.stop_trace()

        switch()
        try:
            yield switch
        finally:
            if traced:
                jax.profiler.stop_trace()

    return callback


def validation(batches: Sequence[dict[str, Any]], every: int) -> Callback:
    """The mean loss on the same held-out batches every so many steps and at the end, as "validation_loss": the
    cross-entropy where a loss has other parts. Its seconds do not count in rates."""

    @contextlib.contextmanager
    def callback(training: Training) -> Iterator[Callable[[], None]]:
        @jax.jit
        @sharding.on_mesh(training.mesh)
        def evaluate(moments: Any, trainable: Any, frozen: Any, batch: Any) -> tuple[jax.Array, Any]:
            weights = evaluation_params(moments, trainable)
            loss, parts = training.loss_fn(weights, frozen, batch, jax.random.key(0))
            return parts.get("cross_entropy", loss), parts.get("weight", 1.0)

        def after() -> None:
            if training.last or training.step % every == 0:
                state = jax.block_until_ready(training.state)
                began, told = time.perf_counter(), (state.optimizer, state.trainable, training.frozen)
                found = jax.device_get([evaluate(*told, place(batch, training.mesh)) for batch in batches])
                total = sum(float(weight) for _, weight in found)
                training.metrics["validation_loss"] = sum(float(loss * weight) for loss, weight in found) / total
                training.show()
                training.paused += time.perf_counter() - began

        yield after

    return callback


@contextlib.contextmanager
def watchdog(training: Training, least: float = 60.0, times: float = 10.0, look: float = 1.0) -> Iterator[Callable]:
    """A line on stderr when no step has ended for `least` seconds, and `times` as long as a step takes: a device, the
    network or the storage of the text may hang. Steps are looked at every `look` seconds, in a thread of its own."""
    dispatched: collections.deque[tuple[int, jax.Array]] = collections.deque()
    over = threading.Event()

    def watch() -> None:
        ended, told, began, since = training.first, training.first, None, 0.0
        while not over.wait(look):
            while dispatched and dispatched[0][1].is_ready():
                ended, since = dispatched.popleft()[0], time.monotonic()
                began = began or (ended, since)  # the first step compiles, for as long as it takes
            if began is None or ended == told:
                continue
            usual, silent = (since - began[1]) / max(ended - began[0], 1), time.monotonic() - since
            if silent > max(least, times * usual):
                told = ended
                print(
                    f"warning: no step has ended for {silent:.0f} s, since step {ended} of {training.train.steps}: if "
                    "nothing else comes, stop the run and start it again",
                    file=sys.stderr,
                    flush=True,
                )

    threading.Thread(target=watch, name="watchdog", daemon=True).start()
    try:
        yield lambda: dispatched.append((training.step, training.metrics["loss"]))
    finally:
        over.set()


def wandb(project: str, folder: Path, about: dict[str, Any]) -> Callback:
    """The lines in a project of Weights & Biases, which must be installed; one run for each folder."""

    @contextlib.contextmanager
    def callback(training: Training) -> Iterator[Callable[[], None]]:
        if not processes.is_first():
            yield nothing
            return
        try:
            import wandb as client  # here, for its only use: it need not be installed
        except ImportError:
            raise InputError(
                f"wandb is {project!r}, but wandb is not installed: pip install wandb, or leave it out"
            ) from None
        place = folder.absolute()
        name = hashlib.sha256(str(place).encode()).hexdigest()[:16]
        with client.init(project=project, name=place.name, dir=place, id=name, resume="allow", config=about) as run:
            training.sinks.append(lambda line: run.log(line, step=line["step"]))
            yield nothing

    return callback
