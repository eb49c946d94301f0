#!/usr/bin/env bash
# Train a small language model, compress it and show what that bought. Flags go to the experiment:
#   bash launch/quickstart.sh --help
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" experiments.quickstart "$@"
