#!/usr/bin/env bash
# A published run on GPUs of several machines, as a SLURM job. From the project's root, which all
# machines must see:  sbatch --nodes=2 launch/recipes/slurm.sh SIZE [more flags]
# SIZE is 60m, 130m, 350m, 1b or 7b. The same command resumes after an interruption.
#
# One task per GPU. Each task sees all GPUs of its machine and uses its own: JAX numbers them by
# task. Do not use --gpus-per-task, which hides the other GPUs.
#SBATCH --job-name=osd
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=%x-%j.txt
# Five minutes before the time limit every task is signalled to stop, and saves a checkpoint.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}"
. launch/_setup.sh
. launch/recipes/_published.sh

published "${1:-}" "${SLURM_NTASKS:?start it by sbatch}"
shift
case ${flags[*]} in
*llama_1b* | *llama_7b*) flags+=(--fsdp) ;;
esac
[ -n "${DRY_RUN:-}" ] || set_up jax train cuda
run srun .venv/bin/python -m launch.train_jax "${flags[@]}" "$@"
