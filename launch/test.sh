#!/bin/bash
# Lint, types and the whole test suite.
#   bash launch/test.sh [pytest arguments]        VENV=FOLDER says where the environment goes (default .venv-test)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-test}
bash launch/setup.sh "$venv" dev
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
"$venv/bin/python" -m pytest "$@"
