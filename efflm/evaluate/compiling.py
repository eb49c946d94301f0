"""The time that compiling takes, told apart from all other time."""

import time
from collections.abc import Callable

import jax

Clock = Callable[[float, float], tuple[float, float]]


def clock() -> Clock:
    """Starts to watch JAX compile, tracing included; what it returns splits the seconds between two readings of
    time.perf_counter into those that compiling took and all others. Neither can be negative."""
    spans: list[tuple[float, float]] = []

    def listen(event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            while spans and spans[-1][0] >= now - seconds:  # nested in this one
                spans.pop()
            spans.append((now - seconds, now))

    def split(since: float, until: float) -> tuple[float, float]:
        compiling = others = 0.0
        at = since
        for start, end in spans:
            start, end = min(max(start, at), until), min(max(end, at), until)
            others, compiling, at = others + start - at, compiling + end - start, end
        return compiling, others + until - at

    jax.monitoring.register_event_duration_secs_listener(listen)
    return split
