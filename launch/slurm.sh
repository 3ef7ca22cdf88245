#!/bin/bash
# Train on N SLURM nodes of 8 GPUs, one process each. From the repository's folder:
#   sbatch --nodes=2 launch/slurm.sh CONFIG [key=value ...]
# A job that SLURM requeues (preemption, a failed node, `scontrol requeue JOB`) goes on from its newest checkpoint, for
# --resume is always passed; a first start has no checkpoint and begins at step 0.
#
# Edit for your cluster: the lines below (add --account, --partition, ...), and how Python is found.
# Options of the sbatch command line win over these lines.
#SBATCH --job-name=vqgan
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

if [[ $# -lt 1 ]]; then
    echo "usage: sbatch --nodes=N launch/slurm.sh CONFIG [key=value ...]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}" # SLURM runs a copy of this script from elsewhere
if [[ ! -f train.py ]]; then
    echo "there is no train.py in $SLURM_SUBMIT_DIR: submit from the repository's folder" >&2
    exit 2
fi

# Edit: `accelerate` must be on the PATH of every node, for example
# source .venv/bin/activate

nodes=$SLURM_JOB_NUM_NODES
main_process_ip=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # a name, if every node can resolve it
main_process_port=$((20000 + SLURM_JOB_ID % 10000))                          # jobs that share a node do not collide

# $SLURM_NODEID is each node's own, so it is expanded there and not here
# shellcheck disable=SC2016
srun --nodes="$nodes" --ntasks="$nodes" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --config_file launch/two_nodes_8xA100_bf16.yaml \
    --num_machines "$nodes" --num_processes "$((8 * nodes))" \
    --main_process_ip "$main_process_ip" --main_process_port "$main_process_port" \
    train.py "$@" --resume
