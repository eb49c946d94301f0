"""A training under way, as the callbacks see it."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from efflm import malloc, trees
from efflm.config import require
from efflm.config.train import TrainConfig
from efflm.train.losses import LossFn
from efflm.train.step import TrainState


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
                self._require_allowed(step, values, leaf)
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
        self._counted_from, self._tokens, self.paused = self.step, [], 0.0

    def _measured(self, waiting: Any, fetched: list[dict[str, Any]], now: float) -> dict[str, Any]:
        """Of the lines that are due: what the clock and the memory say, rates since the last lines before them."""
        counted = [metrics for (step, _), metrics in zip(waiting, fetched) if step > self._counted_from]
        self._tokens += [float(metrics.get("tokens", 0)) for metrics in counted]
        if not self._due:
            return {}
        out, window, steps = {"seconds": round(self.earlier + now - self._began, 4)}, now - self._window, self._tokens
        if steps:
            out |= {"tokens_per_second": round(sum(steps) / window, 1), "step_seconds": window / len(steps)}
        held = [(device.memory_stats() or {}).get("bytes_in_use") for device in jax.local_devices()]
        memory = {"process_bytes": malloc.resident(), "device_bytes": max(filter(None, held), default=None)}
        self._window, self._tokens = now, []
        return out | {name: value for name, value in memory.items() if value is not None}

    def _require_allowed(self, step: int, values: dict[str, float], leaf: int) -> None:
        """That is, there is a lower loss scale to try (1 is the lowest that LossScale does), or on_nan."""
        overflowed = not math.isfinite(values["gradient_norm"]) and values.get("loss_scale", 1) > 1
        paths = [path for path, _ in trees.flatten(self.state.trainable, inside=True)]
        where = f"the first such gradient is that of {paths[leaf]}" if leaf >= 0 else "no gradient is at fault"
        scale = f" at the lowest loss scale, {values['loss_scale']}" if "loss_scale" in values else ""
        require(
            overflowed or self.train.on_nan == "skip",
            f"the loss is {values['loss']} at step {step}, the gradient's norm {values['gradient_norm']}{scale} "
            f"({where}): {self.remedy}",
        )


Callback = Callable[[Training], contextlib.AbstractContextManager[Callable[[], None]]]
