"""The code in the READMEs runs, and what they name exists."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import efflm
from efflm import ops, trees
from efflm.compress import grammar, methods, recipe
from efflm.compress.quantize import Quantize
from efflm.compress.step import Calibration
from efflm.config.model import ModelShape
from efflm.config.parallel import HostsConfig, MeshConfig
from efflm.config.train import TrainConfig
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.formats.sources import load_model
from efflm.model.params import in_layer, is_matrix
from efflm.report.comparison import Limits
from tests import gguf_files, tiny

ROOT = Path(__file__).parent.parent
TOPS = ("efflm", "experiments", "launch")
READMES = sorted([*ROOT.glob("*.md"), *(file for top in TOPS for file in (ROOT / top).rglob("*.md"))])
FRONT = (ROOT / "README.md").read_text()
GROUPS = {
    "model": ModelShape, "train": TrainConfig, "mesh": MeshConfig, "hosts": HostsConfig,
    "score": Scoring, "task": TaskFiles, "calibration": Calibration, "limits": Limits,
    **recipe.STEPS,
}  # fmt: skip


def name_of(file):
    return str(file.relative_to(ROOT))


def python_of(file, section=""):
    """The code of a file, or of its section of this heading."""
    text = file.read_text()
    text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0] if section else text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    return code


def run(code):
    names = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), names)
    return names


def anchors(file):
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_front_page_is_short_and_begins_with_what_a_newcomer_does_first():
    assert len((ROOT / "README.md").read_bytes()) <= 8000
    first_screen = "\n".join(FRONT.splitlines()[:60])
    for wanted in ("\n## Install\n", "bash launch/run.sh", "```python\n", "efflm.save(", "](.assets/quickstart.png)"):
        assert wanted in first_screen, wanted


@pytest.mark.parametrize(
    ("what", "file", "at", "speed", "ratio"),
    [
        ("decode of", "kernels_xeon", {"name": "w8a8"}, "decode_16", "decode_16_ratio"),
        ("prefill of", "kernels_xeon", {"name": "w8a8"}, "prefill_512", "prefill_512_ratio"),
        ("training, 6 layers x 384, float32", "train_speed", {"policy": "float32"}, "tokens_per_second", "ratio"),
    ],
)
def test_the_figures_of_the_first_screen_are_those_of_the_results(what, file, at, speed, ratio):
    found = json.loads((ROOT / "experiments" / "results" / f"{file}.json").read_text())
    row = next(row for row in found["rows"] if at.items() <= row.items())
    (line,) = re.findall(rf"^\| {what}.*\|$", FRONT, re.M)
    assert line.endswith(f"| {row[speed]:,} | {line.rpartition('| ')[2]}")
    assert f"| {row[ratio]:g} times " in line
    assert f"commit {found['versions']['commit']}" in FRONT


def test_the_front_pages_code_works(tmp_path, monkeypatch, capsys):
    code = python_of(ROOT / "README.md")
    assert len(code.strip().splitlines()) <= 10
    weights = gguf_files.weights(np.random.default_rng(0), width=64, hidden=64)
    source = gguf_files.write(tmp_path / "tiny.gguf", weights, kind="Q4_1")
    for name, there in (("smollm2", source), ("stdlib", ROOT / "efflm" / "compress")):
        assert code.count(f'"{name}"') == 1
        code = code.replace(f'"{name}"', repr(str(there)))
    monkeypatch.chdir(tmp_path)
    names = run(code)
    before, after = names["result"]
    assert before.bits_per_byte != after.bits_per_byte
    assert after.bytes < 0.5 * before.bytes
    said = capsys.readouterr().out
    assert "KL to the original" in said
    again, tokenizer = load_model(tmp_path / "runs" / "small.gguf")
    assert tokenizer.encode("The capital") == names["tokenizer"].encode("The capital")
    saved = dict(trees.flatten(again.params))
    for path, w in trees.flatten(names["small"].params):
        np.testing.assert_allclose(ops.dequantize(saved[path]), ops.dequantize(w), rtol=2**-10, err_msg=path)


def test_the_rounding_method_of_ones_own_works(tmp_path):
    """In one file of fewer than 60 lines; it loses less than the nearest codes of the same format."""
    code = python_of(ROOT / "efflm" / "compress" / "README.md", "A rounding method of your own")
    assert len(code.strip().splitlines()) < 60
    weights = gguf_files.weights(np.random.default_rng(0), width=64, hidden=64)
    model, tokenizer = efflm.load(gguf_files.write(tmp_path / "tiny.gguf", weights, kind="F32"))
    (tmp_path / "text").mkdir()
    numbers = [f"number {i * i * 7919 % 10007} stands after {i * 104729 % 9973}\n" for i in range(2000)]
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text("".join(numbers[i * 100 :][:100]))
    text = {"calibration_rows": 64, "calibration_length": 64, "text": tmp_path / "text"}
    after = efflm.compress(model, [run(code)["Refit"](bits=3)], tokenizer=tokenizer, **text)
    nearest = efflm.compress(model, Quantize(bits=3, group=32))
    tokens = tokenizer.encode("".join(numbers[::91]))[:128]
    logits = [np.asarray(tiny.logits(each, jnp.asarray([tokens]))) for each in (model, after, nearest)]
    errors = [np.square(each - logits[0]).mean() for each in logits[1:]]
    assert 0 < errors[0] < 0.98 * errors[1]
    bits = {path: w.bits for path, w in trees.flatten(after.params) if is_matrix(path)}
    assert bits == {path: 3 if in_layer(path) else 8 for path in bits}
    assert after.about["lineage"][-1]["settings"] == {"bits": 3, "group": 32, "super_block": 0, "embeddings": 8}


def test_the_step_of_ones_own_works():
    names = run(python_of(ROOT / "efflm" / "compress" / "README.md", "A step of your own"))
    model = tiny.model()
    after = names["compressed"](model)
    for path, w in trees.select(model.params, "kernel"):
        new = np.asarray(dict(trees.flatten(after.params))[path])
        assert (new == 0).sum() == new.size // 2
        mantissa, _ = np.frexp(new)
        np.testing.assert_array_equal(mantissa * 16, np.round(mantissa * 16))
        assert np.all(np.abs(new[new != 0] / np.asarray(w)[new != 0] - 1) <= 2**-4)
    assert jnp.all(after.params["embedding"] == model.params["embedding"])


def test_the_front_page_lists_every_experiment():
    there = {file.stem for file in (ROOT / "experiments").glob("*.py")} - {"__init__"}
    assert set(re.findall(r"^\| `experiments\.(\w+)` \|", FRONT, re.M)) == there
    listed = re.findall(r"^\| `(\w+)` \| [A-Z].*\?", (ROOT / "experiments" / "README.md").read_text(), re.M)
    assert set(listed) == there


def test_the_tables_of_steps_and_recipes_are_those_of_the_code():
    text = methods.README.read_text()
    assert methods.fill(text) == text, "run .venv/bin/python -m efflm.compress.methods"
    named = "Xiao 2022, 2211.10438; Sun 2024, 2402.17762"
    row = f"| `smoothquant@alpha` | Move the range of activations into weights. | {named} |"
    assert f"\n{row}\n" in text
    assert (
        "\n| `shrink_distill_int8` | `depth,distill,w8a16` | 1910.01108, 2403.03853, 1503.02531, 2208.07339 |\n" in text
    )
    for name in (*recipe.STEPS, *recipe.RECIPES):
        assert re.search(rf"^\| `{name}\b.*\|$", text, re.M), name


@pytest.mark.parametrize("file", READMES, ids=name_of)
def test_what_it_names_exists(file):
    text = file.read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (file.parent / path).resolve() if path else file
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for script in re.findall(r"launch/[\w.]+\.(?:sh|sbatch|yaml)", text):
        assert (ROOT / script).exists(), script
    for module in re.findall(r"\bexperiments\.([a-z_]+)", text):
        assert (ROOT / "experiments" / f"{module}.py").exists(), module
    for chains in re.findall(r"--recipes?=\"?((?<=\")[^\"]+|[^\s\"`]+)", text):
        assert chains.endswith(".toml") or grammar.chains(chains), chains
    for group, field in re.findall(r"--(?:no)?([a-z]+)\.(\w+)", text):
        assert field in GROUPS[group].__dataclass_fields__, f"--{group}.{field}"
