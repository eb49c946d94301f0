"""The scripts for clusters, with programs that stand in for Slurm's and Google Cloud's, and JobSet's schema."""

import re
import signal
import subprocess
import time

import numpy as np
import pytest
import yaml

from efflm.parallel import processes
from tests.launch_test import FINAL, LAUNCH, ROOT, bash

ENDS = "this process ends with exit code {}\n"


# --- Slurm -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path):
    """Starts the job with srun, scontrol and the installed Python stood in for; srun prints and ends as it is told."""
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(
            f'#!/bin/bash\necho {name} "$@" >> {tmp_path}/calls\nsource {tmp_path}/{name}.does\n'
        )
        (tmp_path / name).chmod(0o755)
    (tmp_path / "scontrol.does").write_text("")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").symlink_to("/bin/true")
    (tmp_path / "venv" / ".efflm-installed").write_text((ROOT / "requirements.txt").read_text())
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "EFFLM_VENV": str(tmp_path / "venv"), "EFFLM_ACCELERATOR": ""}
    env |= {"SLURM_JOB_ID": "77"}

    def start(does, **more):
        (tmp_path / "calls").unlink(missing_ok=True)
        (tmp_path / "srun.does").write_text(does)
        ended = bash(LAUNCH / "slurm.sbatch", "experiments.pretrain", "--run_dir=a b", env=env | more, cwd=ROOT)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return ended, calls

    return start


@pytest.mark.parametrize(
    ("said", "sruns", "code", "again"),
    [
        *(("", code, code, False) for code in (0, *FINAL)),
        *(("", code, code, True) for code in (75, 137)),  # lost, or stopped because the time is over
        # srun gives the highest code: that of those who lost the first, or were killed because it had ended
        *((ENDS.format(code), 137, code, False) for code in FINAL),
        (ENDS.format(75) + ENDS.format(1), 137, 75, True),
    ],
)
def test_a_slurm_job_that_was_lost_or_out_of_time_goes_back_into_the_queue(slurm, said, sruns, code, again):
    """Not into its own allocation, whose nodes may be what failed, or whose time is over."""
    ended, calls = slurm(f"printf '{said}'; exit {sruns}")
    assert ended.returncode == code, ended.stderr
    assert calls[0].endswith("experiments.pretrain --run_dir=a b --hosts.coordinator=auto --hosts.stopped=75")
    assert calls[1:] == (["scontrol requeue 77"] if again else [])


def test_a_slurm_job_is_not_queued_for_ever_nor_after_scancel(slurm, tmp_path):
    ended, calls = slurm("exit 75", SLURM_RESTART_COUNT="101")
    assert (ended.returncode, calls) == (75, [])
    # scancel sends SIGTERM to the script too, Slurm's warning before the end of the time to the processes alone
    ended, calls = slurm("kill -TERM $PPID; exit 75")
    assert (ended.returncode, len(calls)) == (75, 1)
    (tmp_path / "scontrol.does").write_text("exit 1")
    ended, calls = slurm("exit 75")
    assert (ended.returncode, len(calls)) == (75, 2)
    assert "error: Slurm does not queue this job again: sbatch the same command" in ended.stderr


def test_slurm_warns_the_processes_before_the_time_is_over():
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE))
    name, _, seconds = options["signal"].partition("@")
    assert name == "TERM"  # with B: it would go to the script alone
    assert int(seconds) >= 120
    assert {"requeue", "open-mode"} <= set(options)


# --- a TPU pod -------------------------------------------------------------------------------------------------------

MISSING = "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource projects/p/mine was not found"


@pytest.fixture
def pod(tmp_path):
    """Runs the script: its exit code, what it says, and what it asked of gcloud, in full and in short.

    gcloud is a script that keeps the pod's state in a file. ssh: what that does to a run. fails: what it is asked for
    in vain, why: what it then says. send: a signal to the script once there is a file "up"."""

    def run(ssh, fails="none", flags=(), send=None, why="UNAVAILABLE: no route"):
        (tmp_path / "gcloud").write_text(f"""#!/bin/bash
echo "$@" >> {tmp_path}/calls
if [[ "$*" == {fails} ]]; then echo "ERROR: (gcloud) {why}, for mine" >&2; exit 1; fi
case "$*" in
  *describe*) if [ -e {tmp_path}/pod ]; then cat {tmp_path}/pod; else echo "{MISSING}" >&2; exit 1; fi ;;
  *queued-resources\\ create*) [ -e {tmp_path}/none ] && echo FAILED > {tmp_path}/pod || echo ACTIVE > {tmp_path}/pod ;;
  *delete*) rm {tmp_path}/pod ;;
  *ssh*) {ssh} ;;
esac
""")
        (tmp_path / "sleep").write_text("#!/bin/bash\n")
        for name in ("gcloud", "sleep"):
            (tmp_path / name).chmod(0o755)
        command = ["bash", LAUNCH / "tpu_pod.sh", "--name=mine", "--zone=z", "--type=v5p-128", "--runtime=r", "--spot"]
        command += ["--restarts=2", *flags, "--", "experiments.pretrain", "--run_dir=a b"]
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
        running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if send:
            while not (tmp_path / "up").exists():
                time.sleep(0.01)
            running.send_signal(send)
            (tmp_path / "up").unlink()
        errors = "".join(running.communicate(timeout=60))
        calls = (tmp_path / "calls").read_text()
        asked = re.findall(r"queued-resources (create|delete)|tpu-vm (scp|ssh)", calls)
        return running.returncode, errors, calls, ["".join(one) for one in asked]

    return run


def is_left(errors):
    return "give it back with gcloud compute tpus queued-resources delete mine --force --zone=z" in errors


def test_the_tpu_pod_is_asked_for_used_and_given_back(pod, tmp_path):
    """The first pod is lost while it works, the second finishes."""
    lost = f"[ -e {tmp_path}/lost ] && exit 0; touch {tmp_path}/lost; echo SUSPENDED > {tmp_path}/pod; exit 255"
    code, errors, calls, asked = pod(lost)
    assert code == 0, errors
    assert asked == ["create", "scp", "ssh", "delete", "create", "scp", "ssh", "delete"]
    assert "--accelerator-type=v5p-128 --runtime-version=r --spot --zone=z" in calls
    assert "experiments.pretrain --run_dir=a\\ b " in calls
    assert not is_left(errors)


@pytest.mark.parametrize(("said", "exit_code", "lives"), [*((code, code, 1) for code in FINAL), (75, 75, 3)])
def test_a_run_on_the_tpu_pod_starts_again_a_few_times_but_not_after_a_final_code(pod, said, exit_code, lives):
    """gcloud itself ends with 1, whatever the processes end with."""
    code, errors, _, asked = pod(f"echo {ENDS.format(said).strip()} >&2; exit 1")
    assert code == exit_code, errors
    assert asked == ["create", *["scp", "ssh"] * lives, "delete"]


def test_a_pod_that_is_not_to_be_had_is_not_asked_for_for_ever(pod, tmp_path):
    (tmp_path / "none").touch()
    code, _, _, asked = pod("exit 0")
    assert code == 75
    assert asked == ["create", "delete"] * 3


@pytest.mark.parametrize(
    ("fails", "ends"),
    [
        ("*describe*", (75, [], False)),  # whether there is a pod is not known
        ("*scp*", (75, ["create", "scp", "scp", "scp"], True)),
        ("*ssh*", (75, ["create", *["scp", "ssh"] * 3], True)),
        ("*delete*", (0, ["create", "scp", "ssh", "delete"], True)),
        ("*queued-resources\\ create*", (75, ["create"] * 3, False)),
    ],
)
def test_a_live_pod_is_left_where_gcloud_fails(pod, tmp_path, fails, ends):
    """A call that fails says nothing of the pod: the network, the login or the quota of calls may be gone."""
    code, errors, _, asked = pod("exit 0", fails=fails)
    assert (code, asked, is_left(errors)) == ends
    assert (tmp_path / "pod").exists() == ("create" in asked and "create" not in fails)
    assert "UNAVAILABLE: no route" in errors


def test_a_live_pod_is_left_where_gcloud_fails_while_the_run_is_under_way(pod, tmp_path):
    code, errors, _, asked = pod(f"touch {tmp_path}/broken; exit 255", fails=f'*describe* && -e "{tmp_path}/broken"')
    assert (code, asked, is_left(errors)) == (75, ["create", "scp", "ssh"], True)
    assert (tmp_path / "pod").read_text() == "ACTIVE\n"


def test_a_pod_of_someone_else_is_used_but_not_deleted(pod, tmp_path):
    (tmp_path / "pod").write_text("ACTIVE\n")
    code, errors, _, asked = pod("exit 0")
    assert (code, asked) == (0, ["scp", "ssh"])
    (tmp_path / "pod").write_text("SUSPENDED\n")
    (tmp_path / "calls").unlink()
    code, errors, _, asked = pod("exit 0")
    assert (code, asked) == (2, [])
    assert "error: there is a pod mine already, which cannot be used" in errors


def test_keep_keeps_the_pod_and_ctrl_c_gives_it_back(pod, tmp_path):
    code, errors, _, asked = pod("exit 0", flags=["--keep"])
    assert (code, asked, is_left(errors)) == (0, ["create", "scp", "ssh"], False)
    (tmp_path / "pod").unlink()
    (tmp_path / "calls").unlink()
    waits = f"touch {tmp_path}/up; while [ -e {tmp_path}/up ]; do /usr/bin/sleep 0.05; done; exit 1"
    code, errors, _, asked = pod(waits, send=signal.SIGTERM)
    assert (code, asked) == (143, ["create", "scp", "ssh", "delete"])


def test_a_mistake_in_the_request_is_told_at_once(pod):
    code, errors, _, asked = pod("exit 0", fails="*create*", why="INVALID_ARGUMENT: v5p-129 is no accelerator type")
    assert (code, asked, is_left(errors)) == (2, ["create"], False)
    assert "v5p-129 is no accelerator type" in errors


def test_what_a_lost_connection_left_running_ends_before_the_next_start(pod, tmp_path):
    """The hosts are this machine: what ssh is to run is run, in a folder that is their home."""
    home, script = tmp_path / "home", 'for last; do :; done; [ "${last#--zone}" = "$last" ] || last=${@: -2:1}'
    home.mkdir()
    (home / "bin").mkdir()
    (home / "bin" / "tar").write_text(f"#!/bin/bash\nmkdir -p efflm/launch; cp {tmp_path}/run.sh efflm/launch/run.sh\n")
    (home / "bin" / "tar").chmod(0o755)
    (tmp_path / "run.sh").write_text(f"""
echo started >> {tmp_path}/said
[ "$(grep -c started {tmp_path}/said)" -gt 1 ] && exit 0
trap 'echo stopped >> {tmp_path}/said; exit 75' TERM
while :; do /usr/bin/sleep 0.05; done
""")
    remote = f"{script}; cd {home}; export PATH={home}/bin:/usr/bin:/bin; "
    remote += f'if [ -e {tmp_path}/again ]; then bash -c "${{last#--command=}}"; exit; fi; touch {tmp_path}/again; '
    remote += f'bash -c "${{last#--command=}}" >/dev/null 2>&1 & until [ -e {tmp_path}/said ]; do /usr/bin/sleep 0.05; '
    remote += "done; exit 255"  # the connection is lost, the run goes on
    code, errors, _, _ = pod(remote)
    assert code == 0, errors
    assert (tmp_path / "said").read_text() == "started\nstopped\nstarted\n"


# --- GKE -----------------------------------------------------------------------------------------------------------

# What a JobSet may hold (its v1alpha2 resource definition, as far as ours goes): a dict is an object of these keys and
# no others, "!" marks one that must be there, a list any number of such items, a type a value of it.
POD = {
    "restartPolicy!": str,
    "terminationGracePeriodSeconds": int,
    "nodeSelector": {str: str},
    "containers!": [
        {
            "name!": str,
            "image!": str,
            "env": [{"name!": str, "value": str}],
            "command": [str],
            "args": [str],
            "resources": {"limits": {str: int}},
            "volumeMounts": [{"name!": str, "mountPath!": str}],
        }
    ],
    "volumes": [{"name!": str, "persistentVolumeClaim": {"claimName!": str}}],
}
EXIT_CODES = {"containerName": str, "operator!": str, "values!": [int]}
JOB = {
    "completions": int,
    "parallelism": int,
    "completionMode": str,
    "backoffLimit": int,
    "podFailurePolicy": {"rules!": [{"action!": str, "onExitCodes": EXIT_CODES}]},
    "template!": {"spec": POD},
}
JOBSET = {
    "apiVersion!": str,
    "kind!": str,
    "metadata!": {"name!": str, "annotations": {str: str}},
    "spec!": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name!": str, "action!": str, "onJobFailureReasons": [str]}],
        },
        "replicatedJobs!": [{"name!": str, "replicas": int, "template!": {"spec": JOB}}],
    },
}


def require_shape(value, shape, where=""):
    if isinstance(shape, type):
        assert type(value) is shape, f"{where} is {value!r}"
    elif isinstance(shape, list):
        assert isinstance(value, list), f"{where} is no list"
        for index, item in enumerate(value):
            require_shape(item, shape[0], f"{where}[{index}]")
    elif str in shape:
        assert isinstance(value, dict), f"{where} is no object"
        for name, item in value.items():
            require_shape(item, shape[str], f"{where}.{name}")
    else:
        assert isinstance(value, dict), f"{where} is no object"
        known = {name.rstrip("!"): kind for name, kind in shape.items()}
        assert set(value) <= set(known), f"{where} knows no {set(value) - set(known)}"
        assert {name[:-1] for name in shape if name.endswith("!")} <= set(value), f"{where} lacks what it must have"
        for name, item in value.items():
            require_shape(item, known[name], f"{where}.{name}")


def test_the_jobset_has_the_shape_of_one():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    require_shape(jobset, JOBSET)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = np.prod([int(side) for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")])
    assert spec["completions"] == spec["parallelism"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert spec["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    mistake = spec["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert mistake["containerName"] == container["name"]
    assert tuple(mistake["values"]) == FINAL == (processes.BUG, processes.MISTAKE, processes.MEMORY)
    assert 0 < jobset["spec"]["failurePolicy"]["maxRestarts"] <= 100
