"""The arrays of a checkpoint on disk, through Orbax (its only import)."""

import contextlib
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efflm import trees
from efflm.config import InputError, require
from efflm.parallel import processes

# What Orbax and TensorStore raise for what they cannot read.
FAILURES = (OSError, ValueError, KeyError, TypeError, RuntimeError)

# Orbax takes the path of a folder for a pattern of names, `\` for `/`, and the first four of these for buckets.
_MISREAD = re.compile(r"/(gs|s3|az|hf)(/|$)|.*[*?\[\]\\]", re.DOTALL)


@contextlib.contextmanager
def plainly_named(folder: Path) -> Iterator[Path]:
    """A path of `folder`, which need not exist yet, that Orbax does not misread: where its name is not such, that of a
    link in a private folder, for the length of a `with`. Raises InputError where there is no place for one."""
    folder = folder.absolute()
    if not _MISREAD.match(str(folder)):
        yield folder
        return
    try:
        private = tempfile.TemporaryDirectory(prefix="efflm-")
    except OSError as error:
        raise InputError(
            f"{folder} needs a link under another name, which cannot be made ({error.strerror}): give a folder whose "
            "name holds none of * ? [ ] \\, or set TMPDIR to a folder to write into"
        ) from None
    with private:
        link = Path(private.name).absolute() / "link"
        require(
            not _MISREAD.match(str(link)),
            f"neither {folder} nor TMPDIR, {link.parent.parent}, is a name that checkpoints can be written under: set "
            "TMPDIR to one that holds none of * ? [ ] \\",
        )
        link.symlink_to(folder, target_is_directory=True)
        yield link


def checkpointer() -> Any:
    """What saves and restores a tree of arrays; it is to be closed."""
    import orbax.checkpoint as ocp  # here, for its only use: it is slow to import

    for name in ("absl", "orbax", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # it logs the errors that it raises
    return ocp.StandardCheckpointer()


def read(folder: Path, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The arrays in `folder` by path, each laid where its abstract leaf says. Raises InputError."""
    try:
        with plainly_named(folder.parent) as parent, checkpointer() as reader:
            tree = reader.restore(parent / folder.name, trees.unflatten(leaves))
    except FAILURES as error:
        known = processes.exit_code(error, began=True) in (processes.RETRY, processes.MEMORY)
        if known or isinstance(error, InputError):
            raise
        raise InputError(
            f"the checkpoint {folder.parent} cannot be read ({processes.reason(error)}): delete it or give another"
        ) from error
    return dict(trees.flatten(tree))


def require_readable(folder: Path, written: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Open every array in `folder` as a restore does, and raise InputError if one is not what was written.

    Bytes are not compared: the manifest's hashes are of what is on disk."""
    tree = described(folder)
    for path, leaf in written.items():
        there = tree.get(path)
        same = there is not None and (there.shape, there.dtype) == (leaf.shape, leaf.dtype)
        require(same, f"it cannot be read again: {path} is not in it as it was written")


def described(folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays in `folder` by path; none if one of them cannot be opened."""
    with plainly_named(folder.parent) as parent, checkpointer() as reader:
        found = reader.metadata(parent / folder.name).item_metadata
    leaves = [] if found is None else trees.flatten(found.tree)
    return {path: jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype)) for path, leaf in leaves}
