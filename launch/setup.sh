# shellcheck shell=bash
# Sourced by the other scripts: knows the experiments by their names, makes .venv beside the code (or in $EFFLM_VENV) and installs requirements.txt into it,
# once, and jax for the accelerator in $EFFLM_ACCELERATOR (tpu, cuda12, cuda13).
# Safe to interrupt: the install is marked done by a stamp written last, and pip picks up where it was.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${EFFLM_VENV:-$root/.venv}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.11 python3.12 python3; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: efflm needs Python 3.11 or 3.12 on the PATH: install one, or set PYTHON to it" >&2
  return 2
}

# The module of an experiment given as experiments.NAME, as NAME or by its file.
experiment() {
  local name=${1##*experiments[./]} names near
  name=${name%.py}
  if [ -z "$name" ]; then
    echo "error: no experiment given: name one, as in experiments.pretrain" >&2
    return 2
  elif [ "${name#_}" = "$name" ] && [ -f "$root/experiments/$name.py" ]; then
    echo "experiments.$name"
    return
  fi
  names=("$root"/experiments/[a-z]*.py)
  names=("${names[@]##*/}")
  near=$("$(find_python)" -c 'import difflib, sys; print(*difflib.get_close_matches(*sys.argv[1:2], sys.argv[2:], 1))' \
    "$name" "${names[@]%.py}" 2>/dev/null) || near=''
  echo "error: there is no experiment $1: ${near:+did you mean experiments.$near? }experiments/README.md lists them" >&2
  return 2
}

wanted() {
  cat "$root/requirements.txt"
  if [ -n "${EFFLM_ACCELERATOR:-}" ]; then echo "jax[$EFFLM_ACCELERATOR]"; fi
}

# Makes efflm importable for "$venv/bin/python" from any folder. PYTHONPATH, which the scripts set, goes before it.
leave_path() {
  local site file
  for site in "$venv"/lib/python3.*/site-packages; do
    file=$site/efflm.pth
    if [ -d "$site" ] && ! printf '%s\n' "$root" | cmp -s - "$file"; then
      { printf '%s\n' "$root" >"$file.$$" && mv -f "$file.$$" "$file"; } 2>/dev/null || {
        rm -f "$file.$$"
        echo "install: cannot write $file: only the scripts in launch/ will find efflm" >&2
      }
    fi
  done
}

set_up() {
  local stamp="$venv/.efflm-installed" mark="$venv/.efflm-made" python
  if [ -x "$venv/bin/python" ] && wanted | cmp -s - "$stamp"; then
    leave_path
    echo "install: $venv is up to date"
    return
  fi
  python=$(find_python) || return
  echo "install: requirements.txt into $venv with $("$python" --version) (once, some minutes)"
  if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    if [ -e "$mark" ]; then # what is left of an environment that this script made
      rm -rf "${venv:?}/bin" "${venv:?}/lib" "${venv:?}/lib64" "$venv/include" "$venv/pyvenv.cfg" "$stamp" || return
    elif [ -n "$(ls -A "$venv" 2>/dev/null)" ]; then
      echo "error: $venv holds no Python with pip, and what it holds is not from here: remove it, or set EFFLM_VENV" >&2
      return 2
    fi
    { mkdir -p "$venv" && touch "$mark" && "$python" -m venv "$venv"; } || return
  fi
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r <(wanted) || return
  leave_path
  wanted >"$stamp"
  echo "install: done"
}

# What a run ended with, from what it printed (a file) and the exit code of srun or gcloud, which may be that of a
# process that only suffered: of several processes the first to say how it ends is the cause.
cause() {
  local said
  said=$(grep -aom1 'this process ends with exit code [0-9]*' "$1" | head -n1) || true
  echo "${said:+${said##* }}" | grep . || echo "$2"
}

# Exit codes worth another try: lost machines and storage, and signals but for Ctrl-C. See the table in launch/README.md.
retryable() { [ "$1" -eq 75 ] || { [ "$1" -gt 128 ] && [ "$1" -ne 130 ]; }; }

# Huge pages, and one big heap in place of a mapping, and its page faults, for each array. On a 2-core Zen 4, in turn
# with and without: a training step is 1.15 to 1.2 times as fast. Results are the same to the last bit.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
