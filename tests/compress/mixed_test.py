import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflm import ops, trees
from efflm.compress import grammar, recipe
from efflm.compress.mixed import Mixed, allocate
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.ops import QArray
from efflm.parallel import meshes
from tests import tiny

NUMBERS = st.tuples(st.floats(-1, 10, allow_nan=False), st.integers(0, 30))


def totals(choice, costs, nbytes):
    return tuple(sum(of[i][j] for i, j in enumerate(choice)) for of in (costs, nbytes))


def greedy(costs, nbytes, budget):
    """From the cheapest in bytes, the option that gains most for each byte while one fits."""
    choice = [int(np.lexsort((c, b))[0]) for c, b in zip(costs, nbytes)]
    while True:
        _, used = totals(choice, costs, nbytes)
        gains = [
            ((costs[i][now] - c) / max(b - nbytes[i][now], 1e-9), i, j)
            for i, now in enumerate(choice)
            for j, (c, b) in enumerate(zip(costs[i], nbytes[i]))
            if c < costs[i][now] and used + b - nbytes[i][now] <= budget
        ]
        if not gains:
            return choice
        _, i, j = max(gains)
        choice[i] = j


@settings(max_examples=150, deadline=None)
@given(items=st.lists(st.lists(NUMBERS, min_size=1, max_size=4), min_size=1, max_size=5), share=st.floats(0, 1))
def test_no_other_choice_within_the_budget_costs_less(items, share):
    costs, nbytes = ([[pair[k] for pair in item] for item in items] for k in range(2))
    least, most = (sum(pick(each) for each in nbytes) for pick in (min, max))
    budget = least + int(share * (most - least))
    choice = allocate(costs, nbytes, budget)
    cost, used = totals(choice, costs, nbytes)
    assert used <= budget
    every = (totals(each, costs, nbytes) for each in itertools.product(*(range(len(item)) for item in items)))
    assert cost == pytest.approx(min(other for other, size in every if size <= budget), abs=1e-9)
    assert cost <= totals(greedy(costs, nbytes, budget), costs, nbytes)[0] + 1e-9


def test_where_greedy_is_worse():
    costs, nbytes = [[10.0, 3.5], [10.0, 5.0], [10.0, 5.0]], [[0, 6], [0, 5], [0, 5]]
    assert totals(greedy(costs, nbytes, 10), costs, nbytes) == (23.5, 6)
    assert allocate(costs, nbytes, 10) == [0, 1, 1]


def test_many_matrices_of_few_sizes_are_quick():
    rng = np.random.default_rng(0)
    sizes = rng.choice([576 * 576, 576 * 192, 576 * 1536], 210)
    nbytes = [[int(size) * bits // 8 + int(size) // 8 for bits in (8, 4, 3)] for size in sizes]
    costs = [sorted(rng.lognormal(0, 2, 3)) for _ in sizes]
    budget = sum(each[1] for each in nbytes)
    choice = allocate(costs, nbytes, budget)
    cost, used = totals(choice, costs, nbytes)
    assert budget - 576 * 192 < used <= budget
    assert cost <= totals(greedy(costs, nbytes, budget), costs, nbytes)[0] + 1e-9


def test_a_budget_below_the_least_is_an_error():
    with pytest.raises(InputError, match=r"budget is 1,233 bytes.*least.* 1,234"):
        allocate([[1.0, 0.0], [0.0]], [[1000, 2000], [234]], 1233)
    with pytest.raises(InputError, match="infinite or NaN"):
        allocate([[np.nan]], [[1]], 2)


CONTEXT = Context(mesh=meshes.make_mesh(), calibration=tiny.batch(tiny.LLAMA.config(), rows=16), corpus="some text")


def bits_of(model):
    return {path: w.bits for path, w in trees.flatten(model.params) if isinstance(w, QArray)}


def divergence(model, whole):
    batch = CONTEXT.calibration
    inputs = {"segments": batch["segments"], "positions": batch["positions"]}
    ours, theirs = (jax.nn.log_softmax(tiny.logits(each, batch["inputs"], **inputs)) for each in (model, whole))
    return float(np.sum(np.exp(theirs) * (theirs - ours), -1)[batch["segments"] > 0].mean())


def test_the_recipe_takes_the_bytes_of_four_bits_and_diverges_less():
    model = tiny.model()
    # One layer is all but empty, so that its bits are better spent in the other.
    faint = trees.map_with_path(
        lambda path, w: w * 0.01 if path.startswith("block_0/feedforward/") else w, model.params
    )
    model = model.replace(params=faint)
    after, records = recipe.apply(model, grammar.chain("mixed4"), CONTEXT)
    plain, _ = recipe.apply(model, (Quantize(bits=4, group=32, clip=True),), CONTEXT)
    _, uniform = recipe.apply(model, grammar.chain("w4a16"), CONTEXT)
    assert records[-1].predicted_bytes <= uniform[-1].predicted_bytes
    assert records[0].corpus == "some text"
    bits = bits_of(after)
    assert {bits[path] for path in bits if path.startswith("block")} > {3}
    assert bits["block_0/feedforward/up/kernel"] == 3, bits
    assert bits["embedding"] == 8
    assert divergence(after, model) < divergence(plain, model)
    layers = lambda model: {path: w for path, w in trees.flatten(model.params) if path.endswith("kernel")}
    assert ops.stored_nbytes(layers(after)) <= ops.stored_nbytes(layers(plain))
    with_scales = {w.group for w in layers(after).values()}
    assert with_scales <= {0, 16, 32}  # 0: the group is no shorter than the inputs


@pytest.mark.parametrize("cost", ["divergence", "loss", "estimate", "scaled"])
def test_budgets(cost):
    model = tiny.model()
    matrices = {path: w for path, w in trees.flatten(model.params) if path.endswith("kernel")}
    for settings_ in ({"average_bits": 3.0}, {"average_bits": 8.0}, {"budget": 0.2}):
        after, _ = Mixed(cost=cost, groups="0", rows=4, embeddings=0, **settings_)(model, CONTEXT)
        bits = bits_of(after)
        assert bits.keys() == matrices.keys()
        if "budget" in settings_:
            made = {path: w for path, w in trees.flatten(after.params) if path in bits}
            assert ops.stored_nbytes(made) <= 0.2 * 4 * sum(w.size for w in matrices.values())
            assert len(set(bits.values())) > 1
        elif settings_["average_bits"] == 3.0:
            assert set(bits.values()) == {3}


def test_pruned_weights_stay_zero_and_quantized_ones_can_be_rounded_again():
    model, _ = recipe.apply(tiny.model(), grammar.chain("magnitude50"), CONTEXT)
    after, _ = Mixed(unit="layer", rows=4, embeddings=0)(model, CONTEXT)
    for path, mask in after.masks.items():
        assert np.all(np.asarray(ops.dequantize(dict(trees.flatten(after.params))[path]))[~np.asarray(mask)] == 0)
    again, _ = Mixed(bits="3", average_bits=3.0, rows=4, embeddings=0)(after, CONTEXT)
    assert set(bits_of(again).values()) == {3}


def test_scaled_costs_are_the_divergence_in_the_coarsest_format_and_go_as_the_squared_error():
    model, step = tiny.model(), Mixed(rows=4, bits="4,3", groups="16,0")
    units = step.measured(model, CONTEXT)
    assert [(row.format.bits, row.format.group) for row in units[0]] == [(4, 16), (3, 16), (4, 0), (3, 0)]
    known = dataclasses.replace(step, cost="divergence").measured(model, CONTEXT)
    for ours, theirs in zip(units, known, strict=True):
        np.testing.assert_allclose(ours[3].divergence, theirs[3].divergence, rtol=1e-4)
        for row in ours:
            wanted = theirs[3].divergence * row.estimate / theirs[3].estimate
            np.testing.assert_allclose(row.divergence, wanted, rtol=1e-4)


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match="groups is"):
        Mixed(groups="-1")
    for bits in ("", "8 4", "4,,3", "four"):
        with pytest.raises(InputError, match=r"bits is .* joined by commas"):
            Mixed(bits=bits)
    with pytest.raises(InputError, match="bits is 5"):
        Mixed(bits="8,5")
    with pytest.raises(InputError, match=r"budget is 1.5"):
        Mixed(budget=1.5)
    with pytest.raises(InputError, match="the least that the formats can take"):
        Mixed(average_bits=2.0, rows=4)(tiny.model(), CONTEXT)
    with pytest.raises(InputError, match="needs calibration text"):
        Mixed()(tiny.model(), Context(mesh=meshes.make_mesh()))
