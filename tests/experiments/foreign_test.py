"""The experiments on a model that was not trained here: a tiny GGUF file of quantized weights."""

import json

import numpy as np
import pytest

from efflm.cli import run_directory
from efflm.cli.flags import launch
from efflm.compress import recipe
from efflm.compress.step import Calibration
from efflm.config.parallel import MeshConfig
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.report.comparison import Limits
from experiments import compress, evaluate, generate
from tests import gguf_files

SHARED = {"score": Scoring(), "task": TaskFiles(), "limits": Limits()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    weights = gguf_files.weights(np.random.default_rng(0), width=64, hidden=64)
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", weights, kind="Q4_1")


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"the thing in the tin {i} ünd 😀\n" * (i + 2))
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_compress_refuses_weights_that_are_not_finite(tmp_path, text, capsys):
    weights = gguf_files.weights(np.random.default_rng(0), width=64, hidden=64)
    weights["model.layers.1.mlp.up_proj.weight"][2] = np.nan
    model, out = gguf_files.write(tmp_path / "tiny.gguf", weights), tmp_path / "runs" / "out"
    with pytest.raises(SystemExit) as stopped:
        launch(compress.main, "", ["x", f"--model={model}", f"--text={text}", f"--run_dir={out}"],
               run=compress.Run(), calibration=Calibration(), **SHARED, **recipe.STEPS)  # fmt: skip
    assert stopped.value.code == 2
    warning, error = capsys.readouterr().err.splitlines()
    for line in (warning, error):
        assert "64 of the numbers in block_1/feedforward/up/kernel are infinite or NaN" in line
    assert not out.exists()


def test_compress_says_what_the_weights_were(model, text, tmp_path, capsys):
    out = tmp_path / "runs" / "out"
    launch(compress.main, "", ["x", f"--model={model}", "--recipe=w8a16 magnitude24", f"--text={text}", "--sample=3",
           f"--run_dir={out}"],
           run=compress.Run(), calibration=Calibration(), **SHARED, **recipe.STEPS)  # fmt: skip
    before, w8a16, magnitude24 = results(out)["rows"]
    assert before["name"] == "dequantized Q4_1"
    assert before["note"] == f"from {model}, dequantized Q4_1"
    assert "multiplies its zeros too" in magnitude24["note"]
    assert "zeros" not in w8a16["note"]
    facts = " ".join(results(out)["protocol"])
    assert "4 of 4 documents" in facts
    assert "are dequantized Q4_1" in facts
    assert ">dequantized Q4_1</button>" in (out / "report.html").read_text()
    assert "dequantized Q4_1" in capsys.readouterr().out
    # The label outlives the file it was read from.
    again = tmp_path / "runs" / "again"
    launch(evaluate.main, "", ["x", f"--model={out / 'w8a16.safetensors'}", f"--reference={model}", f"--text={text}",
           f"--run_dir={again}"], run=evaluate.Run(), mesh=MeshConfig(data=1), **SHARED)  # fmt: skip
    _, row = results(again)["rows"]
    for field in ("bits_per_byte", "kl_to_original", "perplexity"):
        assert row[field] == w8a16[field], field
    assert ".safetensors, dequantized Q4_1" in row["note"]


def test_without_a_text_of_its_own_it_reads_the_standard_library(model, tmp_path):
    out = tmp_path / "runs" / "out"
    launch(evaluate.main, "", ["x", f"--model={model}", "--score.documents=2", "--score.tokens=20", f"--run_dir={out}"],
           run=evaluate.Run(), mesh=MeshConfig(data=1), **SHARED)  # fmt: skip
    facts = " ".join(results(out)["protocol"])
    assert "2 of" in facts
    assert "Python's standard library, at most the first 20 tokens of each (40 tokens scored)" in facts
    assert "in all likelihood trained on Python's standard library" in facts


def test_it_writes(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_directory, "ROOT", tmp_path)
    launch(generate.main, "", ["x", f"--model={model}", "--prompt=the", "--max_tokens=9"], run=generate.Run())
    out, err = capsys.readouterr()
    assert out.startswith("the")
    assert "loaded in" in err
