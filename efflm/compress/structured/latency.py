"""How much less time one model takes than another, measured on this machine."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from efflm import ops
from efflm.config import require
from efflm.infer.generate import decode, prefill, row_keys, start
from efflm.infer.sampling import GREEDY
from efflm.model import LanguageModel
from efflm.parallel import sharding

Phase = Literal["both", "prefill", "decode"]
CONTEXT, NEW = 128, 32  # tokens of the one prompt, and tokens that follow it, for a model that reads so many
ROUNDS, LEAST = 5, 1.0  # of one model and the other, at least; and seconds that they take together, at least


def runner(model: LanguageModel, phase: Phase) -> Callable[[], float]:
    """What reads a prompt and writes tokens once, and gives the seconds of a phase or of both. The first call compiles.

    The weights are laid out for the kernels of this machine: a second copy of them, held as long as what is returned.
    """
    require(jax.process_count() == 1, "latency is measured in one process, but there are several: set another target")
    model = ops.prepare(sharding.on_one_device(model), jax.default_backend())
    new = min(NEW, model.config.max_length // 2)
    length = min(CONTEXT, model.config.max_length - new)
    tokens, lengths = np.arange(length, dtype=np.int32)[None] % model.config.vocabulary, np.array([length], np.int32)
    how, keys, stops = GREEDY.arrays(), row_keys(0, 1), np.zeros(0, np.int32)
    wait: Callable[[Any], Any] = jax.block_until_ready

    def run() -> float:
        began = time.perf_counter()
        logits, cache = wait(prefill(model, tokens, lengths, cache_length=length + new))
        state = wait(start(logits, cache, keys, how, stops))
        read = time.perf_counter()
        wait(decode(model, state, how, stops, np.int32(new), steps=new))
        end = time.perf_counter()
        return {"both": end - began, "prefill": read - began, "decode": end - read}[phase]

    return run


def saved(before: Callable[[], float], after: Callable[[], float]) -> float:
    """The share of the time of `before` that `after` saves, by the medians of runs in turn: A B A B. Both compile."""
    before(), after()
    firsts, seconds = [], []
    while len(firsts) < ROUNDS or sum(firsts) + sum(seconds) < LEAST:
        firsts.append(before())
        seconds.append(after())
    return 1 - statistics.median(seconds) / statistics.median(firsts)
