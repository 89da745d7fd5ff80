#!/usr/bin/env bash
# Installs this checkout, with JAX for the accelerator of this host, into ~/venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

usage() {
    cat <<'TEXT'
usage: bash launch/install.sh tpu|cuda|cpu [--dry-run]

Makes ~/venv with a Python that is new enough (images of TPU hosts have an older one) and installs
this checkout there. uv, which does it, is fetched from astral.sh where it is missing.
TEXT
}

kind=${1-}
case $kind in
    tpu | cuda) extra="[$kind]" ;;
    cpu) extra='' ;;
    -h | --help)
        usage
        exit 0
        ;;
    *) refuse "no accelerator '$kind'; there are tpu, cuda, cpu" ;;
esac
shift
parse "$@"
no_recipe

export PATH=$HOME/.local/bin:$PATH
command -v uv >/dev/null || run sh -c 'curl -LsSf https://astral.sh/uv/install.sh | sh'
run uv venv --allow-existing --python 3.12 "$HOME/venv"
run uv pip install --python "$HOME/venv/bin/python" ".$extra"
