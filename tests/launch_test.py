"""The scripts in launch/: what they say, what they start, and two real processes that train one model."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
FLAGS = [
    "--model.layers=1",
    "--model.width=32",
    "--model.mlp_dim=48",
    "--model.vocabulary=300",
    "--model.max_length=32",
    "--train.length=32",
    "--train.batch=8",
    "--train.warmup=2",
    "--train.log_every=1",
    "--checkpoint_every=4",
]


FINAL = (1, 2, 3)


def bash(*command, **settings):
    return subprocess.run(["bash", *map(str, command)], capture_output=True, text=True, timeout=120, **settings)


@pytest.mark.parametrize("script", sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]), ids=lambda p: p.name)
def test_scripts_are_clean(script):
    assert bash("-n", script).returncode == 0
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run(["shellcheck", "-x", script], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment of this Python without packages, which the set-up takes for one that is installed."""
    venv = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=120)
    (venv / ".efflm-installed").write_text((ROOT / "requirements.txt").read_text())
    return venv


def set_up(venv, launch, path="/usr/bin:/bin"):
    program = f"set -euo pipefail; source {launch}/setup.sh && set_up"
    ended = bash("-c", program, env={"PATH": path, "EFFLM_VENV": str(venv)})
    assert ended.returncode == 0, ended.stderr
    assert "up to date" in ended.stdout
    return ended


def where_efflm_is(venv, folder):
    program = folder / "program.py"
    program.write_text("import efflm\nprint(efflm.__file__)")
    ended = subprocess.run([venv / "bin" / "python", program], capture_output=True, text=True, cwd=folder, env={})
    return ended.stdout.strip() or ended.stderr


def test_the_installed_python_imports_efflm_from_any_folder(environment, tmp_path):
    before = {path for path in environment.rglob("*") if "__pycache__" not in path.parts}
    assert "No module named 'efflm'" in where_efflm_is(environment, tmp_path)
    set_up(environment, LAUNCH)
    assert where_efflm_is(environment, tmp_path) == str(ROOT / "efflm" / "__init__.py")
    (made,) = {path for path in environment.rglob("*") if "__pycache__" not in path.parts} - before
    assert made.name == "efflm.pth"
    stamp = made.stat().st_mtime_ns
    set_up(environment, LAUNCH)
    assert made.stat().st_mtime_ns == stamp
    # The clone was moved, or another one has the same environment.
    moved = tmp_path / "a clone"
    (moved / "efflm").mkdir(parents=True)
    (moved / "efflm" / "__init__.py").touch()
    shutil.copytree(LAUNCH, moved / "launch")
    shutil.copy(ROOT / "requirements.txt", moved)
    set_up(environment, f"'{moved}'/launch")
    assert where_efflm_is(environment, tmp_path) == str(moved / "efflm" / "__init__.py")


def unfinished(environment, pip="exit 1"):
    """Sets the environment up with a stand-in for the Python that makes it; how that ended."""
    python = environment.parent / "python"
    python.write_text(f"""#!/bin/bash
case "$*" in
  *version_info*) ;;
  "-m venv "*) mkdir -p "$3/bin"; touch "$3/pyvenv.cfg"; printf '#!/bin/bash\n{pip}\n' >"$3/bin/python"
    chmod +x "$3/bin/python" ;;
esac
""")
    python.chmod(0o755)
    env = {"PATH": "/usr/bin:/bin", "EFFLM_VENV": str(environment), "PYTHON": str(python)}
    return bash("-c", f"set -euo pipefail; source {LAUNCH}/setup.sh && set_up", env=env)


def test_an_environment_that_it_has_not_made_is_left_alone(tmp_path):
    """Without pip, as uv makes them, or no environment at all."""
    for name in ("pyvenv.cfg", "thesis.txt"):
        folder = tmp_path / f"of the user {name}"
        (folder / "bin").mkdir(parents=True)
        (folder / name).write_text("mine")
        ended = unfinished(folder)
        assert (ended.returncode, (folder / name).read_text()) == (2, "mine")
        assert f"error: {folder} holds no Python with pip" in ended.stderr
        assert sorted(path.name for path in folder.iterdir()) == sorted(["bin", name])
    mine = tmp_path / "made here"
    assert unfinished(mine).returncode == 1  # interrupted before pip was there
    (mine / "lib").mkdir()
    (mine / "notes.txt").write_text("mine")
    assert unfinished(mine, pip="exit 0").returncode == 0
    assert (mine / "notes.txt").read_text() == "mine"
    assert not (mine / "lib").exists()


def test_a_path_that_cannot_be_left_is_told_and_stops_nothing(environment, tmp_path):
    """A stand-in for mv fails: root may write anywhere."""
    (tmp_path / "mv").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "mv").chmod(0o755)
    site = next(environment.glob("lib/python3.*/site-packages"))
    (site / "efflm.pth").unlink(missing_ok=True)
    ended = set_up(environment, LAUNCH, f"{tmp_path}:/usr/bin:/bin")
    assert "only the scripts in launch/ will find efflm" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not list(site.glob("efflm*"))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["local.sh"], "no experiment given"),
        (["local.sh", "--procs=2", "--", "experiments.pretrain"], "unknown flag --procs=2"),
        (["tpu_pod.sh", "--name=x", "--", "experiments.pretrain"], "--zone"),
        (["slurm.sbatch"], "no experiment given"),
        (["run.sh"], "no experiment given"),
        *[
            ([*script, name], f"there is no experiment {name}: did you mean experiments.{meant}?")
            for script in (
                ["run.sh"],
                ["local.sh", "--"],
                ["slurm.sbatch"],
                ["tpu_pod.sh", "--name=x", "--zone=z", "--type=t", "--runtime=r", "--"],
            )
            for name, meant in (("experiments.pretrane", "pretrain"), ("experiments/evalute.py", "evaluate"))
        ],
        (["run.sh", "xyz"], "there is no experiment xyz: experiments/README.md lists them"),
    ],
)
def test_a_wrong_command_is_told_in_one_line(command, words):
    ended = bash(LAUNCH / command[0], *command[1:], cwd=ROOT)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def stand_in(folder, script):
    """An environment in which a script is the installed Python, but for what the launch scripts ask it themselves."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(f"""#!/bin/bash
case "$*" in
  *socket*) echo 1234; exit ;;
esac
{script}
""")
    (folder / "bin" / "python").chmod(0o755)
    (folder / ".efflm-installed").write_text((ROOT / "requirements.txt").read_text())
    return {"PATH": "/usr/bin:/bin", "EFFLM_VENV": str(folder), "EFFLM_ACCELERATOR": "", "TMPDIR": str(folder)}


@pytest.mark.parametrize(
    "name",
    [
        "experiments.pretrain",
        "pretrain",
        "experiments/pretrain.py",
        "./experiments/pretrain.py",
        f"{ROOT}/experiments/pretrain.py",
    ],
)
def test_an_experiment_has_several_names(tmp_path, name):
    ended = bash(LAUNCH / "run.sh", name, "--seed=1", env=stand_in(tmp_path / "venv", 'echo "$@"'))
    assert ended.stdout == "-P -m experiments.pretrain --seed=1\n", ended.stderr


GROUPS = []


@pytest.fixture(autouse=True)
def no_group_left_running():
    yield
    while GROUPS:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(GROUPS.pop(), signal.SIGKILL)


def local(folder, script, *flags):
    """launch/local.sh with two stand-ins, in a process group of its own as a terminal makes one."""
    running = subprocess.Popen(
        ["bash", str(LAUNCH / "local.sh"), *flags, "--", "experiments.pretrain"], env=stand_in(folder, script),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    GROUPS.append(running.pid)
    return running


def test_what_a_runtime_dumps_goes_to_a_log_whose_name_is_printed(tmp_path):
    """Process 1 is killed, process 0 then loses it and says so between the dumps of its libraries."""
    running = local(tmp_path, """
case "$*" in
  *hosts.index=0*)
    echo "  training: step 1"; /usr/bin/sleep 0.5
    { echo 'E0000 coordination_service_agent.cc:1'; echo 'error: a machine failed (UNAVAILABLE)'; echo '*** SIGABRT'
      echo 'warning: passing over the checkpoint 3'; echo 'this process ends with exit code 75'; } >&2
    exit 75 ;;
  *) echo 'F0000 dump' >&2; kill -KILL $$ ;;
esac""", "--restarts=1")  # fmt: skip
    out, errors = running.communicate(timeout=60)
    assert (running.returncode, out) == (75, "  training: step 1\n" * 2)
    lines = [line for line in errors.splitlines() if not line.startswith("install:")]
    where = next(tmp_path.glob("efflm-local.*"))
    assert lines[:5] == [
        "launch: process 1 ended with exit code 137",
        f"launch: what the processes write to stderr is in {where}",
        "error: a machine failed (UNAVAILABLE)",
        "warning: passing over the checkpoint 3",
        "launch: process 0 ended with exit code 75",
    ]
    assert [line for line in lines if "000 dump" in line or "E0000" in line or "SIGABRT" in line] == []
    assert len([line for line in lines if str(where) in line]) == 1
    assert (where / "process-1.log").read_text() == "F0000 dump\n" * 2
    assert (where / "process-0.log").read_text().count("E0000") == 2


def test_a_bug_shows_its_traceback_once(tmp_path):
    script = "echo 'E0000 dump' >&2; printf 'Traceback (most recent call last):\n  File\nKeyError: 1\n' >&2; exit 1"
    _, errors = (running := local(tmp_path, script)).communicate(timeout=60)
    assert running.returncode == 1
    assert errors.count("KeyError: 1") == errors.count("Traceback") == 1
    assert "dump" not in errors


def test_a_bug_after_a_restart_shows_its_own_traceback(tmp_path):
    """And not that of what an earlier life was lost by."""
    script = f"""
if [ -e {tmp_path}/again ]; then
  printf 'Traceback (most recent call last):\\n  File\\nKeyError: 1\\n' >&2; exit 1
fi
case "$*" in
  *hosts.index=0*) printf 'Traceback\\nOSError: lost\\n' >&2; /usr/bin/sleep 0.5; touch {tmp_path}/again; exit 75 ;;
esac
kill -KILL $$"""
    _, errors = (running := local(tmp_path, script)).communicate(timeout=60)
    assert running.returncode == 1
    assert (errors.count("KeyError: 1"), errors.count("OSError")) == (1, 0)


def test_what_went_well_leaves_no_logs(tmp_path):
    running = local(tmp_path, "echo 'E0000 dump' >&2")
    _, errors = running.communicate(timeout=60)
    assert (running.returncode, "dump" in errors) == (0, False)
    assert list(tmp_path.glob("efflm-local.*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_script_stops_all_once(tmp_path, number):
    """A terminal sends Ctrl-C to the script and to its processes, which leave it to the script to tell them to stop."""
    script = f"trap 'echo stopped >> {tmp_path}/told; exit 0' TERM; echo up; while :; do /usr/bin/sleep 0.1; done"
    running = local(tmp_path / "venv", script)
    assert [running.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    os.killpg(running.pid, number) if number == signal.SIGINT else running.send_signal(number)
    running.communicate(timeout=60)
    assert running.returncode == 0
    assert (tmp_path / "told").read_text() == "stopped\n" * 2


def test_a_signal_stops_processes_that_are_just_begun(tmp_path):
    """It comes when the script has no number of them yet: while it looks for a port."""
    environment = stand_in(tmp_path / "venv", "trap 'exit 0' TERM; while :; do /usr/bin/sleep 0.1; done")
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(python.read_text().replace("echo 1234", "kill -TERM $PPID; echo 1234"))
    command = ["bash", str(LAUNCH / "local.sh"), "--", "experiments.pretrain"]
    running = subprocess.Popen(command, env=environment, start_new_session=True)
    GROUPS.append(running.pid)
    assert running.wait(timeout=60) in (0, 143)  # that of a process which has no trap yet


def test_a_second_ctrl_c_ends_all_and_nothing_starts_again(tmp_path):
    running = local(tmp_path / "venv", "trap '' TERM; echo up; while :; do /usr/bin/sleep 0.1; done")
    assert [running.stdout.readline() for _ in range(2)] == ["up\n"] * 2
    os.killpg(running.pid, signal.SIGINT)
    while "launch: stopping" not in (line := running.stderr.readline()):
        assert line
    os.killpg(running.pid, signal.SIGINT)
    out, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert (out, "again" in errors) == ("", False)


@pytest.mark.parametrize(
    ("codes", "exit_code", "lives"),
    [
        ((0, 0), 0, 1),
        *(((code, 75), code, 1) for code in FINAL),
        ((2, 134), 2, 1),
        ((75, 0), 75, 3),
        ((137, 2), 75, 3),  # it was killed: what the other one made of that is not the cause
    ],
)
def test_local_processes_start_again_a_few_times_but_not_after_a_final_code(tmp_path, codes, exit_code, lives):
    """Python is stood in for by a script that ends with the code of its index, the second process after the first."""
    env = stand_in(
        tmp_path / "venv",
        f"""case "$*" in
  *hosts.index=0*) echo life >> {tmp_path}/lives; exit {codes[0]} ;;
  *hosts.index=1*) /usr/bin/sleep 0.5; exit {codes[1]} ;;
esac""",
    )
    ended = bash(LAUNCH / "local.sh", "--processes=2", "--restarts=2", "--", "experiments.pretrain", env=env)
    assert ended.returncode == exit_code, ended.stderr
    assert len((tmp_path / "lives").read_text().splitlines()) == lives


# --- two real processes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(80):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(["alpha", "beta", "gamma", "delta", "\n"], 200)))
    return folder


STARTED = []


@pytest.fixture(autouse=True)
def nothing_left_running():
    yield
    while STARTED:
        STARTED.pop().terminate()


def train(run_dir, corpus, processes, *flags, steps=24):
    """launch/local.sh, under way."""
    where = [f"--run_dir={run_dir}", f"--corpus={corpus}", f"--train.steps={steps}"]
    command = [
        "bash",
        str(LAUNCH / "local.sh"),
        f"--processes={processes}",
        "--devices=2",
        "--",
        "experiments.pretrain",
    ]
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with (run_dir.parent / f"{run_dir.name}.log").open("w") as log:
        STARTED.append(
            subprocess.Popen(
                [*command, *where, *FLAGS, *flags], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        )
    return STARTED[-1]


def losses(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def said(run_dir):
    return (run_dir.parent / f"{run_dir.name}.log").read_text()


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_outlive_a_kill(corpus, tmp_path):
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    mesh = ["--mesh.fsdp=2", "--mesh.tensor=2", "--hosts.heartbeat=10"]
    for run_dir, processes in ((one, 1), (two, 2)):
        assert train(run_dir, corpus, processes, *(mesh if processes == 2 else [])).wait() == 0, said(run_dir)
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-5)
    score = lambda run_dir: float(re.search(r"validation: (\S+)", said(run_dir))[1])
    assert abs(score(two) - score(one)) < 1e-3

    running = train(killed, corpus, 2, *mesh)
    while not (killed / "state" / "8" / "manifest.json").exists():
        assert running.poll() is None, said(killed)
        time.sleep(0.05)
    subprocess.run(["pkill", "-KILL", "-f", f"run_dir={killed} .*hosts.index=1"], check=True)
    began = time.monotonic()
    while "starting all 2 again" not in said(killed):
        assert running.poll() is None, said(killed)
        assert time.monotonic() - began < 60, "the other process did not stop"
        time.sleep(0.1)
    assert running.wait() == 0, said(killed)
    assert "going on from step" in said(killed)
    assert losses(killed) == losses(two)


@pytest.mark.slow
def test_sigterm_stops_all_processes_at_the_same_step_and_another_number_goes_on(corpus, tmp_path):
    run_dir = tmp_path / "stopped"
    running = train(run_dir, corpus, 2, steps=400)
    while not (run_dir / "state" / "4" / "manifest.json").exists():
        assert running.poll() is None, said(run_dir)
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait() == 0, said(run_dir)
    step = int(re.search(r"stopped at step (\d+) of 400, as told by SIGTERM", said(run_dir))[1])
    assert len(losses(run_dir)) == step
    other = train(run_dir, corpus, 1, steps=400)
    while "going on from" not in said(run_dir):
        assert other.poll() is None, said(run_dir)
        time.sleep(0.05)
    assert f"going on from step {step} of 400" in said(run_dir)
    os.killpg(other.pid, signal.SIGINT)  # as a terminal sends Ctrl-C
    assert other.wait() == 0, said(run_dir)
    assert len(re.findall(r"stopped at step \d+ of 400", said(run_dir))) == 1
    assert "Traceback" not in said(run_dir)


@pytest.mark.slow
def test_a_mistake_is_not_tried_again(corpus, tmp_path):
    run_dir = tmp_path / "wrong"
    assert train(run_dir, corpus, 2, "--mesh.data=3").wait() == 2
    assert "starting all" not in said(run_dir)
    assert "mesh.data 3" in said(run_dir)
