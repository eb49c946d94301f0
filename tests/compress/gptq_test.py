import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflm import ops, trees
from efflm.compress import obs, recipe
from efflm.compress.gptq import GPTQ, round_matrix
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.ops import QArray
from efflm.ops.grid import grid_of
from efflm.parallel import meshes
from tests import reference_layers, surgeon, tiny


def rounded(w, x, bits, group, symmetric, order, kept=None, grid=None):
    gram = jnp.asarray(x).T @ jnp.asarray(x)
    form = ops.Format(bits=bits, group=group, symmetric=symmetric)
    grid = grid or grid_of(jnp.asarray(w), -2, form)
    kept = jnp.ones(w.shape, bool) if kept is None else jnp.asarray(kept)
    found = round_matrix(jnp.asarray(w) * kept, obs.inverse(gram, 0.01, "w", order), kept, grid, form)
    return np.asarray(found), grid


def by_reference(w, x, grid, bits, group, symmetric, order, kept=None):
    scale, zeros = (None if part is None else np.asarray(part, np.float64) for part in grid)
    most = 2 ** (bits - 1) - 1
    kept = np.ones(w.shape, bool) if kept is None else kept

    def decide(k, w, diagonal, done):
        s = scale[k // group if group else 0]
        zero = 0 if zeros is None else zeros[k // group if group else 0]
        codes = np.clip(np.round(w[k] / s) + zero, -most - 1, most)
        return np.where(kept[k], (codes - zero) * s, 0)

    gram = x.astype(np.float64).T @ x
    ranks = np.argsort(-np.diag(gram), kind="stable") if order else np.arange(len(w))
    return surgeon.swept(np.where(kept, w, 0), x, ranks, decide)


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    K=st.sampled_from([5, 32, 130, 150]),
    bits=st.sampled_from(range(2, 9)),
    group=st.sampled_from([0, 16]),
    symmetric=st.booleans(),
    order=st.booleans(),
)
def test_it_rounds_as_the_equations_say(seed, K, bits, group, symmetric, order):
    x, w = surgeon.layer(seed, K, 6)
    found, grid = rounded(w, x, bits, group, symmetric, order)
    wanted = by_reference(w, x, grid, bits, group, symmetric, order)
    # float32 now and then rounds a half to the other side, which moves what comes after it.
    assert np.mean(np.abs(found - wanted) > 1e-3) < 0.05
    np.testing.assert_allclose(surgeon.loss(w, found, x), surgeon.loss(w, wanted, x), rtol=0.05)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("order", ["", "weight"])
def test_codes_are_those_of_the_reference_program(bits, order):
    x, w = surgeon.layer(reference_layers.SEED, reference_layers.K, reference_layers.N)
    grid = (jnp.asarray(reference_layers.scales(w, bits)), None)
    found = rounded(w, x, bits, reference_layers.GROUP, True, bool(order), grid=grid)[0]
    wanted = np.load(reference_layers.FILE)[f"gptq{bits}{order}"] * np.repeat(grid[0], reference_layers.GROUP, axis=0)
    assert np.mean(np.isclose(found, wanted, rtol=1e-3)) > 0.99
    np.testing.assert_allclose(surgeon.loss(w, found, x), surgeon.loss(w, wanted, x), rtol=0.01)


def test_it_loses_less_than_the_nearest_code_and_dropped_weights_stay_zero():
    x, w = surgeon.layer(1, 192, 24)
    kept = np.random.default_rng(0).random(w.shape) < 0.5
    for bits, group in ((4, 0), (4, 32), (3, 32)):
        nearest = ops.dequantize(ops.quantize_array(jnp.asarray(w), -2, ops.Format(bits=bits, group=group)))
        found, _ = rounded(w, x, bits, group, True, True)
        assert surgeon.loss(w, found, x) < 0.5 * surgeon.loss(w, nearest, x)
    found, grid = rounded(w, x, 4, 32, True, True, kept)
    assert (found[~kept] == 0).all()
    plain = np.asarray(
        ops.dequantize(ops.quantize_array(jnp.where(kept, w, 0.0), -2, ops.Format(bits=4, group=32), grid))
    )
    assert surgeon.loss(w * kept, found, x) < 0.8 * surgeon.loss(w * kept, plain, x)


def test_inputs_that_are_always_zero_are_rounded_to_the_nearest():
    x, w = surgeon.layer(2, 40, 8)
    x[:, [0, 7, 39]] = 0
    found, grid = rounded(w, x, 4, 0, True, True)
    nearest = np.asarray(ops.dequantize(ops.quantize_array(jnp.asarray(w), -2, ops.Format(bits=4), grid)))
    np.testing.assert_allclose(found[[0, 7, 39]], nearest[[0, 7, 39]], atol=1e-6)
    assert np.isfinite(found).all()


def test_a_singular_matrix_is_damped_more():
    x, _w = surgeon.layer(3, 64, 8)
    x[:] = x[:1] * np.linspace(1, 2, len(x))[:, None]  # rank 1
    gram = jnp.asarray(x).T @ jnp.asarray(x)
    upper = obs.inverse(gram, 1e-9, "w").upper
    assert np.isfinite(np.asarray(upper)).all()
    with pytest.raises(InputError, match="cannot be inverted"):
        obs.inverse(gram.at[0, 1].set(jnp.nan), 0.01, "block_0/attention/query/kernel")


CONTEXT = Context(mesh=meshes.make_mesh(), calibration=tiny.batch(tiny.LLAMA.config(), rows=16), corpus="some text")


def test_a_model_in_four_bits():
    model = tiny.model()
    after, records = recipe.apply(model, (GPTQ(bits=4, group=16),), CONTEXT)
    for path, leaf in trees.flatten(after.params):
        if len(leaf.shape) == 2:
            assert isinstance(leaf, QArray), path
            assert leaf.bits == (8 if path == "embedding" else 4), path
    assert records[0].corpus == "some text"
    plain, _ = recipe.apply(model, (GPTQ(bits=4, group=16, correction=0.0),), CONTEXT)
    nearest, _ = recipe.apply(model, (Quantize(bits=4, group=16),), CONTEXT)
    batch = CONTEXT.calibration
    inputs = {"segments": batch["segments"], "positions": batch["positions"]}
    full, *low = (tiny.logits(each, batch["inputs"], **inputs) for each in (model, after, plain, nearest))
    errors = [np.square(np.asarray(each - full))[batch["segments"] > 0].mean() for each in low]
    assert 0 < errors[0] < errors[1] < errors[2]
    kernels = [dict(trees.flatten(each.params, inside=True)) for each in (after, plain)]
    differs = {path for path in kernels[0] if np.any(kernels[0][path] != kernels[1][path])}
    first = {path for path in differs if path.startswith("block_0/")}
    # In the first layer these read what the model as it was reads.
    assert not [path for path in first if path.split("/")[2] in ("query", "key", "value")]
    assert "block_0/attention/output/kernel/values" in first


def test_corrected_weights_give_of_what_is_read_what_the_model_gave():
    x, w = surgeon.layer(4, 40, 8)
    before = x + np.random.default_rng(0).standard_normal(x.shape) * x.std(0)
    shift, made = jnp.asarray(x.T @ (before - x)), obs.inverse(jnp.asarray(x.T @ x), 1e-7, "w", sort=True)
    wanted, *_ = np.linalg.lstsq(x.astype(np.float64), before @ w)
    for strength in (0.5, 1.0):
        found = obs.corrected(jnp.asarray(w), made, shift, strength)
        left = surgeon.loss(w + strength * (wanted - w), found, x)
        assert left < 1e-5 * surgeon.loss(w, wanted, x)


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match="damping is 0"):
        GPTQ(damping=0.0)
    with pytest.raises(InputError, match="correction is 2"):
        GPTQ(correction=2.0)
    with pytest.raises(InputError, match="bits is 9"):
        GPTQ(bits=9)
    with pytest.raises(InputError, match="needs calibration text"):
        GPTQ()(tiny.model(), Context(mesh=meshes.make_mesh()))
