from efflm.evaluate.cost import Protocol, rates
from tests import tiny


def test_rates_are_medians_within_their_spread():
    models = {"a": tiny.model(), "b": tiny.model(tiny.GPT2)}
    got = rates(models, Protocol(prompt=24, new=3, repeats=3))
    assert list(got) == ["a", "b"]
    for pair in got.values():
        for rate in pair:
            assert 0 < rate.low <= rate.median <= rate.high
