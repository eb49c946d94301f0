import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm import trees
from efflm.compress import recipe
from efflm.compress.finetune import Finetune
from efflm.compress.quantize import Cast, Quantize, quantize
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.infer.generate import prefill
from efflm.model import LanguageModel
from efflm.ops import QArray
from efflm.parallel import meshes
from tests import tiny

CONTEXT = Context(mesh=meshes.make_mesh())


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_every_matrix_is_int8_and_nothing_else(name):
    params = quantize(tiny.model(tiny.CONFIGS[name]).params)
    for path, leaf in trees.flatten(params):
        matrix = len(leaf.shape) == 2
        assert isinstance(leaf, QArray) == matrix, path
        if matrix:
            row_wise = path in ("embedding", "position_embedding")
            assert leaf.scale.shape == ((leaf.shape[0], 1) if row_wise else (1, leaf.shape[1]))


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_logits_stay_near(activations):
    model = tiny.model()
    tokens = jnp.asarray(tiny.tokens(model.config, 2, 8))
    after, record = Quantize(activations=activations)(model, CONTEXT)
    full, low = tiny.logits(model, tokens), tiny.logits(after, tokens)
    assert 0 < np.abs(full - low).max() < 0.08 * np.abs(full).max()
    assert record.predicted_bytes < 0.4 * trees.nbytes(model.params)
    assert len(record.leaves) == 7 * 2 + 1


def _s8_dots(program: str) -> int:
    return len(re.findall(r"= s32\[[\d,]*\]\S* dot\(", program))


def test_compiled_w8a8_prefill_multiplies_int8_into_int32():
    model = tiny.model()
    tokens = jnp.asarray(tiny.tokens(model.config, 4, 16))
    compiled = lambda activations: (
        prefill.lower(
            LanguageModel(model.config, quantize(model.params, activations)), tokens, jnp.full(4, 16), cache_length=16
        )
        .compile()
        .as_text()
    )
    program = compiled("int8")
    assert _s8_dots(program) >= 7 * 2
    for line in program.splitlines():
        if re.search(r"= s32\[[\d,]*\]\S* dot\(", line):
            names = re.search(r"dot\(([^)]*)\)", line).group(1).split(", ")
            for name in names:
                name = name.split()[-1]
                assert re.search(rf"{re.escape(name)}( = |: )s8\[", program) or "s8[" in line, line
    assert _s8_dots(compiled("float")) == 0


def test_quantized_cached_decode_equals_full_forward():
    model = tiny.model()
    after, _ = Quantize()(model, CONTEXT)
    tokens = jnp.asarray(tiny.tokens(model.config, 1, 7))
    full = tiny.logits(after, tokens)
    logits, cache = prefill(after, tokens[:, :6], jnp.array([6]), cache_length=8)
    np.testing.assert_allclose(logits, full[:, 5], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tiny.logits(after, tokens[:, 6:], cache=cache), full[:, 6:], rtol=1e-4, atol=1e-5)


def test_cast_halves_the_bytes_and_doing_nothing_is_an_error():
    model = tiny.model()
    half, _ = Cast()(model, CONTEXT)
    assert trees.nbytes(half.params) * 2 == trees.nbytes(model.params)
    with pytest.raises(InputError, match="changed nothing"):
        Cast()(half, CONTEXT)
    eight, _ = Quantize()(model, CONTEXT)
    with pytest.raises(InputError, match="changed nothing"):
        Quantize()(eight, CONTEXT)


def test_training_with_rounded_activations_beats_rounding_after_training():
    """Sure predictions that int8 activations lose: only a training that sees the rounding has something to learn.

    The targets are the float model's own predictions. One channel of the final norm's output is 300 times the others,
    so that these keep little in int8; the output layer does not read that channel: the float model does not need it.
    """
    model = tiny.model(dataclasses.replace(tiny.UNTIED, layers=1))
    outlier = np.arange(model.config.width) == 3
    norm = model.params["final_norm"]
    norm["scale"] = norm["scale"] * np.where(outlier, 300, 1).astype(np.float32)
    model.params["unembedding"] = model.params["unembedding"] * np.where(outlier, 0, 30).astype(np.float32)[:, None]
    batch = tiny.batch(model.config, rows=4)
    inputs = {name: batch[name] for name in ("segments", "positions")}
    batch["targets"] = np.argmax(tiny.logits(model, batch["inputs"], **inputs), axis=-1).astype(np.int32)
    context = Context(mesh=meshes.make_mesh(), batches=lambda step: batch)
    w8a8, w8a16, train = Quantize(activations="int8"), Quantize(), Finetune(steps=20, learning_rate=3e-3)

    def loss(*steps) -> float:
        log_probabilities = jax.nn.log_softmax(
            tiny.logits(recipe.apply(model, steps, context)[0], batch["inputs"], **inputs)
        )
        nll = -np.take_along_axis(np.asarray(log_probabilities), batch["targets"][..., None], axis=-1)[..., 0]
        return float(np.mean(nll[batch["segments"] > 0]))

    assert loss(w8a8, train) < 0.5
    assert loss(train, w8a8) > 1  # rounded after plain training
    assert loss(w8a16, train, w8a8) > 1  # training saw the rounded weights alone
