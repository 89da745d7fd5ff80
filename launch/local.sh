#!/usr/bin/env bash
# The whole pipeline on this machine: target model -> trajectories -> CLLM -> export -> evaluation.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/local.sh CONFIG [--quick] [--out DIR] [--dry-run]

Runs every stage of the recipe CONFIG, in order. Each step can be resumed: after an
interruption the same line continues where it stopped.

  --quick     a tiny version of every step, to see that the pipeline works
  --out DIR   where everything is written (default: runs/NAME, or runs/quick-NAME
              with --quick, for CONFIG = .../NAME.yaml)
  --dry-run   only print the commands
TEXT
}

refuse() {
    printf 'error: %s\n' "$1" >&2
    usage >&2
    exit 2
}

line=$(printf ' %q' "$0" "$@")
config='' out='' quick=false dry_run=false
while (($#)); do
    case $1 in
        --quick) quick=true ;;
        --dry-run) dry_run=true ;;
        --out)
            [[ -n ${2-} && $2 != --* ]] || refuse '--out needs a directory'
            out=$2
            shift
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        -*) refuse "no option '$1'" ;;
        *)
            [[ -z $config ]] || refuse "two recipes, '$config' and '$1'; give one"
            config=$1
            ;;
    esac
    shift
done
[[ -n $config ]] || refuse 'no recipe given, such as configs/embedded.yaml'
[[ -f $config ]] || refuse "no recipe '$config'"

# On Linux: huge pages, and memory that is freed stays here, to be used again by the next step; the
# kernel would clear it every time (a sixth of the time of a training).
malloc=hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=$((1 << 33))
malloc+=:glibc.malloc.trim_threshold=$((1 << 34))
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.$malloc}

name=$(basename "$config")
name=${name%.*}
common=(--config "$config")
if $quick; then
    common+=(--root "${out:-runs/quick-$name}")
else
    common+=(--root "${out:-runs/$name}")
fi

step() {
    local module=$1
    shift
    local command=("${PYTHON:-python}" -m "cllm_jax.$module" "${common[@]}")
    if $quick && [[ $module != export ]]; then # nothing of an export takes long
        command+=(--quick)
    fi
    command+=("$@")
    printf '+'
    printf ' %q' "${command[@]}"
    printf '\n'
    if $dry_run; then
        return
    fi
    local code=0
    "${command[@]}" || code=$?
    if ((code)); then
        {
            printf 'stopped (exit code %d):' "$code"
            printf ' %q' "${command[@]}"
            local what='run the same line again to continue'
            ((code < 2 || code > 4)) || what='when that is put right, run the same line again'
            printf '\n%s: bash%s\n' "$what" "$line"
        } >&2
        exit "$code"
    fi
}

steps=$("${PYTHON:-python}" -m cllm_jax.runs "$config") || exit
while read -ra words <&3; do
    step "${words[@]}"
done 3<<<"$steps"
