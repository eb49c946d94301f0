#!/usr/bin/env bash
# Run an experiment as several processes on this machine, each with its own fake devices, as a pod would:
#   bash launch/local.sh --processes=2 --devices=4 -- experiments.pretrain --run_dir=runs/two --train.steps=200
# If a process is killed or lost, the others stop and all start again, from the last checkpoint, at most --restarts
# times. A final exit code (launch/README.md) ends it. What process 0 says is shown; the errors of all.
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

processes=2 devices=1 restarts=10 patience=60
while [ $# -gt 0 ]; do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;   # of each process
    --restarts=*) restarts=${1#*=} ;;
    --patience=*) patience=${1#*=} ;; # seconds the others get to stop by themselves
    --) shift; break ;;
    -h | --help) sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}"; exit ;;
    *) echo "error: unknown flag $1: the experiment and its flags come after --" >&2; exit 2 ;;
  esac
  shift
done
if [ $# -eq 0 ]; then
  echo "error: no experiment given: name one after --, as in -- experiments.pretrain" >&2
  exit 2
fi

set_up >&2
export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT # each then writes its part of one last checkpoint

for ((life = 0; life <= restarts; life++)); do
  port=$("$venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  pids=() codes=() deadline=0
  for ((index = 0; index < processes; index++)); do
    together=(--hosts.coordinator="localhost:$port" --hosts.count="$processes" --hosts.index="$index")
    if [ "$processes" -eq 1 ]; then together=(); fi # so that any experiment can be run, with fake devices
    "$venv/bin/python" -P -m "$@" "${together[@]}" &
    pids+=($!)
  done
  running=("${!pids[@]}")
  while [ ${#running[@]} -gt 0 ]; do
    left=()
    for index in "${running[@]}"; do
      if kill -0 "${pids[index]}" 2>/dev/null; then
        left+=("$index")
        continue
      fi
      code=0
      wait "${pids[index]}" 2>/dev/null || code=$?
      if [ "$code" -gt 2 ]; then echo "launch: process $index ended with exit code $code" >&2; fi
      if [ "$code" -ne 0 ] && [ "$deadline" -eq 0 ]; then codes+=("$code"); fi
    done
    running=("${left[@]}")
    if [ ${#codes[@]} -gt 0 ] && [ "$deadline" -eq 0 ]; then # the first to fail are the cause, the others suffer from it
      deadline=$((SECONDS + patience))
    fi
    if [ "$deadline" -gt 0 ] && [ "$SECONDS" -ge "$deadline" ]; then
      for index in "${running[@]}"; do kill -KILL "${pids[index]}" 2>/dev/null || true; done
    fi
    sleep 0.2
  done
  if [ ${#codes[@]} -eq 0 ]; then exit 0; fi
  final=0
  for code in "${codes[@]}"; do
    case $code in
      75 | 134) ;; # it lost the others
      *) if retryable "$code"; then final=0; break; else final=$code; fi ;;
    esac
  done
  if [ "$final" -ne 0 ]; then exit "$final"; fi
  if [ "$life" -lt "$restarts" ]; then
    echo "launch: starting all $processes again, from the last checkpoint ($((life + 1)) of $restarts)" >&2
  fi
done
echo "error: given up after $restarts restarts: see the errors above" >&2
exit 75
