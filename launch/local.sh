#!/usr/bin/env bash
# Run an experiment as several processes on this machine, each with its own fake devices, as a pod would:
#   bash launch/local.sh --processes=2 --devices=4 -- experiments.pretrain --run_dir=runs/two --train.steps=200
# If a process is killed or lost, the others stop and all start again, from the last checkpoint, at most --restarts
# times. A final exit code (launch/README.md) ends it. What process 0 says is shown, and errors and warnings of all;
# all else that several processes write to stderr goes to logs, which are named and kept if one of them fails.
# Ctrl-C or SIGTERM makes all stop with a last checkpoint, a second one ends them.
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
    -h | --help) sed -n '2,7s/^# //p' "${BASH_SOURCE[0]}"; exit ;;
    *) echo "error: unknown flag $1: the experiment and its flags come after --" >&2; exit 2 ;;
  esac
  shift
done
if [ $# -eq 0 ]; then
  echo "error: no experiment given: name one after --, as in -- experiments.pretrain" >&2
  exit 2
fi

module=$(experiment "$1")
shift
set_up >&2
export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices"
exec 3>&2
pids=() asked=0 stopped=0 told=''
# shellcheck disable=SC2317  # a trap calls it
stop() {
  if [ "$stopped" -ne 0 ]; then
    kill -KILL "${pids[@]}" 2>/dev/null || true
    return 0 # without it: the status of what the signal came after, which may end the script
  fi
  stopped=$1 asked=${#pids[@]}
  kill -TERM "${pids[@]}" 2>/dev/null || true # each then writes its part
}
trap 'stop 130' INT
trap 'stop 143' TERM

logs='' named='' reading=() begun=()
declare -A shown=()
if [ "$processes" -gt 1 ]; then
  logs=$(mktemp -d "${TMPDIR:-/tmp}/efflm-local.XXXXXX")
  exec 2>"$logs/launch.log" # what bash itself says of processes that are killed
  for ((index = 0; index < processes; index++)); do
    : >"$logs/process-$index.log"
    exec {fd}<"$logs/process-$index.log"
    reading+=("$fd")
  done
  trap 'if [ -z "$named" ]; then rm -rf "$logs"; fi' EXIT
fi
# What matters of the new lines in the log of process $1, once if several processes say the same. No other program does
# the work, since Ctrl-C would end that too.
show() {
  local line
  if [ -z "$logs" ]; then return; fi
  while IFS= read -r line <&"${reading[$1]}"; do
    line=${begun[$1]:-}$line begun[$1]=''
    case $line in
      error:\ * | warning:\ *)
        if [ -z "${shown[$line]:-}" ]; then echo "$line" >&3; fi
        shown[$line]=yes
        ;;
    esac
  done
  begun[$1]=${begun[$1]:-}$line
}
# How process $1 ended, with code $2, where that is not in its own words; where its other words are.
tell_end() {
  if [ "$2" -gt 2 ]; then echo "launch: process $1 ended with exit code $2" >&3; fi
  if [ "$2" -eq 0 ] || [ -z "$logs" ]; then return; fi
  if [ "$2" -eq 1 ] && [ "$bug" != "$life" ]; then # our own bug: its traceback once, of several processes
    tail -n "+$((written[$1] + 1))" "$logs/process-$1.log" | sed -n '/^Traceback/,$p' |
      grep -av '^this process ends' >&3 || true
    bug=$life
  fi
  if [ -z "$named" ]; then echo "launch: what the processes write to stderr is in $logs" >&3; fi
  named=yes
}

bug='' # the life in which a traceback was shown
for ((life = 0; life <= restarts; life++)); do
  written=() # lines in each log from earlier lives
  if [ -n "$logs" ]; then
    for ((index = 0; index < processes; index++)); do written+=("$(wc -l <"$logs/process-$index.log")"); done
  fi
  if [ "$stopped" -ne 0 ]; then exit "$stopped"; fi
  port=$("$venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
  pids=() codes=() deadline=0
  for ((index = 0; index < processes; index++)); do
    together=(--hosts.coordinator="localhost:$port" --hosts.count="$processes" --hosts.index="$index")
    if [ "$processes" -eq 1 ]; then # so that any experiment can be run, with fake devices
      "$venv/bin/python" -P -m "$module" "$@" &
    else
      "$venv/bin/python" -P -m "$module" "$@" "${together[@]}" 2>>"$logs/process-$index.log" &
    fi
    pids+=($!)
  done
  shown=()
  running=("${!pids[@]}")
  while [ ${#running[@]} -gt 0 ]; do
    if [ "$stopped" -ne 0 ] && [ -z "$told" ]; then
      echo "launch: stopping with a last checkpoint; the same again ends all at once" >&3
      told=yes # not in the trap, which misses what comes while it runs
      kill -TERM "${pids[@]:asked}" 2>/dev/null || true # begun when the signal came, and not yet in the list
    fi
    left=()
    for index in "${running[@]}"; do
      if kill -0 "${pids[index]}" 2>/dev/null; then
        show "$index"
        left+=("$index")
        continue
      fi
      code=0
      wait "${pids[index]}" 2>/dev/null || code=$?
      show "$index"
      tell_end "$index" "$code"
      if [ "$code" -ne 0 ] && [ "$deadline" -eq 0 ]; then codes+=("$code"); fi
    done
    running=("${left[@]}")
    if [ ${#codes[@]} -gt 0 ] && [ "$deadline" -eq 0 ]; then # the first to fail are the cause, the others suffer from it
      deadline=$((SECONDS + patience))
    fi
    if [ "$deadline" -gt 0 ] && [ "$SECONDS" -ge "$deadline" ]; then
      for index in "${running[@]}"; do kill -KILL "${pids[index]}" 2>/dev/null || true; done
    fi
    sleep 0.2 || true # Ctrl-C ends it too
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
  if [ "$stopped" -ne 0 ]; then exit "$stopped"; fi
  if [ "$life" -lt "$restarts" ]; then
    echo "launch: starting all $processes again, from the last checkpoint ($((life + 1)) of $restarts)" >&3
  fi
done
echo "error: given up after $restarts restarts: see the errors above" >&3
exit 75
