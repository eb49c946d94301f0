"""Temporary memory in closed form against that of compiled training steps."""

import dataclasses

import pytest

from efflm.config.model import ModelShape
from efflm.config.train import TrainConfig
from efflm.ops.attention import spans
from efflm.ops.kernels.cpu import build
from efflm.parallel import meshes
from efflm.plan import memory
from efflm.train import aot
from tests import tiny


def temporaries(config, train):
    step, args = aot.training_step(config, train, meshes.make_mesh())
    return step.lower(*args).compile().memory_analysis().temp_size_in_bytes


def check_temporaries(config, settings):
    train = TrainConfig(**settings)
    peak = memory.moments(config, train, train.batch, train.length).peak
    assert peak.total() == pytest.approx(temporaries(config, train), rel=0.25)


SMALL = ModelShape(layers=2, width=128, heads=4, kv_heads=2, mlp_dim=352, vocabulary=1024, max_length=2048)
SMALL_GPT2 = dataclasses.replace(SMALL, family="gpt2", kv_heads=4, mlp_dim=512, tied=False)
NEOX = {"position": "rotary", "feedforward": "gelu_exact", "parallel": True, "rotary_fraction": 0.25}


@pytest.mark.parametrize(
    ("shape", "other", "settings"),
    [
        (SMALL, {}, {"batch": 1, "length": 32}),  # the update is its peak
        tiny.combination(SMALL, {}, {"batch": 8, "length": 128}),
        (SMALL, {}, {"batch": 8, "length": 256, "policy": "bfloat16", "remat": "full"}),
        (SMALL_GPT2, {}, {"batch": 8, "length": 128, "policy": "bfloat16", "remat": "dots", "scan": True}),
        tiny.combination(
            dataclasses.replace(SMALL_GPT2, vocabulary=8192), {}, {"batch": 4, "length": 128, "accumulate": 2}
        ),
        (SMALL, {"qk_norm": True}, {"batch": 8, "length": 512}),
        tiny.combination(SMALL, {"qk_norm": True}, {"batch": 8, "length": 128, "scan": True}),
        tiny.combination(SMALL_GPT2, NEOX, {"batch": 8, "length": 128}),
        (SMALL_GPT2, NEOX, {"batch": 8, "length": 128, "scan": True}),
    ],
)
def test_temporaries_are_those_of_the_compiled_step(shape, other, settings):
    check_temporaries(dataclasses.replace(shape.config(), **other), settings)


@pytest.mark.parametrize("settings", [{}, {"remat": "dots", "accumulate": 2}, {"remat": "full", "scan": True}])
def test_arrays_like_weights_do_not_grow_with_the_batch_and_the_others_do(settings):
    """What plan.prediction divides among the devices of fsdp, and what it does not."""
    train = TrainConfig(batch=64, length=128, policy="bfloat16", **settings)
    once, twice = (memory.moments(dataclasses.replace(SMALL, tied=False).config(), train, n, 128) for n in (64, 128))
    for moment, larger in zip(
        (once.feedforward, once.attention, once.update), (twice.feedforward, twice.attention, twice.update)
    ):
        assert moment.of_weights == larger.of_weights
        assert sum(larger.of_tokens.values()) == 2 * sum(moment.of_tokens.values())
        assert moment.total(8) == sum(moment.of_weights.values()) / 8 + sum(moment.of_tokens.values())
    assert once.loss.of_weights == twice.loss.of_weights


@pytest.mark.parametrize(
    ("platform", "window", "taken"), [("tpu", 200, True), ("cuda", 200, False), ("cuda", 0, True), ("cpu", 0, False)]
)
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_scores_take_no_memory_where_a_kernel_keeps_them_on_the_chip(platform, window, taken, remat):
    config = dataclasses.replace(SMALL, heads=2, kv_heads=2, window=window).config()  # heads of 64
    train = TrainConfig(batch=4, length=512, policy="bfloat16", remat=remat)
    with build.chosen("off"):
        arrays = memory.moments(config, train, 4, 512, platform).attention.of_tokens
    pairs = sum((q_end - q) * (k_end - k) for q, q_end, k, k_end in spans(512, 512, window, in_order=True))
    copies = 2.5 + (remat == "dots")  # weights, in bfloat16 too, and their gradients; and again
    of_scores = sum(nbytes for name, nbytes in arrays.items() if "scores" in name or "attention's weights" in name)
    assert of_scores == pytest.approx((not taken) * copies * 4 * 4 * 2 * pairs)


BENCH = ModelShape(family="gpt2", layers=6, width=384, heads=6, kv_heads=6, mlp_dim=1536, max_length=2048)
DEEP = ModelShape(layers=12, max_length=2048)
WIDE = ModelShape(layers=3, width=512, heads=16, kv_heads=4, mlp_dim=1408, max_length=2048)
LARGE = ModelShape(layers=4, kv_heads=4, vocabulary=49152)


@pytest.mark.slow
@pytest.mark.parametrize("policy", tiny.and_combinations(["float32", "bfloat16"], ["bfloat16"]))
@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (BENCH, {"batch": 16, "length": 256}),
        (BENCH, {"batch": 16, "length": 256, "scan": True}),
        (BENCH, {"batch": 16, "length": 256, "remat": "dots", "accumulate": 4}),
        (DEEP, {"batch": 1, "length": 2048, "scan": True}),
        (DEEP, {"batch": 1, "length": 2048, "scan": True, "remat": "full"}),
        (dataclasses.replace(DEEP, layers=4), {"batch": 2, "length": 2048}),
        (dataclasses.replace(DEEP, layers=3), {"batch": 4, "length": 1024, "remat": "full"}),
        (WIDE, {"batch": 4, "length": 512, "remat": "dots", "scan": True}),
        (dataclasses.replace(WIDE, window=200), {"batch": 4, "length": 512}),
        (LARGE, {"batch": 4, "length": 256}),
        (dataclasses.replace(LARGE, tied=False), {"batch": 4, "length": 256, "remat": "full"}),
        (LARGE, {"batch": 8, "length": 128, "accumulate": 4, "scan": True}),
    ],
)
def test_temporaries_of_larger_models_are_those_of_the_compiled_step(shape, settings, policy):
    check_temporaries(shape.config(), settings | {"policy": policy})
