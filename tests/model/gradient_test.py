"""The gradient of the loss against differences of the float64 reference, along a random direction of each weight."""

import jax
import numpy as np
import pytest

from efflm import trees
from efflm.train import losses
from tests import reference, tiny

STEP = 1e-5  # of the central differences: in float64 both their errors are far below those of a float32 gradient


def reference_loss(config, params, batch):
    """The mean cross-entropy over the tokens of documents, each of which is run alone."""
    nll = []
    for ids, targets, segments in zip(batch["inputs"], batch["targets"], batch["segments"], strict=True):
        for document in sorted(set(segments) - {0}):
            logits = reference.forward(config, params, ids[segments == document])
            largest = logits.max(-1, keepdims=True)
            normalizers = largest[:, 0] + np.log(np.exp(logits - largest).sum(-1))
            nll.extend(normalizers - logits[np.arange(len(logits)), targets[segments == document]])
    return np.mean(nll)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_gradient_is_the_slope_of_the_reference(name, rng):
    model = tiny.model(tiny.FAMILIES[name])
    config, batch = model.config, tiny.batch(model.config, rows=1)
    loss = losses.language_model_loss(config)
    grads = dict(trees.flatten(jax.jit(jax.grad(lambda params: loss(params, {}, batch, None)[0]))(model.params)))
    for path, grad in grads.items():
        direction = rng.standard_normal(grad.shape)

        def moved(size, path=path, direction=direction):
            shift = lambda other, w: np.float64(w) + size * direction if other == path else w
            return trees.map_with_path(shift, model.params)

        rise = reference_loss(config, moved(STEP), batch) - reference_loss(config, moved(-STEP), batch)
        slope, off = np.sum(np.float64(grad) * direction), 1e-4 * np.linalg.norm(grad) + 1e-6
        np.testing.assert_allclose(slope, rise / (2 * STEP), rtol=0, atol=off, err_msg=path)
