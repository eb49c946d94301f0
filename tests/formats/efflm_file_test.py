import dataclasses
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from efflm import ops, trees
from efflm.compress import grammar, recipe
from efflm.compress.magnitude import magnitude_masks
from efflm.compress.step import Context, digest
from efflm.config import InputError
from efflm.config.model import ModelShape
from efflm.formats import checkpoint, efflm_file
from efflm.model import LanguageModel, init_params, params, placement
from efflm.ops import lowrank, quantize_array
from efflm.parallel import meshes
from tests import tiny

CHAINS = [
    "",
    "bfloat16",
    "w8a16",
    "w8a8",
    "magnitude50",
    "magnitude24",
    "magnitude50,w8a8",
    "w8a16,magnitude50",
    "bfloat16,magnitude50",
]


def compressed(model, chain):
    return recipe.apply(model, grammar.chain(chain), Context(mesh=meshes.make_mesh())) if chain else (model, ())


def same(a, b):
    assert a.config == b.config
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("chain", CHAINS)
def test_models_come_back_bit_for_bit(tmp_path, chain):
    model, _ = compressed(tiny.model(), chain)
    efflm_file.save(tmp_path / "m.safetensors", model, {"recipe": chain})
    back, about = efflm_file.load(tmp_path / "m.safetensors")
    assert about == {"recipe": chain, "lineage": []}
    same(back, model)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("chain", CHAINS[1:])
def test_bytes_are_predicted_to_a_percent_and_64_kib(tmp_path, chain):
    config = ModelShape(layers=2, vocabulary=2048, width=192).config()
    model, records = compressed(LanguageModel(config, init_params(config, 0)), chain)
    size = efflm_file.save(tmp_path / "m.safetensors", model, {})
    assert abs(size - records[-1].predicted_bytes) <= 0.01 * size + 65536


def test_a_quantized_file_holds_no_float_matrix(tmp_path):
    model, _ = compressed(tiny.model(), "w8a16")
    efflm_file.save(tmp_path / "m.safetensors", model, {})
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            assert tensor.dtype == np.int8 or tensor.size <= 300, name


def test_sparse_matrices_are_a_bitmask_and_their_values(tmp_path):
    model, _ = compressed(tiny.model(), "magnitude50")
    efflm_file.save(tmp_path / "m.safetensors", model, {})
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
        efflm_file.load(path)
    efflm_file.save(path, tiny.model(), {})
    whole = path.read_bytes()
    for broken in (b"", whole[:5], whole[:200], whole[:-10], b"\xff" * 100, whole[:8] + b"{]" + whole[10:]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="cannot be read"):
            efflm_file.load(path)
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, path)
    with pytest.raises(InputError, match="not written by efflm"):
        efflm_file.load(path)


def test_files_that_contradict_themselves_are_refused(tmp_path):
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "m.safetensors"
    made = {chain: compressed(tiny.model(), chain)[0] for chain in ("", "magnitude50", "w8a16")}

    def refused(chain, change, message):
        efflm_file.save(path, made[chain], {})
        with safe_open(path, framework="numpy") as file:
            manifest = json.loads(file.metadata()["efflm"])
        tensors = load_file(path)
        change(tensors, manifest)
        save_file(tensors, path, metadata={"efflm": json.dumps(manifest)})
        with pytest.raises(InputError, match=message):
            efflm_file.load(path)

    up = "block_0/feedforward/up/kernel"
    narrower = lambda tensors, manifest: manifest["config"]["blocks"][0].update(mlp_dim=40)
    refused("", narrower, r"down/kernel has shape \(48, 32\), but the config says \(40, 32\), of 3 such")
    refused("", lambda tensors, manifest: tensors.pop(up), "up/kernel has shape None, but the config says")
    unknown = lambda tensors, manifest: tensors.update(extra=np.zeros(3))
    refused("", unknown, r"extra has shape \(3,\), but the config says None")
    half = lambda name: lambda tensors, manifest: tensors.update({name: tensors[name][: len(tensors[name]) // 2]})
    refused("magnitude50", half(f"{up}/bitmask"), r"up/kernel/bitmask has shape \(96,\), but the config says \(192,\)")
    refused("magnitude50", half(f"{up}/nonzeros"), "384 values stand for 768 set bits")
    as_float = lambda tensors, manifest: tensors.update({f"{up}/values": tensors[f"{up}/values"].astype(np.float32)})
    refused("w8a16", as_float, "up/kernel/values is stored as float32, which is not what such a weight is made of")
    short = lambda tensors, manifest: tensors.update({f"{up}/scale": tensors[f"{up}/scale"][:, :1]})
    refused("w8a16", short, r"up/kernel/scale has shape \(1, 1\), but the config says \(1, 48\)")
    other = lambda tensors, manifest: manifest["formats"][up].update(activations="int3")
    refused("w8a16", other, "activations is .int3.: choose from")
    foreign = lambda tensors, manifest: manifest["masks"].append("block_0/mystery")
    refused("magnitude50", foreign, "block_0/mystery is no weight of the config")


@settings(max_examples=6)
@given(
    st.sampled_from(range(2, 9)),
    st.sampled_from([0, 20, 16, (16, 256)]),
    st.booleans(),
    st.sampled_from([None, 0.05, 0.5, 0.9]),
)
def test_every_format_comes_back_from_files_and_checkpoints_as_predicted(bits, group, symmetric, sparsity):
    """Packed or not, with zero points or not, with masks that pay for a bitmask and masks that do not."""
    model = tiny.model(dataclasses.replace(tiny.LLAMA, layers=1, kv_heads=4, mlp_dim=32))  # few shapes to compile for
    masks = magnitude_masks(model.params, sparsity) if sparsity else None
    group, super_block = group if isinstance(group, tuple) else (group, 0)
    form = ops.Format(bits=bits, group=group, symmetric=symmetric, super_block=super_block)
    quantized = lambda path, w: quantize_array(w, params.find(path)[0].contracted, form) if w.ndim == 2 else w
    weights = ops.apply_masks(trees.map_with_path(quantized, model.params), masks)
    model = LanguageModel(model.config, weights, masks)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "m.safetensors"
        size = efflm_file.save(file, model, {})
        predicted = ops.stored_nbytes(model.params, model.masks)
        with safe_open(file, framework="numpy") as opened:
            assert sum(opened.get_tensor(name).nbytes for name in opened.keys()) == predicted < size  # noqa: SIM118
        same(efflm_file.load(file)[0], model)
        coded = Path(folder) / "coded.safetensors"
        efflm_file.save(coded, model, {}, coded=True)
        predicted = ops.stored_nbytes(model.params, model.masks, coded=True)
        with safe_open(coded, framework="numpy") as opened:
            assert sum(opened.get_tensor(name).nbytes for name in opened.keys()) == predicted < 0.95 * size  # noqa: SIM118
        same(efflm_file.load(coded)[0], model)
        checkpoint.save(Path(folder) / "c", 1, model, {})
        mesh = meshes.make_mesh(fsdp=2, tensor=2)
        back, _ = checkpoint.load(Path(folder) / "c", mesh)
        same(back, model)
        for each in (file, coded):
            spread = efflm_file.load(each, mesh)[0]
            same(spread, model)
            where = placement.shardings(spread.params, mesh)
            assert jax.tree.map(lambda leaf: leaf.sharding, spread.params) == where
            assert any("fsdp" in each.spec for each in jax.tree.leaves(where))


def test_a_model_rounded_for_entropy_coded_files_is_saved_so_wherever_it_comes_from(tmp_path):
    path, up = tmp_path / "m.safetensors", "block_0/feedforward/up/kernel"
    model, records = compressed(tiny.model(), "quantize[entropy=3,embeddings=4]")
    pair = {up: (np.ones((tiny.LLAMA.width, 2), np.float32), np.ones((2, tiny.LLAMA.mlp_dim), np.float32))}
    corrected = model.replace(params=lowrank.join(model.params, pair))
    cases = [(model, records), compressed(model, "magnitude@0.3"), (corrected, ())]
    for model, records in cases:
        for _ in range(2):  # the second time as it was read
            efflm_file.save(path, model, {}, records)
            with safe_open(path, framework="numpy") as file:
                size = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
            assert size == ops.stored_nbytes(model.params, model.masks)
            assert not records or size == records[-1].predicted_bytes
            assert size < 0.9 * ops.stored_nbytes(model.params, model.masks, coded=False)
            model, _ = efflm_file.load(path)
    assert ops.is_coded(lowrank.join({"w": dict(trees.flatten(corrected.params))[up].base}, {"w": pair[up]}))
    assert not ops.is_coded(compressed(tiny.model(), "w8a16")[0].params)


def test_what_is_wrong_with_coded_tensors_is_a_line_that_names_one(tmp_path):
    from safetensors.numpy import load_file, save_file

    path, up = tmp_path / "m.safetensors", "block_0/feedforward/up/kernel/values"
    model, records = compressed(tiny.model(), "quantize@3[scales=matrix]")  # some codes are rare: they are worth coding
    efflm_file.save(path, model, {}, records, coded=True)
    good, about = load_file(path), efflm_file.load(path)[1]
    assert about["lineage"][0]["actual_bytes"] == sum(tensor.nbytes for tensor in good.values())
    with safe_open(path, framework="numpy") as file:
        manifest = json.loads(file.metadata()["efflm"])
    dtype, (K, N), packed = manifest["coded"][up]
    assert (dtype, packed, good[up].dtype) == ("uint8", [-2, 3], np.uint8)

    def refused(message, value=good[up], kind=(dtype, (K, N), packed), name=up):
        changed = manifest | {"coded": manifest["coded"] | {name: kind}}
        save_file(good | {up: value}, path, metadata={"efflm": json.dumps(changed)})
        with pytest.raises(InputError, match=message) as found:
            efflm_file.load(path)
        assert "\n" not in str(found.value)

    flipped = good[up] ^ (np.arange(good[up].size) == 100)
    for value in (good[up][:100], np.append(good[up], np.uint8(0)), flipped):
        refused(f"{up}: its codes are damaged", value)
    refused(f"{up}: 2 bytes cannot stand for {K * N * 4 // 3}", good[up][:2])
    refused(rf"{up} has shape \({3 << 60}, {N}\), but the config says", kind=(dtype, (3 << 60, N), packed))
    kinds = [("object", (K, N), packed), (dtype, (-K, -N), packed), (dtype, (K + 1, N), packed)]
    for kind in (*kinds, (dtype, (K, N), (0, 3)), (dtype, (K, N), (-2, 4)), (dtype, (K, N), (-2, 9))):
        refused(f"{up} is said to be", kind=kind)
    refused("mystery is said to be", name="mystery")


def test_files_of_before_a_dtype_was_told_stand_for_that_of_their_scales(tmp_path):
    from safetensors.numpy import load_file, save_file

    file, form = tmp_path / "m.safetensors", ops.Format(scale_dtype="bfloat16")
    model = tiny.model()
    model.params["embedding"] = quantize_array(model.params["embedding"], -1, form).replace(dtype="bfloat16")
    efflm_file.save(file, model, {})
    with safe_open(file, framework="numpy") as opened:
        manifest = json.loads(opened.metadata()["efflm"])
    assert manifest["formats"]["embedding"].pop("dtype") == "bfloat16"
    save_file(load_file(file), file, metadata={"efflm": json.dumps(manifest)})
    same(efflm_file.load(file)[0], model)


def test_a_zero_without_a_mask_comes_back_without_one(tmp_path):
    """Many zeros are stored as a bitmask because it is smaller, which does not make them pruned."""
    model = tiny.model()
    up = model.params["block_0"]["feedforward"]["up"]
    up["kernel"] = up["kernel"] * (np.arange(48) % 4 == 0)[None]
    efflm_file.save(tmp_path / "m.safetensors", model, {})
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        assert "block_0/feedforward/up/kernel/bitmask" in file.keys()  # noqa: SIM118
    back, _ = efflm_file.load(tmp_path / "m.safetensors")
    same(back, model)
    assert back.masks is None


def test_lineage_is_kept_and_continued(tmp_path):
    """Each record names the model it was applied to; compressing a compressed model keeps its history."""
    first, records = compressed(tiny.model(), "magnitude50")
    file = tmp_path / "m.safetensors"
    efflm_file.save(file, first, {"source": "text"}, records)
    model, about = efflm_file.load(file)
    second, more = compressed(model, "w8a16")
    efflm_file.save(tmp_path / "n.safetensors", second, about, more)
    _, about = efflm_file.load(tmp_path / "n.safetensors")
    pruned, quantized = about["lineage"]
    assert (pruned["step"], pruned["settings"]["sparsity"], quantized["step"]) == ("Magnitude", 0.5, "Quantize")
    assert pruned["parent"] == digest(tiny.model())
    assert quantized["parent"] == digest(first) == digest(model)
    for entry in (pruned, quantized):
        assert entry["actual_bytes"] == entry["predicted_bytes"] > 0
    assert about["source"] == "text"
