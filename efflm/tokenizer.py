"""Byte-level BPE (Sennrich 2016, arXiv 1508.07909; bytes as in GPT-2), trained here with the `tokenizers` library."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from efflm.config import InputError
from efflm.rundir import write_whole

SEPARATOR = "<|endoftext|>"
BYTES = 257  # entries of a vocabulary that has a token for each byte, a separator and nothing else


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. `separator` is the id that stands before and after each document."""

    core: tokenizers.Tokenizer

    @property
    def vocabulary(self) -> int:
        return self.core.get_vocab_size()

    @property
    def separator(self) -> int:
        return self.core.token_to_id(SEPARATOR)

    def encode(self, text: str) -> list[int]:
        return self.core.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.core.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.core.decode(list(ids), skip_special_tokens=True)

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text each token stands for, int32 [vocabulary]; 0 for the separator."""
        sizes = np.zeros(self.vocabulary, np.int32)
        for token, index in self.core.get_vocab(with_added_tokens=False).items():
            sizes[index] = len(token)  # the byte-level alphabet writes each byte as one character
        sizes[self.separator] = 0
        return sizes

    @functools.cached_property
    def byte_ids(self) -> np.ndarray:
        """The token of each single byte, int32 [256]."""
        # Bytes that print stand for themselves in the byte-level alphabet, the others for 256, 257, ... in order.
        printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        others = iter(range(256, 512))
        letters = [chr(byte if byte in printed else next(others)) for byte in range(256)]
        return np.array([self.core.token_to_id(letter) for letter in letters], np.int32)

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.core.to_str().encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        write_whole(path, self.core.to_str(pretty=True))


def train(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of at most `vocabulary` entries, the separator among them; fewer if the text has no more."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return Tokenizer(core)


def load(path: Path) -> Tokenizer:
    """Read a tokenizer.json. Raises InputError if it is missing or is none."""
    if not path.is_file():
        raise InputError(f"no tokenizer at {path}: give the directory of a finished run")
    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path} is not a tokenizer: {error}") from None
