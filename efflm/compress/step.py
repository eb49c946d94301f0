"""What every compression shares: the context it runs in and the record it leaves."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from efflm import ops, trees
from efflm.cli import run_directory
from efflm.config import flag, require, require_positive
from efflm.config.train import TrainSettings
from efflm.model import LanguageModel
from efflm.train.trainer import Batches
from efflm.train.training import Callback


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """The calibration text: what steps that need it see the model read"""

    rows: int = flag(128, "sequences of the training split")
    length: int = flag(512, "tokens in each; no more than the model reads")

    def __post_init__(self):
        require_positive(self, "rows", "length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What a step may use beside the model.

    batches: step -> a batch to train on (see data.packing). calibration: a batch whose activations a step may look at.
    teacher: what to imitate; a recipe fills in the model it started from. corpus, tokenizer: digests of the text that
    batches and calibration are from and of what made tokens of it, for the records. metrics: the file that a step which
    trains writes its metrics to; of a recipe the folder, in which each step has a file. watched: callbacks of such a
    step's training, which may add to its metrics (see train.callbacks).
    cache: the folder that a teacher's cache is kept in; None: one that is removed after use.
    """

    batches: Batches | None = None
    calibration: dict[str, np.ndarray] | None = None
    teacher: LanguageModel | None = None
    seed: int = 0
    corpus: str = ""
    tokenizer: str = ""
    metrics: Path | None = None
    watched: tuple[Callback, ...] = ()
    cache: Path | None = None
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Record:
    """What a step did, for the lineage of a model.

    step: its name; settings: as `settings` gives them, and under "removed" what a search for a target found. leaves:
    the weights it changed. seed: of the context. corpus, tokenizer: digests of the text it used, "" where it used none.
    predicted_bytes: of the tensors of the model it made, as a file holds them. parent: the digest of the model it was
    applied to.
    """

    step: str
    settings: dict[str, Any]
    leaves: tuple[str, ...]
    seed: int
    corpus: str
    tokenizer: str
    predicted_bytes: int
    parent: str


class Step(Protocol):
    """A compression: from a model to a model. Steps are frozen dataclasses and chain in any order.

    A step says of itself, where it is so: trains = True, it needs text to train on; calibrates = True, it looks at what
    the model computes of calibration text; at = "bits", the field that a value after its name sets, as in gptq@3; or a
    function from that value to the text of each field that it sets.
    """

    def __call__(self, model: LanguageModel, context: Context) -> tuple[LanguageModel, Record]: ...


def trains(steps: Sequence[Step]) -> bool:
    """Whether a step of the chain needs text to train on."""
    return any(getattr(step, "trains", False) for step in steps)


def calibrates(steps: Sequence[Step]) -> bool:
    """Whether a step of the chain looks at what the model computes of calibration text."""
    return any(getattr(step, "calibrates", False) for step in steps)


def reads_text(steps: Sequence[Step]) -> bool:
    return trains(steps) or calibrates(steps)


def record(
    step: Step,
    before: LanguageModel,
    after: LanguageModel,
    context: Context,
    removed: Mapping[str, float] | None = None,
) -> Record:
    """The Record of a step. removed: what a search for a target found. Raises InputError if the step changed nothing:
    that is never what was meant."""
    old, new = dict(trees.flatten(before.params)), dict(trees.flatten(after.params))
    uses_text = reads_text([step])
    changed = tuple(path for path, leaf in new.items() if not _same(old.get(path), leaf))
    same = not changed and old.keys() == new.keys() and before.config == after.config
    require(
        not same or not _same(before.masks, after.masks),
        f"{step} changed nothing: the model already is what it makes, so leave this step out",
    )
    return Record(
        step=type(step).__name__,
        settings=settings(step) | ({"removed": dict(removed)} if removed else {}),
        leaves=changed,
        seed=context.seed,
        corpus=context.corpus if uses_text else "",
        tokenizer=context.tokenizer if uses_text else "",
        predicted_bytes=ops.stored_nbytes(after.params, after.masks),
        parent=digest(before),
    )


def settings(step: Step) -> dict[str, Any]:
    """Its fields but those that are None; of those that every training has, beyond steps and learning rate, only what
    is not the default."""
    usual = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
    usual = {name: usual.get(name) for name in usual.keys() - type(step).__annotations__.keys()}
    usual |= dict.fromkeys(("steps", "learning_rate"))
    return {name: value for name, value in dataclasses.asdict(step).items() if value != usual.get(name)}


def _same(old: Any, new: Any) -> bool:
    if old is new:
        return True
    if old is None or jax.tree.structure(old) != jax.tree.structure(new):
        return False
    return all(map(trees.equal, jax.tree.leaves(old), jax.tree.leaves(new)))


def digest(model: LanguageModel) -> str:
    """A short SHA-256 of the config and of every array of a model, masks included: two models with the same digest are
    the same, on whatever devices they are."""
    out = hashlib.sha256(run_directory.to_json(model.config.to_dict(), sort_keys=True).encode())
    for path, array in trees.flatten({"params": model.params, "masks": dict(model.masks or {})}, inside=True):
        out.update(f"{path} {array.dtype} {array.shape}".encode())
        out.update(np.ascontiguousarray(trees.on_host(array)).view(np.uint8).data)
    return out.hexdigest()[:16]
