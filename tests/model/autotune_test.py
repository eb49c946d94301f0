"""Which precision is picked, by measurements that are made up; and that what is measured is the model's own work."""

import dataclasses
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm.cli import run_directory
from efflm.compress.quantize import quantize
from efflm.config import InputError
from efflm.config.train import TrainConfig
from efflm.formats import checkpoint, sources
from efflm.model import LanguageModel, autotune, init_params, placement
from efflm.ops.kernels.cpu import build
from efflm.parallel import meshes, processes
from efflm.plan import work as plan_work
from efflm.precision import POLICIES, cast
from tests import tiny
from tests.flops import matrix_flops
from tests.formats.huggingface_test import small_tokenizer

CONFIG = tiny.LLAMA.config()
TRAIN = TrainConfig(policy="auto", batch=4, length=16)


def model(config=CONFIG):
    """A model with the same number for all weights, and nothing compiled."""
    leaf = lambda x: jax.device_put(np.full(x.shape, 0.5, x.dtype))
    return LanguageModel(config, jax.tree.map(leaf, jax.eval_shape(lambda: init_params(config, 0))))


class Stopwatch:
    """In place of a measurement: bfloat16 is `ratio` times as fast. calls: how often it was asked."""

    def __init__(self, ratio):
        self.ratio, self.calls = ratio, 0

    def __call__(self, parts):
        self.calls += 1
        return {"layers": {"float32": self.ratio, "bfloat16": 1.0}, "output layer": {"float32": 1e-9, "bfloat16": 1e-9}}


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """The file that measurements are kept in."""
    file = tmp_path / "cache" / "autotune.json"
    monkeypatch.setattr(autotune, "_file", lambda: file)
    return file


def picked(measure, config=CONFIG, train=TRAIN):
    """The policy, and the lines that were said."""
    said = []
    return autotune.training(config, train, said.append, measure).policy, said


@pytest.mark.parametrize(
    ("ratio", "name", "words"),
    [
        (1.7, "bfloat16", "are 1.70x as fast in bfloat16"),
        (1.06, "bfloat16", "1.06x"),
        (1.04, "float32", "are 1.04x as fast in bfloat16 as in float32 (layers 1.04x, output layer 1.00x; "),
        (0.68, "float32", "0.68x"),
    ],
)
def test_bfloat16_is_picked_where_it_is_clearly_faster(ratio, name, words):
    policy, (line,) = picked(Stopwatch(ratio))
    assert policy == name
    assert line.startswith(f"train.policy auto: {name}; the matmuls of a training step")
    assert words in line
    assert f"{run_directory.machine()['cpu']}, measured now)" in line
    assert ("float32 is kept below 1.05x" in line) == (ratio == 1.04)
    said, before = [], model().with_about({"source": "stdlib"})
    chosen = autotune.inference(before, said.append, Stopwatch(ratio))
    assert chosen.config == dataclasses.replace(before.config, precision=name)
    assert (chosen.params, chosen.about) == (before.params, before.about)
    assert said[0].startswith(f"precision auto: {name}; the matmuls of a prompt of 512 tokens and 64 new ones")


def test_what_is_not_auto_is_left_alone():
    train, measure = dataclasses.replace(TRAIN, policy="float16"), Stopwatch(9)
    assert picked(measure, train=train) == ("float16", [])
    assert measure.calls == 0


def test_a_measurement_is_kept_for_the_same_machine_versions_and_shapes(kept, monkeypatch):
    measure = Stopwatch(1.7)
    picked(measure)
    policy, (line,) = picked(Stopwatch(0.5))
    assert (policy, measure.calls) == ("bfloat16", 1)
    assert "measured earlier on this machine)" in line
    machine = run_directory.machine()
    changes = [{name: "other"} for name in ("cpu", "cores", "device", "jax")]
    for changed in changes:
        with monkeypatch.context() as patched:
            patched.setattr(run_directory, "machine", lambda changed=changed: machine | changed)
            assert picked(Stopwatch(0.5))[0] == "float32", changed
    with build.chosen("off"):
        assert (picked(Stopwatch(0.5))[0] == "float32") == (build.supported() != ())
    with monkeypatch.context() as patched:
        patched.setattr(autotune.jaxlib, "__version__", "0")
        assert picked(Stopwatch(0.5))[0] == "float32"
    with monkeypatch.context() as patched:
        patched.setenv("XLA_FLAGS", "--other")
        assert picked(Stopwatch(0.5))[0] == "float32"
    assert picked(Stopwatch(0.5), config=dataclasses.replace(tiny.LLAMA, width=64).config())[0] == "float32"
    assert picked(Stopwatch(0.5), train=dataclasses.replace(TRAIN, batch=8))[0] == "float32"
    assert picked(Stopwatch(0.5))[0] == "bfloat16"  # all of them are kept beside each other
    assert len(json.loads(kept.read_text())) == 10
    assert list(kept.parent.iterdir()) == [kept]


def test_weights_of_another_format_are_measured_again():
    before = model()
    autotune.inference(before, print, Stopwatch(1.7))
    for other in (quantize(before.params), quantize(before.params, "int8"), cast(before.params, "bfloat16")):
        assert autotune.inference(before.replace(params=other), print, Stopwatch(0.5)).config.precision == "float32"
    assert autotune.inference(before, print, Stopwatch(0.5)).config.precision == "bfloat16"


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"\xff\xfe", "null", "3", "{}", '{"layers": 3}', '{"layers": {"float32": 1}}',
     '{"layers": {"float32": 1, "bfloat16": 0}}', '{"layers": {"float32": NaN, "bfloat16": 1}}',
     '{"layers": {"float32": "1", "bfloat16": 1}}'],
)  # fmt: skip
def test_a_damaged_file_is_measured_again(kept, damage):
    """As bytes the whole file, as text the entry in it."""
    picked(Stopwatch(1.7))
    (key,) = json.loads(kept.read_text())
    kept.write_bytes(damage if isinstance(damage, bytes) else f'{{"{key}": {damage}}}'.encode())
    assert picked(Stopwatch(0.5))[0] == "float32"
    assert picked(Stopwatch(1.7))[0] == "float32"  # whole again


def test_where_nothing_can_be_kept_it_is_measured_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(autotune, "_file", lambda: tmp_path / "file" / "autotune.json")
    assert [picked(Stopwatch(ratio))[0] for ratio in (1.7, 0.5)] == ["bfloat16", "float32"]


def test_other_processes_take_what_the_first_one_picked(monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    monkeypatch.setattr(processes, "agree", lambda value: 1)
    measure = Stopwatch(0.5)
    assert picked(measure) == ("bfloat16", [])
    assert measure.calls == 0


def test_precisions_take_turns_and_the_median_counts(monkeypatch):
    """By a clock that only the runs advance: at first by what compiling takes."""
    now, ran = [0.0], []
    seconds = {"float32": iter([90.0, 4.0, 2.0, 900.0]), "bfloat16": iter([70.0, 1.0, 8.0, 3.0])}

    def run(precision):
        ran.append(precision)
        now[0] += next(seconds[precision])
        return ()

    monkeypatch.setattr(autotune, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    assert autotune.measured([autotune.Part("layers", 10.0, run)]) == {"layers": {"float32": 40.0, "bfloat16": 30.0}}
    assert ran == ["float32", "bfloat16"] * 4


# --- what is measured ------------------------------------------------------------------------------------------------


class Work:
    """In place of a measurement: the FLOPs of each part in each precision, counted in what it runs."""

    def __call__(self, parts):
        self.flops = {part.name: dict.fromkeys(autotune.CANDIDATES, 0.0) for part in parts}
        for part in parts:
            for precision in autotune.CANDIDATES:
                self.flops[part.name][precision] += part.times * matrix_flops(lambda part=part: part.run(precision))  # noqa: B023
        return self.flops


@pytest.mark.parametrize(("name", "most"), [("llama", 1e9), ("gpt2", 1e5), ("untied", 1e5)])
def test_all_matmuls_with_weights_are_stood_for(name, most, monkeypatch):
    """However few of them are run: the FLOPs are those of the closed form."""
    monkeypatch.setattr(autotune, "FLOPS", {"cpu": most})
    monkeypatch.setattr(autotune, "LEAST_ROWS", 8)
    monkeypatch.setattr(autotune, "MOST_COLUMNS", 40)
    config, work = tiny.CONFIGS[name], Work()
    picked(work, config, TRAIN)
    wanted = plan_work.forward(config, TRAIN.batch, TRAIN.length)
    for precision in autotune.CANDIDATES:
        layers = 3 * (wanted["projections"].flops + wanted["feedforward"].flops)
        assert work.flops["layers"][precision] == pytest.approx(layers)
        assert work.flops["output layer"][precision] == pytest.approx(3 * wanted["output"].flops)
    with build.chosen("off"):  # else kernels that are not counted multiply single rows
        autotune.inference(model(config), print, work)
    prompt, token = plan_work.forward(config, 1, autotune.PROMPT), plan_work.token(config, 1)
    assert work.flops["prompt"]["float32"] == pytest.approx(prompt["projections"].flops + prompt["feedforward"].flops)
    token = sum(token[part].flops for part in ("projections", "feedforward", "output"))
    assert work.flops["new tokens"]["float32"] == pytest.approx(autotune.NEW * token)


class Run:
    """In place of a measurement: runs every part once in each precision."""

    def __call__(self, parts):
        self.results = {precision: [part.run(precision) for part in parts] for precision in autotune.CANDIDATES}
        return Stopwatch(1.7)(parts)


def test_training_multiplies_forward_and_backward_in_the_precision():
    run = Run()
    picked(run, CONFIG, TRAIN)
    for precision, results in run.results.items():
        for inputs, weights in results:  # gradients
            assert {x.dtype for x in inputs.values()} == {jnp.dtype(precision)}
            assert {w.dtype for w in weights} == {jnp.dtype("float32")}
    for low, full in zip(*(jax.tree.leaves(run.results[name]) for name in ("bfloat16", "float32")), strict=True):
        difference = np.linalg.norm(np.asarray(low, np.float64) - np.asarray(full, np.float64))
        assert 0 < difference < 0.02 * np.linalg.norm(np.asarray(full, np.float64))


@pytest.mark.parametrize("format", ["float", "int8", "spread"])
def test_inference_multiplies_with_the_models_own_weights(format, monkeypatch):
    run, before = Run(), tiny.model()
    params = quantize(before.params) if format == "int8" else before.params
    if format == "spread":
        params = jax.device_put(params, placement.shardings(params, meshes.make_mesh(fsdp=2, tensor=2)))
    autotune.inference(before.replace(params=params), print, run)
    prompt, layers, output = run.results["float32"]
    assert [x.shape for x in prompt] == [(512, 48), (512, 48), (512, 32)]
    assert [x.shape for x in layers] == 2 * [(1, 48), (1, 48), (1, 32)]
    assert [x.shape for x in output] == [(1, 300)]
    # The last of the decoded tokens is the first one plus a whole number.
    row = np.resize(np.random.default_rng(0).standard_normal(1 << 16, np.float32), (1, 32)).astype(np.float64)
    wanted = (row + autotune.CHUNK - 1) @ np.asarray(before.params["embedding"], np.float64).T
    np.testing.assert_allclose(output[0], wanted, rtol=1e-4 if format != "int8" else 0.1, atol=0.1)
    assert all(math.isfinite(np.sum(np.asarray(x))) for x in jax.tree.leaves(run.results))
    assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(run.results))


# --- where it is asked for -------------------------------------------------------------------------------------------


def test_a_loaded_model_computes_in_what_was_picked(tmp_path, monkeypatch, capsys):

    small_tokenizer().save(tmp_path / "tokenizer.json")
    checkpoint.save(tmp_path / "checkpoint", 1, model(), {"source": "stdlib"})
    monkeypatch.setattr(autotune, "measured", Stopwatch(1.7))
    assert sources.load(tmp_path, precision="auto").model.config.precision == "bfloat16"
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("precision auto: bfloat16; ")


def test_a_policy_that_was_not_chosen_cannot_be_computed_with():
    with pytest.raises(InputError, match=r"train.policy is 'auto', but .* needs one of float32, .*autotune.training"):
        plan_work.train_step(CONFIG, TRAIN, 4, 16)
    with pytest.raises(InputError, match="'float8', but what is computed here needs one of"):
        POLICIES["float8"]
