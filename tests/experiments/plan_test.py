"""The plan from its flags to its file, on fake devices; the TPU's compiler where it is installed."""

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from efflm.cli.flags import launch
from efflm.model.presets import preset
from efflm.report import planned
from efflm.report.page import Table
from experiments import plan

SMALL = ["--model=gpt2", "--train.batch=8", "--train.length=64", "--rows=8", "--cache_length=64"]


def run(folder, *flags):
    argv = ["x", f"--run_dir={folder}", *SMALL, *flags]
    launch(plan.main, plan.__doc__, argv, run=plan.Run(), mesh=plan.MESH, train=plan.TRAIN)
    return json.loads((folder / "results.json").read_text())


def rows(found):
    return {row["name"]: row for row in found["rows"]}


def test_training_is_compiled_and_predicted(tmp_path, capsys):
    found = run(tmp_path / "out", "--mesh.fsdp=8", "--hardware=h100")
    assert found["mesh"] == {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    held = rows(found)
    exact = sum(held[name]["nbytes"] for name in ("weights", "optimizer state", "batch"))
    assert exact == pytest.approx(held["arguments"]["nbytes"], abs=100)
    assert held["temporaries"]["nbytes"] > 0
    assert found["fits"]
    for kind in ("all-gather", "all-reduce"):
        some = [each for each in found["collectives"] if each["kind"] == kind]
        assert held[kind]["nbytes"] == sum(each["nbytes"] for each in some) > 0
        assert held[kind]["count"] == sum(each["trips"] for each in some)
    assert held["network"]["nbytes"] < held["all-gather"]["nbytes"] + held["all-reduce"]["nbytes"]
    assert found["seconds_a_step"] == max(held[name]["seconds"] for name in ("compute", "memory", "network"))
    assert found["tokens_a_second"] == pytest.approx(8 * 64 / found["seconds_a_step"])
    shown = capsys.readouterr().out
    for words in ("the CPU's compiler, for 8 fake devices", "It fits", "bound by", "tokens/s", "utilization"):
        assert words in shown


def test_sums_in_bfloat16_along_sequence_are_compiled(tmp_path):
    """A pass of the CPU's compiler aborts at them, with the process: it is left out."""
    found = run(tmp_path / "out", "--mesh.fsdp=2", "--mesh.sequence=2", "--mesh.tensor=2", "--hardware=h100")
    assert rows(found)["reduce-scatter"]["count"] > 0


def test_decoding_in_int8_is_compiled_and_predicted(tmp_path, capsys):
    flags = ["--phase=decode", "--int8", "--activations=int8", "--mesh.fsdp=1", "--mesh.tensor=4", "--mesh.data=2"]
    found = run(tmp_path / "out", "--hardware=v6e", *flags)
    assert found["fits"]
    held = rows(found)
    assert 0 < held["keys and values"]["nbytes"] < held["arguments"]["nbytes"]
    shown = capsys.readouterr().out
    assert "weights in int8, activations too" in shown
    assert "give a topology, as in v5p:4x4x4" in shown


def test_the_search_needs_no_compiler(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "compiled", None)
    found = run(
        tmp_path / "out", "--search", "--tried=0", "--model=llama3.2-1b", "--devices=16", "--train.batch=64",
        "--train.length=4096",
    )  # fmt: skip
    assert len(found["search"]) == 8
    assert found["search"][0]["fits"]
    assert "rows" not in found
    assert "candidates" in capsys.readouterr().out


@pytest.mark.parametrize(("fitting", "count"), [(2, 2), (9, 3)])
def test_the_search_compiles_until_one_fits(tmp_path, monkeypatch, fitting, count):
    tried = []

    def compiled(run, config, train, sizes, chip, topology, log):
        tried.append((sizes, train.batch, train.remat))
        table = Table(caption="", columns=planned.COLUMNS, rows=[])
        return {"fits": len(tried) == fitting, "mesh": dataclasses.asdict(sizes)}, [table], []

    monkeypatch.setattr(plan, "compiled", compiled)
    found = run(tmp_path / "out", "--search", "--devices=8", "--hardware=h100")
    assert len(tried) == len({str(each) for each in tried}) == count
    assert found["mesh"] == dataclasses.asdict(tried[-1][0])
    assert found["fits"] == (fitting == count)
    assert len(found["search"]) == plan.SHOWN


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=gpt5"], "no model is named 'gpt5': choose one of llama3-8b"),
        (["--hardware=abacus"], "no hardware is named 'abacus'"),
        (["--hardware=v5p:4x4"], "torus of 3 dimensions"),
        (["--train.length=2048"], "longer than the max_length of gpt2, 1024"),
        ([], "the number of devices is not known"),
        (["--mesh.fsdp=3"], "a batch of 8 rows cannot be shared by mesh.data 1 x mesh.fsdp 3"),
        (["--hardware=v5p:2x2x1", "--mesh.fsdp=8"], "the mesh has 8 devices, but v5p:2x2x1 has 4"),
        (["--hardware=v5p:2x2x1", "--devices=8"], "devices is 8, but v5p:2x2x1 has 4"),
        (["--int8"], "int8 is for --phase=prefill and decode"),
        (["--activations=int8", "--phase=decode"], "need weights in int8"),
        (["--phase=decode", "--search"], "search knows training only"),
        (["--tried=-1"], "tried is -1"),
        (["--train.policy=auto"], "train.policy is auto, which is measured on the machine that trains"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "out", *flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_compiler_gathers_a_matrix_at_a_time_and_scatters_its_gradient(tmp_path):
    flags = [f"--run_dir={tmp_path}", *SMALL, "--train.length=1024", "--mesh.fsdp=4", "--hardware=v5p:2x2x1"]
    command = [sys.executable, "-m", "experiments.plan", *flags]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "the TPU's compiler" in done.stdout
    found = json.loads((tmp_path / "results.json").read_text())
    held = rows(found)
    exact = sum(held[name]["nbytes"] for name in ("weights", "optimizer state", "batch"))
    assert exact == pytest.approx(held["arguments"]["nbytes"], rel=0.05)
    config, moved = preset("gpt2"), {"all-gather": [], "reduce-scatter": []}
    for each in found["collectives"]:
        if each["kind"] in moved and each["trips"] == len(config.blocks):  # in the loop over layers
            moved[each["kind"]].append(each["nbytes"] / each["trips"])
    feedforward = config.width * config.blocks[0].mlp_dim  # the largest matrix of a layer
    assert max(moved["all-gather"]) == pytest.approx(3 / 4 * feedforward * 2)  # in bfloat16
    assert max(moved["reduce-scatter"]) == pytest.approx(3 / 4 * feedforward * 4)  # in float32
    assert len(moved["reduce-scatter"]) == 6  # query, key, value, output, up, down
    whole = 12 * sum(math.prod(shape) for shape in ((4, config.width, config.width), (2, feedforward)))
    received = lambda kinds: max(x["nbytes"] / x["trips"] for x in found["collectives"] if x["kind"] in kinds)
    assert received(["all-gather"]) < 3 / 4 * whole * 2
    embedding = 4 * config.vocabulary * config.width  # whose gradient is summed whole
    assert received(["all-reduce", "reduce-scatter"]) == pytest.approx(2 * 3 / 4 * embedding)
