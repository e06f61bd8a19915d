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
# Unless another mesh is given, --fsdp splits weights and state of 1B and 7B over all chips. Smaller
# models are split over 16 chips, and gathered once per update: by the TPU compiler, that sends fewer
# bytes than data parallelism. On fewer chips it would send more.
case "${flags[*]} $*" in
*" --mesh"* | *" --compress_gradients"* | *" --single_gpu"*) ;;
*llama_1b* | *llama_7b*) flags+=(--fsdp) ;;
*)
    [ $((${HOSTS:-1} * ${CHIPS:-4} % 16)) -ne 0 ] || flags+=(--mesh data=-1,fsdp=16 --no-reshard_after_forward)
    ;;
esac
[ -n "${DRY_RUN:-}" ] || set_up jax train tpu
run .venv/bin/python -m launch.train_jax "${flags[@]}" --run_dir "${RUNS:-runs}" "$@"
