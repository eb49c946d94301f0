"""Text in: the running Python's standard library, or any file or folder of UTF-8, through one TFDS builder."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from efflm import rundir
from efflm.config import InputError, require

DEFAULT = "stdlib"
KINDS = "'stdlib' (Python's own source files), 'enwik8' (read in bytes), or a file or folder of UTF-8 text"
SPLITS = {"test": 0.10, "validation": 0.05}  # of the documents; the rest trains
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "__pycache__"}
FEW_FILES = 64  # a corpus of fewer files is cut into pieces, so that every split gets some of it
PIECE_BYTES = 16 * 1024

STRETCH = 1 << 18  # bytes of a document that are read and tokenized at a time

Document = tuple[str, str]  # (name, text)


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
class Corpus:
    """Documents by split. source: what `load` takes to find them again; digest: a hash of all names and bytes."""

    name: str
    source: str
    digest: str
    train: list[Document]
    validation: list[Document]
    test: list[Document]

    def describe(self) -> str:
        size = sum(len(text.encode()) for split in (self.train, self.validation, self.test) for _, text in split)
        counts = f"{len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test documents"
        return f"{self.name}, {size / 1e6:.1f} MB, {counts}"


def load(source: str, cache: Path, least_bytes: int = 0) -> Corpus:
    """Read `source` ("stdlib", a file or a folder), prepare it once under `cache`, and return it. Raises InputError.

    Splits follow a hash of each document's path. `least_bytes` is the smallest training split that will do.
    """
    name = name_of(source)
    splits = {
        split: [(part.name, part.text()) for part in parts] for split, parts in _split(_documents(source)).items()
    }
    size = sum(len(text.encode()) for _, text in splits["train"])
    require(
        size >= least_bytes and all(splits.values()),
        f"corpus {name} is too small: {size:,} bytes in {len(splits['train'])} documents to train on, but one batch "
        f"needs about {least_bytes:,} bytes and each split a document: give more text or lower --train.batch",
    )
    digest = hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:16]
    source = source if source == DEFAULT else str(Path(source).expanduser().absolute())
    return Corpus(name, source, digest, **_through_tfds(splits, cache / digest))


def read(source: str) -> list[Part]:
    """All documents of `source` (as `load` takes it) in the order of a hash of their names, which makes the first of
    them a sample. Raises InputError.

    A file is a document; a single one is cut into pieces of PIECE_BYTES.
    """
    root, paths = _files(source)
    return _by_hash(_parts(root, paths, PIECE_BYTES if len(paths) == 1 else 0))


def held_out(source: str, split: str = "test") -> list[Part]:
    """The same of a split that `load` makes, without preparing the others. Raises InputError."""
    return _split(_documents(source))[split]


def name_of(source: str) -> str:
    """A corpus in words."""
    return "Python's standard library" if source == DEFAULT else str(Path(source).expanduser())


def _documents(source: str) -> list[Part]:
    """The documents to split: files, or where these are few, pieces of them."""
    root, paths = _files(source)
    whole = _parts(root, paths, 0)
    if source == DEFAULT or len(whole) >= FEW_FILES:
        return whole
    size = max(1, min(PIECE_BYTES, sum(part.characters for part in whole) // FEW_FILES))
    return _parts(root, paths, size)


def _files(source: str) -> tuple[Path, list[Path]]:
    """The folder that names count from, and the files in it."""
    if source == DEFAULT:
        root = Path(sysconfig.get_path("stdlib"))
        found = root.rglob("*.py")
        return root, sorted(path for path in found if not LEFT_OUT & set(path.relative_to(root).parts))
    root = Path(source).expanduser()
    require(root.exists(), f"corpus {source} does not exist: give a file or folder of UTF-8 text")
    if root.is_file():
        return root.parent, [root]
    paths = [
        path
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    require(bool(paths), f"corpus {source} is empty: it holds no files")
    return root, sorted(paths)


def _parts(root: Path, paths: list[Path], size: int) -> list[Part]:
    """Each file cut at line ends into parts of about `size` characters; 0: whole. Blank ones are left out."""
    parts = [part for path in paths for part in _parts_of(path.relative_to(root).as_posix(), path, size)]
    require(bool(parts), f"corpus {root if len(paths) != 1 else paths[0]} is empty: it holds no text")
    return parts


def _parts_of(name: str, path: Path, size: int) -> Iterator[Part]:
    index = start = count = characters = 0
    blank = True
    for line in _lines(path, 4 * size or STRETCH):  # a file may be one endless line
        count, characters, blank = count + len(line.encode()), characters + len(line), blank and not line.strip()
        if size and characters >= size:
            if not blank:
                yield Part(f"{name}#{index}", path, start, count, characters)
            index, start, count, characters, blank = index + 1, start + count, 0, 0, True
    if not blank:
        yield Part(f"{name}#{index}" if size else name, path, start, count, characters)


def _lines(path: Path, most: int) -> Iterator[str]:
    """The lines of a file with their ends, long ones in parts of `most` characters. Raises InputError."""
    with path.open(encoding="utf-8", newline="\n") as file:
        try:
            while line := file.readline(most):
                require("\0" not in line, f"corpus file {path} is binary: give UTF-8 text")
                yield line
        except UnicodeDecodeError as error:
            offset = file.buffer.tell() - len(error.object) + error.start
            raise InputError(
                f"corpus file {path} is not UTF-8 (byte {error.object[error.start]:#04x} at offset {offset}): "
                "convert it, or leave it out"
            ) from None


def _split(documents: list[Part]) -> dict[str, list[Part]]:
    by_hash = _by_hash(documents)
    splits, start = {}, 0
    for name, fraction in SPLITS.items():
        end = start + max(1, round(fraction * len(by_hash)))
        splits[name], start = by_hash[start:end], end
    return {"train": by_hash[start:], **splits}


def _by_hash(documents: list[Part]) -> list[Part]:
    return sorted(documents, key=lambda part: hashlib.sha256(part.name.encode()).digest())


def _through_tfds(splits: dict[str, list[Document]], folder: Path) -> dict[str, list[Document]]:
    """Write the splits with a TFDS builder unless `folder` has them, and read them back."""
    if folder.exists() and not list(folder.glob("*/*/dataset_info.json")):
        shutil.rmtree(folder)  # an interrupted preparation
    if not folder.exists():
        size = sum(len(text.encode()) for documents in splits.values() for _, text in documents)
        rundir.require_writable(folder, needs=2 * size)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        builder = _builder_class()(splits, data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
        return {
            split: [(row["name"].decode(), row["text"].decode()) for row in builder.as_data_source(split=split)]
            for split in splits
        }


@functools.cache
def _builder_class():
    # Imported here, for its only use: it is slow to import, and --help must not wait for it.
    import tensorflow_datasets as tfds

    class TextCorpus(tfds.core.GeneratorBasedBuilder):
        """Documents of UTF-8 text, in the order given."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, splits: dict[str, list[Document]], **settings):
            self.documents = splits
            super().__init__(**settings)

        def _info(self):
            text = tfds.features.Text()
            features = tfds.features.FeaturesDict({"name": text, "text": text})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(documents) for split, documents in self.documents.items()}

        def _generate_examples(self, documents):
            for index, (name, text) in enumerate(documents):
                yield index, {"name": name, "text": text}

    return TextCorpus
