import dataclasses

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from efflm.compress.structured.allocation import (
    counts,
    gone,
    most,
    parameters,
    per_slice,
    search,
    sizes,
    sizes_within,
    step,
)
from efflm.config import InputError
from tests import tiny

CONFIG = dataclasses.replace(tiny.LLAMA, layers=3, kv_heads=4).config()
WIDE = dataclasses.replace(tiny.LLAMA, layers=3, kv_heads=4, mlp_dim=300).config()  # in steps of 16, the first of 12
AXES = ("groups", "mlp")


def random_scores(config, seed):
    rng = np.random.default_rng(seed)
    return {
        (i, a): rng.gamma(1.0, size=n) * rng.gamma(1.0)
        for i, own in enumerate(sizes(config, AXES))
        for a, n in own.items()
    }


@hypothesis.given(st.floats(0.02, 0.55), st.integers(0, 1000), st.sampled_from([CONFIG, WIDE]))
def test_ranked_reaches_the_target_to_rounding_and_leaves_each_layer_something(share, seed, config):
    scores = random_scores(config, seed)
    width, keep = sizes_within(config, share, AXES, scores)
    assert width == config.width
    unit = per_slice(config, 0, "mlp") * step("mlp", config.blocks[0].mlp_dim)
    assert abs(gone(config, width, keep) - share) * parameters(config) <= unit / 2 + 1e-6
    for own in keep:
        assert own["groups"] >= 1
        assert own["mlp"] >= step("mlp", config.blocks[0].mlp_dim)
        assert own["mlp"] in (config.blocks[0].mlp_dim, *range(0, 300, step("mlp", config.blocks[0].mlp_dim)))


@pytest.mark.parametrize("axis", AXES)
def test_ranked_removes_what_has_the_least_score_of_all_layers(axis):
    scores = random_scores(CONFIG, 0)
    _, keep = sizes_within(CONFIG, 0.25, AXES, scores)
    rising = [(np.sort(scores[i, axis]), len(scores[i, axis]) - own[axis]) for i, own in enumerate(keep)]
    assert max(each[:count].max() for each, count in rising if count) <= min(
        each[count:].min() for each, count in rising if count < len(each) - 1
    )
    assert len({own[axis] for own in keep}) > 1


def test_uniform_layers_give_the_same():
    _, keep = counts(CONFIG, 0.25, AXES)
    assert keep == [keep[0]] * 3


@pytest.mark.parametrize("axes", [("width",), ("groups", "mlp", "width")])
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_the_width_gives_its_share(axes, share):
    width, keep = counts(CONFIG, share, axes)
    column = (parameters(CONFIG) - parameters(dataclasses.replace(CONFIG, width=31))) / parameters(CONFIG)
    assert abs(gone(CONFIG, width, keep) - share) <= column / 2
    assert width < 32
    if len(axes) > 1:
        assert abs(keep[0]["mlp"] / 48 - width / 32) < 0.15


@pytest.mark.parametrize("axes", [AXES, ("mlp",), ("width",), ("groups", "mlp", "width")])
def test_more_than_the_smallest_model_saves_is_refused(axes):
    largest = most(CONFIG, axes)
    width, keep = counts(CONFIG, largest, axes)
    assert gone(CONFIG, width, keep) == pytest.approx(largest)
    with pytest.raises(InputError, match=rf"with the fewest {' and '.join(axes)} .* has {100 * largest:.1f}% fewer"):
        counts(CONFIG, largest + 0.01, axes)


def test_the_search_takes_the_nearest_of_few_candidates():
    tried = []

    def removed(share):
        tried.append(share)
        return share**2

    share, found = search(removed, 0.25, 0.9, "latency", tolerance=0.01, candidates=8)
    assert abs(found - 0.25) <= 0.01
    assert found == share**2
    assert len(tried) == len(set(tried)) <= 8
    steps = lambda share: 0.0 if share < 0.5 else 0.6
    assert search(steps, 0.4, 0.9, "latency", tolerance=0.01, candidates=6)[1] == 0.6
    with pytest.raises(InputError, match=r"latency is 0\.9, but the smallest model that can be made saves 81\.0%"):
        search(removed, 0.9, 0.9, "latency", tolerance=0.01, candidates=8)
