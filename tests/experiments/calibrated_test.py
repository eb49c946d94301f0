"""The experiment on calibration, on a tiny model: its rows, charts and what it writes as it goes."""

import json

import pytest

from efflm.cli.flags import launch
from efflm.compress.step import Calibration
from efflm.config import InputError
from efflm.evaluate.windows import Scoring
from efflm.formats import efflm_file
from efflm.text import tokenizer as tokenizers
from experiments import calibrated
from tests import tiny

GROUPS = {"run": calibrated.Run(), "calibration": Calibration(rows=6, length=32), "score": Scoring(tokens=32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and two corpora of which it knows nothing."""
    root = tmp_path_factory.mktemp("calibrated")
    for name, word in (("numbers", "number"), ("letters", "letter")):
        (root / name).mkdir()
        for i in range(30):
            (root / name / f"{i}.txt").write_text(f"the {word} {i * 7919} stands after {i * 7907}\n" * 12)
    (root / "model").mkdir()
    efflm_file.save(root / "model" / "model.safetensors", tiny.model(), {})
    texts = [file.read_text() for name in ("numbers", "letters") for file in (root / name).iterdir()]
    tokenizers.train(texts, 300).save(root / "model" / "tokenizer.json")
    return root


def test_every_recipe_has_a_row_and_every_family_a_curve(folder, tmp_path, capsys):
    out = tmp_path / "runs" / "out"
    flags = [
        f"--model={folder / 'model'}", f"--corpus={folder / 'numbers'}", f"--run_dir={out}", "--seeds=2",
        "--recipes=quantize@4 gptq@3 wanda@0.5 w8a16",
        f"--domains=numbers={folder / 'numbers'} letters={folder / 'letters'}", "--domain_recipes=wanda50",
    ]  # fmt: skip
    launch(calibrated.main, "", ["x", *flags], **GROUPS)
    found = json.loads((out / "results.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    before, *made = rows.values()
    assert before["over_dense"] is None
    assert [row["name"] for row in made] == flags[4].partition("=")[2].split()
    assert {name: row["seeds"] for name, row in rows.items() if row["seeds"] > 1} == {
        "gptq@3": 2, "wanda@0.5": 2
    }  # fmt: skip
    for row in made:
        assert row["saved"] == pytest.approx(1 - row["bytes"] / before["bytes"])
        assert row["cost"] == pytest.approx(row["over_dense"] / row["saved"])
        assert (row["over_dense_deviation"] is None) == (row["seeds"] == 1)
        assert row["passes"] > 0
    grid = found["domains"]["wanda50"]
    assert grid.keys() == grid["numbers"].keys() == {"numbers", "letters"}
    said = capsys.readouterr().out
    assert "13-token sequences of the test text" in said
    assert "test: letters" in said
    page = (out / "report.html").read_text()
    assert "Perplexity against bits" in page
    assert "Perplexity against sparsity" in page
    assert "Loss against bytes" in page


def test_what_cannot_be_is_refused(folder, tmp_path, capsys):
    for name, words in (
        ("quantize@5", "quantize@5: bits is '5'"),
        ("wanda@1.5", "wanda@1.5: sparsity is 1.5"),
        ("wanda@half", "wanda@half: sparsity is 'half', but must be a number"),
        ("best@4", r"there is no step or recipe 'best' \(in best@4\)"),
    ):
        with pytest.raises(InputError, match=words):
            calibrated.Run(recipes=name)
    with pytest.raises(InputError, match="domains holds 'code'"):
        calibrated.Run(domains="code")
    flags = [f"--model={folder / 'model'}", f"--corpus={folder / 'numbers'}", "--calibration.rows=5000"]
    with pytest.raises(SystemExit):
        launch(calibrated.main, "", ["x", *flags, f"--run_dir={tmp_path / 'runs' / 'out'}"], **GROUPS)
    assert "rows of 32 tokens where 5000 are asked for: give more text" in capsys.readouterr().err
