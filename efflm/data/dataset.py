"""From a corpus to packed rows of tokens to train on, each made once and kept under a hash of its content, and to
held-out text as a stream of tokens to score."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efflm import user_cache
from efflm.cli import progress
from efflm.config import require
from efflm.data import corpora, enwik8, loader, packing
from efflm.data.files import Found
from efflm.text import tokenizer as tokenizers
from efflm.text.tokenizer import Tokenizer

# Of a text without documents: the bytes that count as one, for standard errors, and how much validation text is read.
STRETCH, VALIDATION = 1 << 16, 1 << 20
HELD_OUT = ("validation", "test")
ENCODED_AT_A_TIME = 2048  # documents


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents as token ids, read and tokenized anew whenever one iterates over them: one at a time, and of a long one
    a stretch at a time.

    name: what they are, in words. parts: one a document; encode: a part -> its ids and the bytes of the text that each
    stands for, stretch by stretch. sizes: bytes of each document. unbroken: they are stretches of one text. known: the
    text that models from elsewhere were in all likelihood trained on, if it is that. left_out: which files were, in
    words.
    """

    name: str
    parts: Sequence[Any]
    encode: Callable[[Any], Iterable[tuple[Sequence[int], np.ndarray]]]
    sizes: Sequence[int]
    unbroken: bool = False
    known: str = ""
    left_out: str = ""

    def __len__(self) -> int:
        return len(self.parts)

    def part(self, start: int, end: int) -> "Text":
        """Some of the documents."""
        return dataclasses.replace(self, parts=self.parts[start:end], sizes=self.sizes[start:end])

    def __iter__(self) -> Iterator[Iterator[int]]:
        return (itertools.chain.from_iterable(ids for ids, _ in self.encode(part)) for part in self.parts)

    def sized(self) -> Iterator[Iterator[tuple[int, int]]]:
        """The documents again, with each id the bytes of text that it stands for."""
        return (itertools.chain.from_iterable(zip(*each) for each in self.encode(part)) for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A corpus in rows of tokens to train on, and its held-out text."""

    corpus: corpora.Corpus | enwik8.Enwik8
    tokenizer: Tokenizer
    train: packing.Rows | packing.Stream
    validation: Text
    test: Text

    def batches(self, batch: int, seed: int):
        return loader.batches(self.train, batch, seed)

    def validation_batches(self, batch: int, count: int) -> list[dict[str, np.ndarray]]:
        """The beginning of the validation text in rows like those to train on, again from its start if it is short."""
        left, documents = count * batch * self.train.length, []
        for document in self.validation:
            documents.append(list(itertools.islice(document, left)))
            left -= len(documents[-1])
            if left <= 0:
                break
        rows = packing.pack(documents, self.tokenizer.separator, self.train.length)
        return [rows[np.arange(i * batch, (i + 1) * batch) % len(rows)] for i in range(count)]


def prepare(
    source: str,
    cache: Path,
    *,
    vocabulary: int,
    length: int,
    batch: int,
    tokenizer: Tokenizer | None = None,
    strict: bool = False,
    lower: str = "--train.batch or --train.length",
) -> Dataset:
    """Read, split, tokenize and pack `source`. A tokenizer is trained on its training split unless one is given.

    enwik8 is read in bytes, whatever `vocabulary` is. strict: as corpora.load says. lower: what makes a batch smaller,
    as the caller knows it. Raises InputError, before anything is written, if the text cannot be read or is far too
    small for one batch, and if the tokenizer given has more than `vocabulary` entries.
    """
    require(
        tokenizer is None or tokenizer.vocabulary <= vocabulary,
        f"the tokenizer given has {tokenizer and tokenizer.vocabulary} entries, but the vocabulary is {vocabulary}: "
        "the model's (model.vocabulary) must be at least that",
    )
    if source == enwik8.NAME:
        corpus, tokenizer = enwik8.load(cache), tokenizer or tokenizers.train((), tokenizers.BYTES)
        _require_bytes(tokenizer)
        train = packing.Stream(corpus.train, tokenizer.byte_ids, tokenizer.separator, length)
        return Dataset(corpus, tokenizer, train, *(held_out(source, tokenizer, cache, part) for part in HELD_OUT))
    corpus = corpora.load(source, cache, least_bytes=2 * batch * length, strict=strict, lower=lower)
    folder = cache / corpus.digest
    with user_cache.alone(folder):
        tokenizer = tokenizer or _trained(folder / f"tokenizer-{vocabulary}.json", corpus, vocabulary)
        texts = [text for _, text in corpus.train]
        pack = lambda: packing.pack(_encoded(texts, tokenizer), tokenizer.separator, length)
        reads = f"{tokenizer.digest}-{tokenizer.separator}" + (f"-{tokenizer.limit}" if tokenizer.limit else "")
        train = packing.load_or_pack(folder / f"rows-{reads}-{length}.npy", pack)
    loader.require_one_batch(train, batch, lower)
    return Dataset(
        corpus, tokenizer, train, *(_split(source, part, corpus.parts[part], tokenizer) for part in HELD_OUT)
    )


def _encoded(texts: list[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of each text, some texts at a time."""
    groups = [texts[start : start + ENCODED_AT_A_TIME] for start in range(0, len(texts), ENCODED_AT_A_TIME)]
    characters = lambda group: sum(map(len, group))
    for group in progress.shown(groups, "tokenizing", sum(map(len, texts)), characters):
        yield from tokenizer.encode_batch(group)


def _trained(path: Path, corpus: corpora.Corpus, vocabulary: int) -> Tokenizer:
    if path.exists():
        return tokenizers.load(path)
    texts = progress.shown([text for _, text in corpus.train], "training the tokenizer", len(corpus.train))
    tokenizer = tokenizers.train(texts, vocabulary)
    tokenizer.save(path)
    return tokenizer


def held_out(source: str, tokenizer: Tokenizer, cache: Path, split: str = "test", strict: bool = False) -> Text:
    """What `prepare` keeps from training. Raises InputError."""
    if source != enwik8.NAME:
        return _split(source, split, corpora.split(source, strict)[split], tokenizer)
    _require_bytes(tokenizer)
    content = getattr(enwik8.load(cache), split)[: VALIDATION if split == "validation" else None]
    parts = [content[start : start + STRETCH] for start in range(0, len(content), STRETCH)]
    name = f"stretches of {STRETCH:,} bytes of the {split} split of enwik8"
    encode = lambda part: [(tokenizer.byte_ids[part].tolist(), np.ones(len(part), np.int64))]
    return Text(name, parts, encode, [len(part) for part in parts], unbroken=True)


def source_of(corpus: str, about: dict[str, Any]) -> str:
    """The corpus asked for, else the one that a model was trained on here (about: formats.sources.Loaded)."""
    return corpus or about.get("source") or corpora.DEFAULT


def to_score(
    text: str, corpus: str, about: dict[str, Any], tokenizer: Tokenizer, cache: Path, strict: bool = False
) -> Text:
    """All of a file or folder if one is given as `text`, else the test split of `source_of`. Raises InputError."""
    if text:
        return _text(f"documents of {corpora.name_of(text)}", corpora.read(text, strict), tokenizer)
    source = source_of(corpus, about)
    known = corpora.name_of(source) if source == corpora.DEFAULT and not about.get("source") else ""
    return dataclasses.replace(held_out(source, tokenizer, cache, strict=strict), known=known)


def _split(source: str, split: str, found: Found, tokenizer: Tokenizer) -> Text:
    return _text(f"{split} documents of {corpora.name_of(source)}", found, tokenizer)


def _text(name: str, found: Found, tokenizer: Tokenizer) -> Text:
    encode = lambda part: tokenizer.sized(part.stretches())
    return Text(name, found.parts, encode, [part.nbytes for part in found.parts], left_out=str(found))


def cache() -> Path:
    """Where prepared text is kept. Raises InputError."""
    return user_cache.folder("corpora")


def _require_bytes(tokenizer: Tokenizer) -> None:
    require(
        tokenizer.vocabulary == tokenizers.BYTES,
        f"enwik8 is read in bytes, but the tokenizer given has {tokenizer.vocabulary} entries: give another text, or a "
        "model that was trained on enwik8",
    )
