"""What watches a training: a bar, lines of metrics, a profile, validation, a watchdog.

A callback is a function of the Training that gives a context manager: entered before the first step, left after the
last one or on an error. What it yields is called after every step. It may add scalars to `training.metrics`, and to
`training.sinks` a function of each line of metrics, a dict that the sinks after it see as it leaves it.
"""

import collections
import contextlib
import functools
import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from efflm.cli import progress
from efflm.config import InputError
from efflm.parallel import processes, sharding
from efflm.train.metrics import Metrics
from efflm.train.optimizer import evaluation_params
from efflm.train.step import place
from efflm.train.training import Callback, Training


def nothing() -> None:
    pass


def _told(generator: Callable[..., Iterator[Callable[[], None]]]) -> Callable[..., Callback]:
    """lines(file) in place of lines(training, file): a function of all but the Training that gives the callback."""

    @functools.wraps(generator)
    def given(*settings: Any) -> Callback:
        return lambda training: contextlib.contextmanager(generator)(training, *settings)

    return given


@contextlib.contextmanager
def bar(training: Training) -> Iterator[Callable[[], None]]:
    """A progress bar (cli.progress), and a line for the last step; where stdout is no terminal, one a fifth too."""
    title, steps, began = training.title, training.train.steps, time.perf_counter()
    words, parts = "", 1 if sys.stdout is not None and sys.stdout.isatty() else 5
    shown = training.first * parts // steps

    def show(line: dict[str, Any]) -> None:
        nonlocal words
        words = f"loss {line['loss']:.3f}"
        words += f"  validation {line['validation_loss']:.3f}" if "validation_loss" in line else ""
        words += f"  {line['tokens_per_second']:,.0f} tokens/s" if line.get("tokens_per_second") else ""

    def after() -> None:
        nonlocal shown
        step = training.step
        if training.last:  # so that the last words are those of the last line
            training.fetch()
        update(step, f"step {step}/{steps}  {words}")
        if training.last or step * parts // steps > shown:
            shown = step * parts // steps
            left = (time.perf_counter() - began) / (step - training.first) * (steps - step)
            print(f"  {title}: step {step}/{steps}  {words}  {left:.0f} s left", flush=True)

    training.sinks.append(show)
    with progress.bar(title, steps, done=training.first) as update:
        yield after


@_told
def lines(training: Training, file: Path | None, tensorboard: Path | None = None) -> Iterator[Callable[[], None]]:
    """Metrics as JSON lines, one every train.log_every steps and one for the last, and as event files in a folder."""
    with contextlib.closing(Metrics(file if processes.is_first() else None, tensorboard, training.first)) as metrics:
        training.earlier = metrics.seconds
        training.sinks.append(metrics.write)
        training.before_save.append(metrics.sync)
        yield nothing


@_told
def utilization(training: Training, step_flops: float, peak: float) -> Iterator[Callable[[], None]]:
    """In each line the share of `peak`, FLOP/s of all devices, that a step's FLOPs are. To come before `lines`."""

    def sink(line: dict[str, Any]) -> None:
        if "step_seconds" in line:
            line["flop_utilization"] = round(step_flops / line["step_seconds"] / peak, 4)

    training.sinks.append(sink)
    yield nothing


@_told
def profile(training: Training, first: int, last: int, folder: Path) -> Iterator[Callable[[], None]]:
    """A trace of these steps for TensorBoard and Perfetto: of those of them that this life of the run has."""
    traced = False

    def switch() -> None:
        nonlocal traced
        if traced != (first <= training.step <= last):  # the next step's number
            jax.block_until_ready(training.state)
            traced = not traced
            jax.profiler.start_trace(str(folder), create_perfetto_trace=True) if traced else jax.profiler.stop_trace()

    switch()
    try:
        yield switch
    finally:
        if traced:
            jax.profiler.stop_trace()


@_told
def validation(
    training: Training, batches: Sequence[dict[str, Any]], every: int, name: str = "validation_loss"
) -> Iterator[Callable[[], None]]:
    """The mean loss on the same batches, as a rule held out, every so many steps and at the end, under this name: the
    cross-entropy where a loss has other parts. Its seconds do not count in rates."""

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
            training.metrics[name] = sum(float(loss * weight) for loss, weight in found) / total
            training.show()
            training.paused += time.perf_counter() - began

    yield after


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

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield lambda: dispatched.append((training.step, training.metrics["loss"]))
    finally:
        over.set()
        thread.join()  # a thread that is in JAX when Python ends aborts the process


@_told
def wandb(training: Training, project: str, folder: Path, about: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """The lines in a project of Weights & Biases, which must be installed; one run for each folder."""
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
