import json

import jax
import numpy as np
import pytest
from safetensors import safe_open

from efflm import trees
from efflm.compress import recipe
from efflm.compress.step import Context
from efflm.config import InputError, ModelShape
from efflm.formats import safetensors
from efflm.model import LanguageModel, init_params, sharding
from tests import tiny

CHAINS = ["", "bfloat16", "w8a16", "w8a8", "masks50", "masks24", "masks50,w8a8", "bfloat16,masks50"]


def compressed(model, chain):
    return recipe.run(model, recipe.named(chain), Context(mesh=sharding.make_mesh())) if chain else (model, ())


@pytest.mark.parametrize("chain", CHAINS)
def test_models_come_back_bit_for_bit(tmp_path, chain):
    model, _ = compressed(tiny.model(), chain)
    safetensors.save(tmp_path / "m.safetensors", model, {"recipe": chain})
    back, about = safetensors.load(tmp_path / "m.safetensors")
    assert about == {"recipe": chain}
    assert back.config == model.config
    assert jax.tree.structure(back.params) == jax.tree.structure(model.params)
    for a, b in zip(jax.tree.leaves(back.params), jax.tree.leaves(model.params)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("chain", CHAINS[1:])
def test_bytes_are_predicted_to_a_percent_and_64_kib(tmp_path, chain):
    config = ModelShape(layers=2, vocabulary=2048, width=192).config()
    model, records = compressed(LanguageModel(config, init_params(config, 0)), chain)
    size = safetensors.save(tmp_path / "m.safetensors", model, {})
    assert abs(size - records[-1].nbytes) <= 0.01 * size + 65536


def test_a_quantized_file_holds_no_float_matrix(tmp_path):
    model, _ = compressed(tiny.model(), "w8a16")
    safetensors.save(tmp_path / "m.safetensors", model, {})
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            assert tensor.dtype == np.int8 or tensor.size <= 300, name


def test_sparse_matrices_are_a_bitmask_and_their_values(tmp_path):
    model, _ = compressed(tiny.model(), "masks50")
    safetensors.save(tmp_path / "m.safetensors", model, {})
    path, w = trees.select(model.params, "block_0/feedforward/up/kernel")[0]
    w = np.asarray(w)
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        bits = np.unpackbits(file.get_tensor(f"{path}/bitmask"))[: w.size].reshape(w.shape)
        np.testing.assert_array_equal(bits, w != 0)
        np.testing.assert_array_equal(file.get_tensor(f"{path}/nonzeros"), w[w != 0])
        assert path not in file.keys()  # noqa: SIM118


def test_broken_files_are_one_clear_error(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match="no model file"):
        safetensors.load(path)
    safetensors.save(path, tiny.model(), {})
    whole = path.read_bytes()
    for broken in (b"", whole[:5], whole[:200], whole[:-10], b"\xff" * 100, whole[:8] + b"{]" + whole[10:]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="cannot be read"):
            safetensors.load(path)
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(InputError, match="not written by efflm"):
        safetensors.load(path)


def test_files_that_contradict_themselves_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "m.safetensors"
    made = {chain: compressed(tiny.model(), chain)[0] for chain in ("", "masks50", "w8a16")}

    def refused(chain, change, message):
        safetensors.save(path, made[chain], {})
        with safe_open(path, framework="numpy") as file:
            manifest = json.loads(file.metadata()["efflm"])
        tensors = load_file(path)
        change(tensors, manifest)
        save_file(tensors, path, metadata={"efflm": json.dumps(manifest)})
        with pytest.raises(InputError, match=message):
            safetensors.load(path)

    up = "block_0/feedforward/up/kernel"
    narrower = lambda tensors, manifest: manifest["config"]["blocks"][0].update(mlp_dim=40)
    refused("", narrower, r"down/kernel has shape \(48, 32\), but the config says \(40, 32\), of 3 such")
    refused("", lambda tensors, manifest: tensors.pop(up), "up/kernel has shape None, but the config says")
    unknown = lambda tensors, manifest: tensors.update(extra=np.zeros(3))
    refused("", unknown, r"extra has shape \(3,\), but the config says None")
    half = lambda name: lambda tensors, manifest: tensors.update({name: tensors[name][: len(tensors[name]) // 2]})
    refused("masks50", half(f"{up}/bitmask"), r"up/kernel of shape \(32, 48\) has a bitmask of 96 bytes")
    refused("masks50", half(f"{up}/nonzeros"), r"up/kernel has 384 values for another number of bits")
    as_float = lambda tensors, manifest: tensors.update({f"{up}/values": tensors[f"{up}/values"].astype(np.float32)})
    refused("w8a16", as_float, "up/kernel/values is stored as float32, which is not what such a weight is made of")
    short = lambda tensors, manifest: tensors.update({f"{up}/scale": tensors[f"{up}/scale"][:, :1]})
    refused("w8a16", short, r"up/kernel of shape \(32, 48\) has a scale of shape \(1, 1\)")
    other = lambda tensors, manifest: manifest["kinds"][up].update(activations="int3")
    refused("w8a16", other, "up/kernel has unknown activations int3")
