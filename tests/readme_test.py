"""The README's code runs, and what it names exists."""

import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from efflm import trees
from efflm.compress import recipe
from tests import tiny

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_step_of_ones_own_works():
    text = (ROOT / "efflm" / "compress" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    model = tiny.model()
    after = names["compressed"](model)
    for path, w in trees.select(model.params, "kernel"):
        new = np.asarray(dict(trees.flatten(after.params))[path])
        assert (new == 0).sum() == new.size // 2
        mantissa, _ = np.frexp(new)
        np.testing.assert_array_equal(mantissa * 16, np.round(mantissa * 16))
        assert np.all(np.abs(new[new != 0] / np.asarray(w)[new != 0] - 1) <= 2**-4)
    assert jnp.all(after.params["embedding"] == model.params["embedding"])


def test_named_recipes_files_and_pictures_exist():
    listed = re.search(r"Recipes: (.*?)\. On", TEXT).group(1)
    assert re.findall(r"`(\w+)`", listed) == list(recipe.RECIPES)
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert (ROOT / link).exists(), link
    for script in re.findall(r"launch/\w+\.sh", TEXT):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"experiments\.(\w+)", TEXT):
        assert (ROOT / "experiments" / f"{module}.py").exists(), module
