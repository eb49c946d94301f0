"""What watches a training changes nothing that is trained, and says what it is asked for also when the run breaks."""

import dataclasses
import gc
import json
import sys
import time
import types

import jax
import numpy as np
import optax
import pytest

from efflm.config import InputError
from efflm.config.train import TrainConfig
from efflm.parallel import meshes
from efflm.train import callbacks, optimizer, trainer
from efflm.train.step import place
from tests import tiny

MODEL = tiny.model()
TRAIN = TrainConfig(steps=6, log_every=2, warmup=2, learning_rate=1e-2)
HELD_OUT = [tiny.batch(MODEL.config, seed=seed) for seed in (100, 101)]
PROGRAMS = {}


def batches(step):
    return tiny.batch(MODEL.config, seed=step)


TASK = trainer.model_task(MODEL.config, TRAIN, tiny.copies(MODEL.params), batches)


def train(*watched, title="", task=TASK, programs=PROGRAMS):
    return trainer.fit(task, mesh=meshes.make_mesh(), title=title, watched=watched, programs=programs)


def written(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def collected(found):
    """A callback that keeps the lines."""

    def callback(training):
        training.sinks.append(found.append)
        return callbacks.contextlib.nullcontext(callbacks.nothing)

    return callback


def test_validation_changes_no_weight_and_no_metric(tmp_path):
    plain = train(callbacks.lines(tmp_path / "plain.jsonl"))
    seen = train(callbacks.validation(HELD_OUT, 3), callbacks.lines(tmp_path / "seen.jsonl"))
    jax.tree.map(np.testing.assert_array_equal, plain.params, seen.params)
    found = {line["step"]: line.get("validation_loss") for line in written(tmp_path / "seen.jsonl")}
    assert [step for step in found if found[step] is not None] == [3, 6]
    losses = {line["step"]: line["loss"] for line in written(tmp_path / "seen.jsonl")}
    assert {line["step"]: line["loss"] for line in written(tmp_path / "plain.jsonl")}.items() <= losses.items()
    parts = [TASK.loss_fn(seen.params, {}, place(batch, meshes.make_mesh()), None) for batch in HELD_OUT]
    weights = [float(aux["weight"]) for _, aux in parts]
    wanted = sum(float(loss) * weight for (loss, _), weight in zip(parts, weights, strict=True)) / sum(weights)
    assert found[6] == pytest.approx(wanted, rel=1e-5)


def test_lines_say_rate_memory_and_the_speed_since_the_line_before(tmp_path, monkeypatch):
    """The clock goes ten seconds in each of the first three steps, then one; a line is made as the next step begins."""
    now, steps = [0.0], []
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])

    def slow(step):
        steps.append(step)
        now[0] += 10.0 if step < 3 else 1.0
        return batches(step)

    task = dataclasses.replace(TASK, batches=slow)
    train(callbacks.utilization(4e9, 1e9), callbacks.lines(tmp_path / "lines.jsonl"), task=task)
    lines = written(tmp_path / "lines.jsonl")
    assert [line["step_seconds"] for line in lines] == [20.0, 1.0, 0.5]
    assert [line["seconds"] for line in lines] == [20.0, 22.0, 23.0]
    assert lines[2]["tokens_per_second"] == 2 * lines[1]["tokens_per_second"]
    assert all(line["flop_utilization"] == pytest.approx(4 / line["step_seconds"], abs=1e-3) for line in lines)
    schedule = optimizer.schedule(TRAIN)
    assert [line["learning_rate"] for line in lines] == pytest.approx([float(schedule(i)) for i in (1, 3, 5)])
    assert all(line["process_bytes"] > 1e7 for line in lines)


def test_the_last_words_of_a_bar_are_those_of_the_last_line(tmp_path, capsys):
    train(callbacks.lines(tmp_path / "lines.jsonl"), title="training")
    loss = written(tmp_path / "lines.jsonl")[-1]["loss"]
    assert f"step 6/6  loss {loss:.3f}" in capsys.readouterr().out.splitlines()[-1]


def test_a_step_that_does_not_end_is_told_once(capsys):
    """Steps of some milliseconds, one that takes a second."""

    def hanging(step):
        if step == 4:
            time.sleep(1.0)
        return batches(step)

    watch = lambda training: callbacks.watchdog(training, least=0.3, times=2.0, look=0.02)
    train(task=dataclasses.replace(TASK, batches=batches))  # compiled
    train(watch, task=dataclasses.replace(TASK, batches=hanging))
    assert capsys.readouterr().err.count("no step has ended for") == 1


def test_lines_go_to_weights_and_biases_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="wandb is 'mine', but wandb is not installed: pip install wandb"):
        train(callbacks.wandb("mine", tmp_path, {}))
    told, logged = [], []

    @callbacks.contextlib.contextmanager
    def init(**given):
        told.append(given)
        yield types.SimpleNamespace(log=lambda line, step: logged.append((step, line["loss"])))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    train(callbacks.wandb("mine", tmp_path, {"seed": 1}), callbacks.lines(tmp_path / "lines.jsonl"))
    assert logged == [(line["step"], line["loss"]) for line in written(tmp_path / "lines.jsonl")]
    (given,) = told
    assert (given["project"], given["config"], given["resume"]) == ("mine", {"seed": 1}, "allow")


@pytest.mark.parametrize("window", [(0, 1), (1, 2), (3, 9)])
def test_a_trace_is_written_also_where_the_run_ends_inside(tmp_path, monkeypatch, window):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))

    def failing(step):
        if step == 4:
            raise OSError("storage")
        return batches(step)

    with pytest.raises(OSError, match="storage"):
        train(callbacks.profile(*window, tmp_path), task=dataclasses.replace(TASK, batches=failing))
    assert calls == ["start", "stop"]


def test_a_trace_is_written_where_a_run_is_resumed_inside(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    training = types.SimpleNamespace(step=5, state=())
    with callbacks.profile(4, 6, tmp_path)(training) as after:
        assert calls == ["start"]
        for training.step in (6, 7):
            after()
    assert calls == ["start", "stop"]


@pytest.mark.parametrize("before", [False, True], ids=["", "frozen before"])
def test_what_lives_until_the_end_is_not_collected_again_and_again(before):
    counts = []

    def looked_at(step):
        counts.append(gc.get_freeze_count())
        return batches(step)

    gc.unfreeze()
    if before:
        gc.freeze()
    train(task=dataclasses.replace(TASK, batches=looked_at, rule=optax.sgd(1e-2)), programs=None)
    after = gc.get_freeze_count()
    gc.freeze()  # as tests have it
    assert (counts[0] > 0, after > 0) == (before, before)
    assert all(count > counts[0] + 1000 for count in counts[1:])
