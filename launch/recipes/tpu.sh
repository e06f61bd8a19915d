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
# --fsdp splits weights and state over all chips, unless another mesh is given. Below 1B it sends
# fewer bytes than data parallelism on 16 chips, but more on 4 and on 64, by the TPU compiler.
case "${flags[*]} $*" in
*" --mesh"* | *" --compress_gradients"* | *" --single_gpu"*) ;;
*llama_1b* | *llama_7b*) flags+=(--fsdp) ;;
*) [ $((${HOSTS:-1} * ${CHIPS:-4})) -ne 16 ] || flags+=(--fsdp) ;;
esac
[ -n "${DRY_RUN:-}" ] || set_up jax train tpu
run .venv/bin/python -m launch.train_jax "${flags[@]}" --run_dir "${RUNS:-runs}" "$@"
