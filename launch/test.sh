#!/usr/bin/env bash
# Install what is needed, then lint and run the tests. Arguments go to pytest: bash launch/test.sh -m slow
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up
cd "$root"
"$venv"/bin/ruff format --check --quiet .
"$venv"/bin/ruff check --quiet .
exec "$venv"/bin/python -m pytest "$@"
