#!/bin/bash
# Lint, types and the whole test suite.
#   bash launch/test.sh [pytest arguments]        VENV=FOLDER says where the environment goes (default .venv-test)
# With another constraints file than requirements.txt the tests alone, for lint and types are those of the newest
# versions. All but the slow tests with the lowest versions:
#   CONSTRAINTS=constraints-lowest.txt PYTHON=python3.10 VENV=.venv-lowest bash launch/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-test}
if [ "${CONSTRAINTS:-requirements.txt}" != requirements.txt ]; then
  bash launch/setup.sh "$venv" dev
else
  bash launch/setup.sh "$venv" dev,comparisons
  "$venv/bin/ruff" check .
  "$venv/bin/ruff" format --check .
  "$venv/bin/mypy"
fi
# Two at a time, a file's tests on one of them, for some share runs that take minutes; in conftest.py's order.
"$venv/bin/python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
