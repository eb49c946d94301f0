import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflm import ops, trees
from efflm.compress import grammar, recipe
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context
from efflm.compress.tuned import Best, BlockError, Tuned, rounded, signed_descent, stored
from efflm.config import InputError
from efflm.model import placement
from efflm.model.params import in_layer
from efflm.ops import QArray, qarray
from efflm.ops.grid import grid_of
from efflm.parallel import meshes, sharding
from tests import tiny

CONTEXT = Context(mesh=meshes.make_mesh(), calibration=tiny.batch(tiny.LLAMA.config(), rows=16), corpus="some text")
FORMATS = {
    "bits": st.sampled_from(range(2, 9)),
    "group": st.sampled_from([0, 8, 16]),
    "symmetric": st.booleans(),
    "K": st.sampled_from([5, 16, 27]),
}


def a_matrix(seed, K, N=6):
    """A matrix with groups of zeros, and what may be learned for it: V, and alpha and beta of whole groups."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((K, N)) * rng.lognormal(0, 1, N)
    w[:, -1] = 0
    return w, rng.uniform(-0.5, 0.5, (K, N)), rng.uniform(0.3, 1.2, (2, K, N))


def by_reference(w, V, alpha, beta, bits, symmetric, group, residuals=None):
    """(values, codes, what rounding added) by the equations; residuals: what it adds, in place of rounding."""
    K, most, group = len(w), 2 ** (bits - 1) - 1, group or len(w)
    low = -most - 1
    values, codes, added = np.zeros_like(w), np.zeros_like(w), np.zeros((2, *w.shape))
    for start in range(0, K, group):
        at = slice(start, start + group)
        for n in range(w.shape[1]):
            part = w[at, n]
            if symmetric:
                span, steps = alpha[start, n] * (part[np.abs(part).argmax()] or low), low
            else:
                steps = 2**bits - 1
                unit = (max(part.max(), 0) - min(part.min(), 0)) / steps or 1.0
                below = np.round(-min(part.min(), 0) / unit)
                ends = -beta[start, n] * below * unit, alpha[start, n] * (steps - below) * unit
                span = ends[1] - ends[0]
            s, zero = span / steps, 0.0
            if not symmetric:
                zero = -ends[0] / s
                added[1, at, n] = np.round(zero) - zero
                zero = np.clip(zero + (added if residuals is None else residuals)[1, start, n] + low, low, most)
            x = part / s + V[at, n]
            added[0, at, n] = np.round(x) - x
            x = x + (added if residuals is None else residuals)[0, at, n]
            codes[at, n] = np.clip(x + zero, low, most)
            values[at, n] = (codes[at, n] - zero) * s
    return values, codes, added


def learned_of(V, ends, group, symmetric):
    first = slice(None, None, group or len(V))
    part = {"offset": V, "top": ends[0][first]} | ({} if symmetric else {"bottom": ends[1][first]})
    return {name: jnp.asarray(each, jnp.float32) for name, each in part.items()}


def a_format(bits, group, symmetric):
    return ops.Format(bits=bits, group=group, symmetric=symmetric, scale_dtype="float32")


@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), **FORMATS)
def test_it_rounds_as_the_equations_say(seed, bits, group, symmetric, K):
    w, V, ends = a_matrix(seed, K)
    w = w.astype(np.float32).astype(np.float64)
    group = 0 if group >= K else group
    wanted, codes, added = by_reference(w, V, *ends, bits, symmetric, group)
    form, given = a_format(bits, group, symmetric), jnp.asarray(w, jnp.float32)
    found = stored(given, grid_of(given, -2, form), None, learned_of(V, ends, group, symmetric), form)
    assert (found.bits, found.group, found.shape) == (bits, group, w.shape)
    sure = (np.abs(added) < 0.499).all(axis=0)  # float32 may round a half to the other side
    np.testing.assert_allclose(np.where(sure, ops.dequantize(found), wanted), wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(np.where(sure, qarray.codes(found), np.round(codes)), np.round(codes))


@settings(max_examples=8)
@given(seed=st.integers(0, 2**31), **(FORMATS | {"bits": st.sampled_from([4, 3]), "K": st.just(11)}))
def test_gradients_are_those_of_rounding_that_adds_a_constant(seed, bits, group, symmetric, K):
    w, V, ends = a_matrix(seed, K)
    form, given = a_format(bits, group % K, symmetric), jnp.asarray(w, jnp.float32)
    grid = grid_of(given, -2, form)
    toward = np.random.default_rng(seed).normal(size=w.shape)
    _, _, added = by_reference(w, V, *ends, bits, symmetric, group % K)
    learned = learned_of(V, ends, group % K, symmetric)
    grads = jax.grad(lambda learned: jnp.sum(rounded(given, grid, learned, form) * toward))(learned)

    def surrogate(V, ends):
        return np.sum(by_reference(w, V, *ends, bits, symmetric, group % K, added)[0] * toward)

    step, agreed = 1e-6, []
    for name, grad in grads.items():
        for place in zip(*(index.ravel() for index in np.indices(grad.shape))):
            move_V, move_ends = np.zeros_like(V), np.zeros_like(ends)
            if name == "offset":
                move_V[place] = step
            else:
                first = place[0] * (group % K or K)
                move_ends[("top", "bottom").index(name), first, place[1]] = step
            up, down = surrogate(V + move_V, ends + move_ends), surrogate(V - move_V, ends - move_ends)
            agreed.append(np.isclose(grad[place], (up - down) / (2 * step), rtol=2e-3, atol=2e-3))
    assert (
        np.mean(agreed) > 0.97
    )  # not where a code lies exactly at the end of its range, as the largest one often does


def test_the_rule_takes_steps_of_a_falling_size_within_the_bounds():
    rule, value = signed_descent(4, 0.2), {"a": {"offset": jnp.zeros(3), "top": jnp.full(3, 1.15)}}
    state, seen = rule.init(value), []
    for _ in range(4):
        updates, state = rule.update(jax.tree.map(lambda x: jnp.array([-3.0, 1e-9, 0.0]), value), state, value)
        value = jax.tree.map(jnp.add, value, updates)
        seen.append(value["a"])
    np.testing.assert_allclose([each["offset"][0] for each in seen], [0.2, 0.35, 0.45, 0.5], rtol=1e-6)
    np.testing.assert_allclose([each["offset"][1] for each in seen], [-0.2, -0.35, -0.45, -0.5], rtol=1e-6)
    np.testing.assert_allclose(seen[-1]["top"], [1.2, 0.65, 1.15], rtol=1e-6)


def errors(model, others, batch=CONTEXT.calibration):
    """The mean squared differences of the logits where there is text."""
    inputs = {"segments": batch["segments"], "positions": batch["positions"]}
    full, *low = (tiny.logits(each, batch["inputs"], **inputs) for each in (model, *others))
    return [float(np.square(np.asarray(each - full))[batch["segments"] > 0].mean()) for each in low]


@pytest.mark.parametrize("name", tiny.and_combinations(list(tiny.CONFIGS), ["llama", "neox"]))
def test_layers_lose_less_than_with_the_nearest_codes_of_the_same_grid(name):
    symmetric = name != "neox"
    model = tiny.model(tiny.CONFIGS[name])
    format = {"bits": 3, "group": 16, "symmetric": symmetric}
    after, record = Tuned(**format, steps=24, embeddings=0)(model, CONTEXT)
    nearest, _ = Quantize(**format, clip=True, embeddings=0)(model, CONTEXT)
    tuned, plain = errors(model, [after, nearest])
    assert 0 < tuned < 0.7 * plain
    for path, leaf in trees.flatten(after.params):
        assert isinstance(leaf, QArray) == in_layer(path), path
        if in_layer(path):
            assert leaf.bits == 3
            assert (leaf.zeros is None) == symmetric
            assert np.abs(np.asarray(qarray.codes(leaf)) + 0.5).max() <= 3.5
    assert record.corpus == "some text"


def test_one_step_is_enough_to_run_and_nothing_is_made_worse():
    model = tiny.model()
    far = Tuned(bits=4, group=16, steps=1, learning_rate=0.5, embeddings=0)
    after, _ = far(model, CONTEXT)
    nearest, _ = Quantize(bits=4, group=16, clip=True, embeddings=0)(model, CONTEXT)
    tuned, plain = errors(model, [after, nearest])
    assert tuned < 1.05 * plain


def test_what_had_the_least_error_is_kept():
    errors = {0.0: 3.0, 2.0: 5.0, 4.0: 1.0, 6.0: 4.0, 7.0: 2.0}
    best = Best({"top": jnp.float32(0)}, lambda learned: errors[float(learned["top"])])
    training = types.SimpleNamespace(train=types.SimpleNamespace(steps=7))
    with best(training) as after:
        for training.step in range(1, 8):  # 4 checks of 7 steps: after every second one, and the last
            training.last = training.step == 7
            training.state = types.SimpleNamespace(trainable={"top": jnp.float32(training.step)})
            after()
    assert float(best.learned["top"]) == 4
    assert best.error == 1


def test_in_two_bits_trained_weights_lose_less_than_their_rounding_alone():
    """On text that they were trained on: the rows that the best step is chosen on hold the same."""
    model, step = tiny.model(), Tuned(bits=2, group=16, steps=96, embeddings=0)
    text = {name: np.repeat(array[:2], 8, axis=0) for name, array in CONTEXT.calibration.items()}
    context = dataclasses.replace(CONTEXT, calibration=text)
    rounding, weights = (each(model, context)[0] for each in (step, dataclasses.replace(step, weights=True)))
    lost = errors(model, [weights, rounding], text)
    assert lost[0] < 0.8 * lost[1]


def test_equal_layers_are_compiled_once(monkeypatch):
    traces, call = [], BlockError.__call__

    def counted(self, *args):
        traces.append(self)
        return call(self, *args)

    monkeypatch.setattr(BlockError, "__call__", counted)
    config = tiny.LLAMA.config()
    model = tiny.model(dataclasses.replace(config, blocks=config.blocks * 2))
    Tuned(bits=4, group=24, steps=2)(model, CONTEXT)
    assert len(model.config.blocks) == 4
    assert len(traces) == 2  # a step, and the error of some rows


def test_dropped_weights_stay_zero():
    model, _ = recipe.apply(tiny.model(), grammar.chain("magnitude50"), CONTEXT)
    after, _ = Tuned(bits=4, group=16, steps=4, symmetric=False)(model, CONTEXT)
    for path, leaf in trees.flatten(after.params):
        if path in after.masks:
            assert (np.asarray(ops.dequantize(leaf))[~np.asarray(model.masks[path])] == 0).all(), path


def test_a_dropped_weight_is_stored_as_zero_whatever_its_offset():
    w, V, ends = a_matrix(0, 16)
    kept = np.random.default_rng(0).random(w.shape) < 0.5
    for symmetric in (True, False):
        form, given = a_format(4, 8, symmetric), jnp.asarray(w * kept, jnp.float32)
        learned = learned_of(3 * V, ends, 8, symmetric)
        found = stored(given, grid_of(given, -2, form), kept, learned, form)
        assert (np.asarray(ops.dequantize(found))[~kept] == 0).all()


def test_padding_does_not_count():
    batch, model = CONTEXT.calibration, tiny.model()
    step = Tuned(bits=4, group=16, steps=4, batch=4, learning_rate=0.05)
    other = np.where(batch["segments"] > 0, batch["inputs"], 7)
    empty = {name: np.zeros_like(part[:3]) for name, part in batch.items()}  # rows of nothing but padding
    longer = {name: np.concatenate([part, empty[name]]) for name, part in (batch | {"inputs": other}).items()}
    after = [step(model, dataclasses.replace(CONTEXT, calibration=each))[0].params for each in (batch, longer)]
    for (path, a), (_, b) in zip(*map(trees.flatten, after)):
        assert np.mean(np.asarray(ops.dequantize(a)) != np.asarray(ops.dequantize(b))) < 0.001, path


def test_where_only_the_first_rows_hold_text_they_are_trained_on():
    """A chunk of rows with text, and one with none, which leaves none to hold out."""
    few = {name: part[:8].copy() for name, part in CONTEXT.calibration.items()}
    for part in few.values():
        part[4:] = 0
    after, _ = Tuned(bits=3, group=16, steps=8)(tiny.model(), dataclasses.replace(CONTEXT, calibration=few))
    assert errors(tiny.model(), [after], few)[0] > 0


def test_on_a_mesh_it_is_as_good():
    model, step = tiny.model(dataclasses.replace(tiny.LLAMA, layers=1)), Tuned(bits=3, group=16, steps=8)
    mesh = meshes.make_mesh(data=2, fsdp=2)
    spread = jax.device_put(model, placement.shardings(model, mesh))
    one, _ = step(model, CONTEXT)
    many, _ = step(spread, dataclasses.replace(CONTEXT, mesh=mesh))
    found = errors(model, [one, sharding.on_one_device(many)])
    np.testing.assert_allclose(*found, rtol=0.1)


def test_settings_that_cannot_be():
    for wrong in ({"steps": 0}, {"batch": 0}, {"bits": 9}, {"learning_rate": -1.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            Tuned(**wrong)
    with pytest.raises(InputError, match="needs calibration text"):
        Tuned()(tiny.model(), Context(mesh=meshes.make_mesh()))
