#!/usr/bin/env bash
# Ask Google Cloud for a TPU pod, as a queued resource, and run an experiment on all its hosts:
#   bash launch/tpu_pod.sh --name=mine --zone=us-east5-a --type=v5p-128 --runtime=v2-alpha-tpuv5 --spot \
#     -- experiments.pretrain --run_dir=/mnt/shared/runs/mine --mesh.fsdp=64
# A pod that is preempted is asked for again, and the run goes on from its last checkpoint: --run_dir must lie on
# storage that all hosts have mounted and that outlives them. Final exit codes (launch/README.md) end it. At the end the pod is given back; --keep keeps it.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

name='' zone='' type='' runtime='' keep='' restarts=10 create=()
while [ $# -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --keep) keep=yes ;;
    --restarts=*) restarts=${1#*=} ;; # at most so often a pod is asked for again, and so often the run starts again
    --) shift; break ;;
    -h | --help) sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}"; exit ;;
    *) create+=("$1") ;; # --spot, --reserved, --project=..., for gcloud
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ] || [ -z "$type" ] || [ -z "$runtime" ] || [ $# -eq 0 ]; then
  echo "error: --name, --zone, --type and --runtime are needed, and an experiment after --" >&2
  exit 2
fi
experiment "$1" >/dev/null

tpu() { gcloud compute tpus "$@" --zone="$zone"; }
state() { tpu queued-resources describe "$name" --format='value(state.state)' 2>/dev/null || echo NONE; }
give_back() { tpu queued-resources delete "$name" --force --quiet || true; }
give_up() {
  echo "error: given up after $restarts restarts: see the errors above" >&2
  exit 75
}
on_all_hosts() { tpu tpu-vm ssh "$name" --worker=all --command="$1"; }

asked=0
obtain() {
  while true; do
    case $(state) in
      ACTIVE) return ;;
      NONE)
        if [ "$((asked++))" -gt "$restarts" ]; then give_up; fi
        tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
          --runtime-version="$runtime" "${create[@]}"
        ;;
      SUSPENDED | FAILED) give_back ;; # preempted, or not to be had: ask anew
    esac
    sleep 30
  done
}

if [ -z "$keep" ]; then trap give_back EXIT; fi
archive=$(mktemp) output=$(mktemp)
git -C "$root" archive --format=tar.gz -o "$archive" HEAD
for ((life = 0; life <= restarts; life++)); do
  obtain
  code=0
  {
    tpu tpu-vm scp "$archive" "$name:efflm.tar.gz" --worker=all &&
      on_all_hosts "mkdir -p efflm && tar -xzf efflm.tar.gz -C efflm &&
        EFFLM_ACCELERATOR=tpu bash efflm/launch/run.sh $(printf '%q ' "$@") --hosts.coordinator=auto --hosts.stopped=75"
  } 2>&1 | tee "$output" || code=$?
  if [ "$code" -eq 0 ]; then exit; fi
  code=$(cause "$output" 75) # gcloud's own code says little; if no process said one, a host was lost, or the pod
  if ! retryable "$code"; then exit "$code"; fi
  echo "launch: ended with exit code $code; starting again from the last checkpoint" >&2
  sleep 30
done
give_up
