"""Damaged model files: each gives a ValueError or, where the damage leaves a whole file, a model.

None may hang, take the process down, allocate beyond twice the file, or touch anything but what it reads.
"""

import faulthandler
import hashlib
import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest

from efflm.compress import grammar, recipe
from efflm.compress.step import Context
from efflm.config import InputError
from efflm.config.model import ModelShape
from efflm.formats import efflm_file, huggingface, tensors, translate
from efflm.formats.sources import load_model
from efflm.model import LanguageModel, init_params
from efflm.ops import huffman
from efflm.parallel import meshes
from tests import tiny
from tests.formats.huggingface_test import small_tokenizer

PACKED = Path(__file__).parent / "goldens" / "packed"
SHAPE = ModelShape(layers=2, width=96, heads=4, kv_heads=2, mlp_dim=256, vocabulary=512, max_length=64)  # 0.9 MB
SLACK = 700_000  # bytes: what parsing, exceptions and Python's own caches take, whatever the file
SECONDS = 60
LENGTHS = (0, 1, 7, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
NUMBERS = (-1, 0, 1, 2**31, 2**32 + 1, 2**62, 2**63, 2**64, 10**400)
JUNK = (None, True, "", "x" * 1000, "\x00", [], {}, [[]], {"a": {}}, 1.5, 1e308, float("nan"), *NUMBERS)
DTYPES = ("F32", "F64", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "X9", None, 7)


@pytest.fixture(autouse=True)
def _no_hanging():
    """A load that never ends takes the process down, with a traceback of where it was."""
    faulthandler.dump_traceback_later(SECONDS * 10, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def snapshot(folder: Path) -> dict[str, tuple]:
    facts = {path: path.lstat() for path in sorted(folder.rglob("*"))}
    return {str(path): (fact.st_mode, fact.st_size, fact.st_mtime_ns) for path, fact in facts.items()}


def survives(load, folder: Path, size: int) -> bool:
    """Whether `load` gives a model. It may raise an InputError of one line, and nothing else; see the module."""
    before = snapshot(folder)
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    tracemalloc.start()
    try:
        load()
        good, message = True, ""
    except InputError as error:
        good, message = False, str(error)
    assert "\n" not in message
    assert len(message) < 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= 2 * size + SLACK, f"{peak:,} bytes for a file of {size:,}"
    assert snapshot(folder) == before
    return good


def model() -> LanguageModel:
    config = SHAPE.config()
    return LanguageModel(config, init_params(config, 0))


# --- mutations of bytes ----------------------------------------------------------------------------------------------


def damaged(raw: bytes, rng: np.random.Generator, text: slice) -> bytes:
    """Truncated, extended, with bits flipped or a stretch overwritten; half of it within `text`."""
    some, kind = bytearray(raw), rng.integers(6)
    at = int(rng.integers(text.start, text.stop) if rng.integers(2) else rng.integers(len(raw)))
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw + rng.bytes(int(rng.integers(1, 100)))
    if kind == 2:
        some[at : at + int(rng.integers(1, 9))] = rng.bytes(int(rng.integers(1, 9)))
        return bytes(some)
    for _ in range(1 if kind < 5 else 20):
        some[at] ^= 1 << int(rng.integers(8))
        at = int(rng.integers(text.start, text.stop))
    return bytes(some)


def safetensors_header(raw: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(header: dict | bytes, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def lied_about(raw: bytes, rng: np.random.Generator) -> bytes:
    """A safetensors file whose header says something else."""
    header, data = safetensors_header(raw)
    pick = lambda options: options[int(rng.integers(len(options)))]
    names = [name for name in header if name != "__metadata__"]
    name, other = pick(names), pick(names)
    entry, kind = header[name], rng.integers(10)
    if kind == 0:
        return with_header(header, data, pick(LENGTHS))
    if kind == 1:
        entry["shape"] = pick(([2**31, 2**33], [2**63, 2], [2**32, 2**32], [-1, -4], [], [0], [1.5], ["2"], None, 3))
    elif kind == 2:
        entry["shape"] = entry["shape"][::-1] + [1] * int(rng.integers(3))
    elif kind == 3:
        entry["dtype"] = pick(DTYPES)
    elif kind == 4:
        entry["data_offsets"][int(rng.integers(2))] = pick(NUMBERS)
    elif kind == 5:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == 6:
        del header[name]
    elif kind == 7:
        header[name], header[other] = header[other], header[name]
    elif kind == 8:
        twice = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[other])}}}'
        return with_header(twice.encode(), data)
    else:
        header[name] = pick(JUNK)
    return with_header(header, data)


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face directory with a neighbour that nobody may touch."""
    home = tmp_path_factory.mktemp("fuzz")
    huggingface.save(home / "model", model(), small_tokenizer())
    (home / "secret.safetensors").write_bytes((home / "model" / "model.safetensors").read_bytes())
    return home / "model"


def test_damaged_safetensors(folder):
    file, rng = folder / "model.safetensors", np.random.default_rng(0)
    raw = file.read_bytes()
    text = slice(0, 8 + struct.unpack("<Q", raw[:8])[0])
    results = []
    for i in range(500):
        broken = damaged(raw, rng, text) if i % 2 else lied_about(raw, rng)
        file.write_bytes(broken)
        results.append(survives(lambda: huggingface.load_weights(folder), folder.parent, len(raw)))
    file.write_bytes(raw)
    assert 30 < sum(results) < 200  # a flipped bit of a weight is a weight; most damage is found


def test_damaged_config(folder):
    file, rng = folder / "config.json", np.random.default_rng(1)
    raw = file.read_bytes()
    size = (folder / "model.safetensors").stat().st_size
    values = json.loads(raw)
    keys = [*values, "rope_scaling", "rope_parameters", "layer_types", "quantization_config", "auto_map", "head_dim"]
    keys += ["sliding_window", "use_sliding_window", "num_experts"]
    results = []
    for i in range(400):
        if i % 2:
            broken = damaged(raw, rng, slice(0, len(raw)))
        else:
            changed = dict(values)
            for _ in range(int(rng.integers(1, 3))):
                changed[keys[int(rng.integers(len(keys)))]] = JUNK[int(rng.integers(len(JUNK)))]
            if not i % 10:
                changed["model_type"] = ["mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"][i // 10 % 5]
            broken = json.dumps(changed).encode()
        file.write_bytes(broken)
        results.append(survives(lambda: huggingface.load_weights(folder), folder.parent, size))
    for broken in (
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[1, 2]",
        b"null",
        b"\xff\xfe",
        b"",
        b'{"model_type": "llama"}',
    ):
        file.write_bytes(broken)
        assert not survives(lambda: huggingface.load_weights(folder), folder.parent, size)
    file.write_bytes(raw)
    assert 20 < sum(results) < 250  # much of a config.json says nothing of the model


def paths_of(value, path=()):
    """The places in a JSON value, outermost first."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((*path, key), *paths_of(inner, (*path, key)))]


@pytest.mark.parametrize("name", ["w8a8", "w4a16_asym", "gptq4_asym", "gptq3", "awq4"])
def test_damaged_quantized_checkpoints(name, tmp_path):
    home = Path(shutil.copytree(PACKED / name, tmp_path / "model"))
    file, settings, rng = home / "model.safetensors", home / "config.json", np.random.default_rng(4)
    raw, config = file.read_bytes(), settings.read_bytes()
    text = slice(0, 8 + struct.unpack("<Q", raw[:8])[0])
    results = []
    for i in range(250):
        if i % 3 < 2:
            file.write_bytes(damaged(raw, rng, text) if i % 3 else lied_about(raw, rng))
        else:
            values = json.loads(config)
            places = paths_of(values["quantization_config"])
            *outer, key = places[int(rng.integers(len(places)))]
            inner = values["quantization_config"]
            for step in outer:
                inner = inner[step]
            inner[key] = JUNK[int(rng.integers(len(JUNK)))]
            settings.write_text(json.dumps(values))
        results.append(survives(lambda: huggingface.load_weights(home), tmp_path, len(raw)))
        file.write_bytes(raw)
        settings.write_bytes(config)
    assert 20 < sum(results) < 150


@pytest.fixture
def shards(folder, tmp_path):
    """The same model in three files and an index, and its weights once more outside of the folder."""
    home = Path(shutil.copytree(folder, tmp_path / "model"))
    (home / "model.safetensors").unlink()
    (tmp_path / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    family, _ = translate.describe(SHAPE.config())
    parts, where = list(translate.to_tensors(model(), family)), {}
    for i in range(3):
        name = f"model-{i + 1:05}-of-00003.safetensors"
        tensors.write_safetensors(home / name, parts[i::3])
        where |= dict.fromkeys([part[0] for part in parts[i::3]], name)
    (home / huggingface.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    huggingface.load_weights(home)
    return home


def test_damaged_index(shards):
    file, rng = shards / huggingface.INDEX, np.random.default_rng(2)
    raw = file.read_bytes()
    where = json.loads(raw)["weight_map"]
    size = sum(path.stat().st_size for path in shards.glob("*.safetensors"))
    names, files = list(where), sorted(set(where.values()))
    outside = ["../secret.safetensors", str(shards.parent / "secret.safetensors"), "a/b.safetensors", "..", ".", ""]
    outside += ["model-00009-of-00003.safetensors", huggingface.INDEX, "config.json", "a\x00b", "x" * 5000, "link"]
    results = []
    for i in range(300):
        if i % 2:
            broken = damaged(raw, rng, slice(0, len(raw)))
        else:
            changed, name = dict(where), names[int(rng.integers(len(names)))]
            kind = rng.integers(4)
            if kind == 0:
                del changed[name]
            elif kind == 1:
                changed[name] = files[int(rng.integers(3))]
            else:
                options = outside if kind == 2 else JUNK
                changed[name] = options[int(rng.integers(len(options)))]
            broken = json.dumps({"weight_map": changed}).encode()
        file.write_bytes(broken)
        results.append(survives(lambda: huggingface.load_weights(shards), shards.parent, size))
    for changed in (None, [], {}, 7, "model.safetensors", dict.fromkeys(names, files[0]), {"x": files[0]}):
        file.write_text(json.dumps({"weight_map": changed}))
        assert not survives(lambda: huggingface.load_weights(shards), shards.parent, size), changed
    assert 10 < sum(results) < 150


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("../secret.safetensors", r"speaks of '\.\./secret\.safetensors', which is not a file in it"),
        ("ABSOLUTE", "which is not a file in it"),
        ("folder/../link.safetensors", "which is not a file in it"),
        ("link.safetensors", "links out of its folder"),
        ("loop.safetensors", "has no loop"),
        ("pipe.safetensors", "is not a file"),
        ("folder", "is not a file"),
    ],
)
def test_shards_outside_of_the_folder_are_not_opened(shards, target, message):
    """By a path, by a link, by links in a circle; and nothing but files."""
    secret = shards.parent / "secret.safetensors"
    (shards / "link.safetensors").symlink_to(secret)
    (shards / "loop.safetensors").symlink_to(shards / "back.safetensors")
    (shards / "back.safetensors").symlink_to(shards / "loop.safetensors")
    (shards / "folder").mkdir()
    os.mkfifo(shards / "pipe.safetensors")
    target = str(secret) if target == "ABSOLUTE" else target
    where = dict.fromkeys(tensors.from_safetensors(secret).shapes, target)
    (shards / huggingface.INDEX).write_text(json.dumps({"weight_map": where}))
    with pytest.raises(InputError, match=message):
        huggingface.load_weights(shards)
    (shards / huggingface.INDEX).unlink()
    (shards / huggingface.WEIGHTS).symlink_to(secret)
    with pytest.raises(InputError, match="links out of its folder"):
        huggingface.load_weights(shards)


def test_missing_and_damaged_shards_are_named(shards):
    part = shards / "model-00002-of-00003.safetensors"
    raw = part.read_bytes()
    part.write_bytes(raw[:-5])
    with pytest.raises(InputError, match=r"model-00002-of-00003\.safetensors cannot be read as safetensors"):
        huggingface.load_weights(shards)
    part.unlink()
    with pytest.raises(InputError, match=r"has no model-00002-of-00003\.safetensors: the model is not whole"):
        huggingface.load_weights(shards)
    part.write_bytes((shards / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"is in model-00002-of-00003\.safetensors, but .* says model-00001"):
        huggingface.load_weights(shards)


@pytest.mark.parametrize(("chain", "coded"), [("w8a16", False), ("magnitude50", False), ("magnitude50,w3a16", True)])
def test_damaged_files_of_our_own(chain, coded, tmp_path):
    compressed, _ = recipe.apply(model(), grammar.chain(chain), Context(mesh=meshes.make_mesh()))
    file, rng = tmp_path / "model.safetensors", np.random.default_rng(3)
    efflm_file.save(file, compressed, {"recipe": chain}, coded=coded)
    raw = file.read_bytes()
    efflm_file.load(file)  # what it compiles is not of a damaged file
    header, data = safetensors_header(raw)
    text = slice(0, len(raw) - len(data))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(compressed))
    results = []
    for i in range(250):
        if i % 3 == 0:
            broken = damaged(raw, rng, text)
        elif i % 3 == 1:
            broken = lied_about(raw, rng)
        else:
            manifest = json.loads(header["__metadata__"]["efflm"])
            name, junk = list(manifest)[int(rng.integers(len(manifest)))], JUNK[int(rng.integers(len(JUNK)))]
            part = manifest[name]
            if isinstance(part, list):
                manifest[name] = [*part[1:], junk]
            else:
                part[list(part)[int(rng.integers(len(part)))] if part else "new"] = junk
            if i % 5 == 0:
                manifest = JUNK[int(rng.integers(len(JUNK)))]
            broken = with_header(header | {"__metadata__": {"efflm": json.dumps(manifest)}}, data)
        file.write_bytes(broken)
        # A sparse matrix is larger in memory than in its file, and so is a coded one.
        most = huffman.MOST * len(raw) if coded else max(len(raw), whole)
        results.append(survives(lambda: efflm_file.load(file), tmp_path, most))
    assert 15 < sum(results) < 150


def test_a_shape_beyond_the_file_allocates_nothing(tmp_path):
    """The shape of a sparse weight follows from the config in the metadata, which safetensors does not check."""
    compressed, _ = recipe.apply(tiny.model(), grammar.chain("magnitude50"), Context(mesh=meshes.make_mesh()))
    file = tmp_path / "model.safetensors"
    efflm_file.save(file, compressed, {})
    header, data = safetensors_header(file.read_bytes())
    manifest = json.loads(header["__metadata__"]["efflm"])
    block, config = dict(manifest["config"]["blocks"][0]), dict(manifest["config"])
    for wide in (2**31, 2**63, -32, 0, "32", [32], 2**20):
        changed = config | {"width": wide, "blocks": [block | {"mlp_dim": wide}] * 3}
        manifest["config"] = changed
        file.write_bytes(with_header(header | {"__metadata__": {"efflm": json.dumps(manifest)}}, data))
        assert not survives(lambda: efflm_file.load(file), tmp_path, file.stat().st_size)


def test_a_directory_is_read_and_not_changed(folder):
    digest = lambda: {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    before = digest()
    load_model(folder)
    assert digest() == before
