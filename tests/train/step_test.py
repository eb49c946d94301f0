import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efflm.config import InputError
from efflm.config.train import TrainConfig
from efflm.model import init_params, stack_blocks
from efflm.parallel import meshes
from efflm.precision import POLICIES, LossScale, cast, loss_scale_for
from efflm.train import callbacks, losses, optimizer, trainer
from efflm.train.step import make_step, place
from tests import tiny

CONFIG = TrainConfig(steps=5, warmup=1, batch=8, length=16, learning_rate=1e-2)


def trajectory(mesh, params, config, steps=5, scan=False):
    adamw = optimizer.make(CONFIG)
    state = tiny.init_state(stack_blocks(params, config) if scan else params, adamw, mesh)
    step = make_step(losses.language_model_loss(config, scanned=scan), adamw, 0, state)
    out = []
    for i in range(steps):
        state, metrics = step(state, {}, place(tiny.batch(config, seed=i), mesh))
        out.append(float(metrics["loss"]))
    return out, step, state


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_train_like_one(shape):
    model = tiny.model()
    one, _, _ = trajectory(meshes.make_mesh(), model.params, model.config)
    eight, _, state = trajectory(meshes.make_mesh(**shape), model.params, model.config)
    np.testing.assert_allclose(eight, one, rtol=2e-4)
    assert one[-1] < one[0]
    assert len(state.trainable["embedding"].sharding.device_set) == 8


def test_scanned_training_equals_looped():
    model = tiny.model()
    looped, _, _ = trajectory(meshes.make_mesh(), model.params, model.config)
    scanned, _, _ = trajectory(meshes.make_mesh(), model.params, model.config, scan=True)
    np.testing.assert_allclose(scanned, looped, rtol=2e-4)


def test_the_second_step_does_not_compile_again():
    model = tiny.model()
    _, step, _ = trajectory(meshes.make_mesh(data=2, fsdp=2, tensor=2), model.params, model.config, steps=3)
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


# --- memory: rematerialization and accumulation ---------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize(
    "name", tiny.and_combinations(["llama", "gpt2", "qwen3", "neox", "gemma", "experts"], ["llama", "gemma"])
)
def test_rematerialized_gradients_are_the_same(scan, name):
    model = tiny.model(tiny.FAMILIES[name])
    params = stack_blocks(model.params, model.config) if scan else model.params
    batch, key = tiny.batch(model.config), jax.random.key(0)
    gradient = lambda remat: jax.jit(
        jax.grad(lambda p: losses.language_model_loss(model.config, scanned=scan, remat=remat)(p, {}, batch, key)[0])
    )(params)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    kept = gradient("none")
    for remat in ("dots", "full"):
        jax.tree.map(same, gradient(remat), kept)


def test_full_rematerialization_halves_the_activations():
    shape = dataclasses.replace(tiny.LLAMA, layers=8, width=64, mlp_dim=192)
    config = shape.config()
    params = jax.eval_shape(lambda: init_params(config, 0))
    rows = jax.ShapeDtypeStruct((16, 64), jnp.int32)
    batch = dict.fromkeys(("inputs", "targets", "segments", "positions"), rows)

    def temporaries(remat):
        loss = losses.language_model_loss(config, remat=remat)
        program = jax.jit(jax.grad(lambda p, batch: loss(p, {}, batch, None)[0])).lower(params, batch).compile()
        return program.memory_analysis().temp_size_in_bytes

    nothing_stored, products_stored, all_stored = temporaries("full"), temporaries("dots"), temporaries("none")
    assert all_stored > 2 * nothing_stored
    assert all_stored > products_stored > nothing_stored


def steps_of(loss, params, batch, accumulate=1, loss_scale=None, count=3):
    tx = optimizer.make(CONFIG)
    state = tiny.init_state(params, tx, meshes.make_mesh(), loss_scale)
    step, out = make_step(loss, tx, 0, state, accumulate), []
    for _ in range(count):
        state, metrics = step(state, {}, batch)
        out.append(jax.device_get(metrics))
    return state, out


@pytest.mark.parametrize("parts", tiny.and_combinations([2, 4], [4]))
def test_a_batch_in_parts_trains_like_the_whole(parts):
    model = tiny.model()
    batch = tiny.batch(model.config)
    batch["segments"][:3] = np.where(np.arange(16) < 5, 1, 0)  # parts of unequal weight
    loss = losses.language_model_loss(model.config)
    whole, metrics = steps_of(loss, model.params, batch)
    cut, cut_metrics = steps_of(loss, model.params, batch, parts)
    for a, b in zip(cut_metrics, metrics, strict=True):
        assert a.keys() == b.keys()
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), a, b)
    close = lambda a, b: np.testing.assert_allclose(
        a, b, rtol=1e-3, atol=3e-4
    )  # Adam divides gradients near 0 by themselves
    jax.tree.map(close, cut.trainable, whole.trainable)


def test_a_batch_in_parts_on_eight_devices_trains_like_one():
    model = tiny.model()
    batch = tiny.batch(model.config, rows=16)
    loss, tx = losses.language_model_loss(model.config), optimizer.make(CONFIG)
    outcomes = []
    for mesh in (meshes.make_mesh(), meshes.make_mesh(data=8)):
        state = tiny.init_state(model.params, tx, mesh)
        _, metrics = make_step(loss, tx, 0, state, 2)(state, {}, place(batch, mesh))
        outcomes.append(jax.device_get(metrics))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *outcomes)


def test_rows_that_do_not_divide_are_refused():
    model = tiny.model()
    with pytest.raises(InputError, match=r"8 rows in 3 parts \(accumulate\) cannot be shared"):
        steps_of(losses.language_model_loss(model.config), model.params, tiny.batch(model.config), accumulate=3)


def test_parts_take_less_memory():
    model = tiny.model(dataclasses.replace(tiny.LLAMA, width=64, mlp_dim=192))
    batch, tx = tiny.batch(model.config, rows=64, length=64), optimizer.make(CONFIG)
    state = tiny.init_state(model.params, tx, meshes.make_mesh())
    loss = losses.language_model_loss(model.config)
    compiled = [make_step(loss, tx, 0, state, parts).lower(state, {}, batch).compile() for parts in (1, 8)]
    whole, cut = (program.memory_analysis().temp_size_in_bytes for program in compiled)
    assert whole > 3 * cut


# --- precision ------------------------------------------------------------------------------------------------------


def test_label_weights_and_z_loss_enter_the_loss():
    model = tiny.model()
    batch, key = tiny.batch(model.config), jax.random.key(0)
    logits = np.float64(tiny.logits(model, batch["inputs"], segments=batch["segments"], positions=batch["positions"]))
    normalizer = np.log(np.exp(logits).sum(-1))
    nll = normalizer - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    weights = np.random.default_rng(0).random(nll.shape).astype(np.float32) * (batch["segments"] > 0)
    loss = jax.jit(losses.language_model_loss(model.config, z_loss=0.01))
    total, parts = loss(model.params, {}, {**batch, "weights": weights}, key)
    np.testing.assert_allclose(total, (weights * (nll + 0.01 * normalizer**2)).sum() / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(parts["cross_entropy"], (weights * nll).sum() / weights.sum(), rtol=1e-5)


def test_an_overflow_skips_the_update_and_halves_the_scale():
    weights = {"scale": jnp.ones(3)}
    loss = lambda trainable, frozen, batch, rng: (jnp.sum(trainable["scale"] * batch["x"]), {})
    tx = optax.adam(0.1)
    state = tiny.init_state(weights, tx, meshes.make_mesh(), LossScale.start(1024.0, interval=2))
    step, scales, skipped = make_step(loss, tx, 0, state), [], []
    for x in (1.0, np.inf, 1.0, 1.0, 1.0):
        before = jax.device_get((state.trainable, state.optimizer))
        state, metrics = step(state, {}, {"x": jnp.full(3, x, jnp.float32)})
        unchanged = jax.tree.map(np.array_equal, before, jax.device_get((state.trainable, state.optimizer)))
        assert all(jax.tree.leaves(unchanged)) == (x == np.inf)
        scales.append(float(state.loss_scale.scale))
        skipped.append(float(metrics["skipped"]))
    assert scales == [1024, 512, 512, 1024, 1024]  # two good steps in a row double it
    assert skipped == [0, 1, 1, 1, 1]  # counted since the start
    assert int(state.step) == 5
    np.testing.assert_allclose(metrics["gradient_norm"], 3**0.5, rtol=1e-6)  # as if there were no scale


def fitted(loss=None, rows=None, *, steps=2, log_every=1, watched=(), loss_scale=None):
    """A vector that is trained for a few steps; by default to 0."""
    task = trainer.Task(
        train=TrainConfig(steps=steps, log_every=log_every), loss_fn=loss or quadratic, rule=optax.sgd(0.1),
        start=lambda: {"scale": jnp.ones(3)}, batches=rows or batches, loss_scale=loss_scale,
    )  # fmt: skip
    return trainer.fit(task, mesh=meshes.make_mesh(), watched=watched)


def test_a_skipped_step_does_not_stop_the_run():
    spike = lambda step: {"inputs": np.full((8, 4), np.inf if step == 1 else 1.0), "segments": np.ones((8, 4))}
    loss = lambda trainable, frozen, batch, rng: (jnp.sum(trainable["scale"]) * jnp.mean(batch["inputs"]), {})
    out = fitted(loss, spike, steps=3, loss_scale=LossScale.start())
    np.testing.assert_allclose(out["scale"], 0.8, rtol=1e-6)


def test_float16_needs_its_loss_scale():
    """Gradients around 1e-9 of a loss that is small by construction: below the least float16, 6e-8."""
    model = tiny.model()
    batch = tiny.batch(model.config)
    whole = losses.language_model_loss(model.config, POLICIES["float16"])
    small = lambda *args: (1e-6 * whole(*args)[0], {})
    tx, ends = optax.chain(optax.scale(1e6), optimizer.make(CONFIG)), {}
    for name, scale in (("with", LossScale.start(2.0**20)), ("without", None)):
        state = tiny.init_state(model.params, tx, meshes.make_mesh(), scale)
        step = make_step(small, tx, 0, state)
        for _ in range(12):
            state, metrics = step(state, {}, batch)
        ends[name] = float(metrics["loss"]) * 1e6
    start = float(whole(model.params, {}, batch, jax.random.key(0))[0])
    assert start - ends["with"] > 2 * (start - ends["without"])


def test_half_precision_trains_like_float32():
    model = tiny.model()
    batch = tiny.batch(model.config)
    ends = {}
    for name in POLICIES:
        params = cast(model.params, POLICIES[name].param)
        state, metrics = steps_of(
            losses.language_model_loss(model.config, POLICIES[name]), params, batch,
            loss_scale=loss_scale_for(POLICIES[name]), count=8,
        )  # fmt: skip
        ends[name] = float(metrics[-1]["loss"])
        kept = {str(leaf.dtype) for leaf in jax.tree.leaves(state.trainable)}
        assert kept == {POLICIES[name].param}
        moments = {str(leaf.dtype) for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim}
        assert moments == {"float32"}
    start = float(metrics[0]["loss"])
    assert start - ends["float32"] > 0.5
    for name, end in ends.items():
        np.testing.assert_allclose(end, ends["float32"], atol=0.05 * (start - ends["float32"]), err_msg=name)


def test_bfloat16_ends_within_two_deviations_of_float32():
    """The deviation is float32's own, over seeds of weights and batches. Each seed is trained under both policies."""
    config, tx, ends = tiny.LLAMA.config(), optimizer.make(CONFIG), {}
    for name in ("float32", "bfloat16"):
        step, ends[name] = None, []
        for seed in range(5):
            state = tiny.init_state(init_params(config, seed), tx, meshes.make_mesh())
            step = step or make_step(losses.language_model_loss(config, POLICIES[name]), tx, 0, state)
            for i in range(20):
                state, metrics = step(state, {}, tiny.batch(config, seed=100 * seed + i))
            ends[name].append(float(metrics["loss"]))
    differences = np.subtract(ends["bfloat16"], ends["float32"])
    assert np.all(differences != 0)
    assert np.all(np.abs(differences) <= 2 * np.std(ends["float32"], ddof=1))


def batches(step):
    return {"inputs": np.zeros((8, 4), np.int32), "segments": np.ones((8, 4), np.int32)}


def quadratic(trainable, frozen, batch, rng):
    return jnp.sum(jnp.square(trainable["scale"])) + 0 * jnp.sum(batch["inputs"]), {}


def test_fit_trains_any_tree_and_writes_each_metric_once(tmp_path):
    out = fitted(steps=7, log_every=3, watched=[callbacks.lines(tmp_path / "metrics.jsonl")])
    np.testing.assert_allclose(out["scale"], 0.8**7, rtol=1e-5)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 6, 7]


def test_a_loss_that_is_not_finite_stops_the_run():
    diverging = lambda *args: (quadratic(*args)[0] * jnp.inf, {})
    with pytest.raises(InputError, match="loss is inf at step 1"):
        fitted(diverging)


def test_runs_that_share_programs_compile_once_and_train_the_same():
    traces = []

    def loss(w, frozen, batch, rng):
        traces.append(0)
        return jnp.sum(jnp.square(w["bias"] - frozen["bias"])), {}

    programs, rule, mesh = {}, optax.sgd(0.1), meshes.make_mesh()
    task = lambda start, frozen: trainer.Task(
        train=TrainConfig(steps=2), loss_fn=loss, start=start, frozen=frozen, batches=lambda step: {}, rule=rule
    )
    for shared in (programs, programs, None):
        for target in (1.0, 2.0):
            start, frozen = (lambda: {"bias": jnp.zeros(3)}), {"bias": jnp.full(3, target)}
            out = trainer.fit(task(start, frozen), mesh=mesh, title="", programs=shared)
            np.testing.assert_allclose(out["bias"], 0.36 * target, rtol=1e-6)
    assert len(traces) == 1 + 2  # the runs without `programs` compile each
    wider = lambda: {"bias": jnp.zeros(4)}
    trainer.fit(task(wider, wider()), mesh=mesh, title="", programs=programs)
    assert len(programs) == 2
