#!/usr/bin/env bash
# Tokenizes a dataset on many machines, as a SLURM array of 16 jobs:
#
#   sbatch --array=1-16 examples/slurm_tokenize.sh IMAGES tokens --model lo.safetensors --flip
#
# Job K writes part K of 16 into the same folder, which all machines must see. Submit the same line again after a
# failure: a job skips the shards that are whole and writes the others. To repeat job 3 alone, add its number of parts:
#
#   PARTS=16 sbatch --array=3 examples/slurm_tokenize.sh IMAGES tokens --model lo.safetensors --flip
#SBATCH --job-name=flowmo-tokenize
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

images=$1
tokens=$2
shift 2

srun flowmo tokenize "$images" --output "$tokens" --part "$SLURM_ARRAY_TASK_ID/${PARTS:-$SLURM_ARRAY_TASK_COUNT}" \
    --workers "${SLURM_CPUS_PER_TASK:-4}" "$@"
