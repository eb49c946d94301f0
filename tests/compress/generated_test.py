import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm.compress.generated import Generated, continued
from efflm.compress.magnitude import Magnitude
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.infer.generate import generate
from efflm.parallel import meshes
from efflm.train import losses
from tests import tiny

SHAPE = dataclasses.replace(tiny.LLAMA, layers=1)
STEP = Generated(steps=1, learning_rate=1e-2, prompt=6, new=5)


def batch_of():
    """Rows whose first documents have 4, 8 and 16 tokens, and a row of padding."""
    batch = tiny.batch(SHAPE.config(), rows=4)
    lengths = (4, 8, 16, 0)
    batch["segments"] = np.stack([np.where(np.arange(16) < n, 1, 2) for n in lengths]).astype(np.int32)
    batch["segments"][3] = 0
    return batch


def context(mesh=None, **rest):
    given = {
        "mesh": mesh or meshes.make_mesh(),
        "teacher": tiny.model(SHAPE, seed=2),
        "batches": lambda step: tiny.batch(SHAPE.config()),
    }
    return Context(**(given | rest))


def test_rows_are_gone_on_with_as_generation_would():
    model, batch = tiny.model(SHAPE), batch_of()
    made = jax.jit(continued, static_argnums=(3, 4, 5))(model, batch, jax.random.split(jax.random.key(0), 4), 6, 5, 0.0)
    made = jax.device_get(made)
    assert made["inputs"].shape == (4, 10)
    for row, length in enumerate((4, 6, 6)):
        prompt = batch["inputs"][row, :length].tolist()
        (ids,) = generate(model, [prompt], 5)
        assert made["inputs"][row, : length + 4].tolist() == prompt + ids[:4]
        where = made["weights"][row] > 0
        assert made["targets"][row][where].tolist() == ids
        assert where.tolist() == [length - 1 <= t < length + 4 for t in range(10)]
        assert made["segments"][row].tolist() == [int(t < length + 4) for t in range(10)]
    assert not made["weights"][3].any()
    assert made["positions"][0].tolist() == list(range(10))


@pytest.mark.parametrize("by", ["student", "teacher"])
def test_the_gradient_is_that_of_the_loss_on_the_tokens_written(by):
    student, teacher, batch = tiny.model(SHAPE, seed=1), tiny.model(SHAPE, seed=2), batch_of()
    step, rng = dataclasses.replace(STEP, by=by), jax.random.key(3)
    keys = jax.random.split(rng, 5)[1:]
    made = continued(student if by == "student" else teacher, batch, keys, 6, 5, 1.0)
    of = lambda loss, batch: jax.jit(jax.value_and_grad(lambda params: loss(params, teacher.params, batch, rng)[0]))(
        student.params
    )
    got = of(step.objective(student, teacher)[0], batch)
    models = losses.Transformer(student.config), losses.Transformer(teacher.config)
    fixed = losses.distillation_loss(*models, temperature=1.0, weight=1.0, divergence="reverse")
    text = losses.language_model_loss(student.config)
    want = of(fixed if by == "student" else (lambda params, frozen, batch, rng: text(params, {}, batch, rng)), made)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), got, want)


def test_part_of_the_steps_read_the_text_itself(tmp_path):
    file = tmp_path / "metrics.jsonl"
    Generated(steps=40, learning_rate=1e-9, prompt=6, new=5, share=0.5)(
        tiny.model(SHAPE, seed=1), context(metrics=file)
    )
    read = [json.loads(line)["weight"] for line in file.read_text().splitlines()]
    text = losses.target_weights({name: jnp.asarray(x[:, :10]) for name, x in tiny.batch(SHAPE.config()).items()}).sum()
    assert set(read) == {8 * 5, float(text)}


@pytest.mark.parametrize(("by", "temperature"), [("student", 1.0), ("teacher", 0.0)])
def test_a_pruned_and_rounded_student_learns_to_write_like_its_teacher(by, temperature):
    student, teacher = Magnitude(sparsity=0.5)(tiny.model(SHAPE, seed=1), context())[0], tiny.model(SHAPE, seed=2)
    student = Quantize(activations="int8")(student, context())[0]
    step = dataclasses.replace(STEP, steps=30, by=by, temperature=temperature)
    after, record = step(student, context(seed=1))
    keys = jax.random.split(jax.random.key(9), 8)
    written = continued(teacher, tiny.batch(SHAPE.config()), keys, 6, 5, temperature)
    nats = jax.jit(lambda params: losses.language_model_loss(student.config)(params, {}, written, None)[0])
    assert nats(after.params) < nats(student.params) - 0.05
    assert jax.tree.structure(after.params) == jax.tree.structure(student.params)
    assert record.settings["by"] == by
    again, same = (dataclasses.replace(step, steps=2)(student, context(seed=1))[0] for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, again.params, same.params)


def test_on_two_devices_as_on_one():
    student = tiny.model(SHAPE, seed=1)
    step = dataclasses.replace(STEP, steps=2, temperature=0.0)
    one, two = (step(student, context(mesh))[0].params for mesh in (meshes.make_mesh(), meshes.make_mesh(data=2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, two)


def test_what_cannot_be_is_refused():
    for fields, words in (
        ({"by": "both"}, "by is 'both': choose from student, teacher"),
        ({"share": 0}, "share is 0"),
        ({"new": 0}, "new is 0"),
        ({"divergence": "kl"}, "divergence is 'kl'"),
    ):
        with pytest.raises(InputError, match=words):
            Generated(**fields)
    model = tiny.model(SHAPE)
    with pytest.raises(InputError, match="together 84 tokens, but the models read at most 64: shorten one of them"):
        Generated(prompt=80, new=4)(model, context())
    with pytest.raises(InputError, match=r"set mesh\.sequence to 1"):
        STEP(model, context(meshes.make_mesh(sequence=2)))
