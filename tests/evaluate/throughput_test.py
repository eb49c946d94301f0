import itertools

import numpy as np

from efflm.evaluate import throughput
from efflm.evaluate.throughput import Protocol, rates
from tests import tiny


def test_rates_are_the_quartiles_of_what_the_clock_says(rng):
    """Each measurement takes two looks at the clock: prefill of a, decode of a, prefill of b, and so on in turn."""
    protocol = Protocol(prompt=24, new=3, repeats=6)
    seconds_RMP = rng.uniform(1.0, 9.0, (1 + protocol.repeats, 2, 2))  # rounds, the first to warm up; models; phases
    seconds_RMP[0] = 1000.0
    idle = itertools.repeat(0.25)
    looks = np.cumsum(list(itertools.chain.from_iterable(zip(idle, seconds_RMP.ravel()))))
    clock = iter(looks)
    got, _ = rates({"a": tiny.model(), "b": tiny.model(tiny.GPT2)}, protocol, clock=lambda: next(clock))
    assert next(clock, None) is None
    assert list(got) == ["a", "b"]
    for m, pair in enumerate(got.values()):
        for p, (rate, tokens) in enumerate(zip(pair, (24, 3))):
            expected = tokens / np.percentile(seconds_RMP[1:, m, p], [50, 75, 25])
            np.testing.assert_allclose([rate.median, rate.low, rate.high], expected)


def test_a_single_repeat_has_no_spread():
    looks = itertools.cycle([0.0, 2.0, 0.0, 4.0])
    got, _ = rates({"a": tiny.model()}, Protocol(24, new=3, repeats=1), lambda: next(looks))
    prefill, decode = got["a"]
    assert (prefill.low, prefill.median, prefill.high) == (12.0, 12.0, 12.0)
    assert (decode.low, decode.median, decode.high) == (0.75, 0.75, 0.75)


def test_large_models_are_measured_more_briefly(monkeypatch):
    model = tiny.model()
    assert throughput.protocol_for(model) == Protocol().within(64)
    monkeypatch.setattr(throughput, "LARGE", 1000)
    assert throughput.protocol_for(model) == throughput.SHORT.within(64)
