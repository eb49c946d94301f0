"""Pack documents into rows (sequences) of a fixed length, once. Attention, positions and loss never cross a document.

A row is four int32 arrays of `length`: inputs, targets (the token after each input), segments (1 + the document's
index; 0 is padding) and positions (from 0 at the start of each stretch of a document in a row). A document that does
not fit goes on in the next row, whose stretch begins with the last target: every token is a target exactly once.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from efflm import user_cache
from efflm.cli import run_directory

FIELDS = ("inputs", "targets", "segments", "positions")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows, each array int32 [rows, length]."""

    inputs: np.ndarray
    targets: np.ndarray
    segments: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int | slice | np.ndarray) -> dict[str, np.ndarray]:
        return {name: getattr(self, name)[index] for name in FIELDS}

    @property
    def length(self) -> int:
        return self.inputs.shape[1]


@dataclasses.dataclass(frozen=True)
class Stream:
    """One text without ends, too long to be packed, as rows made when they are asked for; in use like `Rows`.

    content: uint8 [bytes], may be mapped from a file; ids: the token of each byte, int32 [256]. Every byte is a target
    exactly once, the first after the separator; attention crosses no row.
    """

    content: np.ndarray
    ids: np.ndarray
    separator: int
    length: int

    def __len__(self) -> int:
        return -(-len(self.content) // self.length)

    def __getitem__(self, index: int | slice | np.ndarray) -> dict[str, np.ndarray]:
        rows = np.arange(len(self))[index][..., None]
        column = np.arange(self.length)
        place, most = rows * self.length + column, len(self.content) - 1
        inside = place <= most
        before = self.ids[self.content[np.clip(place - 1, 0, most)]]
        return {
            "inputs": np.where(inside, np.where(place > 0, before, self.separator), 0).astype(np.int32),
            "targets": np.where(inside, self.ids[self.content[np.minimum(place, most)]], 0).astype(np.int32),
            "segments": inside.astype(np.int32),
            "positions": np.where(inside, column, 0).astype(np.int32),
        }


def pack(documents: Iterable[list[int]], separator: int, length: int) -> Rows:
    """Pack token ids, the separator before and after each document."""
    inputs, targets, segments = [], [], []
    for index, ids in enumerate(documents):
        stream = np.asarray([separator, *ids, separator], np.int32)
        inputs.append(stream[:-1])
        targets.append(stream[1:])
        segments.append(np.full(len(stream) - 1, index + 1, np.int32))
    total = sum(map(len, inputs))
    rows = -(-total // length)
    to_rows = lambda parts: np.pad(np.concatenate(parts), (0, rows * length - total)).reshape(rows, length)
    segments_RT = to_rows(segments)
    column = np.broadcast_to(np.arange(length, dtype=np.int32), segments_RT.shape)
    starts = np.concatenate([np.ones((rows, 1), bool), segments_RT[:, 1:] != segments_RT[:, :-1]], axis=1)
    positions = column - np.maximum.accumulate(np.where(starts, column, 0), axis=1)
    return Rows(to_rows(inputs), to_rows(targets), segments_RT, positions.astype(np.int32))


def load_or_pack(path: Path, make: Callable[[], Rows]) -> Rows:
    """The rows stored at `path`, made and stored there first if there are none; read from the file as they are used."""
    if not path.exists():
        rows = make()
        run_directory.require_writable(
            path.parent, needs=sum(array.nbytes for array in rows[:].values()), remedy=user_cache.REMEDY
        )
        with run_directory.whole(path) as partial:
            stored = np.lib.format.open_memmap(partial, "w+", np.int32, (len(FIELDS), *rows.inputs.shape))
            for part, name in zip(stored, FIELDS, strict=True):
                part[:] = getattr(rows, name)
            stored.flush()
    return Rows(*np.load(path, mmap_mode="r"))
