"""One name for models from anywhere: directories, files, runs, the hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import jax
import numpy as np
import pytest

from efflm import trees
from efflm.compress.quantize import quantize
from efflm.config import InputError
from efflm.formats import checkpoint, efflm_file, gguf_model, hub, huggingface, manifest, sources, wheels
from efflm.formats.sources import load_model
from efflm.infer.generate import forward
from efflm.model import in_dtype
from efflm.parallel import meshes
from tests import gguf_files, tiny
from tests.formats.fuzz_test import safetensors_header, with_header
from tests.formats.huggingface_test import require_equal, small_tokenizer

MESH = meshes.make_mesh(fsdp=2, tensor=2)


@pytest.fixture
def run(tmp_path):
    """The directory of a training run."""
    small_tokenizer().save(tmp_path / "run" / "tokenizer.json")
    checkpoint.save(tmp_path / "run" / "checkpoint", 3, tiny.model(), {"source": "stdlib"})
    return tmp_path / "run"


def spread(model) -> bool:
    kernel = model.params["block_0"]["attention"]["query"]["kernel"]
    return jax.tree.leaves(kernel)[0].sharding.spec == jax.P("fsdp", "tensor")


def test_training_runs_and_their_checkpoints(run):
    for source in (run, str(run), run / "checkpoint"):
        model, tokens = load_model(source)
        require_equal(model, tiny.model())
        assert tokens.digest == small_tokenizer().digest
    with pytest.raises(InputError, match="dtype is 'int8', but must be float32, bfloat16 or float16"):
        load_model(run, dtype="int8")
    loaded = sources.load(run, dtype="bfloat16", mesh=MESH)
    require_equal(loaded.model, in_dtype(tiny.model(), "bfloat16"))
    assert spread(loaded.model)
    assert loaded.about == {"source": "stdlib"}
    assert loaded.nbytes > 4 * sum(leaf.size for leaf in jax.tree.leaves(tiny.model().params))
    (run / "checkpoint" / "3" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"no checkpoint is whole: delete the folder .*checkpoint"):
        load_model(run)


def test_files_of_our_own(tmp_path):
    model = tiny.model().replace(params=quantize(tiny.model().params, "int8"))
    size = efflm_file.save(tmp_path / "w8a8.safetensors", model, {"recipe": "w8a8"})
    with pytest.raises(InputError, match="no tokenizer at"):
        load_model(tmp_path / "w8a8.safetensors")
    small_tokenizer().save(tmp_path / "tokenizer.json")
    loaded = sources.load(tmp_path / "w8a8.safetensors", mesh=MESH)
    require_equal(loaded.model, model)
    assert spread(loaded.model)
    assert (loaded.about, loaded.nbytes) == ({"recipe": "w8a8", "lineage": []}, size)


def broken(model, path, value):
    """The model with two such numbers in the leaf at that path."""
    flat = dict(trees.flatten(model.params, inside=True))
    damaged = np.array(flat[path])
    damaged.reshape(-1)[[0, -1]] = value
    leaves, tree = [damaged if name == path else leaf for name, leaf in flat.items()], jax.tree.structure(model.params)
    return model.replace(params=jax.tree.map(jax.numpy.asarray, jax.tree.unflatten(tree, leaves)))


@pytest.mark.parametrize(
    ("bits", "path", "value"),
    [
        ("float32", "block_1/attention_norm/scale", np.nan),
        ("bfloat16", "block_0/feedforward/down/kernel", -np.inf),
        ("int8", "block_0/attention/query/kernel/scale", np.inf),
    ],
)
def test_weights_that_are_not_finite_are_named(tmp_path, capsys, bits, path, value):
    model = in_dtype(tiny.model(), bits) if bits != "int8" else tiny.model()
    model = model.replace(params=quantize(model.params, "int8")) if bits == "int8" else model
    small_tokenizer().save(tmp_path / "tokenizer.json")
    file = tmp_path / "model.safetensors"
    efflm_file.save(file, model, {})
    sources.load(file)
    assert capsys.readouterr().err == ""
    efflm_file.save(file, broken(model, path, value), {})
    sources.load(file)
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {file}: 2 of the numbers in {path} are infinite or NaN")


def rewritten(file, name, change):
    """Our own safetensors file with something else as one entry of its manifest."""
    header, data = safetensors_header(file.read_bytes())
    manifest = json.loads(header["__metadata__"]["efflm"])
    header["__metadata__"]["efflm"] = json.dumps(manifest | {name: change(manifest[name])})
    file.write_bytes(with_header(header, data))


def in_block(**fields):
    return lambda config: config | {"blocks": [block | fields for block in config["blocks"]]}


def with_format(**fields):
    return lambda formats: {path: each | fields for path, each in formats.items()}


LIES = [
    ("config", in_block(kv_heads=2.0), "kv_heads is 2.0"),
    ("config", in_block(window=10**30), "window is 1000000000"),
    ("config", lambda config: config | {"norm_epsilon": 2**63}, "norm_epsilon is 9223372036854775808"),
    ("config", lambda config: config | {"rope_base": float("inf")}, "rope_base is inf"),
    ("config", lambda config: config | {"max_length": 64.5}, "max_length is 64.5"),
    ("config", lambda config: config | {"more": 1}, "'more'"),
    ("config", lambda _: None, "the config is None"),
    ("formats", with_format(bits=8.0), "bits is 8.0"),
    ("formats", lambda formats: formats | {"other": {}}, "other is no weight of the config"),
    ("formats", with_format(axis=-2.0), "axis is -2.0"),
    ("formats", with_format(size=True), "size is True"),
    ("formats", with_format(activations=["int8"]), "activations is \\[.int8.\\]: choose from"),
    ("about", lambda about: about | {"source": 7}, "source is 7"),
    ("about", lambda about: about | {"train.length": "x"}, "train.length is 'x'"),
    ("about", lambda about: about | {"train.length": 2**63}, "train.length is 9223372036854775808"),
    ("about", lambda about: about | {"lineage": 5}, "lineage is 5"),
    ("about", lambda about: about | {"lineage": [5]}, r"lineage is \[5\]"),
]


@pytest.mark.parametrize(("name", "change", "message"), LIES)
def test_what_our_own_files_say_is_checked(tmp_path, name, change, message):
    model = tiny.model().replace(params=quantize(tiny.model().params, "int8"))
    file, folder = tmp_path / "w8a8.safetensors", tmp_path / "checkpoint" / "3"
    small_tokenizer().save(tmp_path / "tokenizer.json")
    efflm_file.save(file, model, {})
    rewritten(file, name, change)
    with pytest.raises(InputError, match=rf"w8a8\.safetensors.*{message}") as error:
        sources.load(file)
    assert "\n" not in str(error.value)
    checkpoint.save(folder.parent, 3, model, {})
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | {name: change(about[name])}))
    (folder / manifest.NAME).unlink()
    manifest.write(folder)
    with pytest.raises(InputError, match=rf"checkpoint.*{message}") as error:
        sources.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda leaves: leaves | {"embedding": leaves["embedding"] | {"shape": [2**40, 32]}}, "embedding has shape"),
        (lambda leaves: leaves | {"embedding": {}}, "embedding"),
        (lambda leaves: {path: leaves[path] for path in leaves if path != "embedding"}, "embedding has shape None"),
        (lambda leaves: leaves | {"other": leaves["embedding"]}, "other has shape"),
        (lambda leaves: leaves | {"masks/embedding": leaves["embedding"] | {"shape": [1]}}, "masks/embedding"),
        (lambda leaves: leaves | {"embedding": leaves["embedding"] | {"dtype": "complex64"}}, "complex64"),
        (lambda leaves: leaves | {"embedding": leaves["embedding"] | {"dtype": "int8"}}, "int8"),
        (lambda leaves: leaves | {"embedding": leaves["embedding"] | {"dtype": "x"}}, "x"),
        (lambda _: [], "checkpoint"),
    ],
)
def test_what_a_checkpoint_says_of_its_arrays_is_checked(run, change, message):
    folder = run / "checkpoint" / "3"
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | {"leaves": change(about["leaves"])}))
    (folder / manifest.NAME).unlink()
    manifest.write(folder)
    with pytest.raises(InputError, match=message) as error:
        sources.load(run)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_checkpoint_has_no_links(run, capsys):
    """Neither to a file elsewhere, nor among those that its manifest lists."""
    folder, secret = run / "checkpoint" / "3", run / "secret"
    about = folder / "about.json"
    secret.write_bytes(about.read_bytes())
    about.unlink()
    about.symlink_to(secret)
    with pytest.raises(InputError, match=r"no checkpoint is whole"):
        sources.load(run)
    assert "about.json is a link" in capsys.readouterr().err
    about.unlink()
    about.write_bytes(secret.read_bytes())
    listed = json.loads((folder / manifest.NAME).read_text())
    listed["sha256"]["../../secret"] = listed["sha256"]["about.json"]
    (folder / manifest.NAME).write_text(json.dumps(listed))
    with pytest.raises(InputError, match=r"no checkpoint is whole"):
        sources.load(run)
    assert "../../secret is missing" in capsys.readouterr().err


def test_gguf_files_and_models_by_name(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    gguf_files.write(path, gguf_files.weights(np.random.default_rng(0), width=64, hidden=64))
    expected, _ = gguf_model.load(path)
    loaded = sources.load(path, mesh=MESH)
    require_equal(loaded.model, expected)
    assert spread(loaded.model)
    assert loaded.nbytes == path.stat().st_size
    monkeypatch.setattr(wheels, "fetch", {wheels.WHEELS["smollm2"]: path}.get)
    require_equal(load_model("smollm2", dtype="bfloat16")[0], gguf_model.load(path, dtype="bfloat16")[0])


def test_hugging_face_directories(tmp_path):
    huggingface.save(tmp_path / "model", tiny.model(), small_tokenizer())
    loaded = sources.load(tmp_path / "model", mesh=MESH)
    require_equal(loaded.model, tiny.model())
    assert spread(loaded.model)
    assert loaded.about == {}
    assert loaded.nbytes == (tmp_path / "model" / "model.safetensors").stat().st_size
    with pytest.raises(InputError, match=r"was not written by efflm: .* give a Hugging Face model as its folder"):
        load_model(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nothing/here/at/all",
            "no model at nothing/here/at/all: give a name .smollm2., a Hugging Face directory, hf:org/name",
        ),
        ("runs/none", "no model at runs/none: give"),
        ("some/model", "; the model of that name on the Hugging Face hub is hf:some/model"),
        ("hf:", "hf: names no model of the Hugging Face hub: give hf:org/name or hf:org/name@revision"),
        ("hf:a/b/c", "hf:a/b/c names no model"),
        ("hf:a/b@", "hf:a/b@ names no model"),
        ("hf:../b", "names no model"),
        ("gpt2", "no model at gpt2: give a name"),
        ("/org/model", "no model at /org/model: give"),
        ("../model", "no model at ../model: give"),
        ("org/model.gguf", "no model at org/model.gguf: give"),
        ("", "give a name"),
        ("empty", "empty has neither a config.json, as Hugging Face directories do, nor a checkpoint of efflm's: give"),
        ("pickle.bin", "pickle.bin is pickled: reading it could run any code that whoever made it put in"),
        ("pickle.pt", "pickle.pt is pickled"),
        ("pickle.ckpt", "pickle.ckpt is pickled"),
        ("notes.txt", "notes.txt is not a kind of file that is read: give"),
    ],
)
def test_anything_else_is_refused_and_told_what_there_is(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "runs").mkdir()
    for file in ("pickle.bin", "pickle.pt", "pickle.ckpt", "notes.txt"):
        (tmp_path / file).write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    with pytest.raises(InputError) as error:
        load_model(name)
    assert message.replace(".smollm2.", "(smollm2)") in str(error.value)
    assert "\n" not in str(error.value)


# --- the hub, of which there is none here ----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of the hub, with a model in it as the library keeps them: blobs, and links to them by revision."""
    home, revision = tmp_path / "models--some--model", "a" * 40
    huggingface.save(tmp_path / "made", tiny.model(), small_tokenizer())
    (home / "blobs").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    (home / "snapshots" / revision).mkdir(parents=True)
    for i, file in enumerate(sorted((tmp_path / "made").iterdir())):
        shutil.copy(file, home / "blobs" / f"{i:040}")
        (home / "snapshots" / revision / file.name).symlink_to(f"../../blobs/{i:040}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_model_needs_no_network(cache, offline, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:9")
    model, tokens = load_model("hf:some/model")
    require_equal(model, tiny.model())
    assert tokens.digest == small_tokenizer().digest


def test_a_revision_of_a_model_of_the_hub_is_the_one_that_is_read(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    home = cache / "models--some--model"
    other = tiny.model(seed=1)
    huggingface.save(home / "snapshots" / ("b" * 40), other, small_tokenizer())
    (home / "refs" / "v2").write_text("b" * 40)
    for revision in ("v2", "b" * 40):
        require_equal(load_model(f"hf:some/model@{revision}")[0], other)
    require_equal(load_model("hf:some/model")[0], tiny.model())
    with pytest.raises(InputError, match="hf:some/model@v3 is not in the cache"):
        load_model("hf:some/model@v3")


def test_the_hub_is_not_asked_for_what_could_be_a_path(cache, monkeypatch):
    """From another folder, runs/small names no organization of the hub."""
    monkeypatch.chdir(cache)
    monkeypatch.setattr(hub, "fetch", lambda name: pytest.fail(f"asked the hub for {name}"))
    for name in ("some/model", "runs/small", "runs/small@main"):
        with pytest.raises(InputError, match=f"no model at {name}: give"):
            load_model(name)


def test_only_the_files_that_are_read_count_as_bytes_on_disk(tmp_path):
    folder = Path(shutil.copytree(Path(__file__).parent / "goldens" / "qwen3", tmp_path / "shards"))
    small_tokenizer().save(folder)
    parts = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert len(list(folder.glob("*.safetensors"))) > 1
    huggingface.save(tmp_path / "one", tiny.model(), small_tokenizer())
    whole = (tmp_path / "one" / "model.safetensors").stat().st_size
    for here, size in ((folder, parts), (tmp_path / "one", whole)):
        for stray in ("consolidated.safetensors", "adapter_model.safetensors", "old.gguf"):
            (here / stray).write_bytes(b"x" * 9999)
        assert sources.load(here).nbytes == size


def test_only_the_newest_checkpoint_counts_as_bytes_on_disk(run):
    alone = sources.load(run).nbytes
    shutil.copytree(run / "checkpoint" / "3", run / "checkpoint" / "2")
    assert (
        sources.load(run).nbytes
        == alone
        == sum(file.stat().st_size for file in (run / "checkpoint" / "3").rglob("*") if file.is_file())
    )


@pytest.mark.parametrize(("offline", "why"), [("1", "HF_HUB_OFFLINE is set"), ("0", "the hub cannot be reached")])
def test_without_a_network_one_line_says_so(offline, why, tmp_path):
    """In a process of its own, as a user has it: the library reads its settings when it is imported."""
    program = "from efflm.formats.sources import load_model\nload_model('hf:some/model')"
    settings = {"HF_HUB_OFFLINE": offline, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": "http://localhost:9"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        cwd=Path(__file__).parents[2],
        env=os.environ | settings,
    )
    last = done.stderr.strip().splitlines()[-1]
    expected = (
        f"hf:some/model is not in the cache of the Hugging Face hub ({tmp_path / 'cache'}), and {why}: give a folder"
    )
    assert expected in last


def test_a_link_out_of_the_cache_is_not_followed(cache):
    snapshot = next((cache / "models--some--model" / "snapshots").iterdir())
    (cache / "secret.safetensors").write_bytes((snapshot / "model.safetensors").read_bytes())
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(cache / "secret.safetensors")
    with pytest.raises(InputError, match="links out of its folder"):
        load_model(snapshot)


def test_the_precision_of_matmuls_is_chosen_and_not_guessed(run, tmp_path):
    """Weights in bfloat16 do not make a model compute in it, nor float32 ones the other way round."""
    assert sources.load(run).model.config.precision == "float32"
    chosen = sources.load(run, precision="bfloat16").model
    assert chosen.config.precision == "bfloat16"
    tokens = tiny.tokens(chosen.config, 1, 6)
    low, full = tiny.logits(chosen, tokens), tiny.logits(tiny.model(), tokens)
    assert 0 < np.abs(low - full).max() < 0.05 * np.abs(full).max()
    program = jax.jit(forward).lower(chosen, tokens).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line and "kernel" not in line]
    assert products
    assert all("bf16" in line for line in products)
    int8 = chosen.replace(params=quantize(chosen.params))  # W8A16: int8 weights multiplied in bfloat16
    program = jax.jit(forward).lower(int8, tokens).as_text()
    assert all("bf16" in line for line in program.splitlines() if "dot_general" in line)
    stored = in_dtype(tiny.model(), "bfloat16")
    stored = stored.replace(config=tiny.model().config)  # bfloat16 weights, float32 matmuls
    program = jax.jit(forward).lower(stored, tokens).as_text()
    assert not any("bf16" in line for line in program.splitlines() if "dot_general" in line)
