"""The checkpoints of a training run that may die at any moment (formats.checkpoint says how they lie on disk)."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from efflm import trees
from efflm.cli import run_directory
from efflm.config import require
from efflm.formats import arrays, checkpoint, manifest
from efflm.parallel import processes
from efflm.train import faults
from efflm.train.step import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Where a training run keeps its state and how often: every so many steps, and at its end.

    The newest `keep` are kept, and for good those of every `keep_period`-th step (0: none). `about` is any JSON; a
    checkpoint made with another one is refused.
    """

    directory: Path
    every: int = 0
    keep: int = 2
    keep_period: int = 0
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

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
        """The newest good state, laid out as the abstract `like`; None at the start of a run.

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
            return None
        as_stored = json.loads(run_directory.to_json(self.policy.about))
        checkpoint.require_same(as_stored, checkpoint.about_of(directory, step), directory)
        self.writer.bad = {other for other in checkpoint.steps_in(directory) if other > step}
        flat = dict(trees.flatten(like, inside=True))
        restored = arrays.read(directory / str(step) / checkpoint.ARRAYS, flat)
        return jax.tree.unflatten(jax.tree.structure(like), [restored[path] for path in flat])

    def save(self, step: int, state: TrainState) -> None:
        """Begin to write the state after `step` steps; on return it may be donated. Raises what `check` does, of
        this save or the one before it."""
        self.writer.write(step, dict(trees.flatten(state, inside=True)), self.policy.about)

    def check(self) -> None:
        """Raise if the last save has failed by now: InputError, or Interrupted for what another try may mend."""
        self.writer.check()

    def wait(self) -> None:
        """Return when the last save is committed. Raises what `check` does."""
        self.writer.wait()
