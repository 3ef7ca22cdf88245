#!/bin/bash
# What a GPU makes of this project: correctness and speed, in about six minutes on one H100, as a table.
#   [PYTHON=python3] launch/gpu_check.sh [--device cpu] [--only abc] [--output DIR] [--seconds 400]
# Nothing is installed and nothing is downloaded. `--device cpu` tries the checks themselves, in tiny sizes.
# benchmarks/gpu_check.py says what is checked.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$repository/benchmarks/gpu_check.py" "$@"
