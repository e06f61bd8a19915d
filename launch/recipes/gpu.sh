#!/usr/bin/env bash
# A published run on one GPU:  bash launch/recipes/gpu.sh SIZE [more flags for launch.train_jax]
# SIZE is 60m, 130m, 350m, 1b or 7b. Rerun it after an interruption to resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. launch/_setup.sh
. launch/recipes/_published.sh

published "${1:-}" 1
shift
flags+=(--single_gpu)
case ${flags[*]} in
*llama_7b*) flags+=(--per_layer) ;; # all gradients at once would be as large as the weights
esac
[ -n "${DRY_RUN:-}" ] || set_up jax train cuda
run .venv/bin/python -m launch.train_jax "${flags[@]}" "$@"
