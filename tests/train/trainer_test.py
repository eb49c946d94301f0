"""The assembled run is the same run whole and step by step, on real arrays and on abstract ones; the README's too."""

import dataclasses
import gc
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from efflm import trees
from efflm.config.train import TrainConfig
from efflm.model import init_params, stack_blocks
from efflm.parallel import meshes
from efflm.train import aot, callbacks, metrics, trainer
from efflm.train.checkpointing import Checkpointing
from efflm.train.step import place
from tests import tiny

TRAIN = TrainConfig(steps=3, batch=8, length=16, policy="bfloat16_pure", scan=True, accumulate=2)
CONFIG = dataclasses.replace(tiny.LLAMA, layers=2).config()


def batches(step):
    return tiny.batch(CONFIG, seed=step)


def test_a_whole_run_equals_its_steps():
    mesh = meshes.make_mesh()
    task = trainer.model_task(CONFIG, TRAIN, lambda: init_params(CONFIG, 5), batches)
    _, init, step = trainer.prepared(task, mesh, seed=7)
    state = init(task.start())
    for i in range(TRAIN.steps):
        state, _ = step(state, {}, place(batches(i), mesh))
    model = trainer.fit(task, mesh=mesh, seed=7)
    assert model.params["embedding"].dtype == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, stack_blocks(model.params, CONFIG), state.trainable)


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("resumed", [False, True])
def test_nothing_but_the_state_is_alive_after_the_first_step(scan, resumed, tmp_path):
    """AdamW in float32: a weight and two moments, 12 bytes a parameter. The starting weights are gone, and a run that
    is resumed makes none."""
    train = dataclasses.replace(TRAIN, steps=6, policy="float32", scan=scan, accumulate=1)
    started, alive, before = [], [], 0

    def start():
        started.append(1)
        return init_params(CONFIG, 0)

    def run(batches, every=0):  # while a checkpoint is written a copy of the state is alive too
        kept = Checkpointing(directory=tmp_path, every=every)
        task = trainer.model_task(CONFIG, train, start, batches)
        return trainer.fit(task, mesh=meshes.make_mesh(), checkpointing=kept)

    def looked_at(step):
        alive.append(sum(array.nbytes for array in jax.live_arrays()) - before)
        return batches(step)

    def killed(step):
        if step == 3:
            raise RuntimeError("killed")
        return batches(step)

    if resumed:
        with pytest.raises(RuntimeError, match="killed"):
            run(killed, every=2)
        started.clear()
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    model = run(looked_at)
    assert len(started) == (0 if resumed else 1)
    rows = 4 * 4 * train.batch * train.length + 1000  # of a batch, and of the metrics that wait to be fetched
    assert max(alive[1:]) <= 12 * trees.count(model.params) + rows


def test_the_abstract_step_takes_what_the_real_one_takes():
    mesh = meshes.make_mesh(data=2, fsdp=2, tensor=2)
    _, (abstract, frozen, rows) = aot.training_step(CONFIG, TRAIN, mesh)
    task = aot.random_task(CONFIG, TRAIN, mesh)
    real = trainer.prepared(task, mesh)[1](task.start())
    about = lambda tree: [(path, x.shape, x.dtype, x.sharding) for path, x in trees.flatten(tree, inside=True)]
    assert frozen == {}
    assert about(abstract) == about(real)
    assert about(rows) == about(place(batches(0), mesh))


def readme_code():
    return re.findall(r"```python\n(.*?)```", (Path(trainer.__file__).parent / "README.md").read_text(), re.S)


@pytest.mark.parametrize("index", [0, 1], ids=["the example", "an optimizer of one's own"])
def test_the_code_in_the_readme_trains(index, tmp_path):
    """An optimizer is added in one file of less than 60 lines, and the loss of the rows that it reads again falls."""
    code, names = readme_code()[index], {}
    assert len(code.splitlines()) < 60
    exec(compile(code, "README.md", "exec"), names)
    assert not np.array_equal(names["model"].params["embedding"], init_params(names["config"], 0)["embedding"])
    if index == 1:
        file = tmp_path / "metrics.jsonl"
        trainer.fit(names["task"], mesh=meshes.make_mesh(), title="", watched=[callbacks.lines(file)])
        _, losses = metrics.curve(file)
        assert losses[-1] < losses[0] - 0.1
