"""Any two steps, one after the other, keep what every step keeps: zeros, predicted bytes, the logits of what is saved,
and the same result on several devices."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies

from efflm import ops, trees
from efflm.compress import grammar, recipe
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.formats import efflm_file
from efflm.model import placement
from efflm.parallel import meshes, sharding
from tests import tiny

CONFIG = tiny.LLAMA.config()
# A step of every kind, in the grammar of chains. One more method is one more entry.
STEPS = {
    "cast": "cast@bfloat16",
    "int8": "quantize[activations=int8]",
    "int4": "quantize[bits=4,group=8,embeddings=0]",
    "gptq": "gptq@3[group=8]",
    "tuned": "tuned@4[group=8,steps=1]",
    "mixed": "mixed@4[rows=2,groups=32]",
    "qat": "qat@4[group=8,steps=1]",
    "awq": "awq@4[group=8]",
    "smoothquant": "smoothquant",
    "rotate": "rotate",
    "magnitude": "magnitude@0.7",
    "wanda": "wanda@2:4",
    "sparsegpt": "sparsegpt@0.6",
    "gradual": "gradual@0.5[steps=3,every=1]",
    "width": "width@0.18",  # to 40 channels, which 2:4 divides
    "depth": "depth[layers=1]",
    "distill": "distill[steps=1]",
    "finetune": "finetune[steps=1]",
    "adapt": "adapt[rank=2,steps=2,learning_rate=0.1,merge=true]",
    "generated": "generated[steps=1,by=teacher,prompt=4,new=4]",
}
STEPS = {name: grammar.chain(text)[0] for name, text in STEPS.items()}
ROUNDS = ("int8", "int4", "gptq", "tuned", "mixed", "qat", "awq")
PRUNES = ("magnitude", "wanda", "sparsegpt", "gradual")
TOKENS = tiny.tokens(CONFIG, 2, 8)


def context(mesh):
    return Context(mesh=mesh, batches=lambda step: tiny.batch(CONFIG, seed=step), calibration=tiny.batch(CONFIG))


def refused(first: str, second: str) -> str:
    """Part of the error with which a step refuses what another one made; empty: it does not."""
    if first in ROUNDS and second in ("awq", "smoothquant", "rotate"):
        return "is quantized already"
    if first in PRUNES and second == "rotate":
        return "the model is pruned already"
    nothing = (first in ROUNDS[2:] and second == "int4") or (first, second) == ("magnitude", "sparsegpt")
    return "changed nothing" if nothing else ""


def keeps_what_every_step_keeps(first, second, folder):
    model, steps, message = tiny.model(), (STEPS[first], STEPS[second]), refused(first, second)
    if message:
        with pytest.raises(InputError, match=message):
            recipe.apply(model, steps, context(meshes.make_mesh()))
        return
    before, _ = recipe.apply(model, steps[:1], context(meshes.make_mesh()))
    after, (*_, record) = recipe.apply(model, steps, context(meshes.make_mesh()))

    params = dict(trees.flatten(after.params))
    assert (after.masks or {}).keys() >= (before.masks or {}).keys() & params.keys()
    for path, mask in (after.masks or {}).items():
        assert not np.any(np.asarray(ops.dequantize(params[path]), np.float32)[~np.asarray(mask)]), path

    file = folder / f"{first}_{second}.safetensors"
    size = efflm_file.save(file, after, {}, [record])
    assert record.predicted_bytes == pytest.approx(size, rel=0.01, abs=65536)
    assert record.predicted_bytes == ops.stored_nbytes(after.params, after.masks)
    logits = np.asarray(tiny.logits(after, TOKENS), np.float32)
    np.testing.assert_array_equal(np.asarray(tiny.logits(efflm_file.load(file)[0], TOKENS), np.float32), logits)

    mesh = meshes.make_mesh(data=2)
    spread = model.replace(params=jax.device_put(model.params, placement.shardings(model.params, mesh)))
    other, _ = recipe.apply(spread, steps, context(mesh))
    assert other.config == after.config
    gap = np.asarray(tiny.logits(sharding.on_one_device(other), TOKENS), np.float32) - logits
    rounds = first in ROUNDS or second in ROUNDS or "cast" in (first, second)
    assert np.abs(gap).max() < (0.1 if rounds else 1e-3) * np.abs(logits).max()  # a code may fall to either side


def test_every_step_has_an_entry():
    assert {*map(type, STEPS.values())} == {*recipe.STEPS.values()} - {
        recipe.STEPS[name]
        for name in ("correct", "merge")  # which make and need adapters
    }


# A pair with itself is left out: a step that changes nothing more is refused.
PAIRS = [(first, second) for first in STEPS for second in STEPS if first != second]


@hypothesis.given(strategies.sampled_from(PAIRS))
@hypothesis.settings(max_examples=3, suppress_health_check=list(hypothesis.HealthCheck))
def test_two_steps_keep_what_every_step_keeps(tmp_path_factory, pair):
    keeps_what_every_step_keeps(*pair, tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("pair", [tiny.combination(pair) for pair in PAIRS], ids="_".join)
def test_every_two_steps_keep_what_every_step_keeps(tmp_path, pair):
    keeps_what_every_step_keeps(*pair, tmp_path)
