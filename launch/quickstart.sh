#!/usr/bin/env bash
# Trains a small LLaMA with Online Subspace Descent on the State of the Union addresses; requires only
# Python 3.11 or newer:  bash launch/quickstart.sh [more flags for launch.train_jax]
# Rerun it after an interruption to resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/_setup.sh

name=quickstart
flags=(
    --model_config configs/llama_quickstart.json
    --dataset builtin
    --max_length 256
    --batch_size 16
    --total_batch_size 16
    --optimizer osd_muon
    --proj_type continuous
    --rank 32
    --update_proj_gap 200
    --momentum 0.4
    --lr 0.02
    --full_lr 0.09
    --num_training_steps 450
    --warmup_steps 45
    --eval_every 50
    --eval_tokens 100K
    --save_every 50
    --single_gpu
)

if nvidia-smi -L >/dev/null 2>&1; then
    set_up jax train cuda
else
    set_up jax train
fi

if [ $# -eq 0 ] && [ -f "runs/$name/model/config.json" ]; then
    echo "runs/$name already contains a trained model. To train it again:"
    echo "    bash launch/quickstart.sh --overwrite"
    exit
fi
case " $* " in
*" --help "* | *" -h "*) exec .venv/bin/python -m launch.train_jax --help ;;
*" --overwrite "*) ;;
*) flags+=(--resume) ;; # starts the run if there is no checkpoint
esac
.venv/bin/python -m launch.train_jax --name "$name" "${flags[@]}" "$@"

echo
echo "loss.png in the run's directory plots the loss. More commands:"
echo "    .venv/bin/tensorboard --logdir runs"
echo "    .venv/bin/python -m launch.train_jax --help"
