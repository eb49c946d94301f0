import math

import jax
import numpy as np
import pytest

from efflm import trees
from efflm.model import init_params, params
from tests import tiny


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_table_is_what_a_fresh_model_has(name):
    config = tiny.FAMILIES[name]
    fresh = dict(trees.flatten(init_params(config, 0)))
    table = params.table(config)
    assert {path: w.shape for path, w in fresh.items()} == {path: param.shape for path, param in table.items()}
    for path, w in fresh.items():
        param, values = table[path], np.asarray(w)
        if param.init in ("ones", "zeros"):
            assert np.all(values == (param.init == "ones")), path
        else:
            expected = 0.02 / math.sqrt(2 * len(config.blocks)) if param.init == "residual" else 0.02
            assert values.std() == pytest.approx(expected, rel=0.1), path


def test_axes_say_what_is_summed_over():
    """A layer's matrix sums over its inputs, its first axis; the row of a table comes back whole."""
    table = params.table(tiny.CONFIGS["gpt2"])
    for path, param in table.items():
        if param.is_matrix:
            summed = param.axes[param.contracted]
            wanted = "width" if "embedding" in path else {"output": "heads", "down": "mlp"}.get(path.split("/")[-2])
            assert summed == (wanted or "width"), path


@pytest.mark.parametrize(
    ("path", "weight", "rest"),
    [
        ("embedding", "embedding", ""),
        ("block_12/attention/query/kernel", "block/attention/query/kernel", ""),
        ("blocks_0/feedforward/down/kernel", "block/feedforward/down/kernel", ""),
        ("optimizer/1/0/mu/block_0/attention/key/kernel/scale", "block/attention/key/kernel", "scale"),
        ("masks/block_3/attention/output/kernel", "block/attention/output/kernel", ""),
        ("trainable/position_embedding/values", "position_embedding", "values"),
        ("block_1/attention_norm/scale", "block/attention_norm/scale", ""),
        ("final_norm/bias", "final_norm/bias", ""),
    ],
)
def test_a_weight_is_found_in_longer_paths(path, weight, rest):
    assert params.find(path) == (params.WEIGHTS[weight], rest)


@pytest.mark.parametrize(
    "path", ["block_0/mystery", "kernel", "attention/query/kernel", "blocky/attention/query/kernel"]
)
def test_what_is_no_weight_is_not_found(path):
    assert params.find(path) == (None, "")


def test_only_whole_paths_of_matrices_in_layers_are_pruned_and_decayed():
    assert params.in_layer("block_0/feedforward/up/kernel")
    for path in ("block_0/feedforward/up/kernel/scale", "block_0/feedforward/up/bias", "unembedding", "embedding"):
        assert not params.in_layer(path)
    assert params.is_matrix("unembedding")
    assert not params.is_matrix("block_0/attention_norm/scale")


def test_what_is_trained_beside_the_weights_is_no_weight():
    param, _ = params.find("optimizer/mu/hidden_projection/block_3")
    assert param == params.BESIDE["hidden_projection"]
    path = "hidden_projection/block_3"
    assert not params.in_layer(path)
    assert not params.is_matrix(path)
    assert not any("hidden_projection" in path for path in params.table(tiny.CONFIGS["llama"]))


def test_abstract_and_real_weights_have_the_same_paths():
    config = tiny.CONFIGS["llama"]
    abstract = jax.eval_shape(lambda: init_params(config, 0))
    assert [path for path, _ in trees.flatten(abstract)] == sorted(params.table(config))
