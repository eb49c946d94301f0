"""The training step as a compiled program: for any mesh and with no weights, or run and timed on random tokens."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from efflm import trees
from efflm.cli import progress
from efflm.config.model import ModelConfig
from efflm.config.train import TrainConfig
from efflm.model import init_params
from efflm.parallel import sharding
from efflm.train import trainer
from efflm.train.step import place


def random_task(config: ModelConfig, train: TrainConfig, mesh: Mesh | None = None, seed: int = 0) -> trainer.Task:
    """Training a randomly initialized model on random tokens."""
    batches = lambda step: random_rows(train.batch, train.length, config.vocabulary, step)
    return trainer.model_task(config, train, lambda: init_params(config, seed, mesh), batches)


def training_step(config: ModelConfig, train: TrainConfig, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """The jitted step that trainer.fit runs, and its arguments (state, frozen, batch) without their values.

    `step.lower(*arguments).compile()` is the program; the mesh's devices may be ones that are not attached.
    """
    state, _, step = trainer.prepared(random_task(config, train), mesh)
    rows = jax.ShapeDtypeStruct((train.batch, train.length), jnp.int32, sharding=NamedSharding(mesh, sharding.BATCH))
    return step, (state, {}, dict.fromkeys(random_rows(1, 1, config.vocabulary), rows))


@dataclasses.dataclass(frozen=True)
class TimedStep:
    """A compiled training step at work. seconds: of one step after another, without end; the first ones warm up.

    peak_bytes: arguments and temporaries of the compiled step on one device; state_bytes: of the whole state.
    """

    compile_seconds: float
    peak_bytes: int
    state_bytes: int
    seconds: Iterator[float]


def timed_step(config: ModelConfig, train: TrainConfig, mesh: Mesh) -> TimedStep:
    """The step of a randomly initialized model on one batch of random tokens, ready to be timed."""
    task = random_task(config, train, mesh)
    _, init, _ = trainer.prepared(task, mesh)
    step, arguments = training_step(config, train, mesh)
    start = time.perf_counter()
    with progress.bar(f"compiling the training step in {train.policy}"):
        compiled = step.lower(*arguments).compile()
    compile_seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    peak_bytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    state = init(task.start())
    batch = place(task.batches(0), mesh)
    return TimedStep(compile_seconds, peak_bytes, trees.nbytes(state), _seconds(compiled, state, batch))


def _seconds(compiled: Any, state: Any, batch: Any) -> Iterator[float]:
    while True:
        start = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, {}, batch))
        yield time.perf_counter() - start


def random_rows(batch: int, length: int, vocabulary: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch as data.packing makes it, of random tokens: one document in each sequence."""
    tokens = np.random.default_rng(seed).integers(0, vocabulary, (batch, length + 1)).astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": np.ones((batch, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
    }
