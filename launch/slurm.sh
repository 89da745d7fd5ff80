#!/usr/bin/env bash
#SBATCH --job-name=cllm
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@300
# A job on GPU nodes of a SLURM cluster; queued again when it was interrupted.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: sbatch --nodes=N --ntasks-per-node=G --gpus-per-node=G [SBATCH_FLAG...]
              launch/slurm.sh CONFIG --root DIR [--steps LIST] [-- OVERRIDE...]
       bash launch/slurm.sh CONFIG --root DIR [--steps LIST] --dry-run [-- OVERRIDE...]

Submit it in the root of the checkout. One task per GPU: JAX gives a task the GPU of its number on
the node, so every task must see all GPUs of the node (no --gpus-per-task). --root is a directory on
a disk that all nodes share. Five minutes before the time limit the step is told to save, and the
job goes back to the queue. Steps and overrides: bash launch/host.sh --help.

From the environment: PYTHON, the Python that cllm_jax[cuda] is installed in (default: python).
TEXT
}

# sbatch runs a copy of this file, so that the checkout is where the job was submitted.
[[ -f launch/common.sh ]] || {
    printf 'error: %s: not the root of the checkout; cd there and submit again\n' "$PWD" >&2
    exit 2
}
# shellcheck source=launch/common.sh
source launch/common.sh

parse "$@"
[[ -n $config ]] || refuse 'no recipe given, such as configs/paper_gsm8k.yaml'
[[ -n $root ]] || refuse 'no --root given; name a directory on a disk that all nodes share'
$dry_run || [[ -n ${SLURM_JOB_ID-} ]] ||
    refuse 'no SLURM job here; submit this file with sbatch (see --help), or add --dry-run'
tasks=${SLURM_NTASKS_PER_NODE-} gpus=${SLURM_GPUS_ON_NODE-}
[[ -z $tasks || -z $gpus || $tasks == "$gpus" ]] ||
    refuse "$tasks tasks for $gpus GPUs on a node: there must be one per GPU; give --ntasks-per-node=$gpus"
make_job

code=0
run srun "${job[@]}" || code=$?
if $dry_run; then
    echo '# after exit code 75 (saved, to be continued):'
fi
if $dry_run || ((code == 75)); then
    run scontrol requeue "${SLURM_JOB_ID:-JOB}"
fi
exit "$code"
