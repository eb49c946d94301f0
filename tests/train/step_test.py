import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efflm.config import InputError, TrainConfig
from efflm.model import sharding, stack_blocks
from efflm.train import loop, losses, optimizer
from efflm.train.step import init_state, make_step, place
from tests import tiny

CONFIG = TrainConfig(steps=5, warmup=1, batch=8, length=16, learning_rate=1e-2)


def trajectory(mesh, params, config, steps=5, scan=False):
    adamw = optimizer.adamw(CONFIG)
    state = init_state(stack_blocks(params, config) if scan else params, adamw, mesh)
    step = make_step(losses.language_model_loss(config, scanned=scan), adamw, 0, state)
    out = []
    for i in range(steps):
        state, metrics = step(state, {}, place(tiny.batch(config, seed=i), mesh))
        out.append(float(metrics["loss"]))
    return out, step, state


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_train_like_one(shape):
    model = tiny.model()
    one, _, _ = trajectory(sharding.make_mesh(), model.params, model.config)
    eight, _, state = trajectory(sharding.make_mesh(**shape), model.params, model.config)
    np.testing.assert_allclose(eight, one, rtol=2e-4)
    assert one[-1] < one[0]
    assert len(state.trainable["embedding"].sharding.device_set) == 8


def test_scanned_training_equals_looped():
    model = tiny.model()
    looped, _, _ = trajectory(sharding.make_mesh(), model.params, model.config)
    scanned, _, _ = trajectory(sharding.make_mesh(), model.params, model.config, scan=True)
    np.testing.assert_allclose(scanned, looped, rtol=2e-4)


def test_the_second_step_does_not_compile_again():
    model = tiny.model()
    _, step, _ = trajectory(sharding.make_mesh(data=2, fsdp=2, tensor=2), model.params, model.config, steps=3)
    assert step._cache_size() == 1


def test_padding_has_no_weight_in_the_loss():
    model = tiny.model()
    loss = jax.jit(losses.language_model_loss(model.config))
    batch = tiny.batch(model.config)
    changed = {**batch, "targets": np.where(batch["segments"] == 0, 7, batch["targets"]).astype(np.int32)}
    key = jax.random.key(0)
    assert loss(model.params, {}, batch, key)[0] == loss(model.params, {}, changed, key)[0]
    moved = {**batch, "targets": np.where(batch["segments"] == 1, 7, batch["targets"]).astype(np.int32)}
    assert loss(model.params, {}, batch, key)[0] != loss(model.params, {}, moved, key)[0]


def batches(step):
    return {"inputs": np.zeros((8, 4), np.int32), "segments": np.ones((8, 4), np.int32)}


def quadratic(trainable, frozen, batch, rng):
    return jnp.sum(jnp.square(trainable["scale"])) + 0 * jnp.sum(batch["inputs"]), {}


def test_fit_trains_any_tree_and_writes_each_metric_once(tmp_path):
    start = {"scale": jnp.ones(3)}
    out = loop.fit(
        quadratic,
        start,
        {},
        batches,
        optax.sgd(0.1),
        steps=7,
        mesh=sharding.make_mesh(),
        log_every=3,
        metrics_file=tmp_path / "metrics.jsonl",
    )
    np.testing.assert_allclose(out["scale"], 0.8**7, rtol=1e-5)
    np.testing.assert_array_equal(start["scale"], 1.0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6, 7]


def test_a_loss_that_is_not_finite_stops_the_run():
    diverging = lambda *args: (quadratic(*args)[0] * jnp.inf, {})
    with pytest.raises(InputError, match="loss is inf at step 1"):
        loop.fit(
            diverging,
            {"scale": jnp.ones(3)},
            {},
            batches,
            optax.sgd(0.1),
            steps=2,
            mesh=sharding.make_mesh(),
            log_every=1,
        )


def test_profile_leaves_a_trace_for_tensorboard_and_perfetto(tmp_path):
    loop.fit(
        quadratic,
        {"scale": jnp.ones(3)},
        {},
        batches,
        optax.sgd(0.1),
        steps=4,
        mesh=sharding.make_mesh(),
        profile=(1, 2, tmp_path),
    )
    assert list(tmp_path.rglob("*.xplane.pb"))
    assert list(tmp_path.rglob("perfetto_trace.json.gz"))
