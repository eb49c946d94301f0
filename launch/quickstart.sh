#!/usr/bin/env bash
# Install what is needed, then train a small language model, compress it and show what that bought.
# Flags go to the experiment: bash launch/quickstart.sh --help
set -euo pipefail
# shellcheck source=launch/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up
export XLA_FLAGS="--xla_cpu_prefer_vector_width=512 ${XLA_FLAGS:-}"
exec "$root/.venv/bin/python" -P -m experiments.quickstart "$@"
