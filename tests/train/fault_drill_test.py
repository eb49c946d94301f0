"""Kill a training run again and again, damage its checkpoints, fill its disk: does it lose or falsify anything?

    python -m tests.train.fault_drill_test --kills=20 --folder=FOLDER      # a new one

A tiny model is trained in processes of its own, with a checkpoint every few steps. Some are killed (kill -9) at a
random step, some while a checkpoint is being written, some while they start; between two lives the newest checkpoint
is sometimes truncated, has a bit flipped, or loses its manifest. Then the same on a disk too small for the
checkpoints: a tmpfs, or, where mounting is not permitted, a limit on the size of files.

Every line of metrics and the last state are compared, bit for bit, with those of a run that nobody disturbed. Expect,
in about 3 minutes on two cores, a line for each life and at the end two zeros and exit code 0: no life lost work beyond
one checkpoint interval (apart from the interval whose checkpoint was still being written, or was damaged by us), and
none continued in a wrong state without an error. Exit code 1 otherwise.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efflm import trees, user_cache
from efflm.cli import run_directory
from efflm.cli.flags import launch
from efflm.config import flag
from efflm.config.model import ModelShape
from efflm.config.train import TrainConfig
from efflm.formats import manifest
from efflm.model import init_params
from efflm.parallel import meshes
from efflm.train import callbacks, metrics, trainer
from efflm.train.aot import random_rows, training_step
from efflm.train.checkpointing import Checkpointing, TrainingRun
from tests import tiny

ROOT = Path(__file__).parents[2]
SHAPE = ModelShape(layers=2, width=64, heads=4, kv_heads=2, mlp_dim=128, vocabulary=512, max_length=32)
ROWS, LENGTH, PAUSE = 4, 32, 0.02  # seconds a step waits for its batch, so that a kill hits the step it is meant for
KEEP = 2
DAMAGE = ("truncate", "flip", "no manifest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One of the processes that get killed"""

    run_dir: str = flag("", "where it trains", path=True)
    every: int = flag(5, "steps between checkpoints")
    steps: int = flag(0, "steps to train")
    largest_file: int = flag(0, "bytes beyond which the system lets no file grow; 0: no limit")

    @property
    def train(self) -> TrainConfig:
        return TrainConfig(steps=self.steps, batch=ROWS, length=LENGTH, log_every=1)


def checkpointing(run: Run) -> Checkpointing:
    return Checkpointing(directory=Path(run.run_dir) / "state", every=run.every, keep=KEEP, about={"seed": 0})


@run_directory.locked
def train(run: Run) -> None:
    """What is killed: the unchanged trainer, on batches that are a function of the step."""
    if run.largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.largest_file, run.largest_file))
    user_cache.use_compilation_cache("fault_drill")  # its own: a kill may leave half a program there
    config = SHAPE.config()

    def batches(step: int) -> dict[str, np.ndarray]:
        time.sleep(PAUSE)
        return random_rows(ROWS, LENGTH, config.vocabulary, seed=step)

    trainer.fit(
        trainer.model_task(config, run.train, lambda: init_params(config, 0), batches),
        mesh=meshes.make_mesh(),
        watched=[callbacks.lines(Path(run.run_dir) / "metrics.jsonl")],
        checkpointing=checkpointing(run),
    )


# --- looking at a run from outside ---------------------------------------------------------------------------------


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics that do not differ from run to run; a line that a kill cut off ends them."""
    return [tiny.repeatable(record) for _, record in metrics.read(run_dir / "metrics.jsonl")]


def last_step(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    for text in reversed(file.read_text().splitlines()[-2:] if file.exists() else []):
        with contextlib.suppress(ValueError):
            return json.loads(text)["step"]
    return 0


def folders(run_dir: Path, committed: bool) -> list[int]:
    found = [path for path in (run_dir / "state").glob("*") if path.name.isdigit()]
    return sorted(int(path.name) for path in found if manifest.exists(path) == committed)


def marked(run_dir: Path, step: int) -> tuple[int, ...]:
    """Tells one checkpoint from another of the same step."""
    folder = run_dir / "state" / str(step)
    return tuple(path.stat().st_mtime_ns for path in (folder, folder / "about.json") if path.exists())


def final_state(run: Run) -> str:
    """A digest of the newest whole TrainState."""
    _, (like, *_) = training_step(SHAPE.config(), run.train, meshes.make_mesh())
    with TrainingRun(checkpointing(run)) as kept:
        state = kept.resume(like)
    digest = hashlib.sha256()
    for path, leaf in trees.flatten(state, inside=True):
        digest.update(path.encode() + np.asarray(leaf).tobytes())
    return digest.hexdigest()


# --- lives and faults ----------------------------------------------------------------------------------------------


def start(run: Run, run_dir: Path, largest_file: int = 0) -> subprocess.Popen:
    """A process that trains in run_dir; what it says goes to run_dir.log."""
    run_dir.mkdir(parents=True, exist_ok=True)
    flags = {"run_dir": run_dir, "every": run.every, "steps": run.steps, "largest_file": largest_file}
    command = [sys.executable, "-m", "tests.train.fault_drill_test", "train"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device
    with (run_dir.parent / f"{run_dir.name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)


def said(run_dir: Path) -> str:
    return (run_dir.parent / f"{run_dir.name}.log").read_text()


def restored(run_dir: Path) -> int | None:
    """The step that the last life went on from; None if it was killed before it said so."""
    found = re.search(r"going on from step (\d+)", said(run_dir))
    return int(found[1]) if found else None


def kill_at_random(process: subprocess.Popen, run_dir: Path, every: int, rng: random.Random) -> str:
    """Wait for a moment, kill -9 then, and tell which moment it was; "" if the run was finished before."""
    how = rng.choice(["at a step", "at a step", "while writing", "while writing", "while starting"])
    fresh, begun, wait = not folders(run_dir, committed=True), time.perf_counter(), rng.uniform(0, 3)

    def until(reached) -> None:
        while process.poll() is None and not reached():
            time.sleep(0.001)

    going_on = lambda: restored(run_dir) is not None or (fresh and last_step(run_dir) > 0)
    if how == "while starting":
        until(lambda: time.perf_counter() - begun > wait or going_on())
    else:
        until(going_on)
        target = (restored(run_dir) or 0) + rng.randint(1, 3 * every)
        # Beyond that lie lines of the life before, which this one is about to drop.
        until(lambda: target <= last_step(run_dir) <= target + 3 * every)
        if how == "while writing":
            until(lambda: folders(run_dir, committed=False))
            time.sleep(rng.uniform(0, 0.05))
    if process.poll() is not None:
        return ""
    process.kill()
    process.wait()
    return how


def damage(run_dir: Path, rng: random.Random) -> tuple[int, str] | None:
    """Damage one file of the newest checkpoint, unless no other is left."""
    committed = folders(run_dir, committed=True)
    if len(committed) < 2:
        return None
    folder, how = run_dir / "state" / str(committed[-1]), rng.choice(DAMAGE)
    if how == "no manifest":
        (folder / manifest.NAME).unlink()
        return committed[-1], how
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size))
    content = bytearray(file.read_bytes())
    if how == "truncate":
        del content[rng.randrange(len(content)) :]
    else:
        # Not in the manifest's blanks, where it would be no damage at all.
        place = rng.choice([i for i, byte in enumerate(content[:4096]) if byte not in b" \n"])
        content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return committed[-1], f"{how} {file.relative_to(folder)}"


def drill(root: Path, kills: int = 20, every: int = 5, seed: int = 0) -> tuple[int, int]:
    """How many lives lost work beyond one checkpoint interval, and how many continued in a wrong state."""
    calm, troubled = root / "calm", root / "troubled"
    run = Run(every=every, steps=every * (3 * kills + 10))
    assert start(run, calm).wait() == 0, f"the undisturbed run failed: see {root}/calm.log"
    truth = {line["step"]: line for line in lines(calm)}
    undisturbed = final_state(dataclasses.replace(run, run_dir=str(calm)))

    def is_true(run_dir: Path) -> bool:
        """No gap, no double, and every number as in the undisturbed run."""
        written = lines(run_dir)
        return written == [truth[step] for step in range(1, len(written) + 1)]

    rng, beyond, wrong, worst = random.Random(seed), 0, 0, 0
    damaged, reached = {}, 0  # the checkpoints that we damaged, and the last step known to be done
    for life in range(1, kills + 2):
        damaged = {step: mark for step, mark in damaged.items() if marked(troubled, step) == mark}  # not yet rewritten
        intact = [step for step in folders(troubled, committed=True) if step not in damaged]
        expected = intact[-1] if intact else 0
        process = start(run, troubled)
        if life <= kills:
            how = kill_at_random(process, troubled, run.every, rng)
        else:
            how = "" if process.wait() == 0 else "failed"
        went_on = restored(troubled)
        lost = reached - expected - run.every * len([step for step in damaged if step > expected])
        # One interval may be under way, and the checkpoint of the one before it still being written.
        bad_loss = lost > 2 * run.every or (went_on is not None and went_on != expected) or how == "failed"
        false = not is_true(troubled)
        beyond, wrong, worst = beyond + bad_loss, wrong + false, max(worst, lost)
        reached = last_step(troubled)
        print(
            f"life {life:2}: went on from step {'?' if went_on is None else went_on}, of {expected} expected; "
            f"reached {reached}; {'killed ' + how if how else 'finished'}"
            f"{'; LOST WORK' if bad_loss else ''}{'; WRONG NUMBERS' if false else ''}",
            flush=True,
        )
        if how and life <= kills and rng.random() < 0.5 and not damaged and (hit := damage(troubled, rng)):
            damaged[hit[0]] = marked(troubled, hit[0])
            print(f"         checkpoint {hit[0]}: {hit[1]}", flush=True)
        if not how:
            break
    if final_state(dataclasses.replace(run, run_dir=str(troubled))) != undisturbed:
        wrong += 1
        print("the final state differs from the undisturbed run's")

    lost, false = full_disk(run, root / "small", calm, undisturbed, is_true)
    beyond, wrong = beyond + lost, wrong + false
    print(f"steps done again by one life at most: {worst}, with a checkpoint every {every}")
    print(f"runs that lost work beyond one checkpoint interval: {beyond}")
    print(f"runs that produced a silently wrong state: {wrong}")
    return beyond, wrong


def full_disk(run: Run, disk: Path, calm: Path, undisturbed: str, is_true) -> tuple[bool, bool]:
    """Train where two checkpoints fit and a third does not, then with more space. (lost work, wrong state)."""
    size = sum(file.stat().st_size for file in (calm / "state" / str(run.train.steps)).rglob("*") if file.is_file())
    disk.mkdir(parents=True)
    mount = lambda *with_: subprocess.run(["mount", *with_, str(disk)], capture_output=True).returncode
    mounted = shutil.which("mount") and mount("-t", "tmpfs", "-o", f"size={int(2.6 * size)}", "tmpfs") == 0
    run_dir = disk / "run"
    try:
        if mounted:
            code = start(run, run_dir).wait()
        else:  # a life that leaves a checkpoint, then one that may not write files as large as it needs
            process = start(run, run_dir)
            while process.poll() is None and not folders(run_dir, committed=True):
                time.sleep(0.001)
            process.kill()
            process.wait()
            code = start(run, run_dir, largest_file=size // 4).wait()
        words = [line for line in said(run_dir).splitlines() if not line.startswith("  training")]
        whole = [s for s in folders(run_dir, committed=True) if not manifest.problem(run_dir / "state" / str(s))]
        kept = bool(whole) and last_step(run_dir) - whole[-1] <= 2 * run.every
        clear = code == 2 and len(words) == 1
        print(f"full disk ({'tmpfs' if mounted else 'limited file size'}): exit code {code}, {' '.join(words)}")
        if mounted:
            mount("-o", f"remount,size={40 * size}")
        finished = start(run, run_dir).wait() == 0
        same = (
            finished and is_true(run_dir) and final_state(dataclasses.replace(run, run_dir=str(run_dir))) == undisturbed
        )
        print(f"with space again: went on from step {restored(run_dir)}, {'finished' if finished else 'FAILED'}")
        return not (clear and kept and finished), finished and not same
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=False)


@pytest.mark.slow
def test_no_run_loses_work_or_continues_in_a_wrong_state(tmp_path):
    assert drill(tmp_path) == (0, 0)


def main() -> None:
    if sys.argv[1:2] == ["train"]:
        launch(train, "", [sys.argv[0], *sys.argv[2:]], run=Run())
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often the run is killed")
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="seed of when is killed and what is damaged")
    parser.add_argument("--folder", type=Path, required=True, help="where everything is written, a new one")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True)
    sys.exit(any(drill(asked.folder.resolve(), asked.kills, asked.every, asked.seed)))


if __name__ == "__main__":
    main()
