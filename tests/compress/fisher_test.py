import jax
import numpy as np

from efflm.compress import fisher
from efflm.parallel import meshes
from tests import tiny


def sure(model):
    """With embeddings so large that the model expects some tokens far more than others."""
    return model.replace(params=model.params | {"embedding": model.params["embedding"] * 4})


def test_the_diagonal_is_that_of_the_exact_information():
    """F = E[J^T (diag(p) - p p^T) J], J the derivative of the logits of a token by the weights."""
    model = sure(tiny.model())
    row = {name: field[:1] for name, field in tiny.batch(model.config, rows=1).items()}
    counted = row["segments"][0] > 0

    def logits(w):
        block = model.params["block_1"]
        own = block | {"attention": block["attention"] | {"key": {"kernel": w}}}
        inputs = {"segments": row["segments"], "positions": row["positions"]}
        return tiny.logits(model.replace(params=model.params | {"block_1": own}), row["inputs"], **inputs)[0][counted]

    w = model.params["block_1"]["attention"]["key"]["kernel"]
    p = np.asarray(jax.nn.softmax(logits(w)), np.float64)
    steps = 0.01 * np.eye(w.size, dtype=np.float32).reshape(w.size, *w.shape)
    there, back = (
        np.asarray(jax.lax.map(logits, w[None] + sign * steps, batch_size=64), np.float64) for sign in (1, -1)
    )
    slopes = (there - back) / 0.02  # [weights, tokens, V]
    slopes -= np.einsum("tv,wtv->wt", p, slopes)[..., None]
    exact = np.einsum("tv,wtv->w", p, slopes**2).reshape(w.shape) / counted.sum()

    rows = {name: np.tile(field, (128, 1)) for name, field in row.items()}
    found = np.asarray(fisher.diagonal(model, rows, meshes.make_mesh())["block_1/attention/key/kernel"])
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.9
    np.testing.assert_allclose(found.sum(), exact.sum(), rtol=0.15)


def test_targets_are_drawn_from_what_the_model_expects():
    model = sure(tiny.model())
    rows = {name: np.tile(field[:1], (256, 1)) for name, field in tiny.batch(model.config, rows=1).items()}
    found = fisher.drawn(model, rows, meshes.make_mesh(), seed=3)["targets"]
    assert found.shape == rows["inputs"].shape
    one = {name: rows[name][:1] for name in ("segments", "positions")}
    p = np.asarray(jax.nn.softmax(tiny.logits(model, rows["inputs"][:1], **one))[0])
    for at in (0, 5, 9):
        share = np.bincount(found[:, at], minlength=300) / 256
        assert np.abs(share - p[at]).sum() < 1.5 * np.sqrt(p[at] * (1 - p[at]) / 256).sum()
    few = {name: field[:8] for name, field in rows.items()}
    one, other = (fisher.drawn(model, few, meshes.make_mesh(), seed)["targets"] for seed in (3, 0))
    assert not np.array_equal(one, other)
