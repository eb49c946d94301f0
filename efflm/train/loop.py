"""The loop around the step: feeding, metrics, a progress bar, a profile. There is no other trainer."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from efflm.config import InputError
from efflm.model.sharding import shardings
from efflm.precision import LossScale
from efflm.train.optimizer import evaluation_params
from efflm.train.step import LossFn, init_state, make_step, place

Batches = Callable[[int], dict[str, np.ndarray]]  # step -> the rows of that step, whoever asks and whenever


def fit(
    loss_fn: LossFn,
    trainable: Any,
    frozen: Any,
    batches: Batches,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    mesh: Mesh,
    seed: int = 0,
    accumulate: int = 1,
    loss_scale: LossScale | None = None,
    title: str = "training",
    log_every: int = 10,
    metrics_file: Path | None = None,
    profile: tuple[int, int, Path] | None = None,
) -> Any:
    """Train for `steps` steps and return the trained tree: Schedule-Free's averaged one where that is the optimizer.

    Metrics go to `metrics_file` as JSON lines, one every `log_every` steps and one for the last;
    their seconds are counted from the end of the first step, which compiles. `profile` is (first
    step, last step, folder): a trace for TensorBoard and Perfetto. A step is dispatched before the metrics of
    the one before it are fetched, so the device never waits for the host. `accumulate` and `loss_scale` as in
    train.step. Raises InputError if the loss is not finite, unless the step was skipped for a lower loss scale.
    """
    state = init_state(trainable, optimizer, mesh, loss_scale)
    frozen = jax.device_put(frozen, shardings(frozen, mesh))
    step_fn = make_step(loss_fn, optimizer, seed, state, accumulate)
    lines = metrics_file.open("w") if metrics_file else None
    pending, started, counted = None, time.perf_counter(), 0
    bar = _Bar(title, steps)
    try:
        for step in range(steps):
            batch = batches(step)
            if profile and step == profile[0]:
                jax.block_until_ready(state)
                jax.profiler.start_trace(str(profile[2]), create_perfetto_trace=True)
            state, metrics = step_fn(state, frozen, place(batch, mesh))
            counted += int(np.sum(batch["segments"] > 0))
            if profile and step == profile[1]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            if pending:
                _report(*pending, bar, lines)
                pending = None
            if (step + 1) % log_every == 0 or step + 1 == steps:
                pending = (step + 1, metrics, counted, time.perf_counter() - started)
            if step == 0:  # the first step compiles: what it took says nothing of the rate
                jax.block_until_ready(state)
                started, counted = time.perf_counter(), 0
            bar.advance(step + 1)
        _report(*pending, bar, lines)
        return evaluation_params(state.optimizer, state.trainable)
    finally:
        bar.close()
        if lines:
            lines.close()


def _report(step: int, metrics: dict[str, jax.Array], tokens: int, seconds: float, bar: "_Bar", lines: Any) -> None:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not math.isfinite(values["loss"]) and not values.get("skipped"):
        raise InputError(
            f"the loss is {values['loss']} at step {step}: lower the learning rate or lengthen the warm-up"
        )
    rate = tokens / seconds if tokens and seconds > 0 else 0.0
    bar.show(values["loss"], rate)
    if lines:
        record = {"step": step, **values, "seconds": round(seconds, 4), "tokens_per_second": round(rate, 1)}
        lines.write(json.dumps(record) + "\n")
        lines.flush()


class _Bar:
    """A progress bar on a terminal; a line now and then elsewhere."""

    def __init__(self, title: str, steps: int):
        self.console, self.title, self.steps, self.words, self.shown = Console(), title, steps, "", 0
        self.started = time.perf_counter()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[words]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task(title, total=steps, words="")
        self.progress.start()

    def show(self, loss: float, rate: float) -> None:
        self.words = f"loss {loss:.3f}  {rate:,.0f} tokens/s"
        self.progress.update(self.task, words=self.words)

    def advance(self, step: int) -> None:
        self.progress.update(self.task, completed=step)
        if not self.console.is_terminal and (step == self.steps or step * 5 // self.steps > self.shown):
            self.shown = step * 5 // self.steps
            left = (time.perf_counter() - self.started) / step * (self.steps - step)
            print(f"  {self.title}: step {step}/{self.steps}  {self.words}  {left:.0f} s left", flush=True)

    def close(self) -> None:
        self.progress.stop()
