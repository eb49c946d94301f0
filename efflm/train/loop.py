"""The loop around the step: feeding, metrics, checkpoints, a progress bar, a profile. There is no other trainer."""

import contextlib
import math
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from efflm import trees
from efflm.cli import signals
from efflm.config import Stopped, require
from efflm.config.train import OnNan
from efflm.model.placement import shardings
from efflm.parallel import processes
from efflm.precision import LossScale
from efflm.train.checkpointing import Checkpointing, TrainingRun
from efflm.train.metrics import Metrics
from efflm.train.optimizer import evaluation_params
from efflm.train.step import LossFn, abstract_state, make_init, make_step, place

Batches = Callable[[int], dict[str, Any]]  # step -> the rows of that step (see `place`), whoever asks and whenever
Programs = dict[Hashable, tuple[Callable, Callable]]  # by all that they depend on: the jitted init and step


def fit(
    loss_fn: LossFn,
    start: Callable[[], Any],
    frozen: Any,
    batches: Batches,
    optimizer: optax.GradientTransformation,
    *,
    shapes: Any = None,
    masks: Any = None,
    steps: int,
    mesh: Mesh,
    seed: int = 0,
    accumulate: int = 1,
    loss_scale: LossScale | None = None,
    on_nan: OnNan = "stop",
    title: str = "training",
    remedy: str = "lower the learning rate",
    log_every: int = 10,
    metrics_file: Path | None = None,
    tensorboard: Path | None = None,
    checkpointing: Checkpointing | None = None,
    profile: tuple[int, int, Path] | None = None,
    programs: Programs | None = None,
) -> Any:
    """Train for `steps` steps and return the trained tree: Schedule-Free's averaged one where that is the optimizer.

    start: makes the weights to start from, which are donated, so they must be nobody else's. It is called only if no
    checkpoint is resumed; of the weights nothing but the state stays in memory. shapes: of what it makes, for a `start`
    that cannot be traced by jax.eval_shape.

    Metrics go to `metrics_file` as JSON lines, one every `log_every` steps and one for the last, and to event files in
    the folder `tensorboard`; their seconds are counted from the end of the first step, which compiles. `profile` is
    (first step, last step, folder): a trace for TensorBoard and Perfetto. A step is dispatched before the metrics of
    the one before it are fetched, so the device never waits for the host. `accumulate` and `loss_scale` as in
    train.step. masks: a tree like the weights (ops.mask_tree); what they drop stays as it is. title: of the progress
    bar; "": none. programs: what earlier runs with the same loss and optimizer have compiled, by their shapes; a run
    adds to it. For many short runs: without it each one compiles.

    With `checkpointing`, the run goes on from its newest good checkpoint, to the same metrics and weights as if it had
    never stopped, bit for bit on one device. Every step up to a checkpoint is known to have been finite before that is
    written. SIGTERM or Ctrl-C ends the run after the step in flight with a checkpoint and raises Stopped.

    Raises InputError if the loss or a gradient is not finite, unless the step was skipped: for a lower loss scale, or
    because of on_nan="skip"; and if every step was. These say to do what `remedy` is. Raises it too if a checkpoint
    cannot be written; the one before is left as it is. Raises Interrupted for what the last checkpoint survives:
    lost machines, storage that fails.
    """
    shapes = jax.eval_shape(start) if shapes is None else shapes
    like = abstract_state(shapes, optimizer, mesh, loss_scale, masks)
    init_fn, step_fn = _programs_for(like, loss_fn, optimizer, seed, accumulate, on_nan, programs)

    def excused(values: dict[str, float]) -> bool:
        overflowed = loss_scale is not None and not math.isfinite(values["gradient_norm"])
        return on_nan == "skip" or (overflowed and values["loss_scale"] > 1)  # 1 is the lowest that LossScale tries

    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.begun())
        # Signals are caught until the last checkpoint is written, so this is the last to be left.
        asked_to_stop = stack.enter_context(signals.stop_requests()) if checkpointing else lambda step: ""
        saved = stack.enter_context(TrainingRun(checkpointing)) if checkpointing else None
        state = saved.resume(like) if saved else None
        if state is None:
            state = init_fn(start(), loss_scale, masks)
        first = int(state.step)
        if first:
            print(f"  {title}: going on from step {first} of {steps}", flush=True)
        frozen = jax.device_put(frozen, shardings(frozen, mesh))
        report = stack.enter_context(
            _Report(
                metrics=Metrics(metrics_file if processes.is_first() else None, tensorboard, first),
                bar=_Bar(title, first, steps),
                excused=excused,
                remedy=remedy,
                leaves=[path for path, _ in trees.flatten(shapes, inside=True)],
            )
        )
        traced = False
        for step in range(first, steps):
            batch = batches(step)
            if profile and step == profile[0]:
                jax.block_until_ready(state)
                jax.profiler.start_trace(str(profile[2]), create_perfetto_trace=True)
                traced = True
            state, metrics = step_fn(state, frozen, place(batch, mesh))
            if traced and step == profile[1]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            if report.due:
                report.fetch()
            done, last = step + 1, step + 1 == steps
            if step == first:  # the first step compiles: what it took says nothing of the rate
                jax.block_until_ready(state)
                report.start(done)
            report.add(done, metrics, line=done % log_every == 0 or last)
            report.bar.advance(done)
            if last:  # before the last checkpoint, from which the same command would go on to the same weights
                report.fetch()
                require(
                    int(state.skipped) < steps,
                    f"none of the {steps} steps changed a weight: the loss or a gradient was not finite at each: "
                    f"{remedy}",
                )
            if saved:
                stop = "" if last else asked_to_stop(done)
                if stop or last or (checkpointing.every and done % checkpointing.every == 0):
                    report.fetch()
                    report.metrics.sync()
                    saved.save(done, state)
                saved.check()
                if stop:
                    saved.wait()
                    raise Stopped(
                        f"stopped at step {done} of {steps}, as told by {stop}: the same command goes on from the "
                        f"checkpoint in {checkpointing.directory}"
                    )
        return evaluation_params(state.optimizer, state.trainable)


def _programs_for(like, loss_fn, optimizer, seed, accumulate, on_nan, programs: Programs | None):
    """The jitted init and step of a run, from `programs` where these hold them."""
    programs = {} if programs is None else programs
    key = (loss_fn, optimizer, seed, accumulate, on_nan, jax.tree.structure(like), *jax.tree.leaves(like))
    if key not in programs:
        programs[key] = make_init(optimizer, like), make_step(loss_fn, optimizer, seed, like, accumulate, on_nan)
    return programs[key]


class _Report:
    """Fetches metrics some steps late, checks every step's, and writes those that are due a line."""

    def __init__(
        self,
        metrics: Metrics,
        bar: "_Bar",
        excused: Callable[[dict[str, float]], bool],
        leaves: list[str],
        remedy: str,
    ):
        self.metrics, self.bar, self.excused, self.leaves, self.remedy = metrics, bar, excused, leaves, remedy
        self.waiting: list[tuple[int, dict[str, jax.Array], bool]] = []
        self.due = False
        self.start(0)

    def __enter__(self) -> "_Report":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()
        self.metrics.close()

    def start(self, step: int) -> None:
        """Count seconds from now, and the tokens of the steps after this one."""
        self.started, self.tokens, self.uncounted = time.perf_counter(), 0.0, step

    def add(self, step: int, metrics: dict[str, jax.Array], line: bool) -> None:
        self.waiting.append((step, metrics, line))
        self.due = self.due or line

    def fetch(self) -> None:
        """Wait for the steps added so far. Raises InputError for the first that was not finite."""
        waiting, self.waiting, self.due = self.waiting, [], False
        fetched = jax.device_get([metrics for _, metrics, *_ in waiting])
        seconds = time.perf_counter() - self.started  # now that they are done: the host runs ahead of the device
        for (step, _, line), metrics in zip(waiting, fetched):
            values = {name: float(value) for name, value in metrics.items()}
            leaf = int(values.pop("nonfinite"))
            self.tokens += values.pop("tokens", 0.0) * (step > self.uncounted)
            if not (math.isfinite(values["loss"]) and math.isfinite(values["gradient_norm"])):
                self._require_excuse(step, values, leaf)
            if line:
                rate = self.tokens / seconds if seconds > 0 else 0.0
                self.bar.show(values["loss"], rate)
                taken = {"seconds": round(self.metrics.seconds + seconds, 4), "tokens_per_second": round(rate, 1)}
                self.metrics.write({"step": step, **values, **taken})

    def _require_excuse(self, step: int, values: dict[str, float], leaf: int) -> None:
        where = f"the first such gradient is that of {self.leaves[leaf]}" if leaf >= 0 else "no gradient is at fault"
        scale = f" at the lowest loss scale, {values['loss_scale']}" if "loss_scale" in values else ""
        require(
            self.excused(values),
            f"the loss is {values['loss']} at step {step}, the gradient's norm {values['gradient_norm']}{scale} "
            f"({where}): {self.remedy}",
        )


class _Bar:
    """A progress bar on a terminal; a line now and then elsewhere. Without a title neither."""

    def __init__(self, title: str, first: int, steps: int):
        self.console, self.title, self.words = Console(), title, ""
        self.first, self.steps, self.shown = first, steps, first * 5 // steps
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
            disable=not (self.console.is_terminal and title),
        )
        self.task = self.progress.add_task(title, total=steps, completed=first, words="")
        self.progress.start()

    def show(self, loss: float, rate: float) -> None:
        self.words = f"loss {loss:.3f}" + (f"  {rate:,.0f} tokens/s" if rate else "")
        self.progress.update(self.task, words=self.words)

    def advance(self, step: int) -> None:
        self.progress.update(self.task, completed=step)
        if self.title and not self.console.is_terminal and (step == self.steps or step * 5 // self.steps > self.shown):
            self.shown = step * 5 // self.steps
            left = (time.perf_counter() - self.started) / (step - self.first) * (self.steps - step)
            print(f"  {self.title}: step {step}/{self.steps}  {self.words}  {left:.0f} s left", flush=True)

    def close(self) -> None:
        self.progress.stop()
