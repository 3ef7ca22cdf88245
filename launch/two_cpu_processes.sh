#!/bin/bash
# Train on two CPU processes, to see that what is computed does not depend on the number of processes. No GPU is used.
#   launch/two_cpu_processes.sh CONFIG [key=value ...] [--resume]
# torchrun, because `accelerate launch --cpu --num_processes 2` starts one process (accelerate issue 2741). The banner
# says how many there are.
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: $0 CONFIG [key=value ...] [--resume]" >&2
    exit 2
fi
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(((cores + 1) / 2))}" # threads per process
export ACCELERATE_USE_CPU=true                                     # also where there is a GPU
# standalone: a free port, so that two such runs can go on side by side
exec torchrun --standalone --nproc_per_node 2 -m vqgan_accel train "$@"
