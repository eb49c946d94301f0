import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import trees
from efflm.config.model import BlockConfig, ModelConfig
from efflm.model import (
    LanguageModel,
    Transformer,
    empty_cache,
    final_states_and_gathered,
    init_params,
    layerwise,
    stack_blocks,
    unstack_blocks,
)
from efflm.precision import Policy
from tests import reference, tiny


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_forward_equals_the_float64_reference(name):
    model = tiny.model(tiny.FAMILIES[name])
    tokens = tiny.tokens(model.config, 2, 9)
    expected = np.stack([reference.forward(model.config, model.params, row) for row in tokens])
    np.testing.assert_allclose(tiny.logits(model, tokens), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_position_sees_only_what_is_before_it(name):
    model = tiny.model(tiny.FAMILIES[name])
    tokens = tiny.tokens(model.config, 1, 12)
    changed = tokens.copy()
    changed[0, 7] = (changed[0, 7] + 1) % model.config.vocabulary
    before, after = tiny.logits(model, tokens), tiny.logits(model, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.all(np.any(np.asarray(before[:, 7:]) != np.asarray(after[:, 7:]), axis=-1))


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_cached_decode_equals_full_forward(name):
    model = tiny.model(tiny.FAMILIES[name])
    tokens = tiny.tokens(model.config, 3, 14)
    full = tiny.logits(model, tokens)
    apply = jax.jit(
        lambda tokens, cache: Transformer(model.config).apply({"params": model.params}, tokens, cache=cache)
    )
    prompt, cache = apply(tokens[:, :6], empty_cache(model.config, 3, 20))
    steps = [prompt]
    for t in range(6, 14):
        step, cache = apply(tokens[:, t : t + 1], cache)
        steps.append(step)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), full, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(cache.length_B, [14, 14, 14])


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_packed_documents_do_not_see_each_other(name):
    model = tiny.model(tiny.FAMILIES[name])
    tokens = tiny.tokens(model.config, 1, 12)
    segments = np.repeat([[1, 2]], [5, 7], axis=1)
    positions = np.concatenate([np.arange(5), np.arange(7)])[None]
    packed = tiny.logits(model, tokens, segments=segments, positions=positions)
    alone = jnp.concatenate([tiny.logits(model, tokens[:, :5]), tiny.logits(model, tokens[:, 5:])], axis=1)
    np.testing.assert_allclose(packed, alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", tiny.and_combinations(tiny.FAMILIES, ["llama", "neox"]))
def test_scanned_layers_equal_looped_ones_gradients_included(name):
    model = tiny.model(tiny.FAMILIES[name])
    config, tokens = model.config, tiny.tokens(model.config, 2, 8)

    def loss(params, scanned):
        return jnp.mean(jnp.square(Transformer(config, scanned=scanned).apply({"params": params}, tokens)[0]))

    looped, looped_grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(model.params, False)
    scanned, scanned_grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(
        stack_blocks(model.params, config), True
    )
    np.testing.assert_allclose(scanned, looped, rtol=1e-6)
    scanned_grads = unstack_blocks(scanned_grads, config)
    for path, grad in trees.flatten(looped_grads):
        np.testing.assert_allclose(dict(trees.flatten(scanned_grads))[path], grad, rtol=1e-4, atol=1e-6, err_msg=path)


def test_stacking_and_unstacking_is_the_identity():
    model = tiny.model()
    back = unstack_blocks(stack_blocks(model.params, model.config), model.config)
    assert jax.tree.structure(back) == jax.tree.structure(model.params)
    jax.tree.map(np.testing.assert_array_equal, back, model.params)


def test_layers_of_different_shapes_run_and_are_scanned_by_runs_of_equal_ones():
    small = BlockConfig(heads=2, kv_heads=1, head_dim=8, mlp_dim=20)
    large = BlockConfig(heads=4, kv_heads=4, head_dim=4, mlp_dim=36)
    config = ModelConfig(vocabulary=50, width=16, max_length=32, blocks=(small, large, large, small))
    model = LanguageModel(config, init_params(config, 0))
    tokens = tiny.tokens(config, 1, 6)
    expected = reference.forward(config, model.params, tokens[0])
    np.testing.assert_allclose(tiny.logits(model, tokens)[0], expected, rtol=1e-4, atol=1e-5)
    stacked = stack_blocks(model.params, config)
    assert {name: len(stacked[name]["attention_norm"]["scale"]) for name in stacked if name.startswith("blocks")} == {
        "blocks_0": 1, "blocks_1": 2, "blocks_3": 1
    }  # fmt: skip
    scanned, _ = Transformer(config, scanned=True).apply({"params": stacked}, tokens)
    np.testing.assert_allclose(scanned[0], expected, rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked, config), model.params)


def test_a_weight_of_the_wrong_shape_is_named():
    model = tiny.model()
    model.params["block_1"]["feedforward"]["up"]["kernel"] = jnp.zeros((32, 47))
    with pytest.raises(Exception, match=r"(?s)up.*47"):
        tiny.logits(model, tiny.tokens(model.config, 1, 4))


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("name", ["llama", "neox"])
def test_the_outputs_of_layers_are_those_of_the_layers_one_at_a_time(name, remat):
    model = tiny.model(tiny.FAMILIES[name])
    batch = tiny.batch(model.config, rows=2)
    inputs = [batch[part] for part in ("positions", "segments")]
    transformer = Transformer(model.config, remat=remat)
    named = dict(zip(("positions", "segments"), inputs, strict=True))
    final_BTD, found = final_states_and_gathered(transformer, model.params, batch["inputs"], **named)
    assert found.probabilities == ()
    x_BTD, want = layerwise.embed(model, batch["inputs"], inputs[0]), []
    for i in range(len(model.config.blocks)):
        single = layerwise.block_config(model.config, i)
        x_BTD = layerwise.apply_block(single, model.params[f"block_{i}"], x_BTD, *inputs)
        want.append(x_BTD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found.outputs, tuple(want))
    alone, _ = transformer.apply({"params": model.params}, batch["inputs"], **named, method="final_states")
    np.testing.assert_array_equal(final_BTD, alone)


def test_bfloat16_policy_computes_in_bfloat16_and_returns_float32():
    model = tiny.model()
    tokens = tiny.tokens(model.config, 2, 8)
    apply = jax.jit(
        lambda policy: Transformer(model.config, policy).apply({"params": model.params}, tokens)[0], static_argnums=0
    )
    low, full = apply(Policy(compute="bfloat16")), apply(Policy())
    assert low.dtype == jnp.float32
    assert 0 < np.abs(low - full).max() < 0.05 * np.abs(full).max()
    program = str(
        jax.make_jaxpr(lambda p: Transformer(model.config, Policy(compute="bfloat16")).apply({"params": p}, tokens))(
            model.params
        )
    )
    products = [line for line in program.splitlines() if "dot_general[" in line]
    assert products
    assert all("bf16" not in line.split("=")[0] for line in products), "products accumulate in float32"
