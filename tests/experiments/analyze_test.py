"""The analysis from its flags to its files, on a model small enough for a test."""

import json

import pytest

from efflm.cli.flags import launch
from efflm.config.model import ModelShape
from efflm.config.train import TrainConfig
from experiments import analyze

TINY = [
    "--model.layers=1", "--model.width=32", "--model.heads=4", "--model.mlp_dim=48", "--model.vocabulary=300",
    "--model.max_length=64", "--train.batch=8", "--train.length=32", "--steps=2", "--prompt=48",
]  # fmt: skip


def run(folder, *flags):
    argv = ["x", f"--run_dir={folder}", *TINY, *flags]
    launch(analyze.main, analyze.__doc__, argv, run=analyze.Run(), model=ModelShape(), train=TrainConfig())
    return json.loads((folder / "results.json").read_text())


def test_everything_is_predicted_and_measured(tmp_path, capsys):
    found = run(tmp_path / "out", "--train.policy=bfloat16_pure")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 3
    assert page.count("<table") == 3
    phases = {row["name"]: row for row in found["phases"]}
    assert list(phases) == ["training step", "prefill", "decode, short cache", "decode, full cache"]
    for row in phases.values():
        assert row["measured_seconds"] > 0
        assert row["predicted_seconds"] >= max(row["flops"] / 1e12, row["bytes"] / 1e9) * 0.999
    assert phases["decode, full cache"]["bound"] == "memory"
    held = {row["name"]: row for row in found["memory"]}
    assert held["both"]["predicted"] == pytest.approx(held["both"]["compiled"], abs=100)
    assert held["temporaries of a step"]["compiled"] > 0
    components = {row["name"]: row for row in found["components"]}
    assert set(components) == {"projections", "attention", "feed-forward", "output layer", "all"}
    for n, flops in components["all"]["flops"].items():
        assert flops == sum(row["flops"][n] for name, row in components.items() if name != "all")
    shown = capsys.readouterr().out
    for words in (
        "Attention overtakes",
        "stored activations",
        "lower bound",
        "A token of training costs",
        "FLOP utilization",
    ):
        assert words in shown


def test_a_model_too_large_to_run_is_analyzed_without_running(tmp_path, capsys):
    size = ["--model.width=8192", "--model.heads=64", "--model.layers=80", "--model.mlp_dim=28672", "--longest=1000000"]
    found = run(tmp_path / "out", "--nomeasure", *size)
    assert all(row["measured_seconds"] is None for row in found["phases"])
    assert "longest" not in capsys.readouterr().err
    assert "1000000" in found["components"][0]["flops"]


def test_auto_is_settled_before_anything_is_computed(tmp_path, auto_picks, capsys):
    auto_picks("bfloat16")
    found = run(tmp_path / "out", "--nomeasure", "--train.policy=auto")
    assert "train.policy auto: bfloat16; " in capsys.readouterr().out
    assert "bfloat16" in found["roofline"]["matmul"]


def test_windows_too_short_are_never_overtaken(tmp_path, capsys):
    found = run(tmp_path / "out", "--nomeasure", "--model.window=4")
    assert found["crossover_positions"] is None
    assert "never overtakes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.length=100"], "longer than model.max_length"),
        (["--steps=0"], "steps is 0"),
        (["--longest=-1"], "longest is -1"),
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
