# shellcheck shell=bash
# Sourced by the other scripts: makes .venv beside the code and installs requirements.txt into it, once.
# Safe to interrupt: the install is marked done by a stamp written last, and pip picks up where it was.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

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

set_up() {
  local stamp="$root/.venv/.efflm-installed" python
  if [ -x "$root/.venv/bin/python" ] && cmp -s "$root/requirements.txt" "$stamp"; then
    echo "install: .venv is up to date"
    return
  fi
  python=$(find_python) || return
  echo "install: requirements.txt into $root/.venv with $("$python" --version) (once, some minutes)"
  if ! "$root/.venv/bin/python" -c 'import pip' 2>/dev/null; then
    "$python" -m venv --clear "$root/.venv" || return
  fi
  "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/requirements.txt" || return
  cp "$root/requirements.txt" "$stamp"
  echo "install: done"
}

# Huge pages, and one big heap in place of a mapping, and its page faults, for each array. On a 2-core Zen 4, in turn
# with and without: a training step is 1.15 to 1.2 times as fast. Results are the same to the last bit.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
