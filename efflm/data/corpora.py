"""Text in: the running Python's standard library, or any file or folder of UTF-8, through one TFDS builder."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import shutil
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from efflm import user_cache
from efflm.cli import progress, run_directory
from efflm.config import require
from efflm.data import files
from efflm.data.files import Found, Part

DEFAULT = "stdlib"
KINDS = "'stdlib' (Python's own source files), 'enwik8' (read in bytes), or a file or folder of UTF-8 text"
STRICT = "refuse a folder in which a file is not UTF-8 text; else such files are left out, and named"  # the flag's help
SPLITS = {"test": 0.10, "validation": 0.05}  # of the documents; the rest trains
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "__pycache__"}
FEW_FILES = 64  # a corpus of fewer files is cut into pieces, so that every split gets some of it
PIECE_BYTES = 16 * 1024
SHORT = FEW_FILES * 64  # bytes: a file below that is one document where it is only scored

READ_AT_A_TIME = 1024  # documents

Document = tuple[str, str]  # (name, text)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents by split. source: what `load` takes to find them again; digest: a hash of all names and bytes; parts:
    the same documents as they are on disk."""

    name: str
    source: str
    digest: str
    parts: dict[str, Found]
    train: list[Document]
    validation: list[Document]
    test: list[Document]

    def describe(self) -> str:
        size = sum(part.nbytes for found in self.parts.values() for part in found.parts)
        counts = f"{len(self.train)} train, {len(self.validation)} validation, {len(self.test)} test documents"
        return "; ".join(filter(None, [f"{self.name}, {size / 1e6:.1f} MB, {counts}", str(self.parts["train"])]))


def load(
    source: str, cache: Path, least_bytes: int = 0, strict: bool = False, lower: str = "the batch or its length"
) -> Corpus:
    """Read `source` ("stdlib", a file or a folder), prepare it once under `cache`, and return it. Raises InputError.

    Splits follow a hash of each document's path. `least_bytes` is the smallest training split that will do, and
    `lower` what makes it smaller, for the error. Files of a
    folder that are hidden, or not UTF-8 text, are left out; strict: the latter are refused.
    """
    name, parts = name_of(source), split(source, strict)
    size = sum(part.nbytes for part in parts["train"].parts)
    require(
        size >= least_bytes and all(found.parts for found in parts.values()),
        f"corpus {name} is too small: {size:,} bytes in {len(parts['train'].parts)} documents to train on, but about "
        f"{least_bytes:,} bytes are needed, and a document for each split: give more text, or lower {lower}",
    )
    every = [part for found in parts.values() for part in found.parts]
    texts = iter([(part.name, part.text()) for part in progress.shown(every, f"reading {name}", len(every))])
    splits = {part: list(itertools.islice(texts, len(found.parts))) for part, found in parts.items()}
    digest = hashlib.sha256(run_directory.to_json(splits).encode()).hexdigest()[:16]
    source = source if source == DEFAULT else str(Path(source).absolute())
    with user_cache.alone(cache / digest):
        return Corpus(name, source, digest, parts, **_through_tfds(splits, cache / digest))


def read(source: str, strict: bool = False) -> Found:
    """All documents of `source` (as `load` takes it) in the order of a hash of their names, which makes the first of
    them a sample. Raises InputError.

    A file is a document; a single one is cut into pieces of PIECE_BYTES.
    """
    found = files.whole(name_of(source), *_files(source), strict)
    single = found.files - len(found.left_out) == 1
    parts = files.pieces(found.parts, PIECE_BYTES) if single else found.parts
    return dataclasses.replace(found, parts=_by_hash(parts))


def split(source: str, strict: bool = False) -> dict[str, Found]:
    """The documents of each split that `load` makes, in its order: files, or where these are few, pieces of them.
    Raises InputError."""
    found = files.whole(name_of(source), *_files(source), strict)
    if source == DEFAULT or len(found.parts) >= FEW_FILES:
        by_hash = _by_hash(found.parts)
    else:
        size = max(1, min(PIECE_BYTES, sum(part.characters for part in found.parts) // FEW_FILES))
        by_hash = _by_hash(files.pieces(found.parts, size))
    splits, start = {}, 0
    for name, fraction in SPLITS.items():
        end = start + max(1, round(fraction * len(by_hash)))
        splits[name], start = by_hash[start:end], end
    return {
        name: dataclasses.replace(found, parts=parts) for name, parts in {"train": by_hash[start:], **splits}.items()
    }


def is_short(source: str) -> bool:
    """Whether it is a file whose pieces would be no documents."""
    path = Path(source).expanduser()
    return path.is_file() and path.stat().st_size < SHORT


def name_of(source: str) -> str:
    """A corpus in words."""
    return "Python's standard library" if source == DEFAULT else str(Path(source))


def _files(source: str) -> tuple[Path, list[str]]:
    """The folder that names count from, and the names of the files in it. Raises InputError."""
    if source == DEFAULT:
        root = Path(sysconfig.get_path("stdlib"))
        return root, sorted(name for name in files.walk(root, LEFT_OUT.__contains__) if name.endswith(".py"))
    root = Path(source)
    require(root.exists(), f"corpus {source} does not exist: give a file or folder of UTF-8 text")
    require(root.is_dir() or root.is_file(), f"corpus {source} is neither a file nor a folder: give one of UTF-8 text")
    if root.is_file():
        return root.parent, [root.name]
    names = sorted(files.walk(root, lambda name: name.startswith(".")))
    require(bool(names), f"corpus {source} is empty: it holds no files")
    return root, names


def _by_hash(documents: list[Part]) -> list[Part]:
    return sorted(documents, key=lambda part: hashlib.sha256(part.name.encode()).digest())


def _through_tfds(splits: dict[str, list[Document]], folder: Path) -> dict[str, list[Document]]:
    """Write the splits with a TFDS builder unless `folder` has them, and read them back."""
    if folder.exists() and not list(folder.glob("*/*/dataset_info.json")):
        shutil.rmtree(folder)  # an interrupted preparation
    if not folder.exists():
        size = sum(len(text.encode()) for documents in splits.values() for _, text in documents)
        run_directory.require_writable(folder, needs=2 * size, remedy=user_cache.REMEDY)
    writing = {split: progress.shown(each, f"preparing the {split} text", len(each)) for split, each in splits.items()}
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        builder = _builder_class()(writing, data_dir=folder, file_format="array_record")
        builder.download_and_prepare()
        stored = {split: builder.as_data_source(split=split) for split in splits}
    writing.clear()  # TFDS keeps the builder, and with it the texts
    return {split: _rows(source, f"reading the prepared {split} text") for split, source in stored.items()}


def _rows(stored: Any, title: str) -> list[Document]:
    """The documents of a split, many at a time, which is faster than one by one."""
    groups = [range(start, min(start + READ_AT_A_TIME, len(stored))) for start in range(0, len(stored), READ_AT_A_TIME)]
    return [
        (row["name"].decode(), row["text"].decode())
        for group in progress.shown(groups, title, len(stored), len)
        for row in stored.__getitems__(group)
    ]


@functools.cache
def _builder_class():
    # Imported here, for its only use: it is slow to import, and --help must not wait for it.
    import tensorflow_datasets as tfds

    class TextCorpus(tfds.core.GeneratorBasedBuilder):
        """Documents of UTF-8 text, in the order given."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, splits: dict[str, Iterable[Document]], **settings):
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
