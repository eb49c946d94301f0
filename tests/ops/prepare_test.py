"""Models laid out for the kernels of this machine compute what they computed before, and are not written to files."""

import jax
import numpy as np
import pytest

from efflm import ops, trees
from efflm.config import InputError
from efflm.formats import efflm_file
from efflm.model import placement
from efflm.model.params import find, is_matrix
from efflm.ops.kernels.cpu import build
from efflm.ops.kernels.cpu.dot import Dense, Panels
from efflm.ops.storage import to_flat
from efflm.parallel import meshes
from tests import tiny

FORMATS = {
    "float32": None,
    "8 bits": {"bits": 8},
    "8 bits, activations too": {"bits": 8, "activations": "int8"},
    "4 bits in groups": {"bits": 4, "group": 16},
    "3 bits with zeros": {"bits": 3, "symmetric": False},
    "2 bits in super-blocks": {"bits": 2, "group": 16, "super_block": 256, "symmetric": False},
    "groups that no kernel takes": {"bits": 4, "group": 10},
}


pytestmark = pytest.mark.usefixtures("native_kernels")


def quantized(model, format):
    def one(path, leaf):
        return ops.quantize_array(leaf, find(path)[0].contracted, ops.Format(**format)) if is_matrix(path) else leaf

    return model if format is None else model.replace(params=trees.map_with_path(one, model.params))


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_prepared_model_has_the_same_logits(format):
    model = quantized(tiny.model(), format)
    prepared = ops.prepare(model, "cpu")
    kinds = {type(leaf) for _, leaf in trees.flatten(prepared.params) if leaf.ndim == 2}
    assert kinds == {ops.QArray if format and format.get("group") == 10 else Panels if format else Dense}
    tokens = tiny.tokens(model.config, 1, 3)
    here, there = tiny.logits(prepared, tokens), tiny.logits(model, tokens)
    # A rounded activation may lie on the other side of a tie.
    off = 0.02 if format and "activations" in format else 1e-5
    np.testing.assert_allclose(here, there, atol=off * np.abs(there).max())


def test_a_prepared_model_knows_where_it_is_from():
    model = tiny.model().with_about({"source": "stdlib"})
    assert ops.prepare(model, "cpu").about == ops.prepared(model, "cpu").about == {"source": "stdlib"}


def test_models_on_several_devices_or_without_kernels_stay_as_they_are():
    model = tiny.model()
    spread = jax.device_put(model, placement.shardings(model, meshes.make_mesh(fsdp=8)))
    assert jax.tree.structure(ops.prepare(spread, "cpu")) == jax.tree.structure(spread)
    assert ops.prepare(model, "gpu") is model
    with build.chosen("off"):
        assert ops.prepare(model, "cpu") is model


@pytest.mark.parametrize("format", [None, {"bits": 8}])
def test_a_prepared_model_is_not_saved(format, tmp_path):
    prepared = ops.prepare(quantized(tiny.model(), format), "cpu")
    with pytest.raises(InputError, match=r"laid out for the kernels of this machine: give the one that ops\.prepare"):
        efflm_file.save(tmp_path / "model.safetensors", prepared, {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="laid out for the kernels"):  # what checkpoints are made of
        to_flat(prepared.params)
