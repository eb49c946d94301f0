import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efflm import ops, trees
from efflm.compress import training
from efflm.compress.distill import Distill, layer_map, mixtures, projections
from efflm.compress.magnitude import Magnitude
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.model import LanguageModel, Transformer, final_states_and_gathered, init_params, placement
from efflm.model.params import HIDDEN_PROJECTION
from efflm.parallel import meshes
from efflm.train import losses
from efflm.train.losses import distillation_loss, target_weights
from efflm.train.step import make_step, place
from tests import tiny
from tests.ops import divergences_test
from tests.ops.distillation_test import from_logits
from tests.programs import largest_array

STUDENT = dataclasses.replace(tiny.LLAMA, layers=1)
TEACHER = dataclasses.replace(tiny.UNTIED, layers=1, width=24)
HOW = {"temperature": 2.0, "weight": 0.7}
MIXED = {"data": 2, "sequence": 2, "tensor": 2}


def expected(params, teacher_params, batch):
    """The loss and its parts from both models' logits: what the chunked one must equal."""
    inputs = {name: batch[name] for name in ("segments", "positions")}
    student, teacher = LanguageModel(STUDENT.config(), params), LanguageModel(TEACHER.config(), teacher_params)
    student_BTV, teacher_BTV = (tiny.logits(model, batch["inputs"], **inputs) for model in (student, teacher))
    weights_BT = target_weights(batch)
    parts = from_logits(student_BTV, teacher_BTV, batch["targets"], temperature=2.0)
    kl, nll = (jnp.sum(values_BT * weights_BT) / jnp.sum(weights_BT) for values_BT in parts)
    return 0.7 * kl + 0.3 * nll, {"divergence": kl, "cross_entropy": nll, "weight": jnp.sum(weights_BT)}


def chunked():
    return distillation_loss(Transformer(STUDENT.config()), Transformer(TEACHER.config()), **HOW)


@pytest.fixture(scope="module")
def example():
    """Params of both models, and a batch with padding and with targets of unequal weight."""
    batch = tiny.batch(STUDENT.config())
    batch["weights"] = np.random.default_rng(0).random(batch["targets"].shape).astype(np.float32)
    return tiny.model(STUDENT, seed=1).params, tiny.model(TEACHER, seed=2).params, batch


def test_the_loss_and_its_gradients_equal_those_from_logits(example):
    loss, given = chunked(), example
    got, want = (
        jax.jit(jax.value_and_grad(fn, has_aux=True))(*given) for fn in (lambda *args: loss(*args, None), expected)
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    jax.tree.map(close, got, want)


def test_parts_of_a_batch_on_eight_devices_train_like_the_whole_on_one(example):
    params, teacher, batch = example
    outcomes = []
    for devices, parts in ((meshes.make_mesh(), 1), (meshes.make_mesh(fsdp=2, sequence=2, tensor=2), 2)):
        state = tiny.init_state(params, optax.sgd(0.1), devices)
        frozen = jax.device_put(teacher, placement.shardings(teacher, devices))
        step = make_step(chunked(), optax.sgd(0.1), 0, state, parts)
        state, metrics = step(state, frozen, place(batch, devices))
        outcomes.append(jax.device_get((metrics, state.trainable)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *outcomes)


def test_no_logits_of_a_whole_batch_exist():
    B, T, V = 8, 512, 4096
    small = [dataclasses.replace(shape, vocabulary=V, max_length=T) for shape in (STUDENT, TEACHER)]
    configs = [shape.config() for shape in small]
    loss = distillation_loss(*map(Transformer, configs), **HOW)
    params = [jax.eval_shape(functools.partial(init_params, config, 0)) for config in configs]
    batch = dict.fromkeys(tiny.batch(configs[0]), jax.ShapeDtypeStruct((B, T), jnp.int32))
    program = jax.jit(jax.grad(lambda *args: loss(*args, None)[0])).lower(*params, batch).compile()
    assert largest_array(program) <= B * T * V // 8


def test_a_student_moves_towards_its_teacher_and_the_teacher_stays():
    student, teacher = tiny.model(seed=1), tiny.model(seed=2)
    context = Context(
        mesh=meshes.make_mesh(),
        teacher=teacher,
        corpus="the text",
        batches=lambda step: tiny.batch(student.config, seed=step),
    )
    kept = jax.tree.map(np.array, teacher.params)
    after, record = Distill(steps=30, learning_rate=1e-2, weight=1.0)(student, context)

    tokens = jnp.asarray(tiny.tokens(student.config, 4, 12, seed=99))

    def kl(model):
        return float(from_logits(tiny.logits(model, tokens), tiny.logits(teacher, tokens), tokens, 1.0)[0].mean())

    assert kl(after) < 0.9 * kl(student)
    jax.tree.map(np.testing.assert_array_equal, kept, teacher.params)
    assert (record.seed, record.corpus) == (0, "the text")


@pytest.mark.parametrize("name", ["reverse", "jensen_shannon", "skew"])
def test_the_divergence_that_the_step_names_is_minimized(name, tmp_path):
    shape = dataclasses.replace(tiny.LLAMA, layers=1)
    student, teacher = tiny.model(shape, seed=1), tiny.model(shape, seed=2)
    batch, file = tiny.batch(student.config), tmp_path / "metrics.jsonl"
    context = Context(mesh=meshes.make_mesh(), teacher=teacher, batches=lambda step: batch, metrics=file)
    step = Distill(steps=20, log_every=1, learning_rate=1e-2, weight=1.0, temperature=2.0, divergence=name, mix=0.2)
    after, record = step(student, context)
    reported = json.loads(file.read_text().splitlines()[0])["divergence"]

    def value(model):
        inputs = {name: batch[name] for name in ("segments", "positions")}
        logits = (tiny.logits(each, batch["inputs"], **inputs)[batch["segments"] > 0] for each in (teacher, model))
        return 4 * divergences_test.reference(name, *(np.float64(each) / 2 for each in logits), 0.2).mean()

    assert reported == pytest.approx(value(student), rel=1e-4)
    assert value(after) < 0.8 * value(student)
    assert (record.settings["divergence"], record.settings["mix"]) == (name, 0.2)


def test_bad_settings_are_refused():
    for field, value, message in (
        ("divergence", "alpha", "divergence is 'alpha': choose from forward, reverse, jensen_shannon, skew"),
        ("mix", 0.0, r"mix is 0\.0, but must be in \(0, 1\)"),
        ("mix", 1.0, r"mix is 1\.0, but must be in \(0, 1\)"),
        ("hidden", -1.0, r"hidden is -1\.0, but must be finite and not negative"),
        ("hidden", float("nan"), r"hidden is nan, but must be finite"),
        ("layers", "0:1", "layers is '0:1', but hidden and attention are 0"),
        ("attention", -1.0, r"attention is -1\.0, but must be finite and not negative"),
    ):
        with pytest.raises(InputError, match=message):
            Distill(**{field: value})


@pytest.mark.parametrize("layers", ["0", "0:1,1:3", "0:1 1:", "a:b", "-1:0", "0:1:2"])
def test_a_map_that_is_no_list_of_pairs_is_refused(layers):
    with pytest.raises(InputError, match="must be pairs student:teacher with spaces between them"):
        Distill(hidden=1.0, layers=layers)


def test_layers_are_paired_as_named_or_evenly():
    config = {count: dataclasses.replace(tiny.LLAMA, layers=count).config() for count in (1, 2, 3, 4, 6)}
    assert layer_map("0:1 1:3", config[2], config[4]) == ((0, 1), (1, 3))
    assert layer_map("", config[2], config[6]) == ((0, 2), (1, 5))
    assert layer_map(" ", config[3], config[4]) == ((0, 1), (1, 2), (2, 3))
    assert layer_map("", config[4], config[2]) == ((0, 0), (1, 0), (2, 1), (3, 1))
    assert layer_map("", config[1], config[3]) == ((0, 2),)
    with pytest.raises(InputError, match="layers is '2:0', but the student has no layer 2: its 2 layers"):
        layer_map("2:0", config[2], config[4])
    with pytest.raises(InputError, match="layers is '1:3 0:4', but the teacher has no layer 4: its 4 layers"):
        layer_map("1:3 0:4", config[2], config[4])
    with pytest.raises(InputError, match="layers is '0:1 0:2': give each of the student's layers once"):
        Distill(hidden=1.0, layers="0:1 0:2")


NARROW = dataclasses.replace(tiny.LLAMA, width=24)
WITH_HIDDEN = Distill(steps=1, learning_rate=1e-2, hidden=3.0, layers="0:1 1:0")


def compressed(shape, seed):
    """A model whose layers are pruned by half and whose matrices are in int8, as are the other operands of matmuls."""
    model = tiny.model(shape, seed=seed)
    return Quantize(activations="int8")(
        Magnitude(sparsity=0.5)(model, Context(mesh=meshes.make_mesh()))[0], context_of(model)
    )[0]


def context_of(teacher, mesh=None, **rest):
    batch = tiny.batch(teacher.config)
    return Context(mesh=mesh or meshes.make_mesh(), teacher=teacher, batches=lambda step: batch, **rest)


@pytest.mark.parametrize("shape", [NARROW, tiny.LLAMA])
def test_hidden_states_of_a_pruned_and_rounded_student_are_compared_and_nothing_of_that_stays(shape, tmp_path):
    student, teacher = compressed(shape, seed=1), tiny.model(seed=2)
    batch, file = tiny.batch(student.config), tmp_path / "metrics.jsonl"
    after, record = WITH_HIDDEN(student, context_of(teacher, seed=5, metrics=file))

    inputs = {name: batch[name] for name in ("segments", "positions")}
    states, teacher_states = (
        np.float64(
            final_states_and_gathered(Transformer(each.config), each.params, batch["inputs"], **inputs)[1].outputs
        )
        for each in (student, teacher)
    )
    made = projections(((0, 1), (1, 0)), shape.width, 32, seed=5)
    assert len(made) == (2 if shape is NARROW else 0)
    error = sum(
        (((states[i] @ np.float64(made[f"block_{i}"]) if made else states[i]) - teacher_states[j]) ** 2).mean(-1)
        for i, j in ((0, 1), (1, 0))
    )
    got = json.loads(file.read_text().splitlines()[0])
    assert got["hidden"] == pytest.approx(error[batch["segments"] > 0].mean(), rel=1e-3)
    parts = 0.7 * got["divergence"] + 0.3 * got["cross_entropy"] + 3 * got["hidden"]
    assert got["loss"] == pytest.approx(parts, rel=1e-4)

    assert jax.tree.structure(after.params) == jax.tree.structure(student.params)
    assert record.leaves
    assert not any("projection" in path for path in record.leaves)
    assert (record.settings["hidden"], record.settings["layers"]) == (3.0, "0:1 1:0")
    for path, mask in after.masks.items():
        weight = dict(trees.flatten(after.params))[path]
        assert isinstance(weight, ops.QArray)
        assert not np.any(np.asarray(ops.dequantize(weight))[~np.asarray(mask)])


def test_projections_and_student_learn_to_give_the_teachers_hidden_states(tmp_path):
    student, teacher = tiny.model(NARROW, seed=1), tiny.model(seed=2)
    step = dataclasses.replace(WITH_HIDDEN, steps=30, layers="")
    start = {HIDDEN_PROJECTION: projections(((0, 0), (1, 1)), 24, 32, seed=0)}
    models = Transformer(student.config), Transformer(teacher.config)
    loss = distillation_loss(*models, temperature=1.0, weight=0.7, hidden=3.0, layers=((0, 0), (1, 1)))
    weights, kept = training.full(student, start), []
    keeping = dataclasses.replace(weights, finished=lambda found: kept.append(found) or weights.finished(found))
    training.train(step, student, context_of(teacher), keeping, (loss, teacher.params))
    (trained,) = kept
    batch = tiny.batch(student.config)
    error = jax.jit(lambda params: loss(params, teacher.params, batch, None)[1]["hidden"])
    learned = {HIDDEN_PROJECTION: trained[HIDDEN_PROJECTION]}
    assert error(student.params | learned) < 0.9 * error(student.params | start)
    assert error(trained) < 0.9 * error(trained | start)


@pytest.mark.parametrize("axes", tiny.and_combinations([{"data": 2}, {"fsdp": 2}, {"sequence": 2}, MIXED], [MIXED]))
def test_hidden_states_on_several_devices_teach_like_on_one(axes):
    student, teacher, mesh = tiny.model(NARROW, seed=1), tiny.model(seed=2), meshes.make_mesh(**axes)
    step = dataclasses.replace(WITH_HIDDEN, steps=3)
    one, two = (step(student, context_of(teacher, each))[0].params for each in (meshes.make_mesh(), mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, two)


FEWER_HEADS = dataclasses.replace(tiny.LLAMA, layers=1, heads=2, kv_heads=1)
WITH_ATTENTION = Distill(steps=30, log_every=1, learning_rate=1e-2, weight=0.7, attention=3.0, layers="0:1")


def attention_apart(student, teacher, mixture, batch):
    """The mean over tokens of KL(teacher's attention of layer 1 || student's of layer 0), in float64."""
    read = {name: batch[name] for name in ("segments", "positions")}
    named = {"outputs": False, "probabilities": True}
    q, p = (
        np.float64(
            final_states_and_gathered(Transformer(each.config), each.params, batch["inputs"], **read, **named)[
                1
            ].probabilities[layer]
        )
        for each, layer in ((student, 0), (teacher, 1))
    )
    if mixture is not None:
        shares = np.exp(np.float64(mixture))
        q = np.einsum("bmts,mn->bnts", q, shares / shares.sum(axis=0))
    kl = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0).sum(-1).mean(1)
    return kl[batch["segments"] > 0].mean()


@pytest.mark.parametrize("shape", [FEWER_HEADS, STUDENT])
def test_attention_of_a_student_is_compared_and_learned(shape, tmp_path):
    student, teacher, file = tiny.model(shape, seed=1), tiny.model(seed=2), tmp_path / "metrics.jsonl"
    made = mixtures(((0, 1),), student.config, teacher.config, 5)
    assert {name: m.shape for name, m in made.items()} == ({"block_0": (2, 4)} if shape is FEWER_HEADS else {})
    context = context_of(teacher, seed=5, metrics=file)
    _, record = WITH_ATTENTION(student, context)
    got, *_, last = map(json.loads, file.read_text().splitlines())
    batch = context.batches(0)
    assert got["attention"] == pytest.approx(attention_apart(student, teacher, made.get("block_0"), batch), rel=1e-3)
    parts = 0.7 * got["divergence"] + 0.3 * got["cross_entropy"] + 3 * got["attention"]
    assert got["loss"] == pytest.approx(parts, rel=1e-4)
    assert not any("mixture" in path for path in record.leaves)
    assert last["attention"] < 0.7 * got["attention"]


@pytest.mark.parametrize("axes", tiny.and_combinations([{"data": 2}, {"tensor": 2}, {"sequence": 2}, MIXED], [MIXED]))
def test_attention_on_several_devices_teaches_like_on_one(axes):
    student, teacher, mesh = tiny.model(FEWER_HEADS, seed=1), tiny.model(seed=2), meshes.make_mesh(**axes)
    step = dataclasses.replace(WITH_ATTENTION, steps=2, weight=0.01)
    one, two = (step(student, context_of(teacher, each))[0].params for each in (meshes.make_mesh(), mesh))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, two)


def test_without_their_loss_no_hidden_states_are_gathered(monkeypatch, tmp_path):
    found, own = [], losses.final_states_and_gathered

    def seen(*given, **asked):
        states, gathered = own(*given, **asked)
        found.append(len(gathered.outputs) + len(gathered.probabilities))
        return states, gathered

    monkeypatch.setattr(losses, "final_states_and_gathered", seen)
    monkeypatch.setattr("efflm.compress.distill.projections", None)
    file = tmp_path / "metrics.jsonl"
    Distill(steps=1)(tiny.model(NARROW, seed=1), context_of(tiny.model(seed=2), metrics=file))
    assert "hidden" not in json.loads(file.read_text().splitlines()[0])
    assert found
    assert not any(found)


def test_a_missing_or_foreign_teacher_is_refused():
    model = tiny.model()
    context = Context(mesh=meshes.make_mesh(), batches=lambda step: tiny.batch(model.config))
    with pytest.raises(InputError, match="needs a teacher"):
        Distill(steps=1)(model, context)
    other = tiny.model(dataclasses.replace(tiny.LLAMA, vocabulary=301))
    with pytest.raises(InputError, match="vocabulary is 301, the student's 300"):
        Distill(steps=1)(model, dataclasses.replace(context, teacher=other))
    known, foreign = (model.with_about({"tokenizer": name}) for name in ("ours", "theirs"))
    with pytest.raises(InputError, match="teacher's tokenizer is 'theirs', the student's 'ours'"):
        Distill(steps=1)(known, dataclasses.replace(context, teacher=foreign))
    with pytest.raises(InputError, match="needs text"):
        Distill(steps=1)(model, Context(mesh=meshes.make_mesh(), teacher=model))
