#!/usr/bin/env bash
# srun ... as_rank.sh COMMAND...: run COMMAND as the rank that this Slurm task is, without ssh and without a launcher.
# All GPUs of the node must be visible to each of its tasks (--gpus-per-node), so that the local rank names one.
set -euo pipefail
: "${MASTER_ADDR:?set it to the first node}" "${MASTER_PORT:?set it to a free port of the first node}"
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
exec "$@" # in this process, so that Slurm's signals reach training itself
