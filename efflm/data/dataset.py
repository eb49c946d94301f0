"""From a corpus to rows of tokens: each thing is made once and kept under a hash of its content."""

import dataclasses
from pathlib import Path

import numpy as np

from efflm import tokenizer as tokenizers
from efflm.config import require
from efflm.data import corpora, enwik8, loader, packing
from efflm.tokenizer import Tokenizer

# What is scored, so that measuring takes as long on a large corpus as on a small one: many documents, a part of each.
TEST_DOCUMENTS, TEST_TOKENS = 64, 512
# Of a text without documents: the bytes that count as one, for standard errors, and how much validation text is read.
STRETCH, VALIDATION = 1 << 16, 1 << 20


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A corpus in rows of tokens. protocol: how quality is measured on test, in words."""

    corpus: corpora.Corpus | enwik8.Enwik8
    tokenizer: Tokenizer
    train: packing.Rows | packing.Stream
    validation: packing.Rows | packing.Stream
    test: packing.Rows | packing.Stream
    protocol: str

    def batches(self, batch: int, seed: int):
        return loader.batches(self.train, batch, seed)


def prepare(
    source: str, cache: Path, *, vocabulary: int, length: int, batch: int, tokenizer: Tokenizer | None = None
) -> Dataset:
    """Read, split, tokenize and pack `source`. A tokenizer is trained on its training split unless one is given.

    enwik8 is read in bytes, whatever `vocabulary` is, and all of its test split is scored. Raises InputError, before
    anything is written, if the text cannot be read or is far too small for one batch.
    """
    if source == enwik8.NAME:
        return _in_bytes(enwik8.load(cache), tokenizer or tokenizers.train((), tokenizers.BYTES), length)
    corpus = corpora.load(source, cache, least_bytes=2 * batch * length)
    folder = cache / corpus.digest
    if tokenizer is None:
        path = folder / f"tokenizer-{vocabulary}.json"
        if path.exists():
            tokenizer = tokenizers.load(path)
        else:
            tokenizer = tokenizers.train((text for _, text in corpus.train), vocabulary)
            tokenizer.save(path)
    texts = lambda split: tokenizer.encode_batch([text for _, text in split])
    pack = lambda split, most: packing.pack(texts(split), tokenizer.separator, length, most)
    held_out = lambda split: pack(split[:TEST_DOCUMENTS], TEST_TOKENS)  # the order is a hash's: the first are a sample
    train = packing.load_or_pack(folder / f"rows-{tokenizer.digest}-{length}.npz", lambda: pack(corpus.train, None))
    loader.require_one_batch(train, batch)
    test = held_out(corpus.test)
    protocol = (
        f"{test.segments.max()} of {len(corpus.test)} test documents of {corpus.name}, at most the first {TEST_TOKENS} "
        f"tokens of each ({np.sum(test.segments > 0):,} in all), in rows of {length} without overlap; context crosses "
        "no document or row; bits per byte of UTF-8, standard error over documents"
    )
    return Dataset(corpus, tokenizer, train, held_out(corpus.validation), test, protocol)


def _in_bytes(corpus: enwik8.Enwik8, tokenizer: Tokenizer, length: int) -> Dataset:
    require(
        tokenizer.vocabulary == tokenizers.BYTES,
        f"enwik8 is read in bytes, but the tokenizer given has {tokenizer.vocabulary} entries: train without it",
    )
    rows = lambda content: packing.Stream(
        content, tokenizer.byte_ids, tokenizer.separator, length, max(1, STRETCH // length)
    )
    protocol = (
        f"all {len(corpus.test):,} bytes of the test split of {corpus.name}, in rows of {length} without overlap; "
        "context crosses no row; bits per byte (the literature's bits per character), standard error over stretches "
        f"of {STRETCH:,} bytes"
    )
    return Dataset(
        corpus, tokenizer, rows(corpus.train), rows(corpus.validation[:VALIDATION]), rows(corpus.test), protocol
    )
