"""The one protocol by which text is scored: which part of it, in windows of how many tokens.

A stream of tokens is read in windows of W tokens, each S further on. The first window scores all of its tokens, any
other the ones that no window before it has scored: so every token is scored once, and with S < W it is seen with at
least W - S tokens before it where there are so many. S = W are disjoint windows.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from efflm.config import flag, require
from efflm.evaluate.quality import Quality

FIELDS = ("inputs", "targets", "bytes", "documents", "segments", "positions")
BLOCK = 8192  # tokens in a block: its states and the arrays inside the model are all that scoring holds
LONGEST = 1024  # the window, unless one is asked for
JOINED = "all documents joined by the separator, which is not scored"

Block = dict[str, np.ndarray]  # FIELDS, each int32 [rows, length]
Piece = tuple[np.ndarray, ...]  # inputs, targets, bytes and documents of one window, int32 [tokens]
Sized = Iterable[tuple[int, int]]  # a document: its token ids, and the bytes of the text that each stands for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scoring:
    """How text is scored"""

    documents: int = flag(64, "documents to score, chosen by a hash of their names; 0: all; of enwik8 always all")
    tokens: int = flag(512, "tokens of each document to score, its first; 0: all; of enwik8 always all")
    window: int = flag(0, "tokens the model reads at once; 0: as many as it was trained on, at most 1024")
    stride: int = flag(0, "tokens from one window to the next, of which only the new ones are scored; 0: the window")
    bos: bool = flag(True, "put the tokenizer's separator before each text; without it the first token is not scored")
    joined: bool = flag(False, "join all documents to one text, the separator between them, in place of each by itself")

    def __post_init__(self):
        for name in ("documents", "tokens", "window"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}, but must be positive, or 0")
        longest = self.window or LONGEST
        require(
            0 <= self.stride <= longest,
            f"stride is {self.stride}, but must be in [1, {longest}], the window, or 0 for just that: a longer one "
            "would leave tokens out",
        )

    def within(self, max_length: int, trained: int = 0, unbroken: bool = False) -> "Scoring":
        """The same with the window of a model that reads at most `max_length` tokens and was trained on sequences of
        `trained`; 0: not known. unbroken: for documents that are parts of one text, which is scored whole. Raises
        InputError."""
        window = self.window or min(LONGEST, trained or max_length, max_length)
        require(
            window <= max_length, f"window is {window}, but the model's max_length is {max_length}: shorten the window"
        )
        whole = {"documents": 0, "tokens": 0, "joined": True} if unbroken else {}
        return dataclasses.replace(self, window=window, **whole)

    @property
    def step(self) -> int:
        return self.stride or self.window

    def __str__(self) -> str:
        seen = f"each token scored once, after at least {self.window - self.step:,} others where there are so many"
        moves = "disjoint" if self.step == self.window else f"{self.step:,} apart, {seen}"
        text = JOINED if self.joined else "each document by itself"
        first = "after the separator as BOS" if self.bos else "without BOS, so that a first token is not scored"
        return f"windows of {self.window:,} tokens, {moves}; {text}, {first}"


def blocks(documents: Iterable[Sized], separator: int, scoring: Scoring, unbroken: bool = False) -> Iterator[Block]:
    """The text in blocks of rows of about BLOCK tokens, all of one shape, for evaluate.quality.

    documents: are read once and never held. unbroken: no separators between them. scoring: as `within` says. A block
    holds inputs; targets, the token after each input; bytes, of the text that a target stands for; documents, 1 + the
    document of a target that is scored here, else 0; segments, the window within the row, from 1 on, 0 on padding;
    positions, from 0 in each window. Short windows share a row. Raises InputError at the end if there was nothing to
    score.
    """
    chosen = itertools.islice(documents, scoring.documents or None)
    capped = (itertools.islice(ids, scoring.tokens or None) for ids in chosen)
    length = scoring.window if scoring.joined or not scoring.tokens else min(scoring.window, scoring.tokens)
    count, rows, used, full = max(1, BLOCK // length), [], length, False
    for piece in _pieces(capped, separator, scoring, unbroken):
        if used + len(piece[0]) > length:
            if len(rows) == count:
                yield _block(rows, (count, length))
                rows, full = [], True
            rows.append([])
            used = 0
        rows[-1].append(piece)
        used += len(piece[0])
    require(bool(rows), "there is nothing to score: every document is empty, or a single token without BOS")
    yield _block(rows, (count if full else len(rows), length))


def _block(rows: list[list[Piece]], shape: tuple[int, int]) -> Block:
    out = {name: np.zeros(shape, np.int32) for name in FIELDS}
    for r, row in enumerate(rows):
        at = 0
        for segment, piece in enumerate(row, start=1):
            count = len(piece[0])
            for name, array in zip(FIELDS, (*piece, segment, np.arange(count)), strict=True):
                out[name][r, at : at + count] = array
            at += count
    return out


def _pieces(documents: Iterable[Sized], separator: int, scoring: Scoring, unbroken: bool) -> Iterator[Piece]:
    """The windows of all streams."""
    first = [(separator, 0, 0)] if scoring.bos else []
    between = first if not scoring.joined else [] if unbroken else [(separator, 0, 0)]

    def part(index: int, document: Sized) -> Iterator[tuple[int, int, int]]:
        return itertools.chain(between if index else first, ((token, size, index + 1) for token, size in document))

    parts = itertools.starmap(part, enumerate(documents))
    for stream in [itertools.chain.from_iterable(parts)] if scoring.joined else parts:
        yield from _windows(stream, scoring)


def _windows(stream: Iterator[tuple[int, int, int]], scoring: Scoring) -> Iterator[Piece]:
    """The windows of one stream of (token, its bytes, 1 + its document; 0 for a separator). A target that a window
    before has scored has no document."""
    held, scored = _taken(stream, scoring.window + 1), 0  # at most a window and one; targets already scored
    while held.shape[1] - 1 > scored:
        owners = held[2, 1:].copy()
        owners[:scored] = 0
        yield held[0, :-1], held[0, 1:], held[1, 1:], owners
        more = _taken(stream, scoring.step) if held.shape[1] > scoring.window else held[:, :0]
        scored = max(0, held.shape[1] - 1 - scoring.step)
        held = np.concatenate([held[:, scoring.step :], more], axis=1)


def _taken(stream: Iterator[Any], count: int) -> np.ndarray:
    """The next `count` entries of the stream or what is left of it, int32 [3, tokens]."""
    flat = itertools.chain.from_iterable(itertools.islice(stream, count))
    return np.fromiter(flat, np.int32).reshape(-1, 3).T


def described(scoring: Scoring, name: str, count: int, quality: Quality, unbroken: bool = False) -> str:
    """The protocol in words, without which a perplexity is worth nothing. name: what the text is; count: how many
    documents there are, of which the sums are of the first."""
    documents, tokens = len(quality.tokens), int(quality.tokens.sum())
    how = str(scoring).replace(JOINED, "as one text") if unbroken else str(scoring)
    each = f"at most the first {scoring.tokens:,} tokens of each" if scoring.tokens else "whole"
    errors = "standard errors over documents" if documents > 1 else "one document: no error bar"
    return (
        f"{documents} of {count:,} {name}, {each} ({tokens:,} tokens scored); {how}; bits per byte of text; perplexity "
        f"of this tokenizer's tokens; {errors}"
    )
