"""How much of a text another text holds, by sequences of tokens."""

from collections.abc import Iterable, Mapping

import numpy as np

LENGTH = 13  # tokens: as Brown 2020 (arXiv 2005.14165, appendix C) looks for training text in test sets
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, of high order: sequences get different numbers but for chance


def _numbers(tokens: np.ndarray) -> np.ndarray:
    """A number for each sequence of LENGTH tokens, uint64: equal for equal ones."""
    count = len(tokens) - LENGTH + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for i in range(LENGTH):
        total = total * _FACTOR + tokens[i : i + count].astype(np.uint64) + np.uint64(1)
    return total


def share(calibration: Mapping[str, np.ndarray], documents: Iterable[Iterable[int]]) -> float:
    """The share of the sequences of LENGTH tokens in the documents that the calibration rows hold too; 0 if there are
    none. calibration: inputs and segments [N, T]; sequences lie within a segment."""
    known = [np.zeros(0, np.uint64)]
    for tokens, segments in zip(np.asarray(calibration["inputs"]), np.asarray(calibration["segments"]), strict=True):
        known += [_numbers(tokens[segments == segment]) for segment in np.unique(segments[segments > 0])]
    whole, found, total = np.unique(np.concatenate(known)), 0, 0
    for document in documents:
        numbers = _numbers(np.fromiter(document, np.int64))
        found, total = found + int(np.isin(numbers, whole).sum()), total + len(numbers)
    return found / total if total else 0.0


def words(share: float, name: str) -> str:
    return f"{share:.2%} of the {LENGTH}-token sequences of {name} are in the calibration text too."
