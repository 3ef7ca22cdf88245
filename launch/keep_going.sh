#!/bin/bash
# Start a training again until it has finished, whatever ends it: where no scheduler does that.
#   bash launch/keep_going.sh RUN COMMAND...
# RUN is the output_dir of what COMMAND trains, for example
#   bash launch/keep_going.sh runs/first torchrun --standalone --nproc_per_node 8 -m vqgan_accel train CONFIG output_dir=runs/first --resume
# What counts is what `vqgan-accel status RUN` says, for launchers hide the status of what they start. It gives up after
# three starts in a row without a new checkpoint. SIGTERM and Ctrl-C are passed on, and end it with 75.
set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "usage: bash launch/keep_going.sh RUN COMMAND... (which trains into RUN, with --resume)" >&2
    exit 2
fi
run=$1
shift
in_vain=0 stopped=0 child=
trap 'stopped=1; [[ -z $child ]] || kill -TERM "$child"' TERM INT
newest() { readlink "$run/checkpoints/latest" || cat "$run/checkpoints/latest" 2>/dev/null || true; } # a file without links

while true; do
    before=$(newest)
    "$@" &
    child=$!
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done # a trap ends `wait` early
    child=
    status=0
    "${PYTHON:-python}" -m vqgan_accel status "$run" || status=$?
    if [[ $status -ne 75 || $stopped -eq 1 ]]; then
        exit "$status"
    fi
    if [[ $(newest) == "$before" ]]; then
        in_vain=$((in_vain + 1))
        if [[ $in_vain -ge 3 ]]; then
            echo "three starts in a row without a new checkpoint: giving up" >&2
            exit 1
        fi
        sleep "${PAUSE:-10}"
    else
        in_vain=0
    fi
done
