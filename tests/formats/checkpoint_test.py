import jax
import numpy as np
import pytest

from efflm.compress import grammar, recipe
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.formats import checkpoint
from efflm.model import placement
from efflm.parallel import meshes
from tests import tiny


@pytest.mark.parametrize("name", ["", "bfloat16", "w8a16", "w8a8", "magnitude50,w8a8"])
def test_models_come_back_bit_for_bit(tmp_path, name):
    model, mesh = tiny.model(), meshes.make_mesh()
    if name:
        model, _ = recipe.apply(model, grammar.chain(name), Context(mesh=mesh))
    checkpoint.save(tmp_path / "c", 3, model, {"seed": 1})
    back, about = checkpoint.load(tmp_path / "c", mesh)
    assert back.config == model.config
    assert about == {"seed": 1}
    assert jax.tree.structure(back.params) == jax.tree.structure(model.params)
    for a, b in zip(jax.tree.leaves(back.params), jax.tree.leaves(model.params)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_a_checkpoint_lies_on_the_mesh_it_is_asked_for(tmp_path):
    model = tiny.model()
    checkpoint.save(tmp_path, 0, model, {})
    mesh = meshes.make_mesh(fsdp=4, tensor=2)
    back, _ = checkpoint.load(tmp_path, mesh)
    assert back.params["embedding"].sharding == placement.shardings(model.params, mesh)["embedding"]
    np.testing.assert_array_equal(back.params["embedding"], model.params["embedding"])


def test_missing_and_broken_checkpoints_are_one_clear_line(tmp_path):
    mesh = meshes.make_mesh()
    with pytest.raises(InputError, match="no checkpoint in"):
        checkpoint.load(tmp_path / "none", mesh)
    checkpoint.save(tmp_path, 0, tiny.model(), {})
    for file in (tmp_path / "0").rglob("*"):
        if file.is_file() and file.stat().st_size:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=r"no checkpoint is whole: delete the folder /") as error:
        checkpoint.load(tmp_path, mesh)
    assert "\n" not in str(error.value)


def test_a_difference_is_named():
    checkpoint.require_same({"seed": 1}, {"seed": 1, "more": 2}, "x")
    with pytest.raises(InputError, match="seed=2, but this run asks for 1"):
        checkpoint.require_same({"seed": 1}, {"seed": 2}, "x")
