"""Tasks as files of items: JSON lines, compressed with gzip or not, of a context and what may follow it.

    {"id": "1", "context": "The capital of France is", "choices": [" Paris", " Rome"], "label": 0}

A choice is appended to the context as it stands, its leading space included; label is the index of the right one. With
one choice in every item the task is to predict the last word, with several in every item it is multiple choice.
"""

import dataclasses
import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from efflm.config import InputError, at_home, flag, require
from efflm.evaluate.answers import Kind

SUFFIXES = (".jsonl", ".jsonl.gz")
ASKED = "tasks to answer, commas between them: files of items (JSON lines), or their names in task.folder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """Where tasks are, and how much of them is answered"""

    items: int = flag(0, "items of each task, its first; 0: all")
    folder: str = flag("tasks", "folder of NAME.jsonl or NAME.jsonl.gz for tasks given by name", path=True)

    def __post_init__(self):
        require(self.items >= 0, f"items is {self.items}, but must be positive, or 0 for all")


@dataclasses.dataclass(frozen=True)
class Item:
    """A context, what may follow it, and which of the choices is right."""

    name: str
    context: str
    choices: tuple[str, ...]
    label: int


@dataclasses.dataclass(frozen=True)
class Task:
    """Items of one kind: "choices", or "last word" where each has one choice."""

    name: str
    kind: Kind
    items: tuple[Item, ...]


def read(names: Sequence[str | os.PathLike], files: TaskFiles) -> tuple[Task, ...]:
    """The tasks, each by its name in the folder or the path of its file. Raises InputError for what is no task."""
    paths = [_path(os.fspath(name), Path(at_home(files.folder))) for name in names if name]
    called = [path.name.removesuffix(".gz").removesuffix(".jsonl") for path in paths]
    twice = next((name for name in called if called.count(name) > 1), "")
    require(not twice, f"two tasks are called {twice}: give each once, or rename one of the files")
    return tuple(_read(name, path, files.items) for name, path in zip(called, paths))


def _path(name: str, folder: Path) -> Path:
    path = Path(at_home(name))
    if path.name.endswith(SUFFIXES):
        require(path.is_file(), f"there is no task file {path}: check the path")
        return path
    found = [folder / f"{name}{suffix}" for suffix in SUFFIXES if (folder / f"{name}{suffix}").is_file()]
    there = {each.name.removesuffix(".gz").removesuffix(".jsonl") for each in folder.glob("*.jsonl*")}
    have = f"there are {', '.join(sorted(there))}" if there else f"it has no {' or '.join(SUFFIXES)} files"
    require(bool(found), f"there is no task {name!r} in {folder}: {have}; or give the path of a file")
    return found[0]


def _read(name: str, path: Path, most: int) -> Task:
    items = tuple(itertools.islice(_items(path), most or None))
    require(bool(items), f"{path} has no items: give a file with a JSON object a line")
    several = len(items[0].choices) > 1
    other = next((item for item in items if (len(item.choices) > 1) != several), None)
    if other is not None:
        single, more = (other, items[0]) if several else (items[0], other)
        raise InputError(
            f"{path}: the item {single.name} has one choice, but {more.name} has {len(more.choices)}: give one to "
            "every item (prediction of the last word) or several to every item (multiple choice)"
        )
    return Task(name, "choices" if several else "last word", items)


def _items(path: Path) -> Iterator[Item]:
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _item(line, f"{path}, line {number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is no whole gzip file ({error}): fetch it again, or name it .jsonl") from None
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror or error}): check the file") from None


def _item(line: bytes, where: str) -> Item:
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}): give one object a line") from None
    require(isinstance(found, dict), f"{where} is not a JSON object, but {_shown(found)}: give one a line")
    for field in ("id", "context", "choices", "label"):
        require(field in found, f"{where} has no {field!r}: an item has id, context, choices and label")
    name, context, choices, label = (found[field] for field in ("id", "context", "choices", "label"))
    require(isinstance(name, str | int), f"{where}: id is {_shown(name)}, but must be text or a number")
    require(isinstance(context, str), f"{where}: context is {_shown(context)}, but must be text")
    require(
        isinstance(choices, list) and bool(choices) and all(isinstance(choice, str) and choice for choice in choices),
        f"{where}: choices are {_shown(choices)}, but must be a list of texts, none of them empty",
    )
    require(
        type(label) is int and 0 <= label < len(choices),
        f"{where}: label is {_shown(label)}, but must be the index of one of the {len(choices)} choices, from 0 on",
    )
    return Item(str(name), context, tuple(choices), label)


def _shown(value: Any) -> str:
    return f"{value!r:.60}"
