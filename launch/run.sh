#!/usr/bin/env bash
# Install what is needed, then run an experiment with the settings that make it fast on a CPU.
#   bash launch/run.sh experiments.bench --what=train --policies=bfloat16
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
module=$(experiment "${1:-}")
set_up >&2
exec "$venv/bin/python" -P -m "$module" "${@:2}"
