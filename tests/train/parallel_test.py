"""On eight devices: every way of dividing the work trains like one device, and each device holds its part."""

import collections
import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest

from efflm import trees
from efflm.config import InputError
from efflm.config.model import ModelConfig
from efflm.config.parallel import MeshConfig
from efflm.config.train import TrainConfig
from efflm.model import init_params, placement, unstack_blocks
from efflm.ops import attention_blocks
from efflm.ops.kernels.cpu import build
from efflm.parallel import meshes, sharding
from efflm.plan.collectives import collectives
from efflm.train import aot, losses, trainer
from efflm.train.step import place
from tests import tiny

TRAIN = TrainConfig(steps=4, warmup=1, batch=8, length=16, learning_rate=1e-2)
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "tensor": {"data": 4, "tensor": 2},
    "sequence": {"data": 1, "sequence": 8},
    "fsdp x tensor": {"fsdp": 4, "tensor": 2},
    "data x fsdp x sequence x tensor": {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2},
}


def trained(shape, mesh, train=TRAIN):
    """The losses, the gradients of the first step (as AdamW's first moments hold them), the last state."""
    config, out, gradients = shape if isinstance(shape, ModelConfig) else shape.config(), [], None
    task = aot.random_task(config, train, mesh)
    _, init, step = trainer.prepared(task, mesh)
    state = init(task.start())
    for i in range(train.steps):
        state, metrics = step(
            state, {}, place(tiny.batch(config, rows=train.batch, length=train.length, seed=i % 2), mesh)
        )
        out.append(float(metrics["loss"]))
        if gradients is None:  # the next step gives the state away
            gradients = jax.device_get(optax.tree_utils.tree_get(state.optimizer, "mu"))
    return np.array(out), unstack_blocks(gradients, config) if train.scan else gradients, state


def assert_alike(got, want):
    """That two runs have the same losses and, weight by weight, the same gradients."""
    np.testing.assert_allclose(got[0], want[0], rtol=1e-3)
    for (path, ours), (_, theirs) in zip(trees.flatten(got[1]), trees.flatten(want[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4 * np.abs(theirs).max() + 1e-7, err_msg=path)


@pytest.fixture(scope="module")
def alone():
    return {name: trained(tiny.FAMILIES[name], meshes.make_mesh()) for name in ("llama", "gpt2", "gemma", "experts")}


ALL = "data x fsdp x sequence x tensor"


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *(("fsdp", "llama"), (ALL, "llama"), (ALL, "gemma"), (ALL, "experts")),
        *(tiny.combination(name, "llama") for name in MESHES),
    ],
)
def test_steps_and_gradients_equal_those_of_one_device(name, family, alone):
    mesh = meshes.mesh_for(MeshConfig(**MESHES[name]), TRAIN.batch, TRAIN.length)
    assert mesh.size == 8
    on_eight = losses_on_eight, _, state = trained(tiny.FAMILIES[family], mesh)
    assert_alike(on_eight, alone[family])
    assert losses_on_eight[-1] < losses_on_eight[0] - (0.15 if family == "gemma" else 0.3)  # capped logits move slowly
    held = dict(trees.flatten(state, inside=True))
    for path, spec in trees.flatten(placement.shardings(state, mesh), inside=True):
        assert held[path].sharding == spec, path
        part = np.prod(spec.shard_shape(held[path].shape))
        assert held[path].addressable_shards[0].data.size == part


@pytest.mark.parametrize(
    "changes",
    [
        tiny.combination({"scan": True}),
        tiny.combination({"remat": "full"}),
        {"remat": "dots", "scan": True},
        {"accumulate": 2},
    ],
)
def test_spread_rows_train_like_whole_ones_in_every_mode(changes, alone):
    train = dataclasses.replace(TRAIN, **changes)
    mesh = meshes.make_mesh(data=2, sequence=2, tensor=2)
    assert_alike(trained(tiny.SHAPES["gpt2"], mesh, train), alone["gpt2"])


@pytest.mark.parametrize("window", tiny.and_combinations([0, 5], [5]))
def test_spread_rows_have_the_gradients_of_whole_ones(window, monkeypatch):
    """By the native kernel, and by the portable form, also where that loops over blocks, here of 8 tokens."""
    config = dataclasses.replace(tiny.LLAMA, window=window, max_length=128).config()
    params, batch = init_params(config, 0), tiny.batch(config, rows=2, length=96)
    loss = losses.language_model_loss(config)
    gradient = lambda params, batch: jax.grad(lambda p: loss(p, {}, batch, None)[0])(params)
    with build.chosen("off"):
        whole = jax.jit(gradient)(params, batch)
    mesh = meshes.make_mesh(sequence=4)

    def on_mesh(params, batch):
        with sharding.on_mesh(mesh):
            return gradient(params, batch)

    for form, unrolled in (("auto", 1024), ("off", 1024), ("off", 1)):
        monkeypatch.setattr(attention_blocks, "UNROLLED", unrolled)
        monkeypatch.setattr(attention_blocks, "BLOCK", 8)
        with build.chosen(form):
            ours = jax.jit(lambda params, batch: on_mesh(params, batch))(params, place(batch, mesh))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), ours, whole)


@functools.cache
def compiled_step(accumulate=1, **shape):
    """Of 16 rows of 64 tokens, without native kernels."""
    train = dataclasses.replace(TRAIN, batch=16, length=64, accumulate=accumulate)
    step, arguments = aot.training_step(tiny.LLAMA.config(), train, meshes.make_mesh(**shape))
    with build.chosen("off"):
        return step.lower(*arguments).compile()


# What one step sends, of more than a few numbers: at most so often. A device alone sends nothing. Along `sequence` go
# the four arrays of a batch and the weights of its targets.
SENT = {
    (): {},
    (("data", 8),): {"all-reduce": 3},
    (("data", 2), ("fsdp", 4)): {"all-gather": 16, "all-reduce": 7},  # four of these would be reduce-scatter on a GPU
    (("data", 4), ("tensor", 2)): {"all-reduce": 15},
    (("data", 2), ("sequence", 4)): {"all-gather": 16, "all-reduce": 3, "all-to-all": 5, "reduce-scatter": 4},
}


@pytest.mark.parametrize(
    ("shape", "accumulate"),
    [
        *((shape, 1) for shape in SENT if shape),
        *(((("data", 2), each), 2) for each in (("fsdp", 4), ("sequence", 4))),
        *(tiny.combination(shape, 2) for shape in ((("data", 8),), (("data", 4), ("tensor", 2)))),
    ],
)
def test_each_device_computes_its_share(shape, accumulate):
    """XLA's FLOPs of a device's program, in which the parts of a batch are a loop that is counted once. Attention that
    every device computes for all would make them 1.5 to 3.4 times its share."""
    flops = lambda **shape: compiled_step(accumulate, **shape).cost_analysis()["flops"]
    over = 1.25 if "sequence" in dict(shape) else 1.1
    assert flops() / 8 <= flops(**dict(shape)) < over * flops() / 8


@pytest.mark.parametrize("shape", SENT)
def test_a_step_sends_what_its_mesh_needs_and_no_more(shape):
    """A weight that is gathered twice, or a gradient summed alone, is one more collective."""
    found = collectives(compiled_step(**dict(shape)).as_text())
    counts = collections.Counter(each.kind for each in found if each.nbytes > 256)
    assert counts.keys() == SENT[shape].keys()
    assert all(counts[kind] <= most for kind, most in SENT[shape].items()), counts


def test_rows_that_the_devices_cannot_share_are_refused():
    """Else XLA gives all rows to every device."""
    train = dataclasses.replace(TRAIN, accumulate=2)
    step, arguments = aot.training_step(tiny.LLAMA.config(), train, meshes.make_mesh(data=8))
    with pytest.raises(InputError, match=r"8 rows in 2 parts \(accumulate\) cannot be shared by mesh.data 8"):
        step.lower(*arguments)


def test_weights_are_gathered_a_layer_at_a_time():
    """No array of the compiled program is as large as what all layers' matrices would be together."""
    shape = dataclasses.replace(tiny.LLAMA, layers=8, width=64, mlp_dim=192)
    config, train = shape.config(), dataclasses.replace(TRAIN, scan=True, remat="full")
    step, arguments = aot.training_step(config, train, meshes.make_mesh(fsdp=8))
    text = step.lower(*arguments).compile().as_text()
    gathered = [shape_size(found) for found in re.findall(r"= (\S+) all-gather(?:-start)?\(", text)]
    layer = config.width * max(block.mlp_dim for block in config.blocks)
    assert gathered
    assert layer in gathered
    assert max(gathered) <= max(layer, config.vocabulary * config.width)
    assert max(gathered) < 8 * config.width**2  # one matrix of every layer


def shape_size(text):
    return max(int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\w+\[([\d,]*)\]", text))
