"""Closed-form FLOPs against a walk over jaxprs; bytes against arrays."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import ops, trees
from efflm.config.model import BlockConfig
from efflm.config.train import TrainConfig
from efflm.infer import generate
from efflm.infer.sampling import GREEDY
from efflm.model import LanguageModel, empty_cache, init_params
from efflm.model.params import table
from efflm.parallel import meshes
from efflm.plan import work
from efflm.precision import POLICIES
from efflm.train import aot
from tests import tiny
from tests.flops import matrix_flops

LONG = 1300  # positions, enough for attention to loop over blocks
UNEQUAL = dataclasses.replace(
    tiny.LLAMA.config(),
    blocks=(
        BlockConfig(heads=4, kv_heads=2, head_dim=8, mlp_dim=48),
        BlockConfig(heads=2, kv_heads=1, head_dim=8, mlp_dim=96, window=16),
    ),
)
CONFIGS = {
    **tiny.FAMILIES,
    "windowed": dataclasses.replace(tiny.LLAMA, window=24, kv_heads=1).config(),
    "unequal": UNEQUAL,
}


def abstract_model(config):
    return LanguageModel(config, jax.eval_shape(lambda: init_params(config, 0)))


def ids(batch, length):
    return jax.ShapeDtypeStruct((batch, length), jnp.int32)


def training_step(config, train):
    """For one device."""
    return aot.training_step(config, train, meshes.make_mesh())


# --- parameters, and what is held between steps ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_fresh_parameters(name):
    config = CONFIGS[name]
    params = abstract_model(config).params
    shapes = {path: param.shape for path, param in table(config).items()}
    assert shapes == {path: leaf.shape for path, leaf in trees.flatten(params)}
    counts = work.parameters(config)
    assert sum(counts.values()) == trees.count(params)
    patterns = {
        "projections": r"/attention/\w+/(kernel|bias)$",
        "feedforward": "/feedforward/",
        "norms": "norm/",
        "output": "^unembedding",
    }
    for component, pattern in patterns.items():
        assert counts[component] == sum(leaf.size for _, leaf in trees.select(params, pattern)), component
    assert work.weight_bytes(config) == trees.nbytes(params)
    assert work.weight_bytes(config, POLICIES["bfloat16_pure"]) == trees.nbytes(params) // 2


def test_cache_bytes_are_those_of_an_empty_cache():
    for policy in (POLICIES["float32"], POLICIES["bfloat16"]):
        cache = jax.eval_shape(lambda policy=policy: empty_cache(UNEQUAL, 3, 40, policy.compute))
        assert work.kv_cache_bytes(UNEQUAL, 3, 40, policy) == trees.nbytes(cache.layers)
    moved = lambda cache_length: work.total(work.decode(UNEQUAL, 3, cache_length)).nbytes
    assert moved(50) - moved(10) == work.kv_cache_bytes(UNEQUAL, 3, 40)


# --- FLOPs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "window"), [(1, 0), (7, 0), (7, 3), (5, 9), (64, 64)])
def test_seen_pairs_are_those_of_the_causal_mask(length, window):
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    seen = (key <= query) & (key > query - (window or length))
    assert work.seen_pairs(length, window) == seen.sum()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("length", [1, 50, 200])
def test_forward_and_train_flops_count_what_queries_see(name, length):
    config = CONFIGS[name]
    counted = matrix_flops(
        lambda model, tokens: generate.forward(model, tokens)[0], abstract_model(config), ids(2, length)
    )
    unseen = sum(
        2 * 4 * block.heads * block.head_dim
        * (work.computed_pairs(length, length, block.window) - work.seen_pairs(length, block.window))
        for block in config.blocks
    )  # fmt: skip
    unseen += sum(  # experts compute every token, those that it is not given to as well
        2 * 2 * length * 3 * config.width * block.mlp_dim * (block.experts - block.experts_per_token)
        for block in config.blocks
    )
    assert work.total(work.forward(config, 2, length)).flops == pytest.approx(counted - unseen, rel=0.01)
    assert work.train_flops(config, 2, length) == pytest.approx(3 * (counted - unseen), rel=0.01)
    token_by_token = sum(work.total(work.token(config, seen + 1)).flops for seen in range(length))
    assert token_by_token == pytest.approx((counted - unseen) / 2, rel=0.01)


TRAINED = [
    ("llama", {}),
    ("llama", {"remat": "dots", "length": 100}),
    ("llama", {"remat": "full", "scan": True, "batch": 1, "length": 77}),
    ("gpt2", {"remat": "full", "policy": "bfloat16"}),
    ("gpt2", {"remat": "dots", "scan": True, "length": 300}),
    ("untied", {"accumulate": 4, "length": 300, "batch": 8}),
    ("untied", {"optimizer": "muon", "remat": "full", "batch": 1, "length": 8}),
    ("windowed", {"length": 1000, "batch": 2}),
    ("windowed", {"length": LONG, "batch": 1, "remat": "full"}),
    ("llama", {"length": LONG, "batch": 1, "scan": True, "remat": "dots"}),
    ("unequal", {"accumulate": 2, "optimizer": "muon"}),
]


@pytest.mark.parametrize(("name", "settings"), TRAINED)
def test_train_step_multiplies_what_the_jaxpr_does(name, settings):
    config, train = CONFIGS[name], TrainConfig(**{"batch": 4, "length": 256} | settings)
    step, args = training_step(config, train)
    found = work.total(work.train_step(config, train, train.batch, train.length))
    found += work.update(config, train, 0)
    assert found.flops == pytest.approx(matrix_flops(step, *args), rel=0.01)


@pytest.mark.parametrize("length", [256, LONG])
def test_rematerialization_adds_at_most_a_third_of_the_flops(length):
    config = dataclasses.replace(tiny.LLAMA, width=128, heads=4, kv_heads=4, mlp_dim=352).config()

    def counted(remat):
        step, args = training_step(config, TrainConfig(batch=1, length=length, remat=remat))
        return matrix_flops(step, *args)

    nothing_stored, products_stored, all_stored = counted("full"), counted("dots"), counted("none")
    assert all_stored < products_stored < nothing_stored <= 1.35 * all_stored


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("length", "cache_length"), [(40, 40), (40, 64), (200, 900)])
def test_prefill_and_decode_multiply_what_the_jaxpr_does(name, length, cache_length):
    config = dataclasses.replace(CONFIGS[name], max_length=1024)
    model = abstract_model(config)
    prefill = lambda model, tokens, lengths: generate.prefill(model, tokens, lengths, cache_length=cache_length)
    counted = matrix_flops(prefill, model, ids(3, length), jax.ShapeDtypeStruct((3,), jnp.int32))
    assert work.total(work.prefill(config, 3, length, cache_length=cache_length)).flops == pytest.approx(
        counted, rel=0.01
    )
    cache = jax.eval_shape(lambda: empty_cache(config, 3, cache_length))
    zeros, keys = np.zeros(3, np.int32), generate.row_keys(0, 3)
    state = lambda cache: generate.State(cache, jnp.asarray(zeros), jnp.zeros(3, bool), keys)
    step = lambda model, cache: generate.step(model, state(cache), GREEDY.arrays(), zeros)
    assert work.total(work.decode(config, 3, cache_length)).flops == pytest.approx(
        matrix_flops(step, model, cache), rel=0.01
    )


@pytest.mark.parametrize(
    ("length", "cache_length", "window"), [(LONG, LONG, 0), (LONG, LONG, 200), (700, 2000, 0), (700, 2000, 600)]
)
def test_loops_of_attention_multiply_the_predicted_pairs(length, cache_length, window):
    """Two matmuls a block forward and five backward, as often as the loops' own bounds say."""
    slots = None if length == cache_length else jnp.arange(length, dtype=jnp.int32)[None]
    q, k = jnp.ones((1, length, 2, 4)), jnp.ones((1, cache_length, 1, 4))
    attend = lambda q, k, v: jnp.sum(ops.attention(q, k, v, slots_BT=slots, window=window))
    forward, both = matrix_flops(attend, q, k, k), matrix_flops(jax.grad(attend, argnums=(0, 1, 2)), q, k, k)
    of_matmul = 2 * 2 * 4 * work.computed_pairs(length, cache_length, window, in_order=slots is None)
    assert (forward, both) == (2 * of_matmul, 7 * of_matmul)


def test_the_count_follows_loops_whose_trips_are_data():
    """Of the oracle itself: scans, and loops that run as often as an array says, one in the other."""
    x = jnp.ones((4, 4))

    def fn(bounds):
        inner = lambda y, n: jax.lax.fori_loop(0, n, lambda _, y: y @ x, y)
        twice = lambda y, n: (jax.jit(inner)(inner(y, n), n + 1), None)
        return jax.lax.scan(twice, x, bounds)[0] @ x

    assert matrix_flops(lambda: fn(jnp.asarray([3, 0, 5]))) == 2 * 4**3 * (3 + 4 + 0 + 1 + 5 + 6 + 1)


def test_attention_overtakes_the_feedforward_part_at_the_crossover():
    for config in (CONFIGS["llama"], CONFIGS["gpt2"], dataclasses.replace(UNEQUAL, width=8)):
        at = work.crossover_length(config)
        found = work.token(config, at)
        assert found["attention"].flops == pytest.approx(found["feedforward"].flops)
        longer = work.token(config, at + 1)
        assert longer["attention"].flops > longer["feedforward"].flops
    windowed = dataclasses.replace(tiny.LLAMA, window=4).config()
    assert work.crossover_length(windowed) == math.inf
    found = work.token(windowed, 10**6)
    assert found["attention"].flops < found["feedforward"].flops
