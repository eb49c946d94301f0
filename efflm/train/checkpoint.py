"""Models on disk, through Orbax: atomic, compressed weights included, described by a manifest."""

import logging
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from efflm import trees
from efflm.config import InputError, ModelConfig, require
from efflm.model import LanguageModel, sharding
from efflm.ops.qarray import from_flat, to_flat


def _manager(directory: Path):
    import orbax.checkpoint as ocp  # here, for its only use: it is slow to import

    for name in ("absl", "orbax"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False, create=False)
    return ocp, ocp.CheckpointManager(directory.absolute(), options=options)


def save(directory: Path, step: int, model: LanguageModel, about: dict[str, Any]) -> None:
    """Write the model under directory/<step>, whole or not at all. `about` is any JSON that tells how it was made."""
    directory.mkdir(parents=True, exist_ok=True)
    flat, kinds = to_flat(model.params)
    manifest = {
        "config": model.config.to_dict(),
        "kinds": kinds,
        "leaves": {path: {"shape": list(leaf.shape), "dtype": leaf.dtype.name} for path, leaf in flat.items()},
        "about": about,
    }
    ocp, manager = _manager(directory)
    with manager:
        manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(trees.unflatten(flat)), manifest=ocp.args.JsonSave(manifest)
            ),
            force=True,
        )


def exists(directory: Path) -> bool:
    """Whether a whole checkpoint lies there."""
    return any(path.name.isdigit() for path in directory.glob("*")) if directory.is_dir() else False


def load(directory: Path, mesh: Mesh) -> tuple[LanguageModel, dict[str, Any]]:
    """The newest model under `directory`, laid on the mesh, and its `about`. Raises InputError."""
    require(exists(directory), f"no checkpoint in {directory}: give a directory that a training run has written")
    ocp, manager = _manager(directory)
    try:
        with manager:
            step = manager.latest_step()
            manifest = manager.restore(step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore())).manifest
            leaves = {
                path: jax.ShapeDtypeStruct(
                    leaf["shape"],
                    leaf["dtype"],
                    sharding=jax.NamedSharding(mesh, sharding.partition_spec(path, tuple(leaf["shape"]), mesh)),
                )
                for path, leaf in manifest["leaves"].items()
            }
            target = ocp.args.StandardRestore(trees.unflatten(leaves))
            restored = manager.restore(step, args=ocp.args.Composite(params=target)).params
    except (ValueError, KeyError, TypeError, OSError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the checkpoint in {directory} cannot be read ({first_line}): delete it or give another"
        ) from error
    params = from_flat(dict(trees.flatten(restored)), manifest["kinds"])
    return LanguageModel(ModelConfig.from_dict(manifest["config"]), params), manifest["about"]


def require_same(wanted: dict[str, Any], found: dict[str, Any], directory: Path) -> None:
    """Raise InputError naming the first setting in which a checkpoint differs from what this run asks for."""
    for name, value in wanted.items():
        other = found.get(name)
        require(
            value == other,
            f"the checkpoint in {directory} was made with {name}={other}, but this run asks for {value}: give another "
            "--run_dir, or the same settings",
        )
