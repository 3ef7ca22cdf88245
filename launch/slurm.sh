#!/bin/bash
# Train on N SLURM nodes of 8 GPUs, one task each:
#   sbatch --nodes=2 launch/slurm.sh CONFIG [key=value ...]
# CONFIG is a recipe's name or a YAML file; paths are from the folder in which sbatch is called.
# Before the time limit every process finishes its step and saves, and the job is requeued. A job that SLURM requeues
# (preemption, a failed node, `scontrol requeue JOB`) goes on from its newest checkpoint too, for --resume is always
# passed; a first start has no checkpoint and begins at step 0.
#
# A sweep, one run a line of a file that has key=value words, an output_dir of its own among them:
#   sbatch --array=1-4 --export=ALL,SWEEP=sweep.txt launch/slurm.sh CONFIG
#
# Edit for your cluster: the lines below (add --account, --partition, ...), and how Python is found.
# Options of the sbatch command line win over these lines. Fewer GPUs: change both --ntasks-per-node and --gpus-per-node.
#SBATCH --job-name=vqgan
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: sbatch --nodes=N launch/slurm.sh CONFIG [key=value ...]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}" # SLURM runs a copy of this script from elsewhere

if [[ -n ${SLURM_GPUS_ON_NODE:-} && ${SLURM_NTASKS_PER_NODE:-$SLURM_GPUS_ON_NODE} != "$SLURM_GPUS_ON_NODE" ]]; then
    echo "$SLURM_NTASKS_PER_NODE tasks a node on $SLURM_GPUS_ON_NODE GPUs: give --ntasks-per-node and --gpus-per-node alike" >&2
    exit 2
fi
if [[ -n ${SWEEP:-} ]]; then
    line=$(sed -n "${SLURM_ARRAY_TASK_ID:?SWEEP is for array jobs: sbatch --array=1-N}p" "$SWEEP")
    if [[ $line != *output_dir=* ]]; then
        echo "line $SLURM_ARRAY_TASK_ID of $SWEEP has no output_dir: two runs would meet in one folder" >&2
        exit 2
    fi
    mapfile -t words < <(xargs -n 1 printf '%s\n' <<<"$line") # which knows quotes
    set -- "$@" "${words[@]}"
fi

# Edit: `python` must be that of the environment in which vqgan_accel is installed, on every node, for example
# module load cuda
# source .venv/bin/activate

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # a name, if every node can resolve it
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))                            # jobs that share a node do not collide
export MASTER_ADDR MASTER_PORT ACCELERATE_MIXED_PRECISION=bf16 OMP_NUM_THREADS=1
# NCCL's warnings name the machine and the interface; INFO says all. Where it takes the wrong interface, name the right
# one, as `ip addr` lists it: export NCCL_SOCKET_IFNAME=ib0
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# srun starts the processes itself: torchrun dies of SIGUSR1 and hides its workers' exit status. When one has ended, the
# others have a minute. $SLURM_PROCID is each task's own, so it is expanded there and not here.
status=0
# shellcheck disable=SC2016
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=60 \
    bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS; exec python -m vqgan_accel train "$@"' \
    train "$@" --resume || status=$?

# 75: the processes were signalled, have saved, and want to go on; or this job's former self, on another machine, still
# held the run's folder. (scancel ends this script too, before it comes here.)
if [[ $status -eq 75 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
