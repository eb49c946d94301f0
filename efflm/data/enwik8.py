"""enwik8: the first 10^8 bytes of an English Wikipedia dump of 2006 (Mahoney, Large Text Compression Benchmark).

Read byte by byte, 90M to train, 5M to validate, 5M to test, the split of Graves 2013 (arXiv 1308.0850) and of all byte
and character models since. What they call bits per character is bits per byte.
"""

import dataclasses
import hashlib
import io
import lzma
import os
import shutil
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from efflm.cli import run_directory
from efflm.config import InputError, require

NAME = "enwik8"
URL = "http://mattmahoney.net/dc/enwik8.zip"
MD5 = "a1fa5ffddb56f4953e226637dabbb36a"
SIZE = 100_000_000
SPLITS = {"train": slice(0, 90_000_000), "validation": slice(90_000_000, 95_000_000), "test": slice(95_000_000, SIZE)}


@dataclasses.dataclass(frozen=True)
class Enwik8:
    """Its splits, each uint8 [bytes], on disk until read."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    name: str = NAME
    source: str = NAME
    digest: str = MD5[:16]

    def describe(self) -> str:
        return f"{NAME}, {SIZE / 1e6:.0f} MB: 90 MB to train, 5 MB to validate, 5 MB to test, in bytes"


def load(cache: Path) -> Enwik8:
    """Take enwik8, enwik8.xz or enwik8.zip out of the folder $EFFLM_DATA if that is set, else from the network, once.

    Raises InputError if it can be had from neither, or is not the file that everybody measures on.
    """
    path = cache / NAME / NAME
    if not path.exists():
        _unpack(path)
    content = np.memmap(path, np.uint8, mode="r")
    return Enwik8(**{name: content[where] for name, where in SPLITS.items()})


def _unpack(path: Path) -> None:
    digest = hashlib.md5()
    with run_directory.whole(path) as partial:
        with _source() as source, partial.open("wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
        require(digest.hexdigest() == MD5, f"enwik8 has the MD5 {digest.hexdigest()}, but should have {MD5}: get {URL}")


@contextmanager
def _source() -> Iterator[BinaryIO]:
    folder = os.environ.get("EFFLM_DATA")
    places = [Path(folder) / f"{NAME}{kind}" for kind in ("", ".xz", ".zip")] if folder else []
    path = next((place for place in places if place.is_file()), None)
    try:
        if path is None or path.suffix == ".zip":
            with zipfile.ZipFile(path or _download()) as archive, archive.open(NAME) as file:
                yield file
        else:
            with lzma.open(path) if path.suffix else path.open("rb") as file:
                yield file
    except (lzma.LZMAError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path or 'what was downloaded'} cannot be unpacked ({error}): get {URL} again") from None


def _download() -> io.BytesIO:
    content = io.BytesIO()
    try:
        with urllib.request.urlopen(URL, timeout=30) as answer:
            shutil.copyfileobj(answer, content)
    except OSError as error:
        raise InputError(
            f"enwik8 is not in EFFLM_DATA={os.environ.get('EFFLM_DATA', '')} and cannot be downloaded ({error}): get "
            f"{URL} elsewhere and set EFFLM_DATA to its folder"
        ) from None
    content.seek(0)
    return content
