"""Chains beside other programs, of which stand-ins take the place: they hand the floats on."""

import json
import shutil

import numpy as np
import pytest

from efflm.cli.flags import launch
from efflm.compress.step import Calibration
from efflm.evaluate.windows import Scoring
from efflm.formats import gguf_file
from experiments import quality_per_byte

GROUPS = {"calibration": Calibration(rows=8, length=32), "score": Scoring(documents=4, tokens=32)}
PROGRAM = f"#!{shutil.which('sh')}\n" + 'case "$1" in *{fails}*) exit 3;; esac\ncp -r "$2" "$3" && touch log\n'


def run(folder, out, *flags):
    """The rows of results.json by name."""
    given = [f"--model={folder / 'model'}", f"--corpus={folder / 'numbers'}", f"--run_dir={out}", "--seeds=2"]
    given += ["--kinds=Q8_0", "--formats=4:32", *flags]
    launch(quality_per_byte.main, "", ["x", *given], run=quality_per_byte.Run(), **GROUPS)
    return {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}


@pytest.fixture
def program(tmp_path):
    """A stand-in for the Python of the three programs, which fails for one of them."""
    file = tmp_path / "python"
    file.write_text(PROGRAM.replace("{fails}", "gptqmodel"))
    file.chmod(0o755)
    return str(file)


def test_rows_of_all_programs_are_kept_and_made_once(folder, tmp_path, program, capsys):
    out, chains = tmp_path / "out", "--chains=w8a16 wanda@0.3"
    peers = [f"--{name}={program}" for name in ("llama_cpp", "auto_round", "gptqmodel")]
    rows = run(folder, out, chains, *peers)
    assert "GPTQModel, 4 bits, groups of 32 is left out" in capsys.readouterr().out
    assert list(rows)[:2] == ["w8a16", "AutoRound, 4 bits, groups of 32"]  # by bytes
    copied = rows["llama.cpp Q8_0"]
    assert copied["kl_to_original"] == pytest.approx(0, abs=1e-6)
    assert copied["bits_a_weight"] == 32
    assert (copied["kl_of_seeds"], copied["calibrated"]) == (None, "no")
    importance = dict(np.load(out / "importance-1.npz"))
    tensors = gguf_file.read_header(out / "floats.gguf").tensors
    layers = {name: tensor.shape[-1] for name, tensor in tensors.items() if len(tensor.shape) > 1 and "blk" in name}
    assert {name: len(x) for name, x in importance.items()} == layers
    rounded = rows["AutoRound, 4 bits, groups of 32"]
    assert 0 < rounded["kl_to_original"] < rows["w8a16"]["kl_to_original"]  # of embeddings alone
    assert rounded["ours_ratio"] == pytest.approx(rows["w8a16"]["kl_to_original"] / rounded["kl_to_original"], abs=1e-3)
    assert rows["wanda@0.3"]["kl_of_seeds"] > 0
    assert rows["wanda@0.3"]["passes"] > rows["llama.cpp Q8_0"]["passes"] >= 0
    broken = out / "files" / "gptqmodel_quantize-4:32-0"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    assert run(folder, out, chains) == rows
    assert f"GPTQModel, 4 bits, groups of 32 is left out: {broken}" in capsys.readouterr().out
    assert set(run(folder, out, "--chains=w8a16")) == set(rows) - {"wanda@0.3"}
    assert (rows["wanda@0.3"]["samples"], copied["samples"]) == (2, None)
    fewer = run(folder, out, "--chains=w8a16", "--seeds=3")["AutoRound, 4 bits, groups of 32"]  # no program for a third
    assert fewer == rounded
    assert "AutoRound, 4 bits, groups of 32 has 2 of 3 samples" in capsys.readouterr().out
    assert (out / "files" / "log").exists()  # what a program writes where it runs
    with pytest.raises(SystemExit):
        run(folder, out, chains, "--score.tokens=16")
    assert "was begun with" in capsys.readouterr().err
