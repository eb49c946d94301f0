import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm.compress.quantize import quantize
from efflm.config import InputError
from efflm.infer.generate import generate, sample
from efflm.model import LanguageModel
from efflm.precision import cast
from tests import tiny


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_greedy_equals_the_argmax_of_full_forwards(name):
    model = tiny.model(tiny.CONFIGS[name])
    tokens = np.zeros((2, 11), np.int32)  # what is not written yet is never looked at
    tokens[:, :5] = tiny.tokens(model.config, 2, 5)
    out = np.asarray(generate(model, jnp.asarray(tokens[:, :5]), 6))
    for t in range(5, 11):
        tokens[:, t] = np.argmax(tiny.logits(model, jnp.asarray(tokens))[:, t - 1], axis=-1)
    np.testing.assert_array_equal(out, tokens[:, 5:])


def test_more_positions_than_were_learned_are_refused():
    with pytest.raises(InputError, match="65 positions asked of a model that learned 64"):
        generate(tiny.model(tiny.GPT2), jnp.zeros((1, 60), jnp.int32), 5)
    assert generate(tiny.model(), jnp.zeros((1, 60), jnp.int32), 5).shape == (1, 5)  # rotary ones go on


@pytest.mark.parametrize("format", ["bfloat16", "float", "int8"])
def test_compressed_models_generate(format):
    model = tiny.model()
    params = cast(model.params, format) if format == "bfloat16" else quantize(model.params, format)
    out = generate(LanguageModel(model.config, params), jnp.zeros((1, 3), jnp.int32), 4)
    assert out.shape == (1, 4)
    assert out.max() < model.config.vocabulary


def test_sampling_follows_the_temperature():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    draw = jax.vmap(lambda key, t: sample(logits, t, key)[0], in_axes=(0, None))
    keys = jax.random.split(jax.random.key(0), 4000)
    share = lambda t: np.bincount(draw(keys, jnp.float32(t)), minlength=3) / 4000
    np.testing.assert_array_equal(share(0.0), [1, 0, 0])
    np.testing.assert_allclose(share(1.0), [0.7, 0.2, 0.1], atol=0.03)
    squared = np.array([0.49, 0.04, 0.01]) / 0.54
    np.testing.assert_allclose(share(0.5), squared, atol=0.03)
