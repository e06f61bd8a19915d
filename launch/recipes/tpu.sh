#!/usr/bin/env bash
# A published run on a TPU slice. On every host of it, with RUNS a directory that all of them see (a
# mounted bucket or file share):
#     gcloud compute tpus tpu-vm ssh NAME --worker=all --command \
#         "cd online-subspace-descent && HOSTS=4 RUNS=/mnt/runs bash launch/recipes/tpu.sh SIZE"
# SIZE is 60m, 130m, 350m, 1b or 7b, and more flags for launch.train_jax may follow. HOSTS is how many
# hosts the slice has (1), CHIPS how many chips each of them has (4). The same command goes on after
# an interruption.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. launch/_setup.sh
. launch/recipes/_published.sh

published "${1:-}" "${HOSTS:-1}" "${CHIPS:-4}"
flags+=(--projector_init qr) # XLA compiles an SVD for minutes there
shift
case ${flags[*]} in
*llama_1b* | *llama_7b*) flags+=(--fsdp) ;;
esac
[ -n "${DRY_RUN:-}" ] || set_up jax train tpu
run .venv/bin/python -m launch.train_jax "${flags[@]}" --run_dir "${RUNS:-runs}" "$@"
