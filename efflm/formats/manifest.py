"""The commit mark of a checkpoint: a manifest with the SHA-256 of every file in its folder.

It is written last, once every other file is on disk, and removed first. So a folder without one is half-written,
whatever else lies in it, and a folder with one either holds exactly the bytes that were written or is told apart from
it: tensor files carry no checksum of their own that would catch every flipped bit.
"""

import hashlib
import os
from pathlib import Path

from efflm.cli import run_directory
from efflm.model_files import read_object

NAME = "manifest.json"


def exists(folder: Path) -> bool:
    """Whether the checkpoint in `folder` was committed. Its bytes are not looked at."""
    return (folder / NAME).is_file()


def write(folder: Path) -> None:
    """Commit: put every file of `folder` on disk, then the manifest of their hashes, whole or not at all."""
    hashes = {str(file.relative_to(folder)): _digest(file, sync=True) for file in _files(folder)}
    for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        _sync(inner)
    partial = folder / f"{NAME}.partial"
    with partial.open("w") as file:
        file.write(run_directory.to_json({"sha256": hashes}, indent=1))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / NAME)
    for changed in (folder, folder.parent):
        _sync(changed)


def problem(folder: Path) -> str:
    """Why the checkpoint in `folder` must not be used, or "" if every byte is as it was written."""
    if not exists(folder):
        return f"it is half-written: it has no {NAME}"
    link = next((path for path in folder.rglob("*") if path.is_symlink()), None)
    if link:
        return f"{link.relative_to(folder)} is a link, and no checkpoint is written with any"
    try:
        hashes, files = read_object(folder, NAME)["sha256"], set(_files(folder))
        for name, digest in hashes.items():
            file = folder / name
            if file not in files:
                return f"{name:.80} is missing"
            if _digest(file) != digest:
                return f"{name:.80} is not what was written: its SHA-256 differs"
    except (ValueError, KeyError, TypeError, AttributeError):  # a manifest that was damaged itself
        return f"{NAME} is damaged"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return ""


def remove(folder: Path) -> None:
    """Delete a checkpoint, its manifest first: what a crash leaves behind counts as half-written. Other things that
    lie in the folder stay."""
    (folder / NAME).unlink(missing_ok=True)
    run_directory.discard(folder, (f"{NAME}.partial", "about.json", ".about.json.*", "arrays", "arrays.*"))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != NAME)


def _digest(file: Path, sync: bool = False) -> str:
    with file.open("rb") as opened:
        if sync:
            os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """The names in a folder are on disk only when the folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
