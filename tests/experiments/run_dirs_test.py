"""What the experiments do with --run_dir: each has it for itself, and deletes only what one of its kind has written."""

import dataclasses
import fcntl
import importlib
import pkgutil

import numpy as np
import pytest

import experiments
from efflm.cli import run_directory
from efflm.compress import teacher_cache
from efflm.config import InputError
from efflm.parallel import meshes
from efflm.train.metrics import Metrics
from tests import tiny

WRITING = [
    module
    for found in pkgutil.iter_modules(experiments.__path__)
    if "run_dir" in vars(module := importlib.import_module(f"experiments.{found.name}")).get("Run", int).__dict__
]


def test_which_experiments_have_a_run_dir():
    names = {module.__name__.partition(".")[2] for module in WRITING}
    assert {"pretrain", "compress", "evaluate", "plan", "sweep"} <= names
    assert len(names) >= 8


@pytest.mark.parametrize("module", WRITING, ids=lambda module: module.__name__)
def test_each_has_its_run_directory_for_itself(module, tmp_path):
    run = dataclasses.replace(module.Run(), run_dir=str(tmp_path))
    with (tmp_path / run_directory.LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match=f"{tmp_path} is in use by"):
            module.main(run)
    assert [path.name for path in tmp_path.iterdir()] == [run_directory.LOCK]


def test_a_file_that_is_no_lock_is_left_alone(tmp_path):
    (tmp_path / run_directory.LOCK).write_text("poetry.lock, by another name")
    with (
        pytest.raises(InputError, match=r"run\.lock is not a lock that efflm has written"),
        run_directory.held(tmp_path),
    ):
        pass
    assert (tmp_path / run_directory.LOCK).read_text() == "poetry.lock, by another name"


def test_event_files_of_others_stay(tmp_path):
    (tmp_path / "events.out.tfevents.1.theirs").write_text("mine")
    for step in (0, 0):
        writer = Metrics(tmp_path / "metrics.jsonl", tmp_path, step)
        writer.write({"step": 1, "loss": 1.0})
        writer.close()
    names = [path.name for path in tmp_path.glob("events.*")]
    assert "events.out.tfevents.1.theirs" in names
    assert len(names) == 2  # and one of ours, written anew


@pytest.mark.parametrize("content", ["epoch,loss\n1,2\n", '{"epoch": 1, "loss": 2}\n', '[{"step": 1}]', "\n"])
def test_metrics_of_others_stay(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"metrics\.jsonl holds something other than the metrics of a run"):
        Metrics(tmp_path / "metrics.jsonl", None, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == content
    for cut in ("", '{"st', '{"step": 1, "lo'):  # ours, which a kill has cut off
        (tmp_path / "metrics.jsonl").write_text(cut)
        Metrics(tmp_path / "metrics.jsonl", None, 0).close()
        assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_teachers_cache_deletes_only_its_own_files(tmp_path):
    from efflm.compress.step import Context

    partial = tmp_path / "teacher.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    (partial / "p.npy").write_text("left by an interrupt")
    model = tiny.model()
    context = Context(batches=lambda step: tiny.batch(model.config, seed=step), mesh=meshes.make_mesh())
    header = teacher_cache.described(context, model, 1, "top_k", 2)
    teacher_cache.write(tmp_path / "teacher", model, context, header)
    found = next(tmp_path.rglob("notes.txt"))
    assert found.read_text() == "mine"
    assert np.load(tmp_path / "teacher" / "p.npy").shape[-1] == 2
