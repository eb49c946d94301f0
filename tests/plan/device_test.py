"""Bytes on a device against the ZeRO formula and the compiled program; the search against its own rules."""

import dataclasses
import math
import typing
from typing import Literal

import jax
import pytest

from efflm.compress.quantize import quantize
from efflm.config.model import BlockConfig
from efflm.config.train import REMAT, Recompute, TrainConfig, TrainSettings
from efflm.infer import aot as infer_ahead
from efflm.model import LanguageModel, init_params, params
from efflm.model.presets import preset
from efflm.parallel import meshes
from efflm.plan import device, search, work
from efflm.plan.collectives import collectives
from efflm.plan.device import abstract_mesh
from efflm.plan.hardware import HARDWARE
from efflm.plan.work import Work
from efflm.precision import POLICIES, cast
from efflm.train import aot
from tests import tiny

TRAIN = TrainConfig(batch=8, length=16, policy="bfloat16", scan=True, remat="full")
COUNTERS = 64  # bytes of the step's number and the optimizer's


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_bytes_are_those_of_zero(name, n):
    """Rajbhandari 2019: (weights + two moments) / N, but for norms and biases, which nobody cuts."""
    config = tiny.FAMILIES[name]
    shapes = [param.shape for param in params.table(config).values()]
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    vectors = sum(math.prod(shape) for shape in shapes if len(shape) == 1)
    state, mesh = device.state(config, TRAIN), abstract_mesh(fsdp=n)
    each = 4 * (matrices / n + vectors)
    assert device.held_bytes(state.trainable, mesh) == each
    assert 0 <= device.held_bytes(state, mesh) - 3 * each <= COUNTERS
    assert device.missing_bytes(state.trainable, mesh) == 4 * matrices * (n - 1) / n


@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"fsdp": 3}])
def test_bytes_are_those_of_the_compiled_arguments(sizes):
    config, mesh, train = tiny.LLAMA.config(), meshes.make_mesh(**sizes), dataclasses.replace(TRAIN, batch=24)
    step, arguments = aot.training_step(config, train, mesh)
    stats = step.lower(*arguments).compile().memory_analysis()
    assert 0 <= stats.argument_size_in_bytes - device.part_bytes(arguments) <= COUNTERS
    assert device.part_bytes(arguments[0]) == device.held_bytes(device.state(config, train), abstract_mesh(**sizes))


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_bytes_of_served_models_are_those_of_the_compiled_arguments(phase, int8):
    config = dataclasses.replace(tiny.LLAMA.config(), precision="bfloat16")
    mesh, policy = meshes.make_mesh(data=2, tensor=2), POLICIES["bfloat16_pure"]

    def stored():
        weights = cast(init_params(config, 0), policy.param)
        return quantize(weights) if int8 else weights

    model = LanguageModel(config, jax.eval_shape(stored))
    step, arguments = getattr(infer_ahead, phase)(model, 4, 16, mesh)
    stats = step.lower(*arguments).compile().memory_analysis()
    assert 0 <= stats.argument_size_in_bytes - device.part_bytes(arguments) <= COUNTERS
    weights = device.part_bytes(arguments[0].params)
    assert weights == device.held_bytes(model.params, abstract_mesh(data=2, tensor=2))
    if int8:
        assert weights < 0.7 * device.held_bytes(jax.eval_shape(lambda: init_params(config, 0)), mesh) / 2  # bfloat16
    if phase == "decode":
        assert device.part_bytes(arguments[1].cache.layers) == work.kv_cache_bytes(config, 4, 16, policy) / 4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_stored_is_what_the_policy_keeps(name):
    """Under "full" the input of each layer, beside what the output layer reads; under the others more, in order."""
    config, length = tiny.CONFIGS[name], 16
    stored = {each: device.stored_bytes(config, length, "float32", True, each) for each in REMAT}
    inputs = 4 * length * config.width * len(config.blocks)
    assert inputs <= stored["full"] < stored["dots"] < stored["none"]
    assert stored["full"] <= inputs + 4 * length * (3 * config.width + 4 * 16)  # final states, twice; rotary tables


def test_a_new_policy_of_rematerialization_is_one_entry(monkeypatch):
    monkeypatch.setitem(REMAT, "inputs", Recompute((), projections=1.0, attention=1.0, feedforward=1.0))
    monkeypatch.setitem(TrainSettings.__annotations__, "remat", Literal[*REMAT])  # which an edit of the entries makes
    monkeypatch.setattr("efflm.config.types", typing.get_type_hints)
    config, train = tiny.CONFIGS["llama"], dataclasses.replace(TRAIN, remat="full")
    named = dataclasses.replace(train, remat="inputs")
    state, mesh = device.state(config, train), abstract_mesh(fsdp=2)
    assert device.train_work(config, named, mesh, state) == device.train_work(config, train, mesh, state)
    traffic = lambda train: device.train_traffic(config, train, mesh, state.trainable)
    assert traffic(named) == traffic(train)
    stored = [device.stored_bytes(config, 16, "float32", True, name) for name in ("inputs", "full")]
    assert stored[0] == stored[1]
    assert "inputs" in {each.train.remat for each in search.search(config, train, HARDWARE["h100"], 1)}


def test_a_compiled_step_needs_at_least_what_is_held():
    config, mesh = dataclasses.replace(tiny.LLAMA, layers=8).config(), meshes.make_mesh(fsdp=2)
    train = dataclasses.replace(TRAIN, batch=32, length=64)
    step, arguments = aot.training_step(config, train, mesh)
    stats = step.lower(*arguments).compile().memory_analysis()
    stored = 16 * device.stored_bytes(config, train.length, train.policy, train.scan, train.remat)
    assert device.part_bytes(arguments) + stored <= stats.argument_size_in_bytes + stats.temp_size_in_bytes


def test_work_is_divided_among_devices():
    config = preset("llama3-8b")
    train = dataclasses.replace(TRAIN, batch=64, length=4096)
    state = device.state(config, train)
    one = device.train_work(config, train, abstract_mesh(), state).flops
    for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 4}, {"tensor": 8}, {"sequence": 4, "fsdp": 2}):
        shared = device.train_work(config, train, abstract_mesh(**sizes), state).flops
        assert 8 * shared == pytest.approx(one, rel=0.01), sizes


def test_the_network_takes_what_the_slowest_link_says():
    traffic = {("fsdp",): 9e9, ("data", "sequence"): 9e9}  # within a node, and beyond
    seconds = device.seconds(Work(1e12, 1e9), traffic, HARDWARE["h100"], "bfloat16", abstract_mesh(data=8, fsdp=8))
    assert seconds["network"] == pytest.approx(9e9 / 450e9 + 9e9 / 50e9)
    assert seconds["compute"] == pytest.approx(1e12 / 989.5e12)
    assert seconds["memory"] == pytest.approx(1e9 / 3.35e12)


def test_groups_are_those_of_the_mesh():
    mesh = abstract_mesh(data=2, fsdp=2, tensor=2)
    assert device.group(("tensor",), mesh) == (0, 1)
    assert device.group(("data",), mesh) == (0, 4)
    assert device.group(("data", "tensor"), mesh) == (0, 1, 4, 5)


def test_traffic_under_fsdp_is_three_times_the_weights():
    """Rajbhandari 2019, section 7: 1.5 times that of plain data parallelism, which all-reduces its gradients."""
    config = preset("llama3-8b")
    train = dataclasses.replace(TRAIN, batch=8, length=64, policy="float32")  # one chunk of the loss
    weights = device.state(config, train).trainable
    received = lambda **sizes: sum(device.train_traffic(config, train, abstract_mesh(**sizes), weights).values())
    assert received(fsdp=8) == pytest.approx(1.5 * received(data=8), rel=1e-3)


@pytest.mark.parametrize(
    "sizes",
    [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 4, "tensor": 2}, {"fsdp": 2, "sequence": 4}],
)
def test_a_compiled_step_receives_what_the_sharding_needs(sizes):
    """In float32, where the CPU's compiler writes all-reduce for a reduce-scatter: up to twice as much, and what
    embeddings and norms exchange."""
    config = dataclasses.replace(tiny.LLAMA, layers=4, width=64, mlp_dim=192, vocabulary=320).config()
    train = dataclasses.replace(TRAIN, batch=16, length=128, policy="float32")
    step, arguments = aot.training_step(config, train, meshes.make_mesh(**sizes))
    found = collectives(step.lower(*arguments).compile().as_text())
    needed = device.train_traffic(config, train, abstract_mesh(**sizes), device.state(config, train).trainable)
    received = sum(each.nbytes for each in found)
    assert sum(needed.values()) <= received <= 1.8 * sum(needed.values())


def test_the_search_ranks_what_fits_by_speed():
    train = TrainConfig(batch=64, length=4096, policy="bfloat16", scan=True, remat="full")
    found = search.search(preset("llama3-8b"), train, HARDWARE["h100"], 16)
    fitting = [each for each in found if each.fits]
    assert found[: len(fitting)] == fitting
    assert 0 < len(fitting) < len(found)
    rates = [each.tokens_a_second for each in fitting]
    assert rates == sorted(rates, reverse=True)
    assert all(each.held <= 80e9 for each in fitting)
    assert {each.train.remat for each in found} == {"none", "dots", "full"}
    assert {each.train.batch for each in found} == {16, 32, 64, 128, 256}
    for each in found:
        assert math.prod(each.sizes.values()) == 16
        assert each.train.batch % (each.sizes["data"] * each.sizes["fsdp"]) == 0
        assert each.sizes["tensor"] <= 8  # key-value heads


def test_what_does_not_fit_is_said_not_to():
    train = TrainConfig(batch=8, length=4096, policy="bfloat16", scan=True, remat="full")
    assert not any(each.fits for each in search.search(preset("llama3-8b"), train, HARDWARE["v5e"], 2))


@pytest.mark.parametrize(
    ("heads", "tensor", "mine"),
    [((32, 8), 8, (4, 1)), ((32, 8), 16, (2, 1)), ((9, 3), 2, (9, 3)), ((20, 10), 4, (5, 1))],
)
def test_a_device_has_its_heads_or_all_that_cannot_be_divided(heads, tensor, mine):
    block = BlockConfig(heads=heads[0], kv_heads=heads[1], head_dim=4, mlp_dim=6)
    config = dataclasses.replace(tiny.LLAMA.config(), blocks=(block,))
    (found,) = device.local(config, abstract_mesh(tensor=tensor)).blocks
    assert (found.heads, found.kv_heads) == mine
    assert found.mlp_dim == (3 if tensor == 2 else 6)
