"""What a model answers to the items of a task, and how that differs from the answers of the original."""

import dataclasses
from typing import Literal

import numpy as np

Kind = Literal["choices", "last word"]


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
