"""What a model answers to the items of a task, and how that differs from the answers of the original.

Both answer the same items, so what differs is counted in pairs: items that were right and are wrong, and the reverse
(flips; Dutta 2024, arXiv 2407.09141). An accuracy that stays can hide as many of one kind as of the other.
"""

import dataclasses
import math
import statistics
from typing import Any, Literal

import numpy as np
from scipy import special

from efflm.evaluate import quality
from efflm.evaluate.quality import Figure

Kind = Literal["choices", "last word"]
By = Literal["plain", "tokens", "bytes"]  # what the log-likelihood of a choice is divided by; plain: by nothing
CHANCE, POWER = 0.05, 0.8  # of the intervals, and of the effect that a task can detect
_Z, _Z_POWER = (statistics.NormalDist().inv_cdf(share) for share in (1 - CHANCE / 2, POWER))


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one model answers to the items of one task, [items, choices] padded to the most choices of an item.

    kind: "choices" (multiple choice) or "last word" (one choice, right if every token of it is the likeliest).
    loglikelihoods: float64, nats of each choice after its context, -inf where an item has fewer choices.
    tokens, bytes: int, of each choice. greedy: bool, whether each token of it is the likeliest.
    kl: float64 [items], KL(reference || model) in nats a token, mean over the tokens of the item's choices.
    confidence, right: float64 and bool [predictions], what the expected calibration error is made of. Choices: the
        softmax over an item's choices of its likeliest, and whether that is the label. Last word: the probability of
        the likeliest next token at each token of the word, and whether it is the word's.
    labels: int [items].
    """

    kind: Kind
    loglikelihoods: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray
    greedy: np.ndarray
    kl: np.ndarray
    confidence: np.ndarray
    right: np.ndarray
    labels: np.ndarray


def usual(answers: Answers) -> By:
    """What the accuracy of a task is by: bytes where choices have several tokens, since longer ones are less likely
    whatever they say (ARC, HellaSwag: acc_norm of lm-eval); plain where each is one token, as a letter or a yes and no
    are (MMLU, BoolQ), and of last words (LAMBADA)."""
    return "bytes" if answers.kind == "choices" and answers.tokens.max() > 1 else "plain"


def chosen(answers: Answers, by: By) -> np.ndarray:
    """int [items]: the likeliest choice, the first of equals; -1 if none is finite. Last word: 0 if every token of it
    is the likeliest, else -1: other words are not told apart."""
    if answers.kind == "last word":
        return np.where(answers.greedy[:, 0], 0, -1)
    lengths = {"plain": 1, "tokens": answers.tokens, "bytes": answers.bytes}[by]
    scores = answers.loglikelihoods / np.maximum(lengths, 1)
    return np.where(np.isfinite(scores.max(axis=1)), scores.argmax(axis=1), -1)


def correct(answers: Answers, by: By) -> np.ndarray:
    """bool [items]."""
    return chosen(answers, by) == answers.labels


def mean(values: np.ndarray) -> Figure:
    """The mean over items and its standard error, with the deviation of a sample, as lm-eval has it."""
    count, value = len(values), float(np.mean(values))
    return value, float(np.std(values, ddof=1) / math.sqrt(count)) if count > 1 else None


# --- two models, each item answered by both. to_wrong: items right before and wrong after; to_right: the reverse ------


def flips(before: np.ndarray, after: np.ndarray) -> tuple[int, int]:
    """(to_wrong, to_right) of bool [items]."""
    return int(np.sum(before & ~after)), int(np.sum(~before & after))


def difference(to_wrong: int, to_right: int, items: int) -> Figure:
    """Of the shares that are right, after minus before, and its standard error with the variance of pairs (Newcombe
    1998, Statistics in Medicine 17, 2635, method 1)."""
    value, discordant = (to_right - to_wrong) / items, (to_right + to_wrong) / items
    return value, math.sqrt((discordant - value**2) / items)


def interval(to_wrong: int, to_right: int, items: int) -> tuple[float, float]:
    """The 95% interval of the difference: Wald's with one flip more each way and two items more (Bonett and Price 2012,
    Journal of Educational and Behavioral Statistics 37, 479), which holds for few flips too, even none (Fagerland 2014,
    Statistics in Medicine 33, 2850, recommends it)."""
    value, error = difference(to_wrong + 1, to_right + 1, items + 2)
    return max(-1.0, value - _Z * error), min(1.0, value + _Z * error)


def mcnemar(to_wrong: int, to_right: int) -> float:
    """The two-sided p of McNemar's exact test: were flips to either side equally likely, to_right would be binomial of
    all flips with probability 1/2; p is twice the smaller tail, at most 1."""
    return min(1.0, 2 * float(special.bdtr(min(to_wrong, to_right), to_wrong + to_right, 0.5)))


def detectable(to_wrong: int, to_right: int, items: int) -> float:
    """The smallest difference that so many items show with power 80% at a level of 5% in both tails: d of items =
    ((z_level * sqrt(r) + z_power * sqrt(r - d^2)) / d)^2, with the share of flips r as `interval` has it, one more each
    way (Connett 1987, Statistics in Medicine 6, 733). At most r."""
    count = items + 2
    share = (to_wrong + to_right + 2) / count
    root = _Z_POWER * math.sqrt(max(0.0, count + _Z_POWER**2 - _Z**2))
    return min(share, math.sqrt(share) * (_Z * math.sqrt(count) + root) / (count + _Z_POWER**2))


# --- the figures of a row --------------------------------------------------------------------------------------------


def figures(own: Answers, original: Answers, rounded: Answers | None = None) -> dict[str, Any]:
    """What a row says of a task, as JSON has it. original: of the first row, perhaps the same answers: then nothing is
    said of a difference (None). rounded: of the original computed in another precision (quality.rounded).

    accuracy is that of `usual`, which `by` names. mcnemar_p, flips and changed compare with the original; changed: all
    other answers, of last words only those that flip. interval: of accuracy_difference. minimum_detectable: an
    accuracy difference. changed_by_rounding, kl_by_rounding: what rounding alone does to the original's answers.
    """
    by = usual(original)
    accuracy, error = mean(correct(own, by))
    kept = ("plain", "tokens", "bytes") if own.kind == "choices" else ("plain",)
    found = {
        "kind": own.kind,
        "items": len(own.labels),
        "by": by,
        "accuracy": accuracy,
        "accuracy_stderr": error,
        "accuracies": {each: mean(correct(own, each))[0] for each in kept},
        "calibration_error": quality.expected_error(own.confidence, own.right),
        "calibration_error_before": quality.expected_error(original.confidence, original.right),
        "changed_by_rounding": None if rounded is None else changed(rounded, original),
        "kl_by_rounding": None if rounded is None else float(np.mean(rounded.kl)),
    }
    differences = _differences(own, original, by)
    return found | (dict.fromkeys(differences) if own is original else differences)


def changed(own: Answers, original: Answers) -> int:
    """Items that are answered otherwise."""
    return int(np.sum(differs(own, original)))


def differs(own: Answers, original: Answers) -> np.ndarray:
    """bool [items]: whether the item is answered otherwise."""
    by = usual(original)
    return chosen(own, by) != chosen(original, by)


def _differences(own: Answers, original: Answers, by: By) -> dict[str, Any]:
    both, items = flips(correct(original, by), correct(own, by)), len(own.labels)
    value, error = difference(*both, items)
    divergence, spread = mean(own.kl)
    return {
        "accuracy_difference": value,
        "accuracy_difference_stderr": error,
        "interval": interval(*both, items),
        "mcnemar_p": mcnemar(*both),
        "flips_to_wrong": both[0],
        "flips_to_right": both[1],
        "changed": changed(own, original),
        "kl": divergence,
        "kl_stderr": spread,
        "minimum_detectable": detectable(*both, items),
    }
