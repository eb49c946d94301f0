import dataclasses
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflm import ops, trees
from efflm.compress import grammar, recipe, sensitivity
from efflm.compress.gptq import GPTQ
from efflm.compress.mixed import Mixed, allocate
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


def bits_a_weight(model):
    return 8 * ops.stored_nbytes(model.params, model.masks) / trees.count(model.params)


def test_it_takes_the_bytes_of_plain_rounding_and_diverges_less():
    model = tiny.model()
    # One layer is all but empty, so that its bits are better spent elsewhere.
    faint = trees.map_with_path(
        lambda path, w: w * 0.01 if path.startswith("block_0/feedforward/") else w, model.params
    )
    model = model.replace(params=faint)
    uniform, _ = GPTQ(bits=4, group=32, embeddings=4)(model, CONTEXT)
    after, (record,) = recipe.apply(model, (Mixed(average_bits=bits_a_weight(uniform), groups="32"),), CONTEXT)
    assert record.corpus == "some text"
    assert record.predicted_bytes == ops.stored_nbytes(after.params) <= ops.stored_nbytes(uniform.params)
    assert bits_of(after)["block_0/feedforward/up/kernel"] == 2
    assert divergence(after, model) < divergence(uniform, model)


@pytest.mark.parametrize("cost", ["predicted", "divergence", "loss"])
def test_budgets(cost):
    model = tiny.model()
    matrices = {path for path, w in trees.flatten(model.params) if w.ndim == 2}
    for budget in ({"average_bits": 4.5}, {"average_bits": 12.0}, {"megabytes": 0.0115}):
        after, _ = Mixed(cost=cost, groups="0", rows=4, rounder="nearest", **budget)(model, CONTEXT)
        bits = bits_of(after)
        assert bits.keys() == matrices
        assert bits_a_weight(after) <= budget.get("average_bits", 12.0)
        assert ops.stored_nbytes(after.params) <= 1e6 * budget.get("megabytes", 1.0)
        assert len(set(bits.values())) > 1 or budget == {"average_bits": 12.0}


def test_a_budget_of_an_entropy_coded_file_buys_more():
    model = tiny.model(dataclasses.replace(tiny.LLAMA, layers=1, width=128, mlp_dim=256))
    size = lambda model, coded=None: 8 * ops.stored_nbytes(model.params, coded=coded) / trees.count(model.params)
    few = Mixed(average_bits=3.5, bits="4,3,2", groups="32", rows=4)
    coded, _ = dataclasses.replace(few, coded=True)(model, CONTEXT)
    plain, _ = few(model, CONTEXT)
    assert 3.3 < size(coded) == size(coded, True) <= 3.5 < size(coded, False)  # in 8 bits each before they are coded
    assert size(plain) == size(plain, False)
    assert size(plain, True) > 3.2  # what was chosen for a plain file gains little by coding
    assert divergence(coded, model) < 0.7 * divergence(plain, model)
    assert any(w.bits == 8 for _, w in trees.flatten(coded.params) if isinstance(w, QArray))  # has an entropy


def test_a_budget_is_kept_where_fewer_zeros_are_made_than_predicted(monkeypatch):
    """A file holds many zeros as a bitmask, and GPTQ makes fewer of them than rounding to the nearest."""
    model, step = tiny.model(), Mixed(bits="6,5,4,3", groups="0", rows=2, average_bits=6.0)
    less = lambda row: dataclasses.replace(row, bytes=int(0.7 * row.bytes))
    fewer = [tuple(map(less, rows)) for rows in step.measured(model, CONTEXT)]
    monkeypatch.setattr(Mixed, "measured", lambda *_: fewer)
    plans, planned = [], Mixed.planned
    monkeypatch.setattr(Mixed, "planned", lambda *given: plans.append(planned(*given)) or plans[-1])
    after, _ = step(model, CONTEXT)
    assert bits_a_weight(after) <= 6
    assert len(plans) == 2  # the second one knows by how much the first was wrong


def test_the_output_layer_that_a_rotation_made_counts_for_the_embeddings_it_is_made_of():
    model, step = tiny.model(tiny.UNTIED), Mixed(average_bits=6.0, rows=4, groups="32", rounder="nearest")
    for teacher, layers in ((model, 2), (tiny.model(), 1)):
        after, _ = step(model, dataclasses.replace(CONTEXT, teacher=teacher))
        weights = trees.count(model.params) - (2 - layers) * model.params["unembedding"].size
        assert 5.5 < 8 * ops.stored_nbytes(after.params) / weights <= 6


def test_pruned_weights_stay_zero_and_quantized_ones_can_be_rounded_again():
    model, _ = recipe.apply(tiny.model(), grammar.chain("magnitude50"), CONTEXT)
    after, _ = Mixed(unit="layer", groups="32", rows=4)(model, CONTEXT)
    for path, mask in after.masks.items():
        assert np.all(np.asarray(ops.dequantize(dict(trees.flatten(after.params))[path]))[~np.asarray(mask)] == 0)
    again, _ = Mixed(bits="3", groups="32", rows=4)(after, CONTEXT)
    assert set(bits_of(again).values()) == {3}


def test_the_same_text_is_read_once(monkeypatch):
    model, step = tiny.model(), Mixed(rows=4, bits="4,3", groups="16,0")
    units = step.measured(model, CONTEXT)
    assert [(row.format.bits, row.format.group) for row in units[0]] == [(4, 16), (3, 16), (4, 0), (3, 0)]
    monkeypatch.setattr(sensitivity, "predicted", None)
    assert dataclasses.replace(step, average_bits=5.0, rounder="tuned").measured(model, CONTEXT) is units


def test_by_default_8_bits_are_in_groups_of_16_too():
    sizes = lambda step: sorted({(format.bits, format.group) for format in step.formats if not format.entropy})
    assert sizes(Mixed(bits="8,4")) == [(4, 32), (4, 128), (8, 16), (8, 32), (8, 128)]
    assert sizes(Mixed(bits="4", coded=True)) == [(4, 32), (4, 128)]
    assert sizes(Mixed(bits="8", groups="32")) == [(8, 32)]


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match="groups is"):
        Mixed(groups="-1")
    for bits in ("", "8 4", "4,,3", "four"):
        with pytest.raises(InputError, match=r"bits is .* joined by commas"):
            Mixed(bits=bits)
    with pytest.raises(InputError, match="bits is 9"):
        Mixed(bits="8,9")
    with pytest.raises(InputError, match=r"megabytes is -1"):
        Mixed(megabytes=-1.0)
    with pytest.raises(InputError, match="rounder is 'x': choose from gptq"):
        Mixed(rounder="x")
    with pytest.raises(InputError, match=r"rounder is tuned, but .* must be gptq"):
        Mixed(rounder="tuned", coded=True)
    with pytest.raises(
        InputError, match=r"2.00 bits a weight, but the least that .* can take is [\d,]+, 4\.\d\d: raise"
    ):
        Mixed(average_bits=2.0, bits="4", rows=4)(tiny.model(), CONTEXT)
    with pytest.raises(InputError, match="needs calibration text"):
        Mixed()(tiny.model(), Context(mesh=meshes.make_mesh()))
