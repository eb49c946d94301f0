import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efflm import ops, trees
from efflm.compress import obs
from efflm.compress.quantize import Quantize
from efflm.compress.sparsegpt import SparseGPT, prune
from efflm.compress.step import Context
from efflm.compress.wanda import mask as wanda_mask
from efflm.config import InputError
from efflm.parallel import meshes
from tests import reference_layers, surgeon, tiny

CONTEXT = Context(mesh=meshes.make_mesh(), calibration=tiny.batch(tiny.LLAMA.config(), rows=16))


def pruned(w, x, sparsity, pattern=None, kept=None):
    gram = jnp.asarray(x).T @ jnp.asarray(x)
    kept = jnp.ones(w.shape, bool) if kept is None else jnp.asarray(kept)
    made = prune(jnp.asarray(w), obs.inverse(gram, 0.01, "w"), kept, sparsity, pattern)
    return tuple(map(np.asarray, made))


def by_reference(w, x, sparsity, pattern):
    """Blocks of 128 inputs, or of m, whose weights go by w^2 / (the inverse's diagonal when the block begins, each
    input's with all before it gone)."""
    K, N = w.shape
    together = pattern[1] if pattern else 128
    gone = {}

    def decide(k, w, diagonal, done):
        start = k // together * together
        if k == start:
            end = min(start + together, K)
            score = np.square(w[start:end]) / ahead(x, start, end)[:, None]
            if pattern:
                drop = np.argsort(score, axis=0, kind="stable")[: pattern[1] - pattern[0]]
                gone[start] = np.zeros((end - start, N), bool)
                np.put_along_axis(gone[start], drop, True, axis=0)
            else:
                flat = np.zeros(score.size, bool)
                flat[np.argsort(score.ravel(), kind="stable")[: round(sparsity * score.size)]] = True
                gone[start] = flat.reshape(score.shape)
        return np.where(gone[start][k - start], 0, w[k])

    found = surgeon.swept(w, x, range(K), decide)
    return found, ~np.concatenate([gone[start] for start in sorted(gone)])


def ahead(x, start, end):
    """For each input the diagonal of the inverse of what is left of the matrix when all before it are gone."""
    gram = surgeon.damped(x.astype(np.float64))
    return np.array([np.linalg.inv(gram[k:, k:])[0, 0] for k in range(start, end)])


@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**31),
    K=st.sampled_from([8, 128, 160]),
    sparsity=st.sampled_from([0.3, 0.5, 0.8]),
    pattern=st.sampled_from([None, (2, 4), (1, 4), (4, 8)]),
)
def test_it_prunes_as_the_equations_say(seed, K, sparsity, pattern):
    x, w = surgeon.layer(seed, K, 5)
    found, kept = pruned(w, x, sparsity, pattern)
    wanted, kept_there = by_reference(w, x, sparsity, pattern)
    assert np.mean(kept != kept_there) < 0.02  # near ties
    np.testing.assert_array_equal(found[~kept], 0)
    np.testing.assert_allclose(surgeon.loss(w, found, x), surgeon.loss(w, wanted, x), rtol=0.02)
    if pattern:
        assert (kept.reshape(-1, pattern[1], 5).sum(1) == pattern[0]).all()
    else:
        counts = [round(sparsity * min(128, K - start) * 5) for start in range(0, K, 128)]
        assert (~kept).sum() == sum(counts)


@pytest.mark.parametrize(("name", "pattern"), [("half", None), ("2:4", (2, 4))])
def test_masks_and_weights_are_those_of_the_reference_programs(name, pattern):
    x, w = surgeon.layer(reference_layers.SEED, reference_layers.K, reference_layers.N)
    there = np.load(reference_layers.FILE)
    found, kept = pruned(w, x, 0.5, pattern)
    wanted = there[f"sparsegpt {name}"]
    assert np.mean(kept == (wanted != 0)) > 0.99
    np.testing.assert_allclose(surgeon.loss(w, found, x), surgeon.loss(w, wanted, x), rtol=0.01)
    by_wanda = wanda_mask(jnp.asarray(w), jnp.square(jnp.asarray(x)).sum(0), 0.5, pattern)
    assert np.mean(by_wanda == there[f"wanda {name}"]) > 0.99


def test_it_loses_less_than_wanda_and_that_less_than_magnitude():
    x, w = surgeon.layer(1, 192, 24)
    found, kept = pruned(w, x, 0.5)
    wanda = np.asarray(wanda_mask(jnp.asarray(w), jnp.square(jnp.asarray(x)).sum(0), 0.5))
    smaller = np.abs(w) < np.median(np.abs(w))
    ours, theirs, plain = (surgeon.loss(w, each, x) for each in (found, w * wanda, w * ~smaller))
    assert ours < 0.8 * theirs < 0.8 * plain
    assert (~kept).mean() == pytest.approx(0.5, abs=1e-3)


def test_what_is_pruned_stays_so_and_dead_inputs_go_first():
    x, w = surgeon.layer(2, 64, 8)
    x[:, [3, 40]] = 0
    before = np.random.default_rng(0).random(w.shape) < 0.9
    _, kept = pruned(w, x, 0.5, kept=before)
    assert not kept[~before].any()
    assert not kept[[3, 40]].any()
    assert (~kept).sum() == w.size // 2


@pytest.mark.parametrize(("name", "pattern"), [("llama", ""), ("llama", "2:4"), ("gpt2", "")])
def test_a_model(name, pattern):
    model = tiny.model(tiny.SHAPES[name])
    after, record = SparseGPT(pattern=pattern)(model, CONTEXT)
    assert len(after.masks) == 2 * (7 if name == "llama" else 6)
    for path, mask in after.masks.items():
        w = dict(trees.flatten(after.params))[path]
        assert float(jnp.mean(mask)) == pytest.approx(0.5, abs=0.01)
        assert bool(jnp.all(jnp.where(mask, True, w == 0)))
    assert record.predicted_bytes < trees.nbytes(model.params)


def test_a_quantized_model_is_rounded_again():
    model, _ = Quantize()(tiny.model(), CONTEXT)
    after, _ = SparseGPT()(model, CONTEXT)
    for path, mask in after.masks.items():
        w = dict(trees.flatten(after.params))[path]
        assert isinstance(w, ops.QArray)
        assert bool(jnp.all(jnp.where(mask, True, ops.dequantize(w) == 0)))


def test_settings_that_cannot_be():
    with pytest.raises(InputError, match=r"sparsity is 0.6, but 2:4 removes 0.5"):
        SparseGPT(sparsity=0.6, pattern="2:4")
    with pytest.raises(InputError, match="3:3 keeps 3 of every 3"):
        SparseGPT(pattern="3:3")
    with pytest.raises(InputError, match="which 2:5 cannot group by 5"):
        SparseGPT(pattern="2:5", sparsity=0.6)(tiny.model(), CONTEXT)
