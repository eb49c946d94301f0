"""Checkpoints: arrays that are whole or not there at all, of finished models (here) and of training runs (train).

    DIRECTORY/STEP/arrays/         every array under its path, by Orbax, each process writing its own parts
    DIRECTORY/STEP/about.json      what the arrays are and how they were made
    DIRECTORY/STEP/manifest.json   the SHA-256 of each of these files, written last: the commit (formats.manifest)

Old checkpoints go only once the new one is committed, which is why Orbax's own manager, which knows no manifest,
does not do it.
"""

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from efflm import trees
from efflm.cli import run_directory
from efflm.config import InputError, require
from efflm.config.model import ModelConfig
from efflm.config.written import size
from efflm.formats import arrays, manifest
from efflm.model import LanguageModel, params, placement
from efflm.model_files import read_object
from efflm.ops.storage import array_shapes, from_flat, is_dtype_of, to_flat
from efflm.parallel import processes

ARRAYS = "arrays"  # the folder of a step in which Orbax writes
LOOKS, GONE = 40, 4  # at what a failed save leaves: how often at most, and how often in turn nothing is there


def save(directory: Path, step: int, model: LanguageModel, about: dict[str, Any]) -> None:
    """Write the model under directory/<step>, whole or not at all. `about` is any JSON that tells how it was made."""
    flat, formats = to_flat(model.params)
    flat |= {f"masks/{path}": mask for path, mask in (model.masks or {}).items()}
    leaves = {path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name} for path, leaf in flat.items()}
    described = {"config": model.config.to_dict(), "formats": formats, "leaves": leaves, "about": about}
    with Writer(directory, lambda _: [step]) as writer:
        writer.write(step, flat, described)


def exists(directory: Path) -> bool:
    """Whether a whole checkpoint lies there."""
    return any(manifest.exists(directory / str(step)) for step in steps_in(directory))


def recorded(directory: Path) -> dict[str, Any]:
    """What the newest committed checkpoint there, of a model or of a training run, says of how it was made; {} where
    there is none. Nothing is verified: who reads the arrays does that."""
    for step in reversed(steps_in(directory)):
        if manifest.exists(directory / str(step)):
            with contextlib.suppress(InputError):
                found = about_of(directory, step)
                return found.get("about", found)
    return {}


def load(directory: Path, mesh: Mesh) -> tuple[LanguageModel, dict[str, Any]]:
    """The newest model under `directory`, laid on the mesh, and its `about`. Raises InputError."""
    return read(newest(directory), mesh)


def newest(directory: Path) -> Path:
    """The folder of the newest checkpoint under `directory` that is whole. Raises InputError if there is none."""
    require(steps_in(directory) != [], f"no checkpoint in {directory}: give the directory of a training run")
    step = newest_good(directory)
    require(
        step is not None,
        f"no checkpoint is whole: delete the folder {directory.absolute()} and train again, or give another model",
    )
    return directory / str(step)


def read(folder: Path, mesh: Mesh) -> tuple[LanguageModel, dict[str, Any]]:
    """The model in the folder of one checkpoint, laid on the mesh, and its `about`. Raises InputError."""
    about = read_object(folder, "about.json")
    try:
        config, formats = ModelConfig.from_dict(about["config"]), about["formats"]
        leaves = {
            path: jax.ShapeDtypeStruct(
                shape, dtype, sharding=jax.NamedSharding(mesh, placement.partition_spec(path, shape, mesh))
            )
            for path, (shape, dtype) in _arrays_of(config, formats, about["leaves"]).items()
        }
        how_made = dict(about["about"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{folder} cannot be read as a model ({str(error)[:300]}): give another") from error
    flat = arrays.read(folder / ARRAYS, leaves)
    masks = {path.removeprefix("masks/"): flat.pop(path) for path in leaves if path.startswith("masks/")}
    return LanguageModel(config, from_flat(flat, formats), masks or None), how_made


def _arrays_of(
    config: ModelConfig, formats: dict[str, Any], leaves: dict[str, Any]
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{path: (shape, dtype)} of every array, before any is read. Raises InputError unless they are just those of such a
    model."""
    table, wanted = params.table(config), {}
    unknown = sorted(formats.keys() - table.keys())
    require(not unknown, f"{(unknown or [''])[0]:.80} is no weight of the config")
    for path, param in table.items():
        wanted |= array_shapes(path, param.shape, formats.get(path), leaves)
        wanted |= {mask: param.shape for mask in (f"masks/{path}",) if mask in leaves}
    found = {path: tuple(leaf.get("shape", ())) for path, leaf in leaves.items()}
    differ = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
    first = (differ or [""])[0]
    require(
        not differ, f"{first:.80} has shape {found.get(first)!s:.80}, but the config says {wanted.get(first)!s:.80}"
    )
    out = {}
    for path, shape in wanted.items():
        weight, _, part = path.rpartition("/")
        dtype = np.dtype(leaves[path].get("dtype", "object"))
        good = dtype.kind == "b" if path.startswith("masks/") else is_dtype_of(dtype, part, formats.get(weight))
        require(good, f"{path} is stored as {dtype}, which is not what such a weight is made of")
        out[path] = shape, dtype
    return out


def require_same(wanted: dict[str, Any], found: dict[str, Any], directory: Path) -> None:
    """Raise InputError naming the first setting in which a checkpoint differs from what this run asks for."""
    for name, value in wanted.items():
        other = found.get(name)
        require(
            value == other,
            f"the checkpoint in {directory} was made with {name}={other}, but this run asks for {value}: give another "
            "--run_dir, or the same settings",
        )


# --- files ---------------------------------------------------------------------------------------------------------


class Writer:
    """Writes one checkpoint at a time, in a thread of its own, and then drops the ones that `kept` leaves out."""

    def __init__(self, directory: Path, kept: Callable[[list[int]], list[int]]):
        self.directory, self.kept = directory.absolute(), kept
        self.bad: set[int] = set()  # steps whose checkpoints are known not to be whole: they go with the next commit
        self.orbax = self.thread = self.error = None
        self.closing = contextlib.ExitStack()
        self.named = self.closing.enter_context(arrays.plainly_named(self.directory))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self.thread:
            self.thread.join()
        if self.orbax:
            self.orbax.close()
        self.closing.close()
        if kind is None:  # else there is a first error already
            self.check()

    def wait(self) -> None:
        if self.thread:
            self.thread.join()
        self.check()

    def check(self) -> None:
        error, self.error = self.error, None
        if error:
            raise error

    def write(self, step: int, leaves: dict[str, jax.Array], about: dict[str, Any]) -> None:
        self.wait()
        folder = self.directory / str(step)
        try:
            if processes.is_first():
                manifest.remove(folder)  # what an earlier life of this run has left there, half-written or corrupt
                folder.mkdir(parents=True, exist_ok=True)
                free, needed = shutil.disk_usage(self.directory).free, trees.nbytes(leaves)
                if free < needed:
                    raise OSError(f"{size(free)} free, {size(needed)} needed")
                run_directory.write_json(folder / "about.json", about)
            self.orbax = self.orbax or arrays.checkpointer()
            self.orbax.save(self.named / str(step) / ARRAYS, trees.unflatten(leaves))
        except Exception as error:
            failed = self._failed(folder, error)
            if failed is error:
                raise
            raise failed from error
        written = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()
        }  # may be donated
        self.thread = threading.Thread(target=self._commit, args=(step, written), name=f"checkpoint {step}")
        self.thread.start()

    def _commit(self, step: int, written: dict[str, jax.ShapeDtypeStruct]) -> None:
        folder = self.directory / str(step)
        try:
            self.orbax.wait_until_finished()
            if processes.is_first():
                arrays.require_readable(folder / ARRAYS, written)
                manifest.write(folder)
                self._drop(step)
        except BaseException as error:  # the main thread raises it
            self.error = self._failed(folder, error)

    def _drop(self, newest: int) -> None:
        """Delete what the newest checkpoint makes superfluous, and what is not whole."""
        self.bad.discard(newest)
        steps = steps_in(self.directory)
        good = [step for step in steps if step not in self.bad and manifest.exists(self.directory / str(step))]
        for step in sorted(set(steps) - set(self.kept(good))):
            manifest.remove(self.directory / str(step))

    def _failed(self, folder: Path, error: BaseException) -> BaseException:
        """What to raise for an error of a save: our own bug and a lack of memory as they are. Cleans up `folder`."""
        left = []
        with contextlib.suppress(OSError):  # on storage that fails this may fail too; `error` came first
            if processes.is_first():
                _clear(folder)
            left = [step for step in steps_in(self.directory) if manifest.exists(self.directory / str(step))]
        last = f"the last good one is that of step {left[-1]}" if left else "there is none before it"
        what = f"the checkpoint {folder} could not be written ({processes.reason(error)}); {last}"
        code = processes.exit_code(error, began=True)
        if code == processes.RETRY:
            return processes.Interrupted(f"{what}: start again when the machines and the storage work")
        return InputError(f"{what}: free some space, or give another --run_dir") if code == processes.MISTAKE else error


def _clear(folder: Path) -> None:
    """Delete what a failed save has left. Orbax raises the first error while TensorStore still writes other arrays,
    which puts files, and the folders they are in, where they were deleted: so until nothing comes any more."""
    gone = 0
    for _ in range(LOOKS):
        manifest.remove(folder)
        gone = 0 if folder.exists() else gone + 1
        if gone == GONE:
            return
        time.sleep(0.05)


def steps_in(directory: Path) -> list[int]:
    """The steps of which there is a folder, ascending."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit()) if directory.is_dir() else []


def newest_good(directory: Path) -> int | None:
    """The newest step whose checkpoint is whole, every byte verified, the same on every host; a warning for each newer.

    Process 0 looks, and tells the others: they must not choose differently.
    """
    good = None
    if processes.is_first():
        for step in reversed(steps_in(directory)):
            problem = manifest.problem(directory / str(step))
            if not problem:
                good = step
                break
            print(f"warning: passing over the checkpoint {directory / str(step)}: {problem}", file=sys.stderr)
    told = processes.agree(-1 if good is None else good)
    return None if told < 0 else told


def about_of(directory: Path, step: int) -> dict[str, Any]:
    return read_object(directory / str(step), "about.json")
