"""Families of models against transformers, and Hugging Face directories back and forth."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import tokenizer
from efflm.formats import huggingface
from efflm.infer.generate import forward
from efflm.model import empty_cache
from tests import tiny

GOLDENS = Path(__file__).parent / "goldens"
NAMES = sorted(path.stem for path in GOLDENS.glob("*.npz"))
TOKENIZER = tokenizer.train(["the cat sat on the mat\n" * 9], 300)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers_at_once_and_token_by_token(name):
    model, golden = huggingface.load_weights(GOLDENS / name), np.load(GOLDENS / f"{name}.npz")
    tokens, expected = golden["tokens"], golden["logits"]
    np.testing.assert_allclose(tiny.logits(model, tokens), expected, atol=1e-4)
    step = jax.jit(lambda model, tokens, cache: forward(model, tokens, cache=cache))
    first, cache = step(model, tokens[:, :3], empty_cache(model.config, 2, 48))
    steps = [first]
    for t in range(3, tokens.shape[1]):
        logits, cache = step(model, tokens[:, t : t + 1], cache)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), expected, atol=1e-4)
