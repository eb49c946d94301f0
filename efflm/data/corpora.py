"""Text in: the running Python's standard library, or any file or folder of UTF-8, through one TFDS builder."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import shutil
import sysconfig
from pathlib import Path

from efflm.config import InputError, require

DEFAULT = "stdlib"
SPLITS = {"test": 0.10, "validation": 0.05}  # of the documents; the rest trains
LEFT_OUT = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "__pycache__"}
FEW_FILES = 64  # a corpus of fewer files is cut into pieces, so that every split gets some of it
PIECE_BYTES = 16 * 1024

Document = tuple[str, str]  # (name, text)


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
    name, documents = _read(source)
    splits = _split(documents)
    size = sum(len(text.encode()) for _, text in splits["train"])
    require(
        size >= least_bytes and all(splits.values()),
        f"corpus {name} is too small: {size:,} bytes in {len(splits['train'])} documents to train on, but one batch "
        f"needs about {least_bytes:,} bytes and each split a document: give more text or lower --train.batch",
    )
    digest = hashlib.sha256(json.dumps(splits).encode()).hexdigest()[:16]
    source = source if source == DEFAULT else str(Path(source).expanduser().absolute())
    return Corpus(name, source, digest, **_through_tfds(splits, cache / digest))


def read(source: str, documents: int = 0) -> tuple[str, int, list[Document]]:
    """The name of `source` (as `load` takes it), how many documents it holds, and the first `documents` of them (0:
    all) in the order of a hash of their names, which makes them a sample. Raises InputError.

    A file is a document; a single one is cut into pieces of PIECE_BYTES.
    """
    name, found = _files(source)
    found = _pieces(found, PIECE_BYTES) if len(found) == 1 else found
    return name, len(found), _by_hash(found)[: documents or None]


def held_out(source: str, documents: int = 0) -> tuple[str, int, list[Document]]:
    """The same of the test split that `load` makes, without preparing the others. Raises InputError."""
    name, found = _read(source)
    test = _split(found)["test"]
    return name, len(test), test[: documents or None]


def _read(source: str) -> tuple[str, list[Document]]:
    """The documents to split: files, or where these are few, pieces of them."""
    name, documents = _files(source)
    size = max(1, min(PIECE_BYTES, sum(len(text) for _, text in documents) // FEW_FILES))
    return name, documents if source == DEFAULT or len(documents) >= FEW_FILES else _pieces(documents, size)


def _files(source: str) -> tuple[str, list[Document]]:
    if source == DEFAULT:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts)]
        return "Python's standard library", _documents(root, paths)
    root = Path(source).expanduser()
    require(root.exists(), f"corpus {source} does not exist: give a file or folder of UTF-8 text")
    if root.is_file():
        return str(root), _documents(root.parent, [root])
    paths = [
        path
        for path in root.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    require(bool(paths), f"corpus {source} is empty: it holds no files")
    return str(root), _documents(root, paths)


def _documents(root: Path, paths: list[Path]) -> list[Document]:
    documents = []
    for path in sorted(paths):
        data = path.read_bytes()
        require(b"\0" not in data, f"corpus file {path} is binary: give UTF-8 text")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"corpus file {path} is not UTF-8 (byte {data[error.start]:#04x} at offset {error.start}): "
                "convert it, or leave it out"
            ) from None
        if text.strip():
            documents.append((path.relative_to(root).as_posix(), text))
    require(bool(documents), f"corpus {root if len(paths) != 1 else paths[0]} is empty: it holds no text")
    return documents


def _pieces(documents: list[Document], size: int) -> list[Document]:
    """Each document cut at line ends into pieces of about `size` characters."""
    out = []
    for name, text in documents:
        piece, length, index = [], 0, 0
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), 4 * size):  # a file may be one endless line
                part = line[start : start + 4 * size]
                piece.append(part)
                length += len(part)
                if length >= size:
                    out.append((f"{name}#{index}", "".join(piece)))
                    piece, length, index = [], 0, index + 1
        if piece:
            out.append((f"{name}#{index}", "".join(piece)))
    return [document for document in out if document[1].strip()]


def _split(documents: list[Document]) -> dict[str, list[Document]]:
    by_hash = _by_hash(documents)
    splits, start = {}, 0
    for name, fraction in SPLITS.items():
        end = start + max(1, round(fraction * len(by_hash)))
        splits[name], start = by_hash[start:end], end
    return {"train": by_hash[start:], **splits}


def _by_hash(documents: list[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest())


def _through_tfds(splits: dict[str, list[Document]], folder: Path) -> dict[str, list[Document]]:
    """Write the splits with a TFDS builder unless `folder` has them, and read them back."""
    if folder.exists() and not list(folder.glob("*/*/dataset_info.json")):
        shutil.rmtree(folder)  # an interrupted preparation
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
