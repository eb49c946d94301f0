import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efflm import trees
from efflm.compress import recipe
from efflm.compress.calibrate import SQUARES
from efflm.compress.finetune import Finetune
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context
from efflm.compress.wanda import Wanda, mask
from efflm.ops.qarray import codes
from efflm.parallel import meshes
from tests import tiny
from tests.compress.calibrate_test import seen_by

CONFIG = tiny.LLAMA.config()
CONTEXT = Context(
    mesh=meshes.make_mesh(),
    calibration=tiny.batch(CONFIG, rows=16),
    batches=lambda step: tiny.batch(CONFIG, seed=step),
)


@given(st.integers(0, 2**31), st.floats(0, 0.95))
def test_of_each_output_the_smallest_products_go(seed, sparsity):
    rng = np.random.default_rng(seed)
    w = rng.integers(-2, 3, (12, 5)).astype(np.float32)  # ties
    x = rng.standard_normal((30, 12)) * rng.integers(0, 2, 12)  # and inputs that are always zero
    found = np.asarray(mask(jnp.asarray(w), jnp.asarray(np.square(x).sum(0), jnp.float32), sparsity))
    score = np.abs(w) * np.linalg.norm(x.astype(np.float32), axis=0)[:, None]
    for output in range(5):
        gone = np.argsort(score[:, output].astype(np.float32), kind="stable")[: round(sparsity * 12)]
        close = np.sort(score[:, output])
        if len(gone) in (0, 12) or close[len(gone)] - close[len(gone) - 1] > 1e-4:
            assert set(np.flatnonzero(~found[:, output])) == set(gone)
        assert (~found[:, output]).sum() == round(sparsity * 12)


@given(st.integers(0, 2**31), st.sampled_from([(2, 4), (1, 2), (4, 8), (1, 8)]))
def test_n_of_every_m_inputs_stay(seed, pattern):
    rng = np.random.default_rng(seed)
    w, squares = rng.standard_normal((16, 5)).astype(np.float32), rng.random(16).astype(np.float32)
    found = np.asarray(mask(jnp.asarray(w), jnp.asarray(squares), 0.5, pattern)).reshape(-1, pattern[1], 5)
    score = (np.abs(w) * np.sqrt(squares)[:, None]).reshape(found.shape)
    np.testing.assert_array_equal(found.sum(1), pattern[0])
    assert np.all(np.where(found, score, 9).min(1) >= np.where(found, 0, score).max(1))


def test_the_first_layer_is_pruned_by_its_own_inputs():
    model = tiny.model()
    after, record = Wanda(sparsity=0.5)(model, CONTEXT)
    seen = seen_by(model, CONTEXT.calibration, {"squares": SQUARES})
    path = "block_0/attention/query/kernel"
    w, squares = dict(trees.flatten(model.params))[path], jnp.asarray(seen[path]["squares"])
    np.testing.assert_array_equal(after.masks[path], mask(w, squares, 0.5))
    for kept in after.masks.values():
        np.testing.assert_array_equal((~np.asarray(kept)).sum(0), kept.shape[0] // 2)
    assert record.step == "Wanda"


def test_zeros_survive_rounding_and_training():
    after, _ = recipe.apply(tiny.model(), (Wanda(), Quantize(bits=4, group=16), Finetune(steps=3)), CONTEXT)
    for path, kept in after.masks.items():
        w = dict(trees.flatten(after.params))[path]
        assert w.bits == 4
        np.testing.assert_array_equal(np.asarray(codes(w))[~np.asarray(kept)], 0)


def test_a_mask_that_is_there_already_is_kept():
    once, _ = Wanda(sparsity=0.3)(tiny.model(), CONTEXT)
    twice, _ = Wanda(sparsity=0.6, pattern="")(once, CONTEXT)
    for path, kept in twice.masks.items():
        assert not np.asarray(kept & ~once.masks[path]).any()
        assert float(jnp.mean(kept)) == pytest.approx(0.4, abs=0.03)
