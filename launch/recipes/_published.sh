# Sourced by the recipes: the published runs on C4, 512 rows per update, by model size.
# `published SIZE PROCESSES [DEVICES]` sets `flags` for launch.train_jax, for the given numbers of
# processes and of devices per process (1); `run COMMAND...` runs it, or prints it if DRY_RUN is set.
#
# C4 must be prepared once (in --data_dir); --dataset builtin needs no preparation and tests the
# set-up. Later flags override these, as in `gpu.sh 60m --dataset builtin`.

published() {
    local size=$1 processes=$2 devices=${3:-1} rank batch steps warmup rows
    local lr=0.01 gap=200 optimizer=galore_adamw proj_type=continuous more=()
    case $size in # `batch` is the rows of one device in one forward pass
    60m) rank=128 batch=256 steps=10K warmup=1000 ;;
    130m) rank=256 batch=256 steps=20K warmup=2000 ;;
    350m) rank=256 batch=128 steps=60K warmup=6000 ;;
    1b) rank=1024 batch=16 steps=100K warmup=10000 ;;
    7b)
        rank=1024 batch=16 steps=150K warmup=15000 lr=0.005 gap=500
        optimizer=galore_adamw8bit proj_type=continuous_adam8bit
        more=(--activation_checkpointing --grad_clipping 1.0)
        ;;
    *)
        echo "error: no published run of '$size'; expected 60m, 130m, 350m, 1b or 7b" >&2
        return 2
        ;;
    esac
    if [ $((512 % (processes * devices))) -ne 0 ]; then
        echo "error: 512 rows per update are not divisible by $processes processes x $devices devices;" \
            "use 1, 2, 4, 8, ... of them" >&2
        return 2
    fi
    rows=$((512 / processes))
    batch=$((batch * devices < rows ? batch * devices : rows))
    # shellcheck disable=SC2034 # for the recipe that sources this
    flags=(
        --model_config "configs/llama_$size.json"
        --name "llama_$size"
        --dataset c4
        --batch_size "$batch"
        --total_batch_size 512
        --optimizer "$optimizer"
        --proj_type "$proj_type"
        --rank "$rank"
        --update_proj_gap "$gap"
        --galore_scale 0.25
        --lr "$lr"
        --num_training_steps "$steps"
        --warmup_steps "$warmup"
        --weight_decay 0
        --dtype bfloat16
        --eval_every 1000
        --save_every 1000
        --resume
        "${more[@]}"
    )
}

run() {
    if [ -n "${DRY_RUN:-}" ]; then
        echo "$@"
    else
        exec "$@"
    fi
}
