#!/usr/bin/env bash
# The whole path as Slurm jobs, each begun once those it needs have succeeded:
#
#     bash launch/slurm/pipeline.sh SIZE NUM_SHARDS [sbatch options of the pretraining ...]
#     bash launch/slurm/pipeline.sh base 64 --gpus-per-node=1 --ntasks-per-node=1
#     MODEL=cluster bash launch/slurm/pipeline.sh base 64 --nodes=4
#
# SIZE names the configs, <verb>/SIZE.yaml; MODEL, where given, that of the pretraining, whose run is runs/MODEL. NUM_SHARDS
# array tasks fill the stores side by side. Called again it submits all jobs again: each finds what is done and continues.
# Variables: SHARD_OPTIONS and GPU_OPTIONS are sbatch's options for a shard, and for tokenizer, latents and evaluation;
# what holds for all jobs goes into Slurm's own SBATCH_ACCOUNT and SBATCH_PARTITION. Prints the jobs' numbers.
set -euo pipefail
cd "$(dirname "$0")/../.."

[ "$#" -ge 2 ] || { echo "error: no size and shards given. Usage: bash launch/slurm/pipeline.sh SIZE NUM_SHARDS [options]" >&2; exit 2; }
size="$1" num_shards="$2"
shift 2
case "$num_shards" in '' | *[!0-9]* | 0) echo "error: NUM_SHARDS=$num_shards: must be at least 1. Give a number." >&2; exit 2 ;; esac
model="${MODEL:-$size}"
PYTHON="${PYTHON:-.venv/bin/python}"
read -ra shard_options <<< "${SHARD_OPTIONS:---mem=12G --time=48:00:00}" # one process, one core, 8 GB at 128^3
read -ra gpu_options <<< "${GPU_OPTIONS:---gpus-per-node=1 --ntasks-per-node=1 --cpus-per-task=8 --time=12:00:00}"
for config in {generate_data,train_tokenizer,cache_latents,evaluate_model}/"$size" "pretrain/$model"; do
    [ -f "configs/$config.yaml" ] || { echo "error: configs/$config.yaml: no such file. Choose another size." >&2; exit 2; }
done

# submit NAME JOBS_BEFORE OPTION...: the new job's number
submit() {
    local name="$1" before="$2"
    shift 2
    sbatch --parsable --requeue --open-mode=append --job-name="$name" --output="$name-%j.log" \
        ${before:+--dependency="afterok:$before" --kill-on-invalid-dep=yes} "$@" | cut -d ';' -f 1
}

shard="$PYTHON launch/generate_data.py configs/generate_data/$size.yaml num_processes=1 shard=\$SLURM_ARRAY_TASK_ID/$num_shards"
stores=$(submit stores "" --array="0-$((num_shards - 1))" --output="stores-%A-%a.log" --ntasks=1 --cpus-per-task=1 "${shard_options[@]}" \
    --wrap "exec $shard")
tokenizer=$(submit tokenizer "$stores" "${gpu_options[@]}" launch/slurm/train.sbatch launch/train_tokenizer.py "configs/train_tokenizer/$size.yaml")
latents=$(submit latents "$tokenizer" "${gpu_options[@]}" --wrap "exec $PYTHON launch/cache_latents.py configs/cache_latents/$size.yaml")
pretrain=$(submit pretrain "$latents" "$@" launch/slurm/train.sbatch launch/pretrain.py "configs/pretrain/$model.yaml")
evaluate=$(submit evaluate "$pretrain" "${gpu_options[@]}" --wrap \
    "exec $PYTHON launch/evaluate_model.py configs/evaluate_model/$size.yaml${MODEL:+ run=runs/$model}")
echo "stores $stores, tokenizer $tokenizer, latents $latents, pretrain $pretrain, evaluate $evaluate"
