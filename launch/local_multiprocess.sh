#!/usr/bin/env bash
# One command as several processes on this machine, each with several virtual CPU devices: what a
# pod does, small.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/local_multiprocess.sh PROCESSES DEVICES [--dry-run] COMMAND...

Runs COMMAND in PROCESSES processes that are one JAX job, each with DEVICES virtual CPU devices:

  bash launch/local_multiprocess.sh 2 4 python -m cllm_jax.collect --config configs/embedded.yaml

Ends with the first exit code that is not 0; the other processes are then told to stop. SIGTERM and
SIGINT are passed on to all of them.
TEXT
}

refuse() {
    printf 'error: %s\n' "$1" >&2
    usage >&2
    exit 2
}

[[ ${1-} != -h && ${1-} != --help ]] || { usage && exit 0; }
(($# >= 3)) || refuse 'needs the number of processes, the devices of each, and a command'
processes=$1 devices=$2
shift 2
for number in "$processes" "$devices"; do
    [[ $number =~ ^[1-9][0-9]*$ ]] || refuse "'$number' is not a number of processes or devices"
done
dry_run=false
if [[ $1 == --dry-run ]]; then
    dry_run=true
    shift
    (($#)) || refuse 'no command given'
fi

port=${PORT:-$((20000 + RANDOM % 20000))}
export JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$processes
export XLA_FLAGS="--xla_force_host_platform_device_count=$devices ${XLA_FLAGS-}"

if $dry_run; then
    for ((i = 0; i < processes; i++)); do
        printf 'JAX_COORDINATOR_ADDRESS=%s JAX_NUM_PROCESSES=%s JAX_PROCESS_ID=%s' \
            "$JAX_COORDINATOR_ADDRESS" "$processes" "$i"
        printf ' %q' "$@"
        printf '\n'
    done
    exit
fi

children=()
stop() {
    kill -TERM "${children[@]}" 2>/dev/null || true
}
trap stop TERM INT

for ((i = 0; i < processes; i++)); do
    JAX_PROCESS_ID=$i "$@" &
    children+=($!)
done

result=0
for ((i = 0; i < processes; i++)); do
    code=0
    wait -n || code=$?
    # A trapped signal ends `wait` early, with a code above 128, while the child still runs.
    while ((code > 128)) && [[ -n $(jobs -pr) ]]; do
        code=0
        wait -n || code=$?
    done
    if ((code && !result)); then
        result=$code
        ((code == 75)) || stop
    fi
done
exit "$result"
