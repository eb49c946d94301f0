"""Whether a compressed model keeps to an allowed loss: by which candidates go on to more text, and by the test on text
that nothing was chosen by.

A candidate is accepted where the upper end of a one-sided confidence interval of its increase of the loss, paired over
documents, is at most what is allowed. With several candidates the chance that any of them is accepted wrongly stays at
CHANCE by the fallback procedure (Wiens 2003, Pharmaceutical Statistics 2:211; for tests without a known end Tian &
Ramdas 2021, arXiv 1910.04900): test number j has the share 1 / (j (j + 1)) of it, and one that accepts hands all that
it had on to the next. Its condition is that the order of the candidates does not depend on the text they are tested on.
"""

from collections.abc import Sequence

import numpy as np
from scipy import special

from efflm.evaluate.quality import Figure, Quality

CHANCE = 0.05  # that any candidate is accepted that loses more than is allowed
PROTOCOL = (
    "Accepted: the upper end of a one-sided interval of the loss over the first model's, paired over documents, by "
    f"Student's t. The chance that a candidate is accepted wrongly is {CHANCE:.0%}: test j has 1 / (j (j + 1)) of it, "
    "and what it accepts hands its share on (fallback procedure). That holds for documents drawn like the unseen ones."
)
# Standard errors by which a candidate may miss what is allowed and still be given more text, and by which it must keep
# to that on the selection text to be tested.
PLAUSIBLE = 2.0


def level(accepted: Sequence[bool], chance: float = CHANCE) -> float:
    """The chance of error that the next test has. accepted: the outcomes of all tests before it, in order."""
    number, first = len(accepted) + 1, len(accepted) + 1
    while first > 1 and accepted[first - 2]:
        first -= 1
    return chance * (1 / first - 1 / (number + 1))  # the sum of 1 / (j (j + 1)) from the first to this one


def bound(increase: Figure, documents: int, level: float) -> float:
    """The upper end of the one-sided interval by Student's t; infinity where one document gives no error."""
    value, error = increase
    return np.inf if error is None else float(value + special.stdtrit(documents - 1, 1 - level) * error)


def share_bound(count: int, items: int, level: float) -> float:
    """The upper end of the exact one-sided interval of a share (Clopper and Pearson 1934)."""
    return float(special.betaincinv(count + 1, items - count, 1 - level)) if count < items else 1.0


def layers(points: Sequence[tuple[float, float]]) -> list[int]:
    """Of each point (cost, loss): 1 on the Pareto front, 2 on the front of what is left without that, and so on."""
    found, left, layer = [0] * len(points), set(range(len(points))), 0
    beats = lambda one, other: one != other and one[0] <= other[0] and one[1] <= other[1]
    while left:
        layer += 1
        front = {i for i in left if not any(beats(points[j], points[i]) for j in left)}
        for i in front:
            found[i] = layer
        left -= front
    return found


def promising(costs: Sequence[float], increases: Sequence[Figure], allowed: float, by_loss: bool = False) -> list[int]:
    """Candidates that may keep to the allowed increase, the best first: by layer and then by cost, or by loss."""
    least = [value - PLAUSIBLE * (error or 0.0) for value, error in increases]
    kept = [i for i, value in enumerate(least) if value <= allowed]
    values = [increases[i][0] for i in kept]
    if by_loss:
        return [kept[i] for i in np.argsort(values, kind="stable")]
    ranked = layers([(costs[i], value) for i, value in zip(kept, values)])
    return [i for _, _, i in sorted((layer, costs[i], i) for layer, i in zip(ranked, kept))]


def held(first: Quality, before: Quality, allowed: float, times: int = 20, seed: int = 0) -> float:
    """The share of resamplings of the documents, drawn with replacement, in which the increase is at most `allowed`."""
    drawn = np.random.default_rng(seed).integers(0, len(before.bits), (times, len(before.bits)))
    more, base = (bits[drawn].sum(axis=1) for bits in (first.bits, before.bits))
    return float(np.mean(more / base - 1 <= allowed))


def joined(parts: Sequence[Quality]) -> Quality:
    """The sums of several texts as those of one."""
    fields = Quality.__dataclass_fields__
    return Quality(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))
