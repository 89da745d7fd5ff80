# shellcheck shell=bash
# shellcheck disable=SC2034  # what is set here is used there
# Sourced by the launch scripts: refusals, commands that can be shown instead of run, shared options.

refuse() {
    printf 'error: %s\n' "$1" >&2
    exit 2
}

((BASH_VERSINFO[0] >= 5)) || refuse "bash $BASH_VERSION: bash 5 is needed; install it and run this with it"
[[ -f launch/common.sh && -d cllm_jax ]] ||
    refuse "$PWD: not the root of the cllm_jax checkout; cd there and run this again"

# need NAME MEANING EXAMPLE: an environment variable that must be set.
need() {
    [[ -n ${!1-} ]] || refuse "$1 is not set: it must be $2; for example: export $1=$3"
}

# A command as one line that a shell would read back as the same command.
quoted() {
    local word line=''
    for word; do
        [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word=${word@Q}
        line+=" $word"
    done
    printf '%s' "${line# }"
}

dry_run=false

# Shows a command, and runs it unless this is a dry run.
run() {
    printf '+ %s\n' "$(quoted "$@")"
    $dry_run || "$@"
}

# The command `verb` of a script: one of the words $1, separated by spaces.
take_verb() {
    verb=$2
    if [[ $verb == -h || $verb == --help ]]; then
        usage
        exit 0
    fi
    [[ -n $verb && " $1 " == *" $verb "* ]] || refuse "no command '$verb'; there are ${1// /, }"
}

config='' root='' steps='' with=() rest=()

# Options that the scripts share: [CONFIG] [--root DIR] [--steps LIST] [--with PATH] [--dry-run]
# [-- REST...]; each script says in its usage which it takes.
parse() {
    while (($#)); do
        case $1 in
            -h | --help)
                usage
                exit 0
                ;;
            --dry-run) dry_run=true ;;
            --root | --steps | --with)
                [[ -n ${2-} && $2 != -* ]] || refuse "$1 needs a value; see --help"
                case $1 in
                    --root) root=${2%/} ;;
                    --steps) steps=$2 ;;
                    --with) with+=("$2") ;;
                esac
                shift
                ;;
            --)
                shift
                rest=("$@")
                return
                ;;
            -*) refuse "no option '$1'; see --help, and put what is for other programs after --" ;;
            *)
                [[ -z $config ]] || refuse "two recipes, '$config' and '$1'; give one"
                config=$1
                ;;
        esac
        shift
    done
}

no_recipe() {
    [[ -z $config ]] || refuse "'$config': this command takes no recipe; leave it out"
}

# The run directory of a recipe in the bucket, unless --root names one.
bucket_root() {
    [[ -n $config ]] || refuse 'no recipe given, such as configs/paper_gsm8k.yaml'
    if [[ -z $root ]]; then
        need BUCKET 'the name of a storage bucket' my-bucket
        [[ $BUCKET != *:* ]] || refuse "BUCKET is '$BUCKET': it must be a name without gs://; drop that"
        root=$(basename "$config")
        root=gs://$BUCKET/${root%.*}
    fi
    [[ $root == gs://?* ]] ||
        refuse "--root '$root': hosts of a slice share no disk; give a directory gs://BUCKET/NAME"
}

# What every host runs, as the array `job`. Shown, and with that checked, by host.sh itself.
make_job() {
    local flags=(--root "$root") overrides=() lines
    [[ -z $steps ]] || flags+=(--steps "$steps")
    ((${#rest[@]} == 0)) || overrides=(-- "${rest[@]}")
    lines=$(PYTHON=python bash launch/host.sh "$config" "${flags[@]}" --dry-run "${overrides[@]}") ||
        exit
    printf '# every host runs:\n%s\n' "${lines//+ python/# python}"
    job=(bash launch/host.sh "$config" "${flags[@]}" "${overrides[@]}")
}

# What the scripts for TPU virtual machines need; sets `where` and `runtime`.
tpu_settings() {
    need PROJECT 'the id of a Google Cloud project' my-project
    need ZONE 'a zone that has the accelerator' us-west4-a
    where=(--project "$PROJECT" --zone "$ZONE")
    TPU_NAME=${TPU_NAME:-cllm}
}

tpu_runtime() {
    need ACCELERATOR 'an accelerator type (see launch/README.md)' v6e-16
    case $ACCELERATOR in
        v6e-*) runtime=${RUNTIME:-v2-alpha-tpuv6e} ;;
        v5p-*) runtime=${RUNTIME:-v2-alpha-tpuv5} ;;
        v5litepod-*) runtime=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
        v[234]-*) runtime=${RUNTIME:-tpu-ubuntu2204-base} ;;
        *)
            [[ -n ${RUNTIME-} ]] ||
                refuse "ACCELERATOR is '$ACCELERATOR': its software is unknown here; export RUNTIME=VERSION"
            runtime=$RUNTIME
            ;;
    esac
}

# The committed files, and those of --with, as the archive $source.gz.
source=runs/launch/source.tar
pack() {
    local path
    for path in "${with[@]}"; do
        [[ $path != /* && /$path/ != */../* && -e $path ]] ||
            refuse "--with '$path': it must exist inside the checkout; copy it there, such as to data/"
    done
    [[ -z $(git status --porcelain) ]] || echo 'note: what is not committed is not sent' >&2
    run mkdir -p "$(dirname "$source")"
    run git archive --output "$source" HEAD
    ((${#with[@]} == 0)) || run tar --append --file "$source" -- "${with[@]}"
    run gzip --force "$source"
}
