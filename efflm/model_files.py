"""The files of a model's folder, which is a stranger's: what is looked at before any of them is read.

No file outside of the folder is opened, nothing that is no regular file, and none larger than such a file can need.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from efflm.config import InputError, require

LARGEST = 64_000_000  # bytes: twice the largest tokenizer.json there is, or the index of a model of a million tensors


def exists(folder: Path, name: str) -> bool:
    """Whether the folder has an entry of that name, of whatever kind: a link that leads nowhere is one too."""
    return os.path.lexists(folder / name)


def inside(folder: Path, name: str) -> Path:
    """The regular file of that name in the folder itself, or where a snapshot of the hub's cache links to.

    Raises InputError for anything else: other folders, links that lead out, links in circles.
    """
    require(Path(name).name == name, f"{folder} speaks of {name!r:.80}, which is not a file in it: it is not read")
    try:
        home, file = folder.resolve(strict=True), (folder / name).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        raise InputError(f"{folder} has no {name:.80}: the model is not whole, fetch it again") from None
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    require(file.parent in homes, f"{folder / name} links out of its folder, to {file}: copy the file in")
    require(file.is_file(), f"{folder / name} is not a file")
    return folder / name


def read_text(folder: Path, name: str) -> str:
    """Raises InputError for what `inside` refuses, more than LARGEST bytes, and what is not UTF-8."""
    path = inside(folder, name)
    size = path.stat().st_size
    require(size <= LARGEST, f"{path} has {size:,} bytes, too many for what it should hold: fetch it again")
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from None


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file. Raises InputError."""
    text = read_text(folder, name)
    try:
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()  # fails on half a character, which JSON can spell
    except (ValueError, RecursionError) as error:
        raise InputError(f"{folder / name} is not JSON ({error}): fetch it again") from None
    require(isinstance(value, dict), f"{folder / name} holds a {type(value).__name__}, but must hold a JSON object")
    return value
