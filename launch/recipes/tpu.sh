#!/usr/bin/env bash
# A published run on a TPU slice. Run it on every host, with RUNS a directory that all hosts see (a
# mounted bucket or file share):
#     gcloud compute tpus tpu-vm ssh NAME --worker=all --command \
#         "cd online-subspace-descent && HOSTS=4 RUNS=/mnt/runs bash launch/recipes/tpu.sh SIZE"
# SIZE is 60m, 130m, 350m, 1b or 7b, and more flags for launch.train_jax may follow. HOSTS is the
# number of hosts of the slice (1), CHIPS the number of chips per host (4). The same command resumes
# after an interruption.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. launch/_setup.sh
. launch/recipes/_published.sh

published "${1:-}" "${HOSTS:-1}" "${CHIPS:-4}"
flags+=(--projector_init qr) # XLA takes minutes to compile an SVD for TPUs
shift
# Unless another mesh is given, weights and state are split over all chips, on meshes where a chip sends
# few bytes by the TPU compiler (docs/tpu.md).
chips=$((${HOSTS:-1} * ${CHIPS:-4}))
case "${flags[*]} $*" in
*" --mesh"* | *" --fsdp"* | *" --compress_gradients"* | *" --single_gpu"*) ;;
*llama_1b*" --per_layer"* | *llama_7b*" --per_layer"*) flags+=(--fsdp) ;;
*" --per_layer"*) ;; # reads weights and state a layer at a time
*llama_1b* | *llama_7b*)
    if [ "$chips" -le 16 ]; then
        flags+=(--fsdp)
    else
        flags+=(--mesh data=4,fsdp=-1 --shard_over_data)
    fi
    ;;
*)
    case "$chips ${flags[*]}" in
    "1 "*) ;;
    # The members of data divide the layers; 130M has 12.
    "2 "* | "4 "* | "8 "*llama_60m* | "8 "*llama_350m*) flags+=(--mesh data=-1 --shard_over_data) ;;
    "16 "*llama_130m*) flags+=(--mesh data=-1,fsdp=16 --no-reshard_after_forward) ;;
    "16 "*) flags+=(--mesh data=8,fsdp=-1 --no-reshard_after_forward --shard_over_data) ;;
    *) flags+=(--mesh data=4,fsdp=-1 --no-reshard_after_forward --shard_over_data) ;;
    esac
    ;;
esac
[ -n "${DRY_RUN:-}" ] || set_up jax train tpu
run .venv/bin/python -m launch.train_jax "${flags[@]}" --run_dir "${RUNS:-runs}" "$@"
