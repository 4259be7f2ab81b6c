#!/usr/bin/env bash
# Trains on several nodes of a SLURM cluster, and goes on by itself when its time is up:
#
#   sbatch --nodes=2 examples/slurm.sh configs/lo.yaml lo data.train=... data.val=...
#
# Five minutes before the end SLURM sends USR1 to this script, which asks the run to save and stop by touching its stop
# file, and queues itself again. A node that fails ends the job at once; the next one goes on from the last checkpoint.
#SBATCH --job-name=flowmo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

config=$1
name=$2
shift 2
case " $* " in *" --results-dir"*) echo "The stop file is in results/$name. Leave out --results-dir." >&2 && exit 2 ;; esac

finish() {
    touch "results/$name/stop" || true # a run that has not begun has no folder, and nothing to save
    wait "$run" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap finish USR1

address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun \
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$address:29500" \
    -m flowmo.train --config "$config" --experiment-name "$name" "$@" &
run=$!
wait "$run"
