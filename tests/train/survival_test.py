"""A run that is killed, stopped, out of disk or fed nonsense goes on as if nothing had happened, or says why not."""

import contextlib
import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efflm.cli import run_directory
from efflm.config import InputError, Stopped
from efflm.config.train import TrainConfig
from efflm.formats import arrays, manifest
from efflm.parallel import meshes, processes
from efflm.precision import LossScale
from efflm.train import callbacks, trainer
from efflm.train.checkpointing import Checkpointing
from tests import tiny

ROOT = Path(__file__).parent.parent.parent
ADAM, PROGRAMS = optax.adam(0.1), {}  # what one run has compiled the others use


class Killed(Exception):
    pass


def rows(step):
    """Another number for each step."""
    return {"inputs": np.full((8, 4), 1 + step % 3, np.float32), "segments": np.ones((8, 4), np.int32)}


def quadratic(trainable, frozen, batch, rng):
    noise = jax.random.normal(rng, trainable["scale"].shape)  # the randomness must be resumed as well
    return jnp.mean(jnp.square(trainable["scale"] - batch["inputs"][0, 0] + 0.1 * noise)), {}


def train(
    folder, *, steps=6, batches=rows, size=3, tensorboard=None, loss=quadratic, log_every=1, on_nan="stop",
    loss_scale=None, lines=True, **kept,
):  # fmt: skip
    """A quick run with a checkpoint every two steps and a line each step, in `folder`."""
    task = trainer.Task(
        train=TrainConfig(steps=steps, log_every=log_every, on_nan=on_nan),
        loss_fn=loss,
        start=lambda: {
            "bias": jnp.zeros(2),
            "scale": jnp.asarray(np.random.default_rng(0).standard_normal(size), jnp.float32),
        },
        batches=batches,
        rule=ADAM,
        loss_scale=loss_scale,
    )
    watched = [callbacks.lines(folder / "metrics.jsonl", tensorboard)] if lines else []
    saved = Checkpointing(directory=folder / "state", **{"every": 2, "keep": 9} | kept)
    return trainer.fit(task, mesh=meshes.make_mesh(), watched=watched, checkpointing=saved, programs=PROGRAMS)


def dying_at(fatal, before=rows):
    def batches(step):
        if step == fatal:
            raise Killed
        return before(step)

    return batches


def metrics(folder):
    """The lines, without what the clock and the memory say."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tiny.repeatable(line) for line in lines]


def steps_in(folder):
    return sorted(int(path.name) for path in (folder / "state").iterdir())


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- resuming ------------------------------------------------------------------------------------------------------


def test_resumed_is_uninterrupted_to_the_last_bit(tmp_path):
    """With all that a state may hold: 8-bit moments, a loss scale that grows, stacked layers, a batch in parts."""
    model, config = tiny.model(), TrainConfig(steps=4, optimizer="adamw8bit", policy="float16", scan=True, accumulate=2)
    config = dataclasses.replace(config, log_every=1)
    batches = lambda step: tiny.batch(model.config, seed=step)
    task = trainer.model_task(model.config, config, tiny.copies(model.params), batches)
    task = dataclasses.replace(task, loss_scale=LossScale.start(2.0**4, interval=1))

    def trained():
        watched, kept = (
            [callbacks.lines(tmp_path / "metrics.jsonl")],
            Checkpointing(directory=tmp_path / "state", every=2),
        )
        return trainer.fit(task, mesh=meshes.make_mesh(), watched=watched, checkpointing=kept).params

    whole, written = trained(), metrics(tmp_path)
    assert [line["loss_scale"] for line in written] == [16, 32, 64, 128]
    shutil.rmtree(tmp_path / "state" / "4")
    same(trained(), whole)
    assert metrics(tmp_path) == written


def test_a_run_goes_on_on_another_mesh(tmp_path):
    start = {"embedding": jnp.arange(32.0).reshape(8, 4) / 32, "scale": jnp.ones(4)}
    loss = lambda tree, frozen, batch, rng: (
        jnp.mean(jnp.square(tree["embedding"] * tree["scale"][None] - batch["inputs"])),
        {},
    )

    def trained(mesh):
        task = trainer.Task(
            train=TrainConfig(steps=4, log_every=1), loss_fn=loss, start=tiny.copies(start), batches=rows,
            rule=optax.adam(0.1),
        )  # fmt: skip
        watched, kept = (
            [callbacks.lines(tmp_path / "metrics.jsonl")],
            Checkpointing(directory=tmp_path / "state", every=2),
        )
        return trainer.fit(task, mesh=mesh, watched=watched, checkpointing=kept)

    trained(meshes.make_mesh(fsdp=2))
    written = metrics(tmp_path)
    shutil.rmtree(tmp_path / "state" / "4")
    out = trained(meshes.make_mesh(data=2, fsdp=2, tensor=2))
    assert tuple(out["embedding"].sharding.spec) == ("tensor", "fsdp")
    for line, before in zip(metrics(tmp_path), written, strict=True):
        assert line == pytest.approx(before, rel=1e-5)


def test_a_killed_run_writes_each_line_once(tmp_path):
    calm = train(tmp_path / "calm")
    with pytest.raises(Killed):
        train(tmp_path / "killed", batches=dying_at(5))
    assert [line["step"] for line in metrics(tmp_path / "killed")] == [1, 2, 3, 4]
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 0.5}\n{"step": 6, "lo')  # from beyond the checkpoint, the last one cut off
    same(train(tmp_path / "killed"), calm)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "calm")
    same(train(tmp_path / "killed", batches=dying_at(0)), calm)  # it is finished: no step is needed


def test_lines_are_written_before_the_checkpoint_that_makes_them_old(tmp_path):
    """A line is fetched late; a process killed right after a checkpoint must not lose it."""
    with pytest.raises(Killed):
        train(tmp_path, batches=dying_at(4), log_every=2)
    assert [line["step"] for line in metrics(tmp_path)] == [2, 4]
    train(tmp_path, log_every=2)
    assert [line["step"] for line in metrics(tmp_path)] == [2, 4, 6]


def event_steps(folder):
    """(tag, step) of every scalar in the event files: TFRecord framing, read by hand."""
    from tensorboardX.proto.event_pb2 import Event

    out = []
    for file in folder.glob("events*"):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + size])
            out += [(value.tag, event.step) for value in event.summary.value]
            at += 12 + size + 4
    return out


def test_event_files_hold_each_step_once(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, batches=dying_at(5), tensorboard=tmp_path / "events")
    train(tmp_path, tensorboard=tmp_path / "events")
    assert sorted(step for tag, step in event_steps(tmp_path / "events") if tag == "train/loss") == [1, 2, 3, 4, 5, 6]


def test_other_settings_are_refused_by_name(tmp_path):
    train(tmp_path, steps=2, about={"seed": 1, "shape": (2, 3)})
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="seed=1, but this run asks for 2"):
        train(tmp_path, about={"seed": 2, "shape": (2, 3)})
    assert (tmp_path / "metrics.jsonl").read_text() == before
    train(tmp_path, about={"seed": 1, "shape": (2, 3)})


# --- what is kept, and what is damaged -----------------------------------------------------------------------------


def test_the_newest_and_every_so_many_th_are_kept(tmp_path):
    train(tmp_path, steps=16, every=2, keep=2, keep_period=6)
    assert steps_in(tmp_path) == [6, 12, 14, 16]


def flip(folder):
    file = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def truncate(folder):
    file = folder / "arrays" / "manifest.ocdbt"
    file.write_bytes(file.read_bytes()[:-1])


def damage_the_manifest(folder):
    file = folder / manifest.NAME
    file.write_text(file.read_text()[:40])


DAMAGES = {
    flip: "SHA-256 differs",
    truncate: "manifest.ocdbt is not what was written",
    damage_the_manifest: "manifest.json is damaged",
    lambda folder: (folder / manifest.NAME).unlink(): "half-written",
    lambda folder: (folder / "about.json").unlink(): "about.json is missing",
}


@pytest.mark.parametrize(("damage", "why"), DAMAGES.items(), ids=DAMAGES.values())
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, damage, why):
    calm = train(tmp_path)
    damage(tmp_path / "state" / "6")
    trained = []
    same(train(tmp_path, batches=lambda step: trained.append(step) or rows(step)), calm)
    assert trained == [4, 5]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert str(tmp_path / "state" / "6") in warnings[0]
    assert why in warnings[0]
    assert manifest.problem(tmp_path / "state" / "6") == ""


def test_a_bit_in_any_file_is_noticed(tmp_path):
    train(tmp_path, steps=2)
    folder, files = tmp_path / "state" / "2", 0
    for file in [path for path in folder.rglob("*") if path.is_file() and path.name != manifest.NAME]:
        content = file.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1} if content else ():
            changed = bytearray(content)
            changed[place] ^= 1
            file.write_bytes(changed)
            assert manifest.problem(folder), file
            file.write_bytes(content)
            files += 1
    assert files > 10
    assert manifest.problem(folder) == ""


def test_damaged_checkpoints_do_not_count_among_the_kept(tmp_path):
    train(tmp_path, steps=6, keep=2)
    flip(tmp_path / "state" / "6")
    with pytest.raises(Killed):
        train(tmp_path, steps=8, every=1, keep=2, batches=dying_at(5))
    assert steps_in(tmp_path) == [4, 5]


def test_only_damaged_checkpoints_are_one_clear_line(tmp_path):
    train(tmp_path, steps=2)
    flip(tmp_path / "state" / "2")
    with pytest.raises(
        InputError, match=f"no checkpoint is whole: delete the folder {tmp_path / 'state'} to start over"
    ):
        train(tmp_path)


def test_a_run_killed_in_its_first_checkpoint_begins_anew(tmp_path, capsys):
    calm = train(tmp_path, steps=2)
    (tmp_path / "state" / "2" / manifest.NAME).unlink()
    same(train(tmp_path, steps=2), calm)
    assert "half-written" in capsys.readouterr().err


@pytest.mark.parametrize("told", [False, True])
def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, told):
    """Files may not grow beyond a limit, from the fourth step on: even if it was told to stop, it has failed."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(step):
        if step == 3 and told:
            os.kill(os.getpid(), signal.SIGTERM)
        if step == 3:
            while not manifest.exists(tmp_path / "state" / "2"):
                time.sleep(0.001)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        return rows(step)

    settings = {"steps": 30, "size": 100_000, "lines": False}
    try:
        with pytest.raises(
            InputError, match=r"/4 could not be written .* the last good one is that of step 2"
        ) as error:
            train(tmp_path, batches=filling, **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert "\n" not in str(error.value)
    assert steps_in(tmp_path) == [2]
    same(train(tmp_path, **settings), train(tmp_path / "calm", **settings))


def test_what_is_written_after_a_save_has_failed_goes_too(tmp_path, monkeypatch):
    """TensorStore goes on with other arrays, and makes their folder anew, when Orbax has raised the first error."""

    def still_writing(folder):
        for i in range(10):
            with contextlib.suppress(FileNotFoundError):  # deleted in between
                folder.mkdir(parents=True, exist_ok=True)
                (folder / str(i)).write_bytes(b"x")
            time.sleep(0.01)

    def fail(folder, written):
        threading.Thread(target=still_writing, args=(folder.with_name("arrays.orbax-checkpoint-tmp") / "d",)).start()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arrays, "require_readable", fail)
    with pytest.raises(InputError, match="/2 could not be written"):
        train(tmp_path, steps=2)
    assert steps_in(tmp_path) == []


FAILURES = [
    (OSError(errno.EIO, "Input/output error"), processes.Interrupted),
    (OSError(errno.ESTALE, "Stale file handle"), processes.Interrupted),
    (jax.errors.JaxRuntimeError("UNAVAILABLE: Task 1 heartbeat timeout"), processes.Interrupted),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), InputError),
    (TypeError("a bug"), TypeError),
]


@pytest.mark.parametrize(("error", "raised"), FAILURES, ids=lambda value: repr(value)[:30])
@pytest.mark.parametrize(
    "where", [(run_directory, "write_json"), (manifest, "write"), (os, "fsync")], ids=lambda w: w[1]
)
def test_what_fails_in_a_save_is_retryable_or_final_by_its_cause(tmp_path, monkeypatch, error, raised, where):
    """In the main thread, in the thread that commits, and in the metrics that are put on disk before."""

    def fail(*_):
        raise error

    monkeypatch.setattr(*where, fail)
    kinds = OSError if where[1] == "fsync" and raised is InputError else raised  # flags.launch knows what it is
    with pytest.raises(kinds) as caught:
        train(tmp_path, steps=2)
    final = {processes.Interrupted: processes.RETRY, InputError: processes.MISTAKE, TypeError: processes.BUG}[raised]
    assert processes.exit_code(caught.value) == final
    assert "\n" not in str(caught.value)
    assert steps_in(tmp_path) == [] if (tmp_path / "state").exists() else True


# --- being stopped -------------------------------------------------------------------------------------------------


def test_a_disk_without_room_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(InputError, match=r"1\.00 kB free, \d+\.\d\d kB needed.*free some space"):
        train(tmp_path, size=10_000)
    assert not (tmp_path / "state").exists() or steps_in(tmp_path) == []


ASKING = [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")]


@pytest.mark.parametrize(("number", "name"), ASKING)
def test_a_signal_ends_the_run_after_the_step_in_flight(tmp_path, number, name):
    def batches(step):
        if step == 2:
            os.kill(os.getpid(), number)
        return rows(step)

    before = [signal.getsignal(each) for each, _ in ASKING]
    with pytest.raises(Stopped, match=f"stopped at step 3 of 6, as told by {name}: the same command goes on"):
        train(tmp_path, batches=batches, every=0)
    assert [signal.getsignal(each) for each, _ in ASKING] == before
    assert steps_in(tmp_path) == [3]
    same(train(tmp_path), train(tmp_path / "calm"))
    assert metrics(tmp_path) == metrics(tmp_path / "calm")


def under_way(tmp_path, pause):
    """A training process in whose fifth step we are, which takes `pause` seconds as all others from then on do."""
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which a shell's background processes ignore
        "from efflm.cli.flags import launch\n"
        "from tests.train import survival_test as t\n"
        "from pathlib import Path\n"
        f"slow = lambda step: (print('step', step, flush=True), time.sleep({pause} * (step > 4)), t.rows(step))[2]\n"
        "launch(lambda: t.train(Path(sys.argv[1]), steps=100000, batches=slow, every=0), '', ['x'])\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    for line in run.stdout:
        if line.startswith("step 5"):
            break
    return run


def test_a_second_ctrl_c_ends_the_run_at_once(tmp_path):
    run = under_way(tmp_path, 600)
    run.send_signal(signal.SIGINT)
    assert run.stderr.readline() == "stopping with a last checkpoint; another Ctrl-C ends at once\n"
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert (run.returncode, errors) == (130, "")


@pytest.mark.parametrize("number", [number for number, _ in ASKING])
def test_a_signal_is_exit_code_0_with_a_word(tmp_path, number):
    run = under_way(tmp_path, 0.01)
    run.send_signal(number)
    rest, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    assert "Traceback" not in errors
    word = rest.splitlines()[-1]
    assert word.startswith("stopped at step")
    assert steps_in(tmp_path) == [int(word.split()[3])]
    assert len([line for line in rest.splitlines() if not line.startswith(("step", "  training"))]) == 1


# --- what is not finite --------------------------------------------------------------------------------------------


def nonsense(*steps):
    return lambda step: rows(step) | {"inputs": np.full((8, 4), np.inf if step in steps else 1.0, np.float32)}


def test_a_step_that_is_not_finite_stops_the_run_before_its_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"step 4, .* first such gradient is that of scale") as error:
        train(tmp_path, batches=nonsense(3))
    assert "\n" not in str(error.value)
    assert steps_in(tmp_path) == [2]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]


def test_a_gradient_alone_that_is_not_finite_stops_the_run(tmp_path):
    """At 0 the root is finite and its slope is not: the weights would be lost, and the loss of the next step."""
    root = lambda trainable, *rest: (jnp.sqrt(jnp.sum(trainable["bias"])), {})
    with pytest.raises(InputError, match=r"loss is 0\.0 at step 1, .* that of bias"):
        train(tmp_path, loss=root, log_every=5)


def test_such_steps_can_be_skipped_and_are_counted(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path, batches=dying_at(4, nonsense(1, 5)), on_nan="skip")
    skipping = train(tmp_path, batches=nonsense(1, 5), on_nan="skip")
    assert [line["skipped"] for line in metrics(tmp_path)] == [0, 1, 1, 1, 1, 2]
    assert np.all(np.isfinite(skipping["scale"]))
    ending = train(tmp_path / "shorter", batches=nonsense(1), on_nan="skip", steps=5)
    same(skipping, ending)


@pytest.mark.parametrize("steps", [3, 40])
def test_a_loss_scale_that_overflows_at_every_step_is_an_error(tmp_path, steps):
    """Few steps: none changed a weight. Many: the scale is 1, and there is no lower one to try."""
    with pytest.raises(InputError, match=r"none of the 3 steps|lowest loss scale, 1\.0") as error:
        train(tmp_path, batches=nonsense(*range(steps)), loss_scale=LossScale.start(), steps=steps)
    assert "\n" not in str(error.value)
    assert not manifest.exists(tmp_path / "state" / str(steps))


def test_a_run_that_skipped_every_step_is_an_error_even_when_resumed(tmp_path):
    for _ in range(2):
        with pytest.raises(InputError, match=r"none of the 4 steps .* not finite"):
            train(tmp_path, batches=nonsense(*range(4)), on_nan="skip", steps=4)
    assert steps_in(tmp_path) == [2]


def test_a_loss_scale_may_fall_to_1_and_recover(tmp_path):
    out = train(tmp_path, batches=nonsense(1, 2), loss_scale=LossScale.start(4.0), steps=5)
    assert [line["loss_scale"] for line in metrics(tmp_path)] == [4, 4, 2, 1, 1]
    assert np.all(np.isfinite(out["scale"]))
