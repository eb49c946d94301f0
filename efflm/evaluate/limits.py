"""Where a compressed model is worse than its loss on the whole text says: at which places of the text, at how frequent
tokens, and how far its confidence is from what it gets right."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from efflm.evaluate import quality
from efflm.evaluate.quality import Block, Figure, Quality

POSITIONS = (0, 16, 64, 256, 1024, 4096)  # where bins of the tokens before a target begin
FIELDS = dataclasses.fields(Quality)
COUNTS = (0, 1, 10, 100, 1000)  # where bins of the occurrences of a token in the training text begin


@dataclasses.dataclass(frozen=True)
class Targets:
    """The targets of a text, [M]: fields of their blocks, and of each model what quality.score gives of them."""

    fields: dict[str, np.ndarray]
    found: dict[str, dict[str, np.ndarray]]

    def quality(self, name: str) -> Quality:
        """The sums of a model for each document."""
        counts = {"bytes": self.fields["bytes"], "tokens": np.ones(len(self.fields["bytes"]))} | self.found[name]
        sums = {each.name: np.bincount(self.fields["documents"] - 1, counts[each.name]) for each in FIELDS}
        return Quality(**sums)

    def by_group(self, values_M: np.ndarray, groups_M: np.ndarray) -> dict[int, Figure]:
        """{group: the mean of its values, and its standard error over documents}."""
        out = {}
        for group in np.unique(groups_M):
            mine = groups_M == group
            sums = [np.bincount(self.fields["documents"][mine], each) for each in (values_M[mine], np.ones(mine.sum()))]
            out[int(group)] = quality.ratio(*(each[sums[1] > 0] for each in sums))
        return out


def gathered(blocks: Iterable[tuple[Block, dict[str, dict[str, np.ndarray]]]]) -> Targets:
    """Of what quality.by_target gives."""
    fields, found = zip(*blocks)
    joined = lambda parts: {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Targets(joined(fields), {name: joined([each[name] for each in found]) for name in found[0]})


def bins(values_M: np.ndarray, starts: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    """The bin of each value, and what the bins are called: 0, 1-9, 1000+."""
    ends = [f"{low}" if high == low + 1 else f"{low}-{high - 1}" for low, high in itertools.pairwise(starts)]
    return np.searchsorted(starts, values_M, side="right") - 1, [*ends, f"{starts[-1]}+"]


def by_position(read: Targets, name: str, first: str) -> dict[str, Figure]:
    """{tokens before it: bits a token more than the first model's}; of the first model its bits a token."""
    where, names = bins(read.fields["positions"], POSITIONS)
    base = 0.0 if name == first else read.found[first]["bits"]
    return {names[i]: figure for i, figure in read.by_group(read.found[name]["bits"] - base, where).items()}


def by_frequency(read: Targets, name: str, counts_V: np.ndarray) -> dict[str, Figure]:
    """{occurrences of the target in the training text: the share at which the likeliest token is another one than the
    reference's}. counts_V: of each token."""
    where, names = bins(counts_V[read.fields["targets"]], COUNTS)
    return {names[i]: figure for i, figure in read.by_group(1.0 - read.found[name]["agreement"], where).items()}


def calibration(read: Targets, name: str, first: str, times: int = 200, seed: int = 0) -> tuple[Figure, Figure | None]:
    """The expected calibration error and its standard error, and the same of the difference to the first model's: over
    resamplings of the documents (bootstrap)."""
    owners, count = read.fields["documents"] - 1, int(read.fields["documents"].max())
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), times)
    weights = np.concatenate([np.ones((1, count)), weights])  # the text as it is, then the resamplings

    def errors(each: str) -> np.ndarray:
        confidence, right = read.found[each]["confidence"], read.found[each]["right"]
        gaps = np.zeros((count, quality.BINS))
        np.add.at(gaps, (owners, quality.bin_of(confidence)), right - confidence)
        return np.abs(weights @ gaps).sum(axis=1) / (weights @ np.bincount(owners, minlength=count))

    own = errors(name)
    figure = lambda values: (float(values[0]), float(np.std(values[1:], ddof=1)) if count > 1 else None)
    return figure(own), None if name == first else figure(own - errors(first))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's, of equal values the mean rank; None where one of them has no two values that differ."""
    ranks = [np.array([np.mean([(x > y) + (x >= y) for y in values]) for x in values]) for values in (one, other)]
    spread = [np.std(each) for each in ranks]
    return float(np.corrcoef(*ranks)[0, 1]) if len(one) > 1 and min(spread) > 0 else None
