#!/usr/bin/env bash
# A job on a spot TPU slice that waits for capacity, and starts again where it was interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

usage() {
    cat <<'TEXT'
usage: bash launch/queued.sh run CONFIG [--root gs://BUCKET/NAME] [--steps LIST] [--with PATH]...
                                 [-- OVERRIDE...]
       bash launch/queued.sh logs | status | delete

  run     queue for a spot slice, run the steps of the recipe on it, queue again whenever it is
          taken away, and delete it when the steps are done or cannot succeed. Stays until then; if
          it is stopped itself, the job goes on, and the same line watches it again.
  logs    follow the log of host $WORKER (default 0); all logs end up in ROOT/launch/
  status  state of the request
  delete  give up the request and the slice; the runs stay in the bucket

Each takes --dry-run: only print the commands. Steps and overrides: bash launch/host.sh --help.
From the environment: PROJECT, ZONE, TPU_NAME (cllm); for run also ACCELERATOR, RUNTIME (by the
accelerator), BUCKET if there is no --root, QUEUE_FLAGS (--spot; more flags of gcloud, by spaces).
TEXT
}

take_verb 'run logs status delete' "${1-}"
parse "${@:2}"
[[ $verb == run ]] || no_recipe
tpu_settings
queue=(gcloud compute tpus queued-resources)
describe=("${queue[@]}" describe "$TPU_NAME" "${where[@]}" --format 'value(state.state)')
delete=("${queue[@]}" delete "$TPU_NAME" "${where[@]}" --force --quiet)

case $verb in
    logs)
        run gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker "${WORKER:-0}" \
            --command 'sudo tail -n 100 -F ~root/cllm.log'
        exit
        ;;
    status)
        run "${describe[@]}"
        exit
        ;;
    delete)
        run "${delete[@]}"
        exit
        ;;
esac

tpu_runtime
bucket_root
make_job
verdict=$root/launch/verdict
kept=runs/launch/$TPU_NAME
startup=$kept/startup.sh
read -ra flags <<<"${QUEUE_FLAGS---spot}"

# Runs on every host as root, at every boot. Its last word goes to ROOT/launch/verdict.
startup_script() {
    printf '#!/bin/bash\n# Written by launch/queued.sh.\nroot=%q\njob=(%s)\n' "$root" "$(quoted "${job[@]}")"
    cat <<'TEXT'
set -uo pipefail
export HOME=${HOME:-/root}
export PYTHON=$HOME/venv/bin/python
cd "$HOME" || exit
exec >>cllm.log 2>&1

install() {
    [[ -f installed ]] || {
        gcloud storage cp "$root/launch/source.tar.gz" . && mkdir -p cllm_jax &&
            tar -xzf source.tar.gz -C cllm_jax && bash cllm_jax/launch/install.sh tpu && touch installed
    }
}

verdict() {
    echo "$1"
    gcloud storage cp cllm.log "$root/launch/$HOSTNAME.log"
    until echo "$1" | gcloud storage cp - "$root/launch/verdict"; do
        sleep 30
    done
}

for ((failures = 0; failures < 10; )); do
    code=1
    if install; then
        (cd cllm_jax && "${job[@]}")
        code=$?
    fi
    case $code in
        0)
            verdict 'done'
            exit
            ;;
        2 | 3 | 4) break ;; # settings, data, numbers: another start changes nothing
        75) ;;
        *) failures=$((failures + 1)) ;;
    esac
    sleep 30
done
verdict "failed on $HOSTNAME: exit code $code"
TEXT
}

submit() {
    run "${queue[@]}" create "$TPU_NAME" "${where[@]}" --node-id "$TPU_NAME" \
        --accelerator-type "$ACCELERATOR" --runtime-version "$runtime" "${flags[@]}" \
        --metadata-from-file "startup-script=$startup"
}

state='' word=''
if ! $dry_run; then
    state=$("${describe[@]}" 2>/dev/null) || state=''
    word=$(gcloud storage cat "$verdict" 2>/dev/null) || word=''
fi
if [[ -z $state ]]; then
    pack
    printf '# %s:\n' "$startup"
    startup_script | sed 's/^/#   /'
    run mkdir -p "$kept"
    $dry_run || { startup_script >"$startup" && echo running >"$kept/verdict"; }
    run gcloud storage cp "$source.gz" "$root/launch/source.tar.gz"
    run gcloud storage cp "$kept/verdict" "$verdict"
    submit
    word=running
elif [[ $(cat "$startup" 2>/dev/null) != "$(startup_script)" ]]; then
    refuse "$TPU_NAME is $state with another job; delete that one, or export TPU_NAME=another name"
fi

if $dry_run; then
    echo '# then, every minute:'
    run "${describe[@]}"
    run gcloud storage cat "$verdict"
    echo '# when the slice was taken away (SUSPENDED or FAILED), again:'
    run "${delete[@]}"
    submit
    echo '# at the end:'
    run "${delete[@]}"
    exit
fi

again=false
while :; do
    case $word in
        done | failed*)
            run "${delete[@]}"
            echo "$word; logs in $root/launch/"
            [[ $word == 'done' ]] || exit 1
            exit 0
            ;;
    esac
    case $state in
        SUSPENDED | FAILED) again=true ;;
    esac
    if $again; then
        echo 'the slice was taken away: queueing again'
        run "${delete[@]}" || true # it may be gone already
        if submit; then
            again=false
        fi
    fi
    sleep 60
    # A failure to ask is not an answer: keep waiting.
    state=$("${describe[@]}") || state=''
    word=$(gcloud storage cat "$verdict") || word=''
done
