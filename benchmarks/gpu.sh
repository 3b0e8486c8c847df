#!/usr/bin/env bash
# What must be right on a GPU, then a table as that of docs/performance.md: 12 minutes, one JSON.
#
#   benchmarks/gpu.sh OUT.json            on a machine with a GPU
#   benchmarks/gpu.sh OUT.json --tiny     the same path at tiny sizes, on a processor too
set -euo pipefail
: "${1:?usage: benchmarks/gpu.sh OUT.json [--tiny]}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export HF_HUB_OFFLINE=1
exec "${PYTHON:-$here/../.venv/bin/python}" "$here/gpu.py" "$@"
