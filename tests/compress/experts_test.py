"""Mixtures of experts: each is calibrated by the tokens that it is given; one given none goes by its weights alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops, trees
from efflm.compress import recipe
from efflm.compress.distill import Distill
from efflm.compress.gptq import GPTQ
from efflm.compress.magnitude import Magnitude
from efflm.compress.quantize import Quantize
from efflm.compress.rotate import Rotate
from efflm.compress.smoothquant import SmoothQuant
from efflm.compress.sparsegpt import SparseGPT
from efflm.compress.step import Context
from efflm.compress.structured.depth import Depth
from efflm.compress.structured.width import Width
from efflm.compress.wanda import Wanda
from efflm.config import InputError
from efflm.formats import efflm_file
from efflm.parallel import meshes
from tests import tiny
from tests.compress.calibrate_test import reads, seen_by

CONFIG = tiny.FAMILIES["experts"]
BATCH = tiny.batch(CONFIG)
MATRICES = ("gate/kernel", "up/kernel", "down/kernel")


def context(mesh=None):
    return Context(
        mesh=mesh or meshes.make_mesh(), calibration=BATCH, batches=lambda step: tiny.batch(CONFIG, seed=step)
    )


def unreached():
    """A model that gives every token to the experts 0 and 1: among equals the earlier ones are chosen."""
    model = tiny.model(CONFIG)
    even = lambda path, w: jnp.zeros_like(w) if "router" in path else w
    return model.replace(params=trees.map_with_path(even, model.params))


def test_statistics_are_of_the_tokens_that_an_expert_is_given(monkeypatch):
    model, seen = tiny.model(CONFIG), seen_by(tiny.model(CONFIG), BATCH)
    x = reads(model, BATCH, monkeypatch)["block_0/feedforward/router/kernel"]
    logits = x @ np.float64(model.params["block_0"]["feedforward"]["router"]["kernel"])
    chosen = np.argsort(-logits, axis=1)[:, :2]
    for e in range(4):
        own = x[(chosen == e).any(1)]
        assert 0 < len(own) < len(x)
        np.testing.assert_allclose(seen[f"block_0/feedforward/expert_{e}/up/kernel"]["gram"], own.T @ own, atol=1e-3)


def test_an_expert_that_no_text_reaches_is_rounded_to_the_nearest_and_pruned_by_magnitude():
    model = unreached()
    seen = seen_by(model, BATCH)
    after, _ = recipe.apply(model, (GPTQ(bits=4, group=0, clip=False),), context())
    nearest, _ = recipe.apply(model, (Quantize(bits=4, group=0, clip=False),), context())
    pruned, _ = recipe.apply(model, (Wanda(sparsity=0.5),), context())
    compensated, _ = recipe.apply(model, (SparseGPT(sparsity=0.5),), context())
    for e, name in ((e, name) for e in range(4) for name in MATRICES):
        path = f"block_1/feedforward/expert_{e}/{name}"
        find = lambda model, path=path: ops.dequantize(dict(trees.flatten(model.params))[path])
        w, reached = np.asarray(find(model)), e < 2
        assert (seen[path]["squares"] > 0).any() == reached
        assert np.array_equal(find(after), find(nearest)) != reached
        least = np.sort(np.abs(w), axis=0)[len(w) // 2]
        assert np.array_equal(find(pruned) != 0, np.abs(w) >= least) != reached
        assert np.isin(find(compensated), [*w.reshape(-1), 0]).all() != reached  # nothing makes up for what is gone


@pytest.mark.parametrize(
    "steps",
    [
        (Quantize(bits=4, group=8, embeddings=0),),
        (SmoothQuant(), Quantize(activations="int8")),
        (Magnitude(sparsity=0.5), Distill(steps=2)),
        (Depth(), GPTQ(bits=4, group=8)),
    ],
    ids=lambda steps: ",".join(type(step).__name__ for step in steps),
)
def test_chains_on_eight_devices_give_models_that_are_saved_and_read(steps, tmp_path):
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    model, tokens = tiny.model(CONFIG), tiny.tokens(CONFIG, 2, 12)
    after, records = recipe.apply(model, steps, context(mesh))
    efflm_file.save(tmp_path / "m.safetensors", after, {}, records)
    back, _ = efflm_file.load(tmp_path / "m.safetensors")
    assert back.config == after.config
    for layer in range(len(after.config.blocks)):
        kept = after.params[f"block_{layer}"]["feedforward"]["router"]["kernel"]
        assert isinstance(kept, jax.Array)
        assert kept.dtype == jnp.float32
    np.testing.assert_allclose(tiny.logits(back, tokens), tiny.logits(after, tokens), atol=1e-4)


def test_what_mixtures_cannot_have_is_refused_by_name():
    for step in (Rotate(), Width(parameters=0.2)):
        with pytest.raises(InputError, match="the model is a mixture of experts, "):
            recipe.apply(tiny.model(CONFIG), (step,), context())


def test_experts_without_tokens_do_not_run():
    """Infinite weights of experts that no token is given to spoil nothing where there are few tokens."""
    model = unreached()
    spoil = lambda path, w: w * jnp.inf if "expert_2" in path or "expert_3" in path else w
    spoiled = model.replace(params=trees.map_with_path(spoil, model.params))
    tokens = tiny.tokens(CONFIG, 1, 1)
    np.testing.assert_array_equal(tiny.logits(spoiled, tokens), tiny.logits(model, tokens))
    assert not np.isfinite(tiny.logits(spoiled, tiny.tokens(CONFIG, 2, 4))).all()
