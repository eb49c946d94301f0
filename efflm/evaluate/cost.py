"""What running a model costs on this machine: tokens a second in prefill and in decode, with their spread."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from efflm.infer.generate import decode, prefill, row_keys, start
from efflm.infer.sampling import GREEDY
from efflm.model import LanguageModel


@dataclasses.dataclass(frozen=True)
class Rate:
    """Tokens a second: the median of the repeats, and their lower and upper quartile."""

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Prefill reads `prompt` tokens of one row; decode writes `new` more after the first `start`, greedily."""

    prompt: int = 512
    start: int = 16
    new: int = 64
    repeats: int = 11

    def within(self, context: int) -> "Protocol":
        """The same for a model that reads at most `context` positions."""
        start = max(1, min(self.start, context // 2))
        return Protocol(min(self.prompt, context), start, max(1, min(self.new, context - start)), self.repeats)

    def __str__(self) -> str:
        return (
            f"batch 1; prefill of {self.prompt} tokens; greedy decode of {self.new} tokens after {self.start}; median "
            f"of {self.repeats} rounds, models in turn, after warm-up"
        )


def rates(models: dict[str, LanguageModel], protocol: Protocol = Protocol()) -> dict[str, tuple[Rate, Rate]]:
    """{name: (prefill, decode)}. The models take turns, so that what else the machine does falls on all alike."""
    tokens = np.arange(max(protocol.prompt, protocol.start), dtype=np.int32)[None] % 251
    # Where decoding starts after just that prompt, both are served by one program.
    room = protocol.prompt + (protocol.new if protocol.start == protocol.prompt else 0)
    runs: dict[str, tuple[Callable[[], float], Callable[[], float]]] = {}
    for name, model in models.items():
        runs[name] = (
            _prefill_run(model, tokens[:, : protocol.prompt], room),
            _decode_run(model, tokens[:, : protocol.start], protocol.new),
        )
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    for round_ in range(protocol.repeats + 1):
        for name, pair in runs.items():
            for run, kept in zip(pair, seconds[name], strict=True):
                took = run()
                if round_:  # round 0 compiles and warms up
                    kept.append(took)
    counts = (protocol.prompt, protocol.new)
    return {
        name: tuple(_rate(count, kept) for count, kept in zip(counts, pair, strict=True))
        for name, pair in seconds.items()
    }


def _prefill_run(model: LanguageModel, tokens: np.ndarray, room: int) -> Callable[[], float]:
    lengths = np.array([tokens.shape[1]], np.int32)

    def run() -> float:
        began = time.perf_counter()
        jax.block_until_ready(prefill(model, tokens, lengths, room=room))
        return time.perf_counter() - began

    return run


def _decode_run(model: LanguageModel, tokens: np.ndarray, new: int) -> Callable[[], float]:
    how, keys, stops = GREEDY.arrays(), row_keys(0, 1), np.zeros(0, np.int32)
    lengths = np.array([tokens.shape[1]], np.int32)

    def run() -> float:
        logits, cache = prefill(model, tokens, lengths, room=tokens.shape[1] + new)
        state = jax.block_until_ready(start(logits, cache, keys, how, stops))
        began = time.perf_counter()
        jax.block_until_ready(decode(model, state, how, stops, np.int32(new), steps=new))
        return time.perf_counter() - began

    return run


def _rate(tokens: int, seconds: list[float]) -> Rate:
    fast, median, slow = statistics.quantiles(seconds, n=4, method="inclusive")
    return Rate(tokens / median, tokens / slow, tokens / fast)
