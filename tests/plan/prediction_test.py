"""Bytes on a device against the ZeRO formula and the compiled program; the search against its own rules."""

import dataclasses
import math
from typing import Literal

import jax
import pytest

from efflm.compress.quantize import quantize
from efflm.config.train import REMAT, Recompute, TrainConfig, TrainSettings
from efflm.infer import aot as infer_ahead
from efflm.model import LanguageModel, init_params, params
from efflm.model.presets import preset
from efflm.parallel import meshes
from efflm.plan import device, prediction, search
from efflm.plan.collectives import Collective
from efflm.plan.device import abstract_mesh
from efflm.plan.hardware import HARDWARE
from efflm.plan.prediction import train_traffic
from efflm.plan.work import Work
from efflm.precision import POLICIES, cast
from efflm.report import planned
from efflm.train import aot
from tests import tiny

TRAIN = TrainConfig(batch=8, length=16, policy="bfloat16", scan=True, remat="full")
COUNTERS = 64  # bytes of the step's number and the optimizer's


def abstract(config):
    return jax.eval_shape(lambda: init_params(config, 0))


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_bytes_are_those_of_zero(name, n):
    """Rajbhandari 2019: (weights + gradients + two moments) / N, but for norms and biases, which nobody cuts."""
    config = tiny.CONFIGS[name]
    shapes = [param.shape for param in params.table(config).values()]
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    vectors = sum(math.prod(shape) for shape in shapes if len(shape) == 1)
    held = device.held(config, TRAIN, abstract_mesh(fsdp=n))
    each = 4 * (matrices / n + vectors)
    assert (held.arguments["weights"], held.besides["gradients"]) == (each, each)
    assert 0 <= held.arguments["optimizer state"] - 2 * each <= COUNTERS


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 3}])
@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_bytes_are_those_of_the_state_as_it_lies(name, sizes):
    config, mesh = tiny.CONFIGS[name], meshes.make_mesh(**sizes)
    batch = dataclasses.replace(TRAIN, batch=24)
    _, (state, _, rows) = aot.training_step(config, batch, mesh)
    part = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    held = device.held(config, batch, abstract_mesh(**sizes)).arguments
    for name, lies in (("weights", state.trainable), ("optimizer state", state.optimizer), ("batch", rows)):
        assert sum(map(part, jax.tree.leaves(lies))) == held[name]


def test_bytes_are_those_of_the_compiled_arguments():
    config, mesh = tiny.LLAMA.config(), meshes.make_mesh(fsdp=4, tensor=2)
    step, arguments = aot.training_step(config, TRAIN, mesh)
    stats = step.lower(*arguments).compile().memory_analysis()
    held = device.held(config, TRAIN, abstract_mesh(fsdp=4, tensor=2))
    assert 0 <= stats.argument_size_in_bytes - sum(held.arguments.values()) <= COUNTERS


@pytest.mark.parametrize("int8", [False, True])
def test_bytes_of_served_models_are_those_of_the_compiled_arguments(int8):
    config, mesh, policy = (
        dataclasses.replace(tiny.LLAMA.config(), precision="bfloat16"),
        meshes.make_mesh(data=2, tensor=2),
        POLICIES["bfloat16_pure"],
    )

    def stored():
        weights = cast(init_params(config, 0), policy.param)
        return quantize(weights) if int8 else weights

    model = LanguageModel(config, jax.eval_shape(stored))
    shape = abstract_mesh(data=2, tensor=2)
    decoding, prefilling = (
        device.served(model.params, config, phase, 4, 16, policy, shape) for phase in ("decode", "prefill")
    )
    stats = infer_ahead.decode(model, 4, 16, mesh).compile().memory_analysis()
    rows = (4 + 4 + 1 + 8) * 4 / 2  # of two devices: lengths, newest tokens, whether ended, keys
    same = 4 * (4 + 16)  # how to sample, and the stop tokens
    rest = stats.argument_size_in_bytes - sum(decoding.arguments.values()) - rows - same
    assert 0 <= rest <= COUNTERS
    if int8:
        assert decoding.arguments["weights"] < 0.35 * device.tree_bytes(abstract(config), shape)  # of float32
    prefilled = infer_ahead.prefill(model, 4, 16, mesh).compile().memory_analysis()
    assert 0 <= prefilled.argument_size_in_bytes - sum(prefilling.arguments.values()) - 4 * 4 * (16 + 1) / 2 <= COUNTERS


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_stored_grows_with_rows_alone_and_is_what_the_policy_keeps(name, remat):
    """Under "full" the input of each layer, beside what the output layer reads; under the others more, in order."""
    config, length = tiny.CONFIGS[name], 16
    stored = {each: device.stored_bytes(config, TrainConfig(scan=True, remat=each), 1, length) for each in REMAT}
    train = TrainConfig(scan=True, remat=remat, batch=64)
    assert device.stored_bytes(config, train, 6, length) == 6 * stored[remat]
    inputs = 4 * length * config.width * len(config.blocks)
    assert inputs <= stored["full"] < stored["dots"] < stored["none"]
    assert stored["full"] <= inputs + 4 * length * (3 * config.width + 4 * 16)  # final states, twice; rotary tables


def test_a_new_policy_of_rematerialization_is_one_entry(monkeypatch):
    monkeypatch.setitem(REMAT, "inputs", Recompute((), projections=1.0, attention=1.0, feedforward=1.0))
    monkeypatch.setitem(TrainSettings.__annotations__, "remat", Literal[*REMAT])  # which an edit of the entries makes
    config, train = tiny.CONFIGS["llama"], dataclasses.replace(TRAIN, remat="full")
    named = dataclasses.replace(train, remat="inputs")
    for fn in (prediction.train_work, prediction.train_traffic, device.held):
        assert fn(config, named, abstract_mesh(fsdp=2)) == fn(config, train, abstract_mesh(fsdp=2))
    assert "inputs" in {each.train.remat for each in search.search(config, train, HARDWARE["h100"], 1)}


def test_a_compiled_step_needs_at_least_what_is_held():
    config, mesh = dataclasses.replace(tiny.LLAMA, layers=8).config(), meshes.make_mesh(fsdp=2)
    train = dataclasses.replace(TRAIN, batch=32, length=64)
    step, arguments = aot.training_step(config, train, mesh)
    stats = step.lower(*arguments).compile().memory_analysis()
    assert device.held(config, train, abstract_mesh(fsdp=2)).total <= planned.on_device(stats)


def test_work_is_divided_among_devices():
    config = preset("llama3-8b")
    train = dataclasses.replace(TRAIN, batch=64, length=4096)
    one = prediction.train_work(config, train, abstract_mesh()).flops
    for sizes in ({"fsdp": 8}, {"data": 2, "fsdp": 4}, {"tensor": 8}, {"sequence": 4, "fsdp": 2}):
        shared = prediction.train_work(config, train, abstract_mesh(**sizes)).flops
        assert 8 * shared == pytest.approx(one, rel=0.01), sizes


def test_the_network_takes_what_the_slowest_link_says():
    chip = HARDWARE["h100"]
    near, far = (Collective("all-gather", "x", group, "f32", 9e9, 1) for group in (tuple(range(8)), tuple(range(64))))
    predicted = prediction.predict(Work(1e12, 1e9), [near, far], chip, "bfloat16", 64)
    assert predicted.network == pytest.approx(9e9 / 450e9 + 9e9 / 50e9)
    assert predicted.bound == "network"
    assert predicted.seconds == predicted.network < predicted.unhidden


def test_groups_are_those_of_the_mesh():
    mesh = abstract_mesh(data=2, fsdp=2, tensor=2)
    assert device.group(("tensor",), mesh) == (0, 1)
    assert device.group(("data",), mesh) == (0, 4)
    assert device.group(("data", "tensor"), mesh) == (0, 1, 4, 5)


def test_traffic_under_fsdp_is_three_times_the_weights():
    """Rajbhandari 2019, section 7: 1.5 times that of plain data parallelism, which all-reduces its gradients."""
    config = preset("llama3-8b")
    train = dataclasses.replace(TRAIN, batch=64, length=64, policy="float32")  # one chunk of the loss
    train = dataclasses.replace(train, batch=8)
    received = lambda **sizes: sum(
        each.nbytes
        for each in train_traffic(config, train, abstract_mesh(**sizes))
        if each.name in ("weights", "gradients")
    )
    assert received(fsdp=8) == pytest.approx(1.5 * received(data=8), rel=1e-3)


def test_the_search_ranks_what_fits_by_speed():
    train = TrainConfig(batch=64, length=4096, policy="bfloat16", scan=True, remat="full")
    found = search.search(preset("llama3-8b"), train, HARDWARE["h100"], 16)
    fitting = [each for each in found if each.fits]
    assert found[: len(fitting)] == fitting
    assert 0 < len(fitting) < len(found)
    rates = [each.tokens_a_second for each in fitting]
    assert rates == sorted(rates, reverse=True)
    assert all(each.held.total <= 80e9 for each in fitting)
    assert {each.train.remat for each in found} == {"none", "dots", "full"}
    assert {each.train.batch for each in found} == {16, 32, 64, 128, 256}
    for each in found:
        assert math.prod(each.sizes.values()) == 16
        assert each.train.batch % (each.sizes["data"] * each.sizes["fsdp"]) == 0
        assert each.sizes["tensor"] <= 8  # key-value heads


def test_what_does_not_fit_is_said_not_to():
    train = TrainConfig(batch=8, length=4096, policy="bfloat16", scan=True, remat="full")
    assert not any(each.fits for each in search.search(preset("llama3-8b"), train, HARDWARE["v5e"], 2))
