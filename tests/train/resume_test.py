"""What may change when a run goes on, and a run that branches from another one."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest

from efflm.config import InputError
from efflm.config.train import TrainConfig
from efflm.parallel import meshes
from efflm.train import callbacks, optimizer, trainer
from efflm.train.checkpointing import Checkpointing
from tests import tiny

MODEL = tiny.model()
TRAIN = TrainConfig(
    steps=4, batch=4, log_every=1, learning_rate=1e-2, warmup=1, schedule="constant", optimizer="adamw8bit"
)
ABOUT = {"seed": 0}
WHOLLY_CHANGED = {"remat": "full", "accumulate": 2, "scan": True}


def batches(step):
    return tiny.batch(MODEL.config, rows=4, seed=step)


PROGRAMS: trainer.Programs = {}


@functools.cache
def task_of(config):
    return trainer.model_task(MODEL.config, config, tiny.copies(MODEL.params), batches)


def train(folder, config=TRAIN, mesh=None, **kept):
    kept = Checkpointing(directory=folder / "state", **{"every": 2, "keep": 9, "about": ABOUT} | kept)
    watched, mesh = [callbacks.lines(folder / "metrics.jsonl")], mesh or meshes.make_mesh()
    task = task_of(config)
    return trainer.fit(task, mesh=mesh, title="", watched=watched, checkpointing=kept, programs=PROGRAMS).params


def lines(folder):
    return [tiny.repeatable(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the weights of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder)


def interrupted(whole, tmp_path):
    """A copy of it as it was after two steps."""
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    shutil.rmtree(folder / "state" / "4")
    return folder


def test_more_steps_are_those_of_a_longer_run_to_the_last_bit(whole, tmp_path):
    longer = dataclasses.replace(TRAIN, steps=6)
    after, calm = train(shutil.copytree(whole[0], tmp_path / "copy"), longer), train(tmp_path / "calm", longer)
    jax.tree.map(np.testing.assert_array_equal, after, calm)
    assert lines(tmp_path / "copy") == lines(tmp_path / "calm")


@pytest.mark.parametrize(
    "changed",
    tiny.and_combinations(
        [{"remat": "full"}, {"accumulate": 2}, {"scan": True}, WHOLLY_CHANGED], every_time=[WHOLLY_CHANGED]
    ),
    ids=str,
)
def test_how_a_step_is_computed_may_change(whole, tmp_path, changed):
    after = train(interrupted(whole, tmp_path), dataclasses.replace(TRAIN, **changed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-3), after, whole[1])


@pytest.mark.parametrize("optimizer", ["adamw8bit", "muon", "adafactor"])
def test_stacked_layers_are_taken_apart_again(tmp_path, optimizer):
    """The state of a scanned run, moments included, goes on in a run that loops over its layers."""
    looped = dataclasses.replace(TRAIN, optimizer=optimizer)
    before = train(tmp_path / "looped", looped)
    train(tmp_path / "run", dataclasses.replace(looped, scan=True, steps=2))
    after = train(tmp_path / "run", looped)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-3), after, before)


def test_the_mesh_may_change(whole, tmp_path):
    after = train(interrupted(whole, tmp_path), mesh=meshes.make_mesh(data=2, fsdp=2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-3), after, whole[1])


def test_a_branch_is_the_run_from_there_under_another_schedule(whole, tmp_path):
    folder = whole[0] / "state" / "2"
    same = train(tmp_path / "same", branch=(folder, ABOUT))
    jax.tree.map(np.testing.assert_array_equal, same, whole[1])
    assert [line["step"] for line in lines(tmp_path / "same")] == [3, 4]
    decayed = dataclasses.replace(TRAIN, schedule="wsd", decay=2, final_fraction=0.0)
    train(tmp_path / "decayed", decayed, branch=(folder, ABOUT))
    rates = [line["learning_rate"] for line in lines(tmp_path / "decayed")]
    assert rates == pytest.approx([float(optimizer.schedule(decayed)(step)) for step in (2, 3)])
    assert rates[1] < rates[0]


def test_a_branch_from_nowhere_or_of_other_data_is_refused(whole, tmp_path):
    with pytest.raises(InputError, match=r"no checkpoint to branch from in .*/3: .*those of .*: 2, 4"):
        train(tmp_path, branch=(whole[0] / "state" / "3", ABOUT))
    with pytest.raises(InputError, match="was made with seed=0, but this run asks for 1"):
        train(tmp_path, branch=(whole[0] / "state" / "2", {"seed": 1}))
