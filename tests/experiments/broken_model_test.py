"""What is kept and shown of a model whose figures are beyond all numbers."""

import json

import numpy as np
import pytest

from efflm.cli.flags import launch
from efflm.compress import recipe
from efflm.compress.step import Calibration
from efflm.config.parallel import MeshConfig
from efflm.evaluate.task_files import TaskFiles
from efflm.evaluate.windows import Scoring
from efflm.report import table
from efflm.report.comparison import Limits
from efflm.train.metrics import Metrics, curve
from experiments import compress, evaluate
from tests import gguf_files

GROUPS = {
    compress: {
        "run": compress.Run(),
        "calibration": Calibration(),
        "score": Scoring(),
        "task": TaskFiles(),
        "limits": Limits(),
        **recipe.STEPS,
    },
    evaluate: {
        "run": evaluate.Run(),
        "score": Scoring(),
        "task": TaskFiles(),
        "mesh": MeshConfig(data=1),
        "limits": Limits(),
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text, and two models: of one exp(mean nats) is beyond a float64, of the other the outputs are infinite."""
    folder = tmp_path_factory.mktemp("broken")
    for index in range(2):
        (folder / f"{index}.txt").write_text("the river runs down to the sea\n" * (20 + index))
    weights = gguf_files.weights(np.random.default_rng(0), width=64, hidden=64)
    for name, factor in (("large", 3e3), ("infinite", 1e38)):
        scaled = weights | {"model.norm.weight": np.float32(factor) * weights["model.norm.weight"]}
        gguf_files.write(folder / f"{name}.gguf", scaled, kind="Q4_1")
    return folder


def run(module, folder, model, out, *flags):
    """The rows of results.json, read by a strict reader."""
    argv = [
        "x", f"--model={folder / model}.gguf", f"--text={folder / '0.txt'}", f"--run_dir={out}", "--score.window=16",
        "--score.tokens=32", *flags,
    ]  # fmt: skip
    launch(module.main, module.__doc__, argv, **GROUPS[module])
    return results(out)


def results(out):
    return json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)["rows"]


@pytest.mark.parametrize("model", ["large", "infinite"])
def test_a_broken_model_is_reported(folder, tmp_path, capsys, model):
    before, after = run(compress, folder, model, tmp_path, "--recipe=w8a16", "--sample=2")
    assert before["perplexity"] is after["perplexity"] is None
    assert after["prefill_tokens_per_second"] > 0
    said, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    if model == "large":
        assert before["bits_per_byte"] > 100
        assert "> 1e308" in said
        assert "&gt; 1e308" in page
    else:
        assert before["bits_per_byte"] is after["bits_per_byte_increase"] is None
        assert "nan" in said


@pytest.mark.parametrize("module", [compress, evaluate])
def test_results_are_there_even_if_they_cannot_be_shown(folder, tmp_path, monkeypatch, module):
    def refuse(*args):
        raise RuntimeError("no terminal")

    monkeypatch.setattr(table, "show", refuse)
    with pytest.raises(RuntimeError, match="no terminal"):
        run(module, folder, "large", tmp_path)
    assert results(tmp_path)[0]["bits_per_byte"] > 100


def test_a_metric_that_is_not_finite_is_read_as_such(tmp_path):
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file, None, 0)
    for step, loss in enumerate((3.0, float("nan"), float("inf"))):
        metrics.write({"step": step, "loss": loss})
    metrics.close()
    for line in file.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    np.testing.assert_array_equal(curve(file), [[0, 1, 2], [3.0, np.nan, np.nan]])
    Metrics(file, tmp_path / "events", 2).close()  # shows the kept lines anew
