"""Text as rows to score: the protocol that a perplexity is worth nothing without.

A stream of tokens is read in windows of W tokens, each S further on. The first window scores all of its tokens, any
other the ones that no window before it has scored: so every token is scored once, and with S < W it is seen with at
least W - S tokens before it where there are so many. S = W are disjoint windows.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from efflm.config import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
    """How documents become streams and streams become windows. Raises InputError.

    window: tokens a model reads at once. stride: tokens from one window to the next; 0: the window. bos: the
    separator stands before each stream, so that its first token is scored too; without it that token is read only.
    joined: all documents are one stream, with the separator between them, which is read and not scored; otherwise
    each is a stream of its own.
    """

    window: int = 1024
    stride: int = 0
    bos: bool = True
    joined: bool = False

    def __post_init__(self):
        require(self.window > 0, f"window is {self.window}, but must be positive")
        require(
            0 <= self.stride <= self.window,
            f"stride is {self.stride}, but must be in [1, {self.window}], the window, or 0 for just that: a longer one "
            "would leave tokens out",
        )

    @property
    def step(self) -> int:
        return self.stride or self.window

    def __str__(self) -> str:
        seen = f"each token scored once, after at least {self.window - self.step:,} others where there are so many"
        moves = "disjoint" if self.step == self.window else f"{self.step:,} apart, {seen}"
        text = (
            "all documents joined by the separator, which is not scored" if self.joined else "each document by itself"
        )
        first = "after the separator as BOS" if self.bos else "without BOS, so that a first token is not scored"
        return f"windows of {self.window:,} tokens, {moves}; {text}, {first}"


def cut(documents: Sequence[Sequence[int]], separator: int, windows: Windows) -> dict[str, np.ndarray]:
    """Rows for evaluate.quality, of token ids: int32 [rows, length], as long as the longest window.

    inputs; targets, the token after each input; documents, 1 + the document of a target that is scored here, else 0;
    segments, the window within the row from 1 on, 0 on padding; positions, from 0 in each window. Short windows share
    a row. Raises InputError if there is nothing to score.
    """
    pieces = [
        piece
        for stream, owners in _streams(documents, separator, windows)
        for piece in _pieces(stream, owners, windows)
    ]
    require(bool(pieces), "there is nothing to score: every document is empty, or a single token without BOS")
    length, rows = max(len(inputs) for inputs, _, _ in pieces), []
    for piece in pieces:
        if not rows or sum(len(inputs) for inputs, _, _ in rows[-1]) + len(piece[0]) > length:
            rows.append([])
        rows[-1].append(piece)
    out = {
        name: np.zeros((len(rows), length), np.int32)
        for name in ("inputs", "targets", "documents", "segments", "positions")
    }
    for r, row in enumerate(rows):
        at = 0
        for segment, (inputs, targets, owners) in enumerate(row, start=1):
            here = (r, slice(at, at + len(inputs)))
            out["inputs"][here], out["targets"][here], out["documents"][here] = inputs, targets, owners
            out["segments"][here], out["positions"][here] = segment, np.arange(len(inputs))
            at += len(inputs)
    return out


def _streams(documents, separator: int, windows: Windows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(token ids, 1 + the document each belongs to, 0 for a separator)."""
    first = [separator] if windows.bos else []
    if not windows.joined:
        for index, ids in enumerate(documents, start=1):
            yield np.array([*first, *ids], np.int32), np.array([0] * len(first) + [index] * len(ids), np.int32)
        return
    stream, owners = list(first), [0] * len(first)
    for index, ids in enumerate(documents, start=1):
        if index > 1:
            stream, owners = [*stream, separator], [*owners, 0]
        stream, owners = [*stream, *ids], [*owners, *[index] * len(ids)]
    yield np.array(stream, np.int32), np.array(owners, np.int32)


def _pieces(stream: np.ndarray, owners: np.ndarray, windows: Windows):
    """The windows of one stream: inputs, targets, and the owner of each target that no window before has scored."""
    last, scored = len(stream) - 1, 0  # the last target, and the last that has been scored
    for start in range(0, last, windows.step):
        end = min(start + windows.window, last)
        fresh = np.arange(start + 1, end + 1) > scored
        yield stream[start:end], stream[start + 1 : end + 1], np.where(fresh, owners[start + 1 : end + 1], 0)
        scored = end
        if end == last:
            return
