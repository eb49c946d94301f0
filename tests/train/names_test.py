"""Checkpoints in folders of any name, and none that cannot be opened again."""

import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efflm.config import InputError
from efflm.config.train import TrainConfig
from efflm.formats import arrays, checkpoint
from efflm.model import placement
from efflm.parallel import meshes
from efflm.train import callbacks, trainer
from efflm.train.checkpointing import Checkpointing, TrainingRun
from tests import tiny

NAMES = [
    "[br]",
    "[unclosed",
    "[!a]",
    "a*b",
    "**",
    "q?z",
    "{ack}",
    "back\\slash",
    "new\nline",
    "per%20cent#x|y",
    "ü 文",
    "~",
]


@pytest.mark.parametrize("name", NAMES)
def test_models_come_back_from_a_folder_of_any_name(tmp_path, monkeypatch, name):
    """Beside folders that the name fits as a pattern, whose arrays are others."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started, other = tiny.model(), tiny.model()
    other = other.replace(params=jax.tree.map(jnp.zeros_like, other.params))
    for beside in ("b", "a-b", "qqz"):
        checkpoint.save(tmp_path / beside / "checkpoint", 1, other, {})
    folder = tmp_path / name
    checkpoint.save(folder / "checkpoint", 1, started, {"seed": 1})
    mesh = meshes.make_mesh(fsdp=4, tensor=2)
    back, about = checkpoint.load(folder / "checkpoint", mesh)
    assert about == {"seed": 1}
    assert back.params["embedding"].sharding == placement.shardings(started.params, mesh)["embedding"]
    jax.tree.map(np.testing.assert_array_equal, back.params, started.params)
    assert not list(tmp_path.glob("efflm-*"))


@pytest.mark.parametrize("name", ["[br]", "back\\slash", "**"])
def test_a_run_goes_on_in_a_folder_of_any_name(tmp_path, name):
    folder = tmp_path / name

    def trained(steps):
        seen = []
        task = trainer.Task(
            train=TrainConfig(steps=steps),
            loss_fn=lambda tree, frozen, batch, rng: (jnp.mean((tree["w"][None] - batch["inputs"]) ** 2), {}),
            start=lambda: {"w": jnp.ones(4)},
            batches=lambda step: seen.append(step) or {"inputs": np.full((8, 4), step, np.float32)},
            rule=optax.adam(0.1),
        )
        watched = [callbacks.lines(folder / "metrics.jsonl", folder / "tensorboard")]
        kept = Checkpointing(directory=folder / "state")
        trainer.fit(task, mesh=meshes.make_mesh(), watched=watched, checkpointing=kept)
        return seen

    assert trained(2) == [0, 1]
    assert trained(3) == [2]


@pytest.mark.parametrize("path", ["/gs", "/gs/bucket/run", "/s3/run", "/az/run", "/hf/run", "/a/b[", "/a\\b"])
def test_what_orbax_would_misread_goes_by_another_name(path):
    with arrays.plainly_named(Path(path)) as named:
        assert named != Path(path)
        assert named.readlink() == Path(path)
    assert not named.is_symlink()
    for plain in ("/gsx/a", "/a/gs/b", "/a/s3"):
        with arrays.plainly_named(Path(plain)) as named:
            assert named == Path(plain)


def test_a_name_that_cannot_work_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "[t]"))
    with pytest.raises(InputError, match=r"\[run\].*set TMPDIR"):
        TrainingRun(Checkpointing(directory=tmp_path / "[run]"))
    (tmp_path / "[t]").mkdir()
    with pytest.raises(InputError, match=r"\[run\].*set TMPDIR"):
        TrainingRun(Checkpointing(directory=tmp_path / "[run]"))
    assert not (tmp_path / "[run]").exists()
    assert list((tmp_path / "[t]").iterdir()) == []


@dataclasses.dataclass
class Careless:
    """A checkpointer that loses a part of what it wrote before it says that it is done."""

    real: object
    lost: str
    folder: Path

    def save(self, *arguments):
        self.real.save(*arguments)

    def wait_until_finished(self):
        self.real.wait_until_finished()
        for file in self.folder.rglob(self.lost):
            file.unlink()

    def close(self):
        self.real.close()


@pytest.mark.parametrize("lost", ["manifest.ocdbt", "_METADATA"])
def test_a_checkpoint_that_cannot_be_opened_is_not_certified(tmp_path, monkeypatch, lost):
    checkpoint.save(tmp_path, 1, tiny.model(), {"seed": 1})
    real, made = arrays.checkpointer, []

    def careless():
        """The one that writes; those that read are as they are."""
        made.append(real())
        return Careless(made[0], lost, tmp_path / "2") if len(made) == 1 else made[-1]

    monkeypatch.setattr(arrays, "checkpointer", careless)
    with pytest.raises(InputError, match=r"2 could not be written \(it cannot be read again"):
        checkpoint.save(tmp_path, 2, tiny.model(), {"seed": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert checkpoint.load(tmp_path, meshes.make_mesh())[1] == {"seed": 1}


def test_a_checkpoint_removes_nothing_that_is_not_of_one(tmp_path):
    for step in ("1", "2024"):
        (tmp_path / step).mkdir()
        (tmp_path / step / "notes.txt").write_text("mine")
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tiny.model(), {})
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*.txt")) == [
        "1/notes.txt",
        "2024/notes.txt",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2024", "3"]
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["notes.txt"]
