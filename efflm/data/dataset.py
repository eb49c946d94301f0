"""From a corpus to packed rows: text, tokenizer, rows, each made once and kept under a hash of its content."""

import dataclasses
from pathlib import Path

import numpy as np

from efflm import tokenizer as tokenizers
from efflm.data import corpora, loader, packing
from efflm.tokenizer import Tokenizer

# What is scored, so that measuring takes as long on a large corpus as on a small one: many documents, a part of each.
TEST_DOCUMENTS, TEST_TOKENS = 64, 512


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A corpus in tokens. train, validation and test are packed rows."""

    corpus: corpora.Corpus
    tokenizer: Tokenizer
    train: packing.Rows
    validation: packing.Rows
    test: packing.Rows

    def batches(self, batch: int, seed: int):
        return loader.batches(self.train, batch, seed)

    @property
    def protocol(self) -> str:
        """How quality is measured on `test`, in words."""
        tokens = int(np.sum(self.test.segments > 0))
        return (
            f"{self.test.segments.max()} of {len(self.corpus.test)} test documents of {self.corpus.name}, at most the "
            f"first {TEST_TOKENS} tokens of each ({tokens:,} in all), in rows of "
            f"{self.test.inputs.shape[1]} without overlap; context crosses no document or row; bits per byte of "
            "UTF-8, standard error over documents"
        )


def prepare(
    source: str, cache: Path, *, vocabulary: int, length: int, batch: int, tokenizer: Tokenizer | None = None
) -> Dataset:
    """Read, split, tokenize and pack `source`. A tokenizer is trained on its training split unless one is given.

    Raises InputError, before anything is written, if the text cannot be read or is far too small for one batch.
    """
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
    return Dataset(corpus, tokenizer, train, held_out(corpus.validation), held_out(corpus.test))
