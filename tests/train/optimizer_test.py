"""Every update rule against its paper's equations in float64, and what they have in common."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from optax import contrib

from efflm import ops, trees
from efflm.config.train import Optimizer, Schedule, TrainConfig
from efflm.model import init_params, stack_blocks, unstack_blocks
from efflm.parallel import meshes
from efflm.train import optimizer, trainer
from efflm.train.step import make_step
from tests import tiny

OPTIMIZERS = typing.get_args(Optimizer)
PLAIN = TrainConfig(
    steps=10, warmup=0, learning_rate=0.1, schedule="constant", weight_decay=0.3, beta1=0.9, beta2=0.95, clip=1e9
)
WEIGHTS = {
    "embedding": (6, 4),
    "block_0/attention/query/kernel": (4, 6),
    "block_0/attention_norm/scale": (4,),
}


def random_tree(rng, shapes=WEIGHTS):
    return {path: rng.standard_normal(shape) for path, shape in shapes.items()}


def float32(flat):
    return trees.unflatten({path: jnp.asarray(w, jnp.float32) for path, w in flat.items()})


def decay(path):
    return PLAIN.weight_decay if path.endswith("kernel") else 0.0


def two_steps(rng, settings, expected_update, shapes=WEIGHTS, rtol=2e-5):
    """Two steps of the optimizer and of `expected_update(memory, t, path, w, g) -> change of w` from the same start.

    memory: a dict of the path's own, for moments. Returns the memories, the parameters and the optimizer's state.
    """
    weights, memory = random_tree(rng, shapes), {path: {} for path in shapes}
    params, tx = float32(weights), optimizer.make(settings)
    state = tx.init(params)
    for t in (1, 2):
        grads = random_tree(rng, shapes)
        updates, state = jax.jit(tx.update)(float32(grads), state, params)
        params = optax.apply_updates(params, updates)
        weights = {path: w + expected_update(memory[path], t, path, w, grads[path]) for path, w in weights.items()}
    for path, w in trees.flatten(params):
        np.testing.assert_allclose(w, weights[path], rtol=rtol, atol=1e-5, err_msg=path)
    return memory, params, state


def adam_direction(memory, t, g, beta1=0.9, beta2=0.95):
    m = memory["m"] = beta1 * memory.get("m", 0.0) + (1 - beta1) * g
    v = memory["v"] = beta2 * memory.get("v", 0.0) + (1 - beta2) * g * g
    return m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + 1e-8)


def newton_schulz(g):
    """Five steps of X <- a X + b (X X') X + c (X X')^2 X from X = G / |G| (Jordan 2024)."""
    x = g / np.linalg.norm(g)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


# --- the papers' equations -----------------------------------------------------------------------------------------


def test_sgd_has_momentum_and_no_decay(rng):
    def expected(memory, t, path, w, g):
        memory["m"] = 0.9 * memory.get("m", 0.0) + g
        return -0.1 * memory["m"]

    two_steps(rng, dataclasses.replace(PLAIN, optimizer="sgd"), expected)


def test_adam_has_no_decay(rng):
    expected = lambda memory, t, path, w, g: -0.1 * adam_direction(memory, t, g)
    two_steps(rng, dataclasses.replace(PLAIN, optimizer="adam"), expected)


def test_adamw_decays_matrices_apart_from_the_gradient(rng):
    expected = lambda memory, t, path, w, g: -0.1 * (adam_direction(memory, t, g) + decay(path) * w)
    two_steps(rng, dataclasses.replace(PLAIN, optimizer="adamw"), expected)


def test_lion_takes_the_sign_of_an_interpolation(rng):
    def expected(memory, t, path, w, g):
        m = memory.get("m", 0.0)
        memory["m"] = 0.95 * m + 0.05 * g
        return -0.1 * (np.sign(0.9 * m + 0.1 * g) + decay(path) * w)

    two_steps(rng, dataclasses.replace(PLAIN, optimizer="lion"), expected)


def test_adafactor_factors_large_matrices_and_clips_its_updates(rng):
    shapes = {"embedding": (6, 4), "block_0/attention/query/kernel": (128, 160), "block_0/attention_norm/scale": (4,)}

    def expected(memory, t, path, w, g):
        beta, squared = 1 - t**-0.8, g * g + 1e-30
        if w.size > 24:  # factored: the rank-one estimate with the rows' and columns' means (algorithm 2)
            row = memory["row"] = beta * memory.get("row", 0.0) + (1 - beta) * squared.mean(1, keepdims=True)
            column = memory["column"] = beta * memory.get("column", 0.0) + (1 - beta) * squared.mean(0, keepdims=True)
            v = row * column / row.mean()
        else:
            v = memory["v"] = beta * memory.get("v", 0.0) + (1 - beta) * squared
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt(np.mean(u * u)))
        return -0.1 * (u + decay(path) * w)

    settings = dataclasses.replace(PLAIN, optimizer="adafactor")
    two_steps(rng, settings, expected, shapes, rtol=1e-4)
    params = float32(random_tree(rng, {"block_0/attention/query/kernel": (128, 160)}))
    assert optimizer.state_bytes(optimizer.make(settings), params) < 4 * (128 + 160 + 10) / (128 * 160)


def test_muon_orthogonalizes_the_momentum_of_matrices_in_layers(rng):
    def expected(memory, t, path, w, g):
        if not path.endswith("kernel"):
            return -0.1 * adam_direction(memory, t, g)
        m = memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * g
        nesterov = 0.9 * m / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
        return -0.1 * (newton_schulz(nesterov) * 0.2 * np.sqrt(6) + 0.3 * w)

    two_steps(rng, dataclasses.replace(PLAIN, optimizer="muon"), expected, rtol=1e-3)


def test_muons_update_has_singular_values_near_one_and_the_rms_of_adamw(rng):
    params = float32({"block_0/feedforward/up/kernel": rng.standard_normal((32, 96))})
    tx = optimizer.make(dataclasses.replace(PLAIN, optimizer="muon", weight_decay=0.0))
    grads = float32({"block_0/feedforward/up/kernel": rng.standard_normal((32, 96)) * np.geomspace(1, 30, 96)})
    update = np.float64(jax.tree.leaves(tx.update(grads, tx.init(params), params)[0])[0]) / -0.1
    singular = np.linalg.svd(update / (0.2 * np.sqrt(96)), compute_uv=False)
    assert singular.min() > 0.6
    assert singular.max() < 1.3
    assert 0.15 < np.sqrt(np.mean(update**2)) < 0.25


def test_schedule_free_averages_its_iterates(rng):
    """y is trained, z steps, x averages (algorithm 1 with Adam's denominator); all three begin at w."""
    settings = dataclasses.replace(PLAIN, optimizer="schedule_free")

    def expected(memory, t, path, y, g):
        z, x = memory.get("z", y), memory.get("x", y)
        v = memory["v"] = 0.95 * memory.get("v", 0.0) + 0.05 * g * g
        z = memory["z"] = z - 0.1 * (g / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + decay(path) * y)
        x = memory["x"] = (1 - 1 / t) * x + z / t
        return 0.1 * z + 0.9 * x - y

    memory, params, state = two_steps(rng, settings, expected)
    for path, x in trees.flatten(optimizer.evaluation_params(state, params)):
        np.testing.assert_allclose(x, memory[path]["x"], rtol=1e-4, atol=1e-4)


# --- what they have in common --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_layers_are_updated_as_if_unstacked(name, rng):
    """Per-layer statistics (top singular directions, factored moments, block scales, RMS) never cross layers."""
    shape = dataclasses.replace(tiny.LLAMA, width=128, heads=4, kv_heads=4, mlp_dim=160, layers=2)
    model = shape.config()
    params, tx = init_params(model, 0), optimizer.make(dataclasses.replace(PLAIN, optimizer=name))
    update = jax.jit(tx.update)
    apart, together = params, stack_blocks(params, model)
    states = tx.init(apart), tx.init(together)
    for _ in range(2):
        layer_scale = {path: 30.0 if "block_1" in path else 1.0 for path, _ in trees.flatten(params)}
        draw = lambda path, w, scale=layer_scale: jnp.asarray(rng.standard_normal(w.shape) * scale[path], jnp.float32)
        grads = trees.map_with_path(draw, params)
        first, state_apart = update(grads, states[0], apart)
        second, state_together = update(stack_blocks(grads, model), states[1], together)
        states = state_apart, state_together
        for (path, a), (_, b) in zip(trees.flatten(first), trees.flatten(unstack_blocks(second, model)), strict=True):
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5, err_msg=path)
        apart, together = optax.apply_updates(apart, first), optax.apply_updates(together, second)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_lies_on_the_mesh_like_the_weights(name):
    model = tiny.model()
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    params = stack_blocks(model.params, model.config)
    state = tiny.init_state(params, optimizer.make(dataclasses.replace(PLAIN, optimizer=name)), mesh)
    kernel = state.trainable["blocks_0"]["attention"]["query"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    moments = [leaf for path, leaf in trees.flatten(state.optimizer, inside=True) if "query/kernel" in path]
    alike = [leaf.sharding.spec for leaf in moments if leaf.shape == kernel.shape]
    assert alike
    assert set(alike) == {kernel.sharding.spec}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_float32_of_weights_in_bfloat16(name):
    params = {"block_0": {"attention": {"query": {"kernel": jnp.ones((4, 4), jnp.bfloat16)}}}}
    tx = optimizer.make(dataclasses.replace(PLAIN, optimizer=name))
    loss = lambda params, *_: (sum(jnp.sum(jnp.square(w.astype(jnp.float32))) for w in jax.tree.leaves(params)), {})
    dtypes = lambda tree: {leaf.dtype for leaf in jax.tree.leaves(tree) if leaf.ndim}
    state = tiny.init_state(params, tx, meshes.make_mesh())
    fresh = dtypes(state.optimizer)
    after, _ = make_step(loss, tx, 0, state)(state, {}, {})
    assert dtypes(after.trainable) == {jnp.dtype("bfloat16")}
    assert dtypes(after.optimizer) == fresh <= {jnp.dtype(kind) for kind in ("float32", "int8", "uint8")}
    assert jnp.dtype("float32") in fresh


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_stay_and_the_rest_moves_zeros_too(name, rng):
    """Of two zeros, the one that a mask drops stays, and the other moves like any weight."""
    path = "block_0/attention/query/kernel"
    kept = rng.integers(0, 2, (8, 8)).astype(bool)
    w = rng.standard_normal((8, 8)) * kept
    free = tuple(np.argwhere(kept)[0])
    w[free] = 0.0
    params, tx = float32({path: w}), optimizer.make(dataclasses.replace(PLAIN, optimizer=name))
    goal = jnp.asarray(rng.standard_normal((8, 8)), jnp.float32)
    loss = lambda params, *_: (jnp.sum(jnp.square(jax.tree.leaves(params)[0] - goal)), {})
    state = tiny.init_state(params, tx, meshes.make_mesh(), masks=ops.mask_tree(params, {path: jnp.asarray(kept)}))
    step = make_step(loss, tx, 0, state)
    for _ in range(3):
        state, _ = step(state, {}, {})
    for tree in (state.trainable, optimizer.evaluation_params(state.optimizer, state.trainable)):
        np.testing.assert_array_equal(np.asarray(jax.tree.leaves(tree)[0]) == 0, ~kept)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rate_may_be_an_input_of_the_compiled_step(name, rng):
    """One program for every learning rate, with the updates that a constant rate has."""
    params, grads = float32(random_tree(rng)), float32(random_tree(rng))
    settings = dataclasses.replace(PLAIN, optimizer=name, warmup=2, schedule="cosine")
    swept = optax.inject_hyperparams(lambda learning_rate: optimizer.make(settings, learning_rate))
    states = [swept(learning_rate=rate).init(params) for rate in (0.1, 0.003)]
    update = jax.jit(swept(learning_rate=7.0).update)
    for rate, state in zip((0.1, 0.003), states, strict=True):
        tx = optimizer.make(dataclasses.replace(settings, learning_rate=rate))
        constant, fixed = tx.init(params), jax.jit(tx.update)
        for _ in range(2):
            ours, state = update(grads, state, params)
            theirs, constant = fixed(grads, constant, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), ours, theirs)
    assert update._cache_size() == 1


def test_the_gradient_is_clipped_to_its_norm():
    settings = TrainConfig(steps=10, warmup=0, clip=1.0, optimizer="sgd")
    big, small = ({"kernel": jnp.full((2, 2), value)} for value in (100.0, 0.5))
    params = {"kernel": jnp.ones((2, 2))}
    tx = optimizer.make(settings)
    first = lambda grads: tx.update(grads, tx.init(params), params)[0]["kernel"]
    np.testing.assert_allclose(first(big), first(small), rtol=1e-5)  # both have norm 1 after clipping


def test_fit_returns_the_averaged_parameters():
    start = {"final_norm": {"scale": jnp.full(3, 2.0)}}
    batches = lambda step: {"inputs": np.zeros((8, 4), np.int32), "segments": np.ones((8, 4), np.int32)}
    quadratic = lambda trainable, *_: (jnp.sum(jnp.square(trainable["final_norm"]["scale"])), {})
    settings = TrainConfig(optimizer="schedule_free", steps=4, warmup=0, learning_rate=0.5, clip=1e9)
    tx = optimizer.make(settings)
    task = trainer.Task(train=settings, loss_fn=quadratic, start=tiny.copies(start), batches=batches)
    out = trainer.fit(task, mesh=meshes.make_mesh())
    y, state, iterates = start, tx.init(start), []
    for _ in range(4):
        updates, state = tx.update(jax.tree.map(lambda w: 2 * w, y), state, y)
        y = optax.apply_updates(y, updates)
        found = [n for n in jax.tree.leaves(state, is_leaf=_is_averaging) if _is_averaging(n)]
        iterates.append(np.asarray(found[0].z["final_norm"]["scale"]))
    np.testing.assert_allclose(
        out["final_norm"]["scale"], np.mean(iterates, axis=0), rtol=1e-4
    )  # equal rates: a plain mean
    assert not np.allclose(out["final_norm"]["scale"], y["final_norm"]["scale"], rtol=1e-3)


def _is_averaging(node):
    return isinstance(node, contrib.ScheduleFreeState)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "schedule_free"])
def test_other_rules_evaluate_what_they_train(name):
    params = {"scale": jnp.ones(3)}
    tx = optimizer.make(dataclasses.replace(PLAIN, optimizer=name))
    assert optimizer.evaluation_params(tx.init(params), params) is params


@pytest.mark.parametrize(
    ("name", "per_parameter"), [("sgd", 4), ("adam", 8), ("adamw", 8), ("lion", 4), ("schedule_free", 8)]
)
def test_state_bytes_are_those_of_the_moments(name, per_parameter):
    tx = optimizer.make(dataclasses.replace(PLAIN, optimizer=name))
    params = jax.eval_shape(lambda: init_params(tiny.LLAMA.config(), 0))
    np.testing.assert_allclose(optimizer.state_bytes(tx, params), per_parameter, rtol=1e-3)


# --- weight decay and schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_decay_spares_norms_biases_and_embeddings(name):
    params = tiny.model(tiny.CONFIGS[name]).params
    decayed = {path for path, decays in _flat_mask(params) if decays}
    kernels = {path for path, _ in trees.flatten(params) if path.endswith("/kernel")}
    assert decayed == kernels != set()


def _flat_mask(params):
    leaves, _ = jax.tree_util.tree_flatten_with_path(optimizer.decay_mask(params))
    return [("/".join(key.key for key in path), leaf) for path, leaf in leaves]


CORNERS = {  # rates after 0, 5, 10 (peak), 55 (halfway), 80 and 100 of 100 steps
    "cosine": [0.0, 1.0, 2.0, 0.2 + 1.8 * 0.5, 0.2 + 1.8 * (1 + np.cos(np.pi * 7 / 9)) / 2, 0.2],
    "linear": [0.0, 1.0, 2.0, 1.1, 2.0 - 1.8 * 7 / 9, 0.2],
    "wsd": [0.0, 1.0, 2.0, 2.0, 2.0, 0.2],
    "constant": [0.0, 1.0, 2.0, 2.0, 2.0, 2.0],
}


@pytest.mark.parametrize("name", typing.get_args(Schedule))
def test_schedules_at_their_corners(name):
    settings = TrainConfig(steps=100, warmup=10, learning_rate=2.0, final_fraction=0.1, schedule=name, decay=20)
    rate = optimizer.schedule(settings)
    np.testing.assert_allclose([rate(t) for t in (0, 5, 10, 55, 80, 100)], CORNERS[name], rtol=1e-6)
    if name == "wsd":
        np.testing.assert_allclose([rate(81), rate(90)], [2.0 - 1.8 / 20, 1.1], rtol=1e-6)
    assert optimizer.schedule(dataclasses.replace(settings, warmup=0))(0) == 2.0


@pytest.mark.parametrize("name", typing.get_args(Schedule))
@pytest.mark.parametrize("steps", [1, 2, 600])
def test_every_length_of_training_has_a_finite_schedule(name, steps):
    rate = optimizer.schedule(TrainConfig(steps=steps, schedule=name))
    assert np.all(np.isfinite([rate(t) for t in (0, 1, steps)]))


@pytest.mark.parametrize(("steps", "warmup"), [(600, 40), (200, 20), (5, 0)])
def test_warm_up_is_a_tenth_unless_said_otherwise(steps, warmup):
    assert TrainConfig(steps=steps).warmup_steps == warmup
    assert TrainConfig(steps=steps, warmup=3).warmup_steps == 3
