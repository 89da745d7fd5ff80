#!/usr/bin/env bash
# What every host of a job runs: the steps of a recipe, in order. The other scripts start this one.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/host.sh CONFIG --root DIR [--steps LIST] [--dry-run] [-- OVERRIDE...]

Runs the steps of the recipe CONFIG in order, with the Python $PYTHON (default: python).

  --root DIR      directory of the runs; with several hosts one that all of them see. A bucket,
                  gs://BUCKET/NAME, is mounted below $GCS_MOUNT (/tmp/gcs) with gcsfuse
  --steps LIST    steps in order, separated by commas; default train:target,collect,train:cllm,
                  then collect:recollect,train:refine if the recipe has a stage refine;
                  export and evaluate are steps too
  --dry-run       only print the commands
  -- OVERRIDE...  settings for the train steps, such as -- --mesh.fsdp 8

SIGTERM and Ctrl-C end the running step with SIGTERM, so that it saves what it has. Exit codes:
those of the step; 75 means interrupted, and the same line continues. With RESTART_CODE=N in the
environment it ends with N wherever another start may help: with every code but 0, 2, 3 and 4.
TEXT
}

refuse() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

config='' root='' steps='' dry_run=false
while (($#)); do
    case $1 in
        --dry-run) dry_run=true ;;
        --root | --steps)
            [[ -n ${2-} && $2 != -* ]] || refuse "$1 needs a value; see --help"
            case $1 in
                --root) root=$2 ;;
                --steps) steps=$2 ;;
            esac
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            break
            ;;
        -*) refuse "no option '$1'; settings for the train steps come after --" ;;
        *)
            [[ -z $config ]] || refuse "two recipes, '$config' and '$1'; give one"
            config=$1
            ;;
    esac
    shift
done
[[ -n $config ]] || refuse 'no recipe given, such as configs/embedded.yaml'
[[ -f $config ]] || refuse "no recipe '$config'; give a file of this checkout"
[[ -n $root ]] || refuse 'no --root given; name the directory of the runs'
[[ ${RESTART_CODE-} =~ ^[0-9]*$ ]] || refuse "RESTART_CODE is '$RESTART_CODE': it must be a number"

if [[ -z $steps ]]; then
    steps=train:target,collect,train:cllm
    ! grep -q '^refine:' "$config" || steps+=,collect:recollect,train:refine
fi
IFS=, read -ra list <<<"$steps"
for step in "${list[@]}"; do
    case $step in
        train:target | train:cllm | train:refine | collect | collect:recollect | export | evaluate) ;;
        *) refuse "no step '$step'; there are train:target, collect, train:cllm, collect:recollect, train:refine, export, evaluate" ;;
    esac
done

# The commands work on files. Nothing of a bucket is cached, since other hosts write there too.
if [[ $root == gs://* ]]; then
    bucket=${root#gs://} name=
    [[ $bucket != */* ]] || name=/${bucket#*/}
    bucket=${bucket%%/*}
    place=${GCS_MOUNT:-/tmp/gcs}/$bucket
    mount=(gcsfuse --implicit-dirs --metadata-cache-ttl-secs 0 --rename-dir-limit 100000 "$bucket" "$place")
    root=$place$name
    printf '+'
    printf ' %q' "${mount[@]}"
    printf '\n'
    if ! $dry_run && ! mountpoint -q "$place"; then
        command -v gcsfuse >/dev/null ||
            refuse "gs://$bucket: gcsfuse is not installed; launch/README.md has its page"
        mkdir -p "$place"
        "${mount[@]}" || refuse "gs://$bucket: gcsfuse cannot mount it on $place; see above"
    fi
fi

child='' stopped=false
stop() {
    stopped=true
    [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT

finish() {
    case $1 in
        0 | 2 | 3 | 4) exit "$1" ;; # done, or wrong: settings, data, numbers
        *) exit "${RESTART_CODE:-$1}" ;;
    esac
}

for step in "${list[@]}"; do
    command=("${PYTHON:-python}" -m "cllm_jax.${step%:*}" --config "$config" --root "$root")
    [[ $step != *:* ]] || command+=(--stage "${step#*:}")
    [[ $step != train:* ]] || command+=("$@")
    printf '+'
    printf ' %q' "${command[@]}"
    printf '\n'
    if $dry_run; then
        continue
    fi
    if $stopped; then
        finish 75
    fi
    # In the background, because bash handles a signal only when a foreground command has ended.
    "${command[@]}" &
    child=$!
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # the signal ended `wait`, not the step
        code=0
        wait "$child" || code=$?
    done
    child=''
    if $stopped && ((code > 128)); then
        code=75
    fi
    if ((code)); then
        printf 'stopped (exit code %d): %s\n' "$code" "${command[*]}" >&2
        finish "$code"
    fi
done
