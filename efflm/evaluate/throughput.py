"""What running a model costs on this machine: tokens a second in prefill and in decode, with their spread."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from efflm import trees
from efflm.cli import progress
from efflm.evaluate import machine
from efflm.infer.generate import decode, prefill, row_keys, start
from efflm.infer.sampling import GREEDY
from efflm.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Rate:
    """Tokens a second: the median of the repeats, and their lower and upper quartile (of one repeat it itself).
    rounds: of each repeat, in order."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Prefill reads `prompt` tokens of one sequence; decode writes `new` more after the first `start`, greedily."""

    prompt: int = 512
    start: int = 16
    new: int = 64
    repeats: int = 11

    def within(self, max_length: int) -> "Protocol":
        """The same for a model that reads at most `max_length` positions."""
        start = max(1, min(self.start, max_length // 2))
        return Protocol(min(self.prompt, max_length), start, max(1, min(self.new, max_length - start)), self.repeats)

    def __str__(self) -> str:
        return (
            f"batch 1; prefill of {self.prompt} tokens; greedy decode of {self.new} tokens after {self.start}; median "
            f"of {self.repeats} rounds, models in turn, after warm-up"
        )


# A model of 100 million parameters in float32 decodes some tens of tokens a second on two cores.
LARGE, SHORT = 50_000_000, Protocol(prompt=256, start=256, new=16, repeats=5)


def protocol_for(model: LanguageModel) -> Protocol:
    """The protocol that a model of this size is measured by."""
    return (SHORT if trees.count(model.params) > LARGE else Protocol()).within(model.config.max_length)


def rates(
    models: dict[str, LanguageModel], protocol: Protocol = Protocol(), clock: Callable[[], float] = time.perf_counter
) -> tuple[dict[str, tuple[Rate, Rate]], machine.Load]:
    """{name: (prefill, decode)}, and what other programs used meanwhile. The models take turns, so that this affects
    all equally."""
    load = machine.load_watched()
    runs = {name: _round(model, protocol, clock) for name, model in models.items()}
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    turns = [(round_, name) for round_ in range(protocol.repeats + 1) for name in models]
    for round_, name in progress.shown(turns, "measuring speed", len(turns), live=False):
        for took, kept in zip(runs[name](), seconds[name], strict=True):
            if round_:  # round 0 compiles and warms up
                kept.append(took)
    counts = (protocol.prompt, protocol.new)
    found = {
        name: tuple(_rate(count, kept) for count, kept in zip(counts, pair, strict=True))
        for name, pair in seconds.items()
    }
    return found, load()


def _round(model: LanguageModel, protocol: Protocol, clock: Callable[[], float]) -> Callable[[], tuple[float, float]]:
    """One round: seconds of prefill and of decode. Where decoding starts after just that prompt, it follows on."""
    how, keys, stops = GREEDY.arrays(), row_keys(0, 1), np.zeros(0, np.int32)
    follows = protocol.start == protocol.prompt

    def read(length: int, cache_length: int):
        tokens = np.arange(length, dtype=np.int32)[None] % 251
        return jax.block_until_ready(prefill(model, tokens, np.array([length], np.int32), cache_length=cache_length))

    def timed() -> tuple[float, float]:
        began = clock()
        logits, cache = read(protocol.prompt, protocol.prompt + protocol.new * follows)
        reading = clock() - began
        if not follows:
            logits, cache = read(protocol.start, protocol.start + protocol.new)
        state = jax.block_until_ready(start(logits, cache, keys, how, stops))
        began = clock()
        jax.block_until_ready(decode(model, state, how, stops, np.int32(protocol.new), steps=protocol.new))
        return reading, clock() - began

    return timed


def continued(model: LanguageModel, prompt: list[int], protocol: Protocol) -> list[int]:
    """1 + protocol.new ids that follow a prompt of at most protocol.start tokens, greedily, by the programs of the
    rounds: after `rates` nothing is compiled."""
    how, stops = GREEDY.arrays(), np.zeros(0, np.int32)
    tokens = np.zeros((1, protocol.start), np.int32)
    tokens[0, : len(prompt)] = prompt
    lengths, cache_length = np.array([len(prompt)], np.int32), protocol.start + protocol.new
    state = start(*prefill(model, tokens, lengths, cache_length=cache_length), row_keys(0, 1), how, stops)
    first = int(state.token_B[0])
    ids_BS, _ = decode(model, state, how, stops, np.int32(protocol.new), steps=protocol.new)
    return [first, *map(int, np.asarray(ids_BS)[0])]


def _rate(tokens: int, seconds: list[float]) -> Rate:
    fast, median, slow = map(float, np.quantile(seconds, (0.25, 0.5, 0.75)))
    return Rate(tokens / median, tokens / slow, tokens / fast, tuple(tokens / took for took in seconds))


def ratio(rate: Rate, base: Rate) -> tuple[float, float | None]:
    """How many times as fast as `base`, and the standard error of that: see `paired`."""
    return paired(rate.rounds, base.rounds)


def paired(rounds: Sequence[float], base: Sequence[float]) -> tuple[float, float | None]:
    """How many times as fast as `base`, and the standard error of that, both measured in the same rounds: the median of
    the rounds' ratios, whose error is that of a median of normal values, by their quartiles (None of one round)."""
    low, median, high = np.quantile(np.divide(rounds, base), (0.25, 0.5, 0.75))
    if len(rounds) < 2:
        return float(median), None
    deviation = (high - low) / (2 * statistics.NormalDist().inv_cdf(0.75))
    return float(median), float(math.sqrt(math.pi / 2 / len(rounds)) * deviation)
