"""Every step that trains has all settings of training, and hands them to the one trainer."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from efflm import trees
from efflm.compress import recipe
from efflm.compress.plan import EMBEDDINGS, LAYERS, Plan
from efflm.compress.quantize import Quantize
from efflm.compress.step import Context, settings
from efflm.config import InputError
from efflm.config.train import TrainSettings
from efflm.model import Transformer, autotune
from efflm.ops import Format, QArray, qarray
from efflm.parallel import meshes, sharding
from efflm.train import trainer
from efflm.train.losses import language_model_loss
from efflm.train.optimizer import decay_mask
from efflm.train.step import _accumulated
from tests import tiny

SHAPE = dataclasses.replace(tiny.LLAMA, layers=1)
# Of each step that trains, the ways it does so.
WAYS = {
    "finetune": {"text": {}},
    "distill": {
        "outputs": {},
        "layers": {"hidden": 1.0, "attention": 1.0},
        "cache": {"cache": "top_k", "entries": 5},
    },
    "qat": {"learned": {"group": 16}, "running": {"group": 16, "scales": "running", "distill": False}},
    "adapt": {"beside": {"rank": 2}, "merge": {"rank": 2, "merge": True, "weight": 0.0}},
    "gradual": {"text": {"every": 1}},
    "generated": {
        "student": {"prompt": 6, "new": 4, "temperature": 0.0},
        "teacher": {"prompt": 6, "new": 4, "temperature": 0.0, "by": "teacher"},
    },
}
# Whose losses another way of the same step, or text alone, has in part or in whole.
ALIKE = ("distill-outputs", "qat-running", "adapt-beside", "generated-teacher")


def cases(combinations=()):
    each = [(f"{name}-{way}", name, fields) for name, ways in WAYS.items() for way, fields in ways.items()]
    marks = lambda id: pytest.mark.combination if id in combinations else ()
    params = [pytest.param(*case, id=id, marks=marks(id)) for id, *case in each]
    return pytest.mark.parametrize(("name", "fields"), params)


def context(mesh=None):
    batch = tiny.batch(SHAPE.config())
    return Context(mesh=mesh or meshes.make_mesh(), batches=lambda step: batch, teacher=tiny.model(SHAPE, seed=2))


class Caught(Exception):
    """The task that a step gives the trainer."""


def asked(monkeypatch, step, model=None):
    def fit(task, **_):
        raise Caught(task)

    monkeypatch.setattr(trainer, "fit", fit)
    with pytest.raises(Caught) as caught:
        step(model or tiny.model(SHAPE, seed=1), context())
    return caught.value.args[0]


def program(task):
    """The jaxpr of the gradient, in words."""
    grad = jax.grad(lambda trainable, batch: task.loss_fn(trainable, task.frozen, batch, jax.random.key(0))[0])
    return str(jax.make_jaxpr(grad)(jax.eval_shape(task.start), task.batches(0)))


def test_the_ways_are_those_of_all_steps_that_train():
    training = {name for name, kind in recipe.STEPS.items() if issubclass(kind, TrainSettings)}
    assert set(WAYS) == training == {name for name, kind in recipe.STEPS.items() if getattr(kind, "trains", False)}


@cases()
def test_the_trainer_and_the_models_are_told_everything(name, fields, monkeypatch):
    made, own = [], Transformer.__post_init__
    monkeypatch.setattr(Transformer, "__post_init__", lambda self: made.append(self) or own(self))
    step = recipe.STEPS[name](steps=4, **fields)
    plain = asked(monkeypatch, step)
    assert dataclasses.replace(plain.train, policy="") == step
    assert plain.train.policy == "float32"
    assert not re.search(r"bf16\[\d+,\d+,|remat", program(plain))  # activations; scales are rounded to that dtype too
    assert {(model.policy.compute, model.remat) for model in made} == {("float32", "none")}

    told = {"optimizer": "muon", "schedule": "wsd", "warmup": 1, "weight_decay": 0.3, "accumulate": 2, "clip": 0.5}
    told |= {"policy": "bfloat16_pure", "remat": "full", "on_nan": "skip", "beta1": 0.5, "log_every": 3}
    made.clear()
    found = asked(monkeypatch, dataclasses.replace(step, **told))
    assert found.train == dataclasses.replace(step, **told)
    shapes = jax.eval_shape(found.start)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(shapes)} == {"bfloat16"}
    assert "remat" in program(found)
    assert {model.policy.compute for model in made} == {"bfloat16"}  # the teacher too, and one that writes
    assert "full" in {model.remat for model in made}
    # What is decayed, and made orthogonal: the matrices in the layer, or their two adapters, and nothing beside them.
    assert sum(jax.tree.leaves(decay_mask(shapes))) == (14 if name == "adapt" else 7)


@pytest.mark.parametrize("name", ["finetune", "distill", "generated", "adapt", "gradual"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_training_begins_and_ends_on_the_grid_that_was_given(name, symmetric, monkeypatch):
    """Its codes are those of scales which no weights have by themselves: here twice as large."""
    form = Format(bits=3, group=8, symmetric=symmetric)
    model, _ = Quantize(plan=Plan(((LAYERS, form), (EMBEDDINGS, Format()))))(tiny.model(SHAPE), context())
    twice = lambda w: w.replace(scale=2 * w.scale) if isinstance(w, QArray) else w
    model = model.replace(params=jax.tree.map(twice, model.params, is_leaf=lambda w: isinstance(w, QArray)))
    fields = {"merge": True} if name == "adapt" else next(iter(WAYS[name].values()))
    task = asked(monkeypatch, recipe.STEPS[name](steps=4, **fields), model)
    ended = task.finish(task.start())
    kept = dict(ended.masks or {})
    for path, leaf in trees.flatten(model.params):
        found = dict(trees.flatten(ended.params))[path]
        assert found.dtype == leaf.dtype
        if isinstance(leaf, QArray):
            np.testing.assert_array_equal(found.scale, leaf.scale)
            same = np.asarray(kept.get(path, True))
            np.testing.assert_array_equal(np.where(same, qarray.codes(found), 0), np.where(same, qarray.codes(leaf), 0))
    if name == "finetune":
        given = task.start(), task.frozen, task.batches(0), jax.random.key(0)
        wanted, _ = language_model_loss(model.config)(model.params, {}, *given[2:])
        np.testing.assert_allclose(task.loss_fn(*given)[0], wanted, rtol=1e-6)


@cases(ALIKE)
def test_parts_and_rematerialization_change_no_gradient(name, fields, monkeypatch):
    step = recipe.STEPS[name](steps=4, **fields)
    whole, parts = (
        gradient(asked(monkeypatch, each)) for each in (step, dataclasses.replace(step, accumulate=2, remat="full"))
    )
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * largest), parts, whole)


@pytest.mark.parametrize(
    ("name", "fields"),
    [("finetune", {}), ("distill", {}), ("qat", {"group": 16, "distill": False}), ("adapt", {"rank": 2})],
)
def test_scanned_layers_have_the_same_gradients(name, fields, monkeypatch):
    three = dataclasses.replace(tiny.LLAMA, layers=3)
    step = recipe.STEPS[name](steps=4, **fields)
    looped, scanned = (
        asked(monkeypatch, dataclasses.replace(step, scan=scan), tiny.model(three, seed=1)) for scan in (False, True)
    )
    assert "length=3" in program(scanned)
    assert "length=3" not in program(looped)
    whole, parts = gradient(looped), gradient(scanned)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * largest), parts, whole)


def test_what_cannot_be_scanned_is_refused():
    model = tiny.model(dataclasses.replace(tiny.LLAMA, layers=2))
    plan = Plan(((r"block_0/.*", Format(bits=4, group=16)), (LAYERS, Format())))
    with pytest.raises(InputError, match="scan loops over layers in one format"):
        recipe.apply(model, (Quantize(plan=plan), recipe.STEPS["finetune"](scan=True)), context())
    with pytest.raises(InputError, match="scan hides what layers give"):
        recipe.STEPS["distill"](scan=True, hidden=1.0)(tiny.model(SHAPE), context())


def test_auto_trains_by_the_faster_policy(monkeypatch):
    monkeypatch.setattr(autotune, "trained", lambda model, batch, length: tiny.model(in_bfloat16(model.config)))
    _, (record,) = recipe.apply(
        tiny.model(SHAPE), (recipe.STEPS["finetune"](steps=1, warmup=0, policy="auto"),), context()
    )
    assert record.settings["policy"] == "bfloat16"
    with pytest.raises(InputError, match=r"train\.policy is 'auto', but what is computed here needs one of"):
        recipe.STEPS["finetune"](steps=1, warmup=0, policy="auto")(tiny.model(SHAPE), context())


def in_bfloat16(config):
    return dataclasses.replace(config, precision="bfloat16")


def gradient(task):
    gradients = jax.value_and_grad(task.loss_fn, has_aux=True)
    if task.train.accumulate > 1:
        gradients = functools.partial(_accumulated, gradients, task.train.accumulate)

    def of(*given):
        with sharding.on_mesh(meshes.make_mesh()):
            return gradients(*given, jax.random.key(0))[1]

    return jax.device_get(jax.jit(of)(task.start(), task.frozen, task.batches(0)))


def test_a_step_trains_by_what_it_is_told_and_its_record_says_so():
    step = recipe.STEPS["qat"](group=16, steps=3, distill=False, policy="bfloat16_pure", optimizer="muon")
    made, record = step(tiny.model(SHAPE, seed=1), context())
    assert (record.settings["policy"], record.settings["optimizer"]) == ("bfloat16_pure", "muon")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(made.params)} == {"float32", "float16", "uint8", "int8"}


def test_settings_are_checked_and_only_those_that_were_given_are_recorded():
    step = recipe.STEPS["finetune"]
    assert settings(step(accumulate=3)) == {"steps": 150, "learning_rate": 2e-3, "accumulate": 3}
    for fields, words in (
        ({"optimizer": "adamx"}, "optimizer is 'adamx': choose from adamw, adamw8bit"),
        ({"policy": "float8"}, "policy is 'float8': choose from float32, bfloat16, bfloat16_pure, float16, auto"),
        ({"warmup": 200}, "warmup is 200, but must be less than steps, which is 150"),
        ({"accumulate": 0}, "accumulate is 0, but must be positive"),
    ):
        with pytest.raises(InputError, match=words):
            step(**fields)
    with pytest.raises(InputError, match="optimizer is schedule_free, whose averages hold what was dropped"):
        recipe.STEPS["gradual"](optimizer="schedule_free")
    with pytest.raises(InputError, match=r"z_loss is 0\.1, but is part of the loss on text alone"):
        recipe.STEPS["distill"](z_loss=0.1)(tiny.model(SHAPE), context())
    with pytest.raises(InputError, match=r"a batch of 8 rows in 3 parts \(accumulate\) cannot be shared"):
        step(accumulate=3, steps=1)(tiny.model(SHAPE), context())
