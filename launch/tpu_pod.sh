#!/usr/bin/env bash
# Ask Google Cloud for a TPU pod, as a queued resource, and run an experiment on all its hosts:
#   bash launch/tpu_pod.sh --name=mine --zone=us-east5-a --type=v5p-128 --runtime=v2-alpha-tpuv5 --spot \
#     -- experiments.pretrain --run_dir=/mnt/shared/runs/mine --mesh.fsdp=64
# A pod that is preempted is asked for again, and the run goes on from its last checkpoint: --run_dir must lie on
# storage that all hosts have mounted and that outlives them. Final exit codes (launch/README.md) end it. At the end the
# pod is given back if this command asked for it, unless --keep is given. Where gcloud fails, so that nothing is known
# of the pod, it is left as it is, and a line says how to give it back.
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
    -h | --help) sed -n '2,8s/^# //p' "${BASH_SOURCE[0]}"; exit ;;
    *) create+=("$1") ;; # --spot, --reserved, --project=..., for gcloud
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ] || [ -z "$type" ] || [ -z "$runtime" ] || [ $# -eq 0 ]; then
  echo "error: --name, --zone, --type and --runtime are needed, and an experiment after --" >&2
  exit 2
fi
experiment "$1" >/dev/null
if ! command -v gcloud >/dev/null; then
  echo "error: there is no gcloud on the PATH: install the Google Cloud CLI" >&2
  exit 2
fi

tpu() { gcloud compute tpus "$@" --zone="$zone"; }
errors=$(mktemp) archive=$(mktemp) output=$(mktemp)
ours='' # whether this command asked for the pod that is there: no other is deleted
# shellcheck disable=SC2317  # a trap calls it
left() {
  if [ -n "$ours" ] && [ -z "$keep" ]; then
    echo "launch: the pod $name may still be there, and cost: give it back with gcloud compute tpus queued-resources" \
      "delete $name --force --zone=$zone" >&2
  fi
  rm -f "$errors" "$archive" "$output"
}
trap left EXIT
# Delete the pod; it is no longer there, or being deleted, if this succeeds.
give_back() { if tpu queued-resources delete "$name" --force --quiet; then ours=''; else return 1; fi; }
# End with exit code $1. What the pod did is known, so it is not needed any more.
finish() {
  trap '' INT TERM
  if [ -n "$ours" ] && [ -z "$keep" ]; then give_back || true; fi
  exit "$1"
}
trap 'finish 130' INT
trap 'finish 143' TERM
give_up() {
  echo "error: given up after $restarts restarts: see the errors above" >&2
  if [ -n "${1:-}" ]; then finish 75; fi
  exit 75
}
# What Google Cloud says of the pod; NONE if it says that there is none, or nothing; UNKNOWN if it does not answer. For
# NONE a pod is asked for, which harms none that is there.
state() {
  local said
  if said=$(tpu queued-resources describe "$name" --format='value(state.state)' 2>"$errors"); then
    echo "${said:-UNKNOWN}"
  elif [ ! -s "$errors" ] || grep -F NOT_FOUND "$errors" | grep -qF "$name"; then
    echo NONE
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
}
on_all_hosts() { tpu tpu-vm ssh "$name" --worker=all --command="$1"; }

asked=0
ask() {
  if [ "$((asked++))" -gt "$restarts" ]; then
    ours='' # there is none
    give_up
  fi
  if tpu queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" ${create[@]+"${create[@]}"} 2>"$errors"; then
    ours=yes
    return
  fi
  cat "$errors" >&2
  if grep -qE 'INVALID_ARGUMENT|PERMISSION_DENIED|UNAUTHENTICATED|unrecognized arguments|argument --' "$errors"; then
    exit 2 # it is the same the next time
  elif ! grep -qE 'ALREADY_EXISTS|already exists' "$errors"; then
    ours=yes # it may have been heard all the same
  fi
}
obtain() {
  local unknown=0
  while true; do
    case $(state) in
      ACTIVE) return ;;
      NONE) unknown=0; ask ;;
      UNKNOWN) if [ "$((unknown++))" -ge "$restarts" ]; then give_up; fi ;;
      SUSPENDED | FAILED) # preempted, or not to be had: ask anew
        unknown=0
        if [ -z "$ours" ]; then
          echo "error: there is a pod $name already, which cannot be used: delete it, or give another --name" >&2
          exit 2
        fi
        give_back || true
        ;;
      *) unknown=0 ;; # on its way
    esac
    sleep 30
  done
}

# What an earlier start has left running, because its connection was lost, ends with a last checkpoint before the next.
# shellcheck disable=SC2016
stop='running() { pkill "$1" -F efflm.pid -f "efflm|experiments" 2>/dev/null; }
if [ -e efflm.pid ] && running -TERM; then
  for _ in $(seq 120); do running -0 || break; sleep 1; done
  running -KILL || true
fi'
git -C "$root" archive --format=tar.gz -o "$archive" HEAD
for ((life = 0; life <= restarts; life++)); do
  obtain
  code=0
  {
    tpu tpu-vm scp "$archive" "$name:efflm.tar.gz" --worker=all &&
      on_all_hosts "$stop; mkdir -p efflm && tar -xzf efflm.tar.gz -C efflm && echo \$\$ >efflm.pid &&
        exec env EFFLM_ACCELERATOR=tpu bash efflm/launch/run.sh $(printf '%q ' "$@") \
          --hosts.coordinator=auto --hosts.stopped=75"
  } 2>&1 | tee "$output" || code=$?
  if [ "$code" -eq 0 ]; then finish 0; fi
  code=$(cause "$output" '') # gcloud's own code says little; if no process said one, a host was lost, or the pod
  if [ -n "$code" ] && ! retryable "$code"; then finish "$code"; fi
  echo "launch: ended with ${code:+exit code }${code:-no word from a process}; starting again from the last checkpoint" >&2
  sleep 30
done
give_up "$code"
