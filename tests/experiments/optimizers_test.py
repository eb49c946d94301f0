import dataclasses
import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efflm.cli.flags import launch
from efflm.config.train import Optimizer
from efflm.evaluate.windows import Scoring
from efflm.parallel import meshes
from efflm.train.step import make_step
from experiments import optimizers
from tests import tiny

ROOT = Path(__file__).parent.parent.parent
TINY = [
    "--model.layers=1", "--model.width=32", "--model.mlp_dim=48", "--model.vocabulary=300", "--model.max_length=16",
    "--train.steps=12", "--train.warmup=2", "--train.length=16", "--train.batch=3", "--train.log_every=2",
]  # fmt: skip


def run(*argv):
    groups = {"run": optimizers.Run(), "model": optimizers.MODEL, "train": optimizers.TRAIN, "score": Scoring()}
    launch(optimizers.main, optimizers.__doc__, ["x", *argv], **groups)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(["alpha", "beta", "gamma", "for", "(", ")", "\n"], 150)))
    return folder


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "optimizers"
    run(f"--run_dir={folder}", f"--corpus={corpus}", "--optimizers=adamw8bit", "--multipliers=0.1,1",
        "--widen=1", "--seeds=2", *TINY)  # fmt: skip
    return folder


def test_rows_curves_and_plot_are_written(finished):
    results = json.loads((finished / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["adamw", "adamw8bit"]
    assert (finished / "report.html").read_text().count("<svg") == 2
    assert (rows["adamw"]["over_adamw"], rows["adamw"]["state_bytes"]) == (None, pytest.approx(8, rel=1e-3))
    assert rows["adamw8bit"]["state_bytes"] < 3
    assert rows["adamw"]["steps_to_adamw"] <= 12
    for name, row in rows.items():
        losses = results["test_bits_per_byte"][name]
        assert row["bits_per_byte"] == pytest.approx(np.mean(losses))
        assert row["bits_per_byte_sd"] == pytest.approx(np.std(losses, ddof=1))
        assert losses[0] != losses[1]
    assert any("8-bit moments" in fact and "within 1%" in fact for fact in results["protocol"])


def test_the_best_rate_on_validation_is_the_one_repeated(finished):
    """Seed 0 has run at every rate of the grid and at those beyond its edge, seed 1 at the selected one alone."""
    rows = {row["name"]: row for row in json.loads((finished / "results.json").read_text())["rows"]}
    for name, row in rows.items():
        tried = dict(part.split(": ") for part in row["note"].removeprefix("validation bits per byte by learning rate ")
                     .split("; ")[0].split(", "))  # fmt: skip
        assert len(tried) == 3
        best = min(tried, key=lambda rate: float(tried[rate]))
        assert float(best) == pytest.approx(row["learning_rate"], rel=0.05)
        again = [path.name for path in (finished / "curves").glob(f"{name}-*-seed1.jsonl")]
        assert again == [f"{name}-{row['learning_rate']:.2e}-seed1.jsonl"]
        assert len(list((finished / "curves").glob(f"{name}-*-seed0.jsonl"))) == 3


@pytest.mark.parametrize("name", typing.get_args(Optimizer))
def test_every_learning_rate_runs_the_same_program(name):
    """The text of the step before it is compiled does not depend on the rate: a sweep compiles once."""
    usual, mesh = optimizers.settings(name, optimizers.TRAIN), meshes.make_mesh()
    params = {"block_0": {"attention": {"query": {"kernel": jnp.ones((4, 8))}}}, "embedding": jnp.ones((8, 4))}
    loss_fn = lambda trainable, *_: (sum(jnp.sum(jnp.square(w)) for w in jax.tree.leaves(trainable)), {})

    def program(rate):
        tx = optimizers.at_rate(usual, rate)
        state = tiny.init_state(params, tx, mesh)
        return make_step(loss_fn, tx, 0, state).lower(state, {}, {}).as_text()

    assert program(1e-3) == program(2e-2)


def test_a_rate_that_diverges_is_only_not_selected(corpus, tmp_path, capsys):
    run(f"--run_dir={tmp_path / 'run'}", f"--corpus={corpus}", "--optimizers=sgd", "--multipliers=1e-3,1e25",
        "--widen=0", "--seeds=1", "--train.clip=1e30", *TINY)  # fmt: skip
    text = (tmp_path / "run" / "results.json").read_text()
    rows = json.loads(text, parse_constant=pytest.fail)["rows"]
    assert rows[1]["bits_per_byte_sd"] is rows[1]["over_adamw_sd"] is None  # one seed has no deviation
    assert rows[1]["learning_rate"] < 1
    assert np.isfinite(rows[1]["bits_per_byte"])
    assert "the loss is" in capsys.readouterr().out


def test_the_curve_is_a_trailing_mean():
    np.testing.assert_allclose(optimizers.smoothed(np.arange(20.0))[[0, 1, 19]], [0.0, 0.5, 18.5])


def test_the_small_setting_leaves_what_was_asked_for():
    asked = dataclasses.replace(optimizers.TRAIN, steps=7)
    small = optimizers.replace_defaults(asked, optimizers.TRAIN, optimizers.REDUCED_TRAIN)
    assert (small.steps, small.length) == (7, optimizers.REDUCED_TRAIN["length"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optimizers=adagrad"], "--optimizers is 'adagrad', but must be one of adamw, "),
        (["--multipliers=0,1"], "multipliers is 0.0,1.0, but must be positive"),
        (["--multipliers=a"], "--multipliers is 'a', but must be a number"),
        (["--seeds=0"], "seeds is 0"),
        (["--widen=-1"], "widen is -1"),
        (["--train.length=300"], "longer than model.max_length"),
        (["--corpus=/nowhere"], "corpus /nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(corpus, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run(f"--run_dir={tmp_path / 'runs' / 'o'}", f"--corpus={corpus}", *TINY, *flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "runs" / "o").exists()


@pytest.mark.slow
def test_eight_bits_lose_less_than_one_percent_in_500_steps(tmp_path):
    """Real text, three seeds, as a user runs it: without the tests' settings of JAX."""
    command = [
        sys.executable, "-m", "experiments.optimizers", "--reduced", "--optimizers=adamw8bit", "--multipliers=1",
        "--widen=0", "--seeds=3", "--train.steps=500", f"--run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment, timeout=600)
    by_seed = json.loads((tmp_path / "run" / "results.json").read_text())["test_bits_per_byte"]
    ratios = np.array(by_seed["adamw8bit"]) / np.array(by_seed["adamw"])
    assert len(ratios) == 3
    assert np.all(np.abs(ratios - 1) < 0.01), ratios
