"""The assembled run is the same run whole and step by step, on real arrays and on abstract ones; the README's too."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np

from efflm import trees
from efflm.config import TrainConfig
from efflm.model import LanguageModel, init_params, sharding, stack_blocks
from efflm.train import ahead, assemble
from efflm.train.step import place
from tests import tiny

TRAIN = TrainConfig(steps=3, batch=8, length=16, policy="bfloat16_pure", scan=True, accumulate=2)
CONFIG = dataclasses.replace(tiny.LLAMA, layers=2).config()


def batches(step):
    return tiny.batch(CONFIG, seed=step)


def test_a_whole_run_equals_its_steps():
    mesh = sharding.make_mesh()
    state = assemble.init_state(CONFIG, TRAIN, mesh, seed=5)
    step = assemble.make_step(CONFIG, TRAIN, state, seed=7)
    for i in range(TRAIN.steps):
        state, _ = step(state, {}, place(batches(i), mesh))
    model = assemble.fit_model(LanguageModel(CONFIG, init_params(CONFIG, 5)), TRAIN, batches, mesh=mesh, seed=7)
    assert model.params["embedding"].dtype == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, stack_blocks(model.params, CONFIG), state.trainable)


def test_the_abstract_step_takes_what_the_real_one_takes():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    _, (abstract, frozen, rows) = ahead.training_step(CONFIG, TRAIN, mesh)
    real = assemble.init_state(CONFIG, TRAIN, mesh)
    about = lambda tree: [(path, x.shape, x.dtype, x.sharding) for path, x in trees.flatten(tree, inside=True)]
    assert frozen == {}
    assert about(abstract) == about(real)
    assert about(rows) == about(place(batches(0), mesh))


def test_the_example_in_the_readme_trains():
    text = (Path(assemble.__file__).parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert not np.array_equal(names["model"].params["embedding"], names["start"].params["embedding"])
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (Path(assemble.__file__).parent / link).exists(), link
