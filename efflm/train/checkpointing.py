"""The checkpoints of a training run that may die at any moment (formats.checkpoint says how they lie on disk)."""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from efflm import trees
from efflm.cli import run_directory
from efflm.config import Stopped, require
from efflm.formats import arrays, checkpoint, manifest
from efflm.model.params import STACK, is_stacked
from efflm.model.placement import placed
from efflm.parallel import processes
from efflm.train import faults
from efflm.train.step import TrainState
from efflm.train.training import Callback, Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Where a training run keeps its state and how often: every so many steps, and at its end.

    The newest `keep` are kept, and for good those of every `keep_period`-th step (0: none). `about` is any JSON; a
    checkpoint made with another one is refused. branch: the folder of a checkpoint of another run that this one begins
    with, and what of `about` must be the same there.
    """

    directory: Path
    every: int = 0
    keep: int = 2
    keep_period: int = 0
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    branch: tuple[Path, dict[str, Any]] | None = None

    def __post_init__(self):
        require(self.every >= 0, f"checkpoint_every is {self.every}, but must be positive, or 0 for the end only")
        require(self.keep > 0, f"keep is {self.keep}, but must be positive: one checkpoint at least is kept")
        require(self.keep_period >= 0, f"keep_period is {self.keep_period}, but must be positive, or 0 for none")

    def kept(self, steps: list[int]) -> list[int]:
        """Of ascending steps, those to keep."""
        for_good = [step for step in steps if self.keep_period and step % self.keep_period == 0]
        return sorted({*steps[-self.keep :], *for_good})

    def most(self, steps: int) -> int:
        """How many are on disk at once at most, the one being written included, in a run of so many steps."""
        written = -(-steps // self.every) if self.every else 1
        return min(written, self.keep + 1 + (steps // self.keep_period if self.keep_period else 0))


class TrainingRun:
    """The checkpoints of one run: `resume` once, then `save` as often as wanted, inside a `with`.

    A checkpoint is the whole TrainState. It holds no more, since the rows a step sees and its randomness are functions
    of the seed and the step. Training goes on while one is written; leaving the `with` waits for it.
    """

    def __init__(self, policy: Checkpointing):
        self.policy = policy
        self.writer = checkpoint.Writer(policy.directory, policy.kept)

    def __enter__(self) -> "TrainingRun":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
        self.writer.__exit__(kind)
        if error and processes.is_fault(error):
            directory = self.policy.directory
            good = [step for step in checkpoint.steps_in(directory) if manifest.exists(directory / str(step))]
            faults.require_passing(directory / f"faults-{jax.process_index()}.json", good[-1] if good else -1, error)

    def resume(self, like: TrainState) -> TrainState | None:
        """The newest good state, laid out as the abstract `like`, layers stacked or not; None at the start of a run.

        One that is corrupt or half-written is passed over with a warning. Raises InputError if every committed one is
        corrupt, or if the run was started with other settings.
        """
        directory = self.policy.directory
        step = checkpoint.newest_good(directory)
        if step is None:
            require(
                not checkpoint.exists(directory),
                f"no checkpoint is whole: delete the folder {directory.absolute()} to start over, or give another "
                "--run_dir",
            )
            return self.policy.branch and _branched(*self.policy.branch, like)
        self.writer.bad = {other for other in checkpoint.steps_in(directory) if other > step}
        return _restored(directory / str(step), self.policy.about, like)

    def save(self, step: int, state: TrainState) -> None:
        """Begin to write the state after `step` steps; on return it may be donated. Raises what `check` does, of
        this save or the one before it."""
        flat = dict(trees.flatten(state, inside=True))
        self.writer.write(step, flat, self.policy.about | {"stacked": _stacked(flat)})

    def saving(self, asked_to_stop: Callable[[int], str]) -> Callback:
        """Checkpoints as often as the policy says, and when the run is told to stop; then it raises Stopped."""

        @contextlib.contextmanager
        def callback(training: Training) -> Iterator[Callable[[], None]]:
            def after() -> None:
                stop = "" if training.last else asked_to_stop(training.step)
                if stop or training.last or (self.policy.every and training.step % self.policy.every == 0):
                    training.fetch()
                    for flush in training.before_save:
                        flush()
                    self.save(training.step, training.state)
                self.writer.check()
                if stop:
                    self.writer.wait()
                    raise Stopped(
                        f"stopped at step {training.step} of {training.train.steps}, as told by {stop}: the same "
                        f"command goes on from the checkpoint in {self.policy.directory}"
                    )

            yield after

        return callback


def _branched(folder: Path, about: dict[str, Any], like: TrainState) -> TrainState:
    """The state in the folder of a checkpoint of another run. Raises InputError."""
    problem = manifest.problem(folder)
    there = ", ".join(map(str, checkpoint.steps_in(folder.parent))) or "none"
    require(not problem, f"no checkpoint to branch from in {folder}: {problem}; those of {folder.parent}: {there}")
    return _restored(folder, about, like)


def _restored(folder: Path, about: dict[str, Any], like: TrainState) -> TrainState:
    as_stored, there = json.loads(run_directory.to_json(about)), checkpoint.about_of(folder.parent, int(folder.name))
    checkpoint.require_same(as_stored, there, folder.parent)
    flat, inside = dict(trees.flatten(like, inside=True)), folder / checkpoint.ARRAYS
    if there.get("stacked") == _stacked(flat):
        restored = arrays.read(inside, flat)
    else:
        stored, mesh = arrays.described(inside), jax.tree.leaves(like)[0].sharding.mesh
        read = arrays.read(inside, dict(trees.flatten(placed(trees.unflatten(stored), mesh))))
        out = {path: leaf.sharding for path, leaf in flat.items()}
        restored = jax.jit(functools.partial(_restacked, like=flat), out_shardings=out)(read)
    return jax.tree.unflatten(jax.tree.structure(like), [restored[path] for path in flat])


def _stacked(flat: dict[str, Any]) -> bool:
    """Whether layers are stacked in a state, by path."""
    return any(map(is_stacked, flat))


def _restacked(stored: dict[str, jax.Array], like: dict[str, Any]) -> dict[str, jax.Array]:
    """Leaves by path, their layers stacked (blocks_0: a leading axis) or not (block_0, block_1, ...) as in `like`. Of a
    leaf that has no such axis where layers are stacked, as placeholders of optimizers have none, all layers are alike.
    """
    runs = sorted({int(n) for path in (*stored, *like) for n in re.findall(rf"{STACK}(\d+)/", path)})
    layers = len({name for path in (*stored, *like) for name in re.findall(r"\bblock_\d+", path)})
    out = {}
    for path, leaf in like.items():
        if path in stored:
            out[path] = stored[path]
            continue
        head, kind, number, tail = re.fullmatch(rf"(.*?)({STACK}|block_)(\d+)(/.*)", path).groups()
        first = max(n for n in runs if n <= int(number))
        if kind == STACK:
            end = min((n for n in runs if n > first), default=layers)
            each = [stored[f"{head}block_{i}{tail}"] for i in range(first, end)]
            out[path] = each[0] if each[0].shape == leaf.shape else jnp.stack(each)
        else:
            stack = stored[f"{head}{STACK}{first}{tail}"]
            out[path] = stack if stack.shape == leaf.shape else stack[int(number) - first]
    return out
