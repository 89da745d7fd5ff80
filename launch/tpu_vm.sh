#!/usr/bin/env bash
# A job on one TPU slice, by ssh: create it, send the code, run, read the log, delete it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

usage() {
    cat <<'TEXT'
usage: bash launch/tpu_vm.sh create [-- GCLOUD_FLAG...]
       bash launch/tpu_vm.sh sync [--with PATH]...
       bash launch/tpu_vm.sh run CONFIG [--root gs://BUCKET/NAME] [--steps LIST] [-- OVERRIDE...]
       bash launch/tpu_vm.sh logs | status | stop | delete

  create  ask for the slice now; it fails where there is none (then see queued.sh)
  sync    send the committed files, and those of --with, to every host and install them
  run     start the steps of the recipe on every host; they go on when ssh ends
  logs    follow the log of host $WORKER (default 0)
  stop    send SIGTERM: the step saves, and `run` with the same line continues
  delete  delete the slice, which ends its cost; the runs stay in the bucket

Each takes --dry-run: only print the commands. Steps and overrides: bash launch/host.sh --help.
From the environment: PROJECT, ZONE, TPU_NAME (cllm); for create ACCELERATOR and RUNTIME (by the
accelerator); for run BUCKET, if there is no --root.
TEXT
}

take_verb 'create sync run logs status stop delete' "${1-}"
parse "${@:2}"
[[ $verb == run ]] || no_recipe
tpu_settings
tpu=(gcloud compute tpus tpu-vm)

# on WORKER COMMAND: a shell command on one host, or on all.
on() {
    run "${tpu[@]}" ssh "$TPU_NAME" "${where[@]}" --worker "$1" --command "$2"
}

case $verb in
    create)
        tpu_runtime
        run "${tpu[@]}" create "$TPU_NAME" "${where[@]}" --accelerator-type "$ACCELERATOR" \
            --version "$runtime" "${rest[@]}"
        ;;
    sync)
        pack
        run "${tpu[@]}" scp "$source.gz" "$TPU_NAME:source.tar.gz" "${where[@]}" --worker all
        on all 'mkdir -p cllm_jax && tar -xzf source.tar.gz -C cllm_jax && bash cllm_jax/launch/install.sh tpu'
        ;;
    run)
        bucket_root
        make_job
        # setsid and nohup turn into host.sh, so that $! is the process that `stop` tells to end.
        on all "kill -0 \$(cat cllm.pid 2>/dev/null) 2>/dev/null &&\
 { echo 'a job runs here: stop it first'; exit 1; };\
 cd cllm_jax && { PYTHON=\$HOME/venv/bin/python setsid nohup $(quoted "${job[@]}")\
 >>../cllm.log 2>&1 </dev/null & echo \$! >../cllm.pid; }"
        ;;
    logs) on "${WORKER:-0}" 'tail -n 100 -F cllm.log' ;;
    status) run "${tpu[@]}" describe "$TPU_NAME" "${where[@]}" --format 'value(state)' ;;
    stop) on all "kill -TERM \$(cat cllm.pid)" ;;
    delete) run "${tpu[@]}" delete "$TPU_NAME" "${where[@]}" --quiet ;;
esac
