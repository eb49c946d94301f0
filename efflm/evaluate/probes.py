"""Generated tasks whose answers are exact: what a compressed model no longer copies or adds up.

Each is to say the rest of a text, which can be only one; right is an answer whose every token is the likeliest. The
original may be wrong too: what counts is which answers change.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from efflm.evaluate.task_files import Item, Task

FIRST = ("Ba", "De", "Fi", "Go", "Hu", "Ka", "Le", "Mi", "No", "Ru", "Sa", "Te", "Vi", "Wo", "Za")
LAST = ("bor", "dan", "gel", "kin", "lov", "mar", "nis", "pol", "ret", "sun", "tam", "vek")
PLACES = ("hall", "garden", "station", "market", "library", "office")
HIDDEN = ("drawer", "basket", "cupboard", "barrel", "wagon", "chimney", "kettle", "suitcase")
LINES = 24  # between what a long copy is of and the question, of about ten tokens each


def rare_words(tokenizer: Any, counts_V: np.ndarray, count: int) -> list[str]:
    """Words that are one token, with the space before them, and are in a text least often. counts_V: of each token."""
    words = (tokenizer.decode([index]).strip() for index in np.argsort(counts_V, kind="stable").tolist())
    found = dict.fromkeys(word for word in words if re.fullmatch("[a-z]{4,}", word))
    return [f" {word}" for word in list(found)[:count]]


def tasks(rare: Sequence[str], items: int, seed: int = 0) -> tuple[Task, ...]:
    """`items` of each kind. rare: words, perhaps none."""
    rng = np.random.default_rng(seed)
    one = lambda words: str(rng.choice(words))
    name = lambda: f"{one(FIRST)}{one(LAST)}{one(LAST)}"

    def rare_word() -> tuple[str, str]:
        word = one(rare)
        return f"The teacher wrote the word{word} on the board. Then the pupils wrote the word", word

    def digits() -> tuple[str, str]:
        code = " ".join(map(str, rng.integers(0, 10, 5)))
        return f"The code of the door is {code}. She said it again: the code of the door is", f" {code}"

    def total() -> tuple[str, str]:
        *shown, (a, b) = rng.integers(1, 10, (6, 2))
        return "".join(f"{c} + {d} = {c + d}\n" for c, d in shown) + f"{a} + {b} =", f" {a + b}"

    def surname() -> tuple[str, str]:
        first, last, other = name(), name(), name()
        return f"{first} {last} met {other} in the {one(PLACES)}. {other} left soon, but not {first}", f" {last}"

    def long_copy() -> tuple[str, str]:
        who, where = name(), one(HIDDEN)
        between = "".join(f"The coat of {name()} is in the {one(PLACES)}.\n" for _ in range(LINES))
        return f"The key of {who} is in the {where}.\n{between}The key of {who} is in the", f" {where}"

    kinds: dict[str, Callable[[], tuple[str, str]]] = {"rare words": rare_word} if rare else {}
    kinds |= {"digits": digits, "sums": total, "names": surname, "long-range copies": long_copy}
    return tuple(
        Task(kind, "last word", tuple(_item(i, *make()) for i in range(items))) for kind, make in kinds.items()
    )


def _item(number: int, context: str, answer: str) -> Item:
    return Item(str(number), context, (answer,), 0)
