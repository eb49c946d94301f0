"""Files of UTF-8 text: found in a folder, looked at once, and read in stretches as documents."""

import codecs
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from efflm.cli import progress
from efflm.config import InputError, require

STRETCH = 1 << 18  # bytes of a document that are read and tokenized at a time
NAMED = 3  # of the files left out


@dataclasses.dataclass(frozen=True)
class Part:
    """A document that is still on disk: `nbytes` of a file from byte `start` on, which are so many characters."""

    name: str
    path: Path
    start: int
    nbytes: int
    characters: int

    def stretches(self) -> Iterator[str]:
        """The text, cut at line ends into stretches of at most STRETCH bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.nbytes
            while left > 0 and (data := file.read(min(STRETCH, left))):
                if len(data) < left:
                    end = data.rfind(b"\n") + 1 or _last_character(data)
                    file.seek(end - len(data), 1)
                    data = data[:end]
                left -= len(data)
                yield data.decode()

    def text(self) -> str:
        return "".join(self.stretches())


def _last_character(data: bytes) -> int:
    """Where the last character of UTF-8 begins, of which not all bytes may be there."""
    return next(i for i in range(len(data) - 1, -1, -1) if data[i] & 0xC0 != 0x80)


@dataclasses.dataclass(frozen=True)
class Found:
    """Documents on disk. left_out: {name: why} of the files beside them that are not UTF-8 text; of how many files."""

    parts: list[Part]
    left_out: dict[str, str]
    files: int

    def __str__(self) -> str:
        """What was left out, in words; nothing if nothing was."""
        count, named = len(self.left_out), ", ".join(list(self.left_out)[:NAMED])
        more = f" and {count - NAMED:,} more" if count > NAMED else ""
        which = f"{count:,} of {self.files:,} files left out, which {_are(count)} not UTF-8 text: {named}{more}"
        return which if count else ""


def whole(corpus: str, root: Path, names: list[str], strict: bool) -> Found:
    """Every file as one document, but for those that are blank or not UTF-8 text. Raises InputError.

    Each file is read once. What is left out depends on its bytes alone; strict: nothing may be. corpus: what the files
    are, in words.
    """
    parts, left_out = [], {}
    for name in progress.shown(names, f"reading {corpus}", len(names)):
        part = _whole(_printable(name), root / name)
        if isinstance(part, str):
            left_out[_printable(name)] = part
        elif part:
            parts.append(part)
    if len(names) == 1 and left_out:
        raise InputError(f"corpus {corpus} is {next(iter(left_out.values()))}: give UTF-8 text")
    found, count = Found(parts, left_out, len(names)), len(left_out)
    bad = "; ".join(f"{name} is {why}" for name, why in left_out.items())
    require(
        not left_out or not strict,
        f"corpus {corpus}: {count:,} of {len(names):,} files {_are(count)} not UTF-8 text: {bad}: convert or remove "
        "them, or have them left out (without strict)",
    )
    require(bool(parts), f"corpus {corpus} is empty: it holds no text{', ' * bool(left_out)}{found}")
    return found


def walk(folder: Path | str, skip: Callable[[str], bool], prefix: str = "") -> Iterator[str]:
    """The names of all files in a folder but for files and folders that are to be skipped.

    Links to files are read, those to folders are not followed.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if skip(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from walk(entry.path, skip, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield prefix + entry.name


def _printable(name: str) -> str:
    """A file's name whose bytes may not be UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _whole(name: str, path: Path) -> Part | str | None:
    """The file as one document; None if it is blank; why it is not text, if it is not."""
    decoder, nbytes, characters, blank = codecs.getincrementaldecoder("utf-8")(), 0, 0, True
    with path.open("rb", buffering=0) as file:
        while True:
            data = file.read(STRETCH)
            nbytes += len(data)
            if b"\0" in data:
                return "binary"
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:  # its object: of the data read, as much as was not decoded yet
                offset = nbytes - len(error.object) + error.start
                return f"not UTF-8 (byte {error.object[error.start]:#04x} at offset {offset})"
            characters, blank = characters + len(text), blank and (not text or text.isspace())
            if not data:
                return None if blank else Part(name, path, 0, nbytes, characters)


def pieces(wholes: list[Part], size: int) -> list[Part]:
    """The documents cut at line ends into parts of about `size` characters, without blank ones."""
    return [part for whole in wholes for part in _pieces_of(whole, size)]


def _pieces_of(whole: Part, size: int) -> Iterator[Part]:
    index = start = count = characters = 0
    blank = True
    with whole.path.open(encoding="utf-8", newline="\n") as file:
        while line := file.readline(4 * size):  # a file may be one endless line
            count, characters, blank = count + len(line.encode()), characters + len(line), blank and line.isspace()
            if characters >= size:
                if not blank:
                    yield Part(f"{whole.name}#{index}", whole.path, start, count, characters)
                index, start, count, characters, blank = index + 1, start + count, 0, 0, True
    if not blank:
        yield Part(f"{whole.name}#{index}", whole.path, start, count, characters)


def _are(count: int) -> str:
    return "is" if count == 1 else "are"
