import json

import numpy as np
import pytest

from efflm.cli.flags import launch
from experiments import sensitivity
from tests import gguf_files


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    weights = gguf_files.weights(np.random.default_rng(0), width=64, hidden=64)
    return gguf_files.write(tmp_path_factory.mktemp("model") / "tiny.gguf", weights, kind="Q4_1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(["alpha", "beta", "for", "while", "return"], 200)))
    return folder


def run(*argv):
    launch(sensitivity.main, sensitivity.__doc__, ["x", *argv], run=sensitivity.Run())


def test_table_results_and_report(model, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    run(
        f"--model={model}",
        f"--corpus={corpus}",
        "--rows=2",
        "--length=16",
        "--bits=8,3",
        "--show=3",
        f"--run_dir={out}",
    )
    found = json.loads((out / "results.json").read_text())
    rows = found["rows"]
    costs = [row["loss"] / row["saved"] for row in rows]
    assert costs == sorted(costs, reverse=True)
    assert {(row["name"], row["format"]["bits"]) for row in rows} == {(r["name"], b) for r in rows for b in (8, 3)}
    for row in rows:
        assert row["bits_per_token"] == pytest.approx(row["loss"] / np.log(2))
    said = capsys.readouterr().out
    assert f"{len(rows) - 3} more rows are in the report" in said
    assert rows[0]["name"] in said
    page = (out / "report.html").read_text()
    assert all(row["name"] in page for row in rows)
    assert "each rounded alone to 3 bits, groups of 32" in page


@pytest.mark.parametrize(
    ("flag", "words"), [("--bits=9", "bits is 9"), ("--groups=x", "groups is"), ("--show=-1", "show is")]
)
def test_wrong_flags(flag, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(flag)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
