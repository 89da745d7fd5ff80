#!/usr/bin/env bash
# What each choice of the training recipe is worth: one short training run per choice.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/ablations.sh CONFIG --root DIR [--steps N] [--dry-run] [-- OVERRIDE...]

Trains a CLLM for every row of the table below, from DIR/target (made by
`bash launch/local.sh CONFIG --out DIR`) with one setting of CONFIG's stage cllm changed, or from the
CLLM of the first row on other trajectories; evaluates it, and prints a table of all rows, or at an
interruption of those that are done. What is done already is not done again.

  --root DIR      directory with the run `target`; rows go to DIR/ablations
  --steps N       optimisation steps of each row (default 400)
  --dry-run       only print the commands
  -- OVERRIDE...  settings for every training
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

# name | model to start from | whose trajectories, schedule and n | settings
rows=(
    'the recipe|target|target-sliding-16|'
    'local consistency in place of global|target|target-sliding-16|--loss.global-weight 0 --loss.local-weight 1 --noise.pairs --noise.fresh 0 --texts='
    'no texts|target|target-sliding-16|--texts='
    'AR weight 1|target|target-sliding-16|--loss.ar-weight 1'
    'no position decay|target|target-sliding-16|--noise.decay 0'
    'no fresh starts|target|target-sliding-16|--noise.fresh 0'
    'corrupted guesses|target|target-sliding-16|--noise.corruption 0.3'
    'right answers only|target|target-sliding-16|--cleaning.wrong'
    'AdamW in place of Muon|target|target-sliding-16|--optimizer.kind adamw --optimizer.learning-rate 1e-3'
    'states of the block schedule|target|target-block-16|'
    'as many steps again|recipe|target-sliding-16|'
    'as many steps again, own states|recipe|recipe-sliding-16|'
    'own states, n = 32|recipe|recipe-sliding-32|--held-out.block 32'
    'n = 8|target|target-sliding-8|--held-out.block 8'
    'n = 32|target|target-sliding-32|--held-out.block 32'
    'AR weight 12|target|target-sliding-16|--loss.ar-weight 12'
    'half of the states fresh|target|target-sliding-16|--noise.fresh 0.5'
    'own states, right answers only|recipe|recipe-sliding-16|--cleaning.wrong'
    'augmented states|target|target-sliding-16|--cleaning.augment 0.5'
    'position decay 4|target|target-sliding-16|--noise.decay 4'
    'position decay 16|target|target-sliding-16|--noise.decay 16'
    'AR weight 2|target|target-sliding-16|--loss.ar-weight 2'
    'global and local consistency|target|target-sliding-16|--loss.local-weight 1 --noise.pairs --noise.fresh 0 --texts='
)

parse "$@"
steps=${steps:-400}
[[ -n $config ]] || refuse 'no recipe given, such as configs/embedded.yaml'
[[ -f $config ]] || refuse "no recipe '$config'; give a file of this checkout"
[[ -n $root ]] || refuse 'no --root given; name the directory with the run target'
[[ $steps =~ ^[1-9][0-9]*$ ]] || refuse "steps '$steps': must be a whole number above 0"

# On Linux: huge pages, and memory that is freed stays here, to be used again by the next step; the
# kernel would clear it every time (a sixth of the time of a training).
malloc=hugetlb=1:glibc.malloc.arena_max=1:glibc.malloc.mmap_threshold=$((1 << 33))
malloc+=:glibc.malloc.trim_threshold=$((1 << 34))
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.$malloc}
python=${PYTHON:-python} out=$root/ablations

names=()
for row in "${rows[@]}"; do
    name=${row%%|*}
    names+=("$name|$out/$steps-steps/${name// /-}")
done

show_rows() {
    "$python" - "${names[@]}" <<'PYTHON'
import json
import sys
from pathlib import Path

print('| changed | task | quality | tokens/forward | speed-up | identical |')
print('| --- | --- | ---: | ---: | ---: | ---: |')
for name, place in (pair.split('|') for pair in sys.argv[1:]):
    file = Path(place, 'evaluate.json')
    found = json.loads(file.read_text()) if file.is_file() else []
    for task in found if isinstance(found, list) else [found]:
        quality = task['quality']['cllm']
        cells = (
            '-' if quality is None else f'{quality:.1%}',
            f'{task["tokens_per_forward"]["cllm"]:.2f}',
            f'{task["speedup"]:.2f}x',
            f'{task["identical"]:.0%}',
        )
        print('|', ' | '.join((name, task['task'], *cells)), '|')
PYTHON
}
$dry_run || trap show_rows EXIT

declare -A collected models=([target]=$root/target [recipe]=$out/$steps-steps/the-recipe/cllm)
for row in "${rows[@]}"; do
    IFS='|' read -r name start states flags <<<"$row"
    read -ra settings <<<"$flags"
    IFS=- read -r whose mode block <<<"$states"
    place=$out/$steps-steps/${name// /-} data=$out/$mode-$block
    [[ $whose == target ]] || data=$out/$steps-steps/$states
    [[ ! -f $place/evaluate.json ]] || continue
    if [[ -z ${collected[$states]-} ]]; then
        run "$python" -m cllm_jax.collect --config "$config" --model "${models[$whose]}" \
            --out "$data" --mode "$mode" --block "$block" --prompts 2048
        collected[$states]=yes
    fi
    run "$python" -m cllm_jax.train --config "$config" --stage cllm --root "$place" \
        --model "${models[$start]}" --data "$data" --steps "$steps" \
        --held-out.every "$steps" --save-every "$steps" "${settings[@]}" "${rest[@]}"
    run "$python" -m cllm_jax.evaluate --config "$config" --model "$place/cllm" \
        --target "$root/target" --block "$block" --limit 100 --timed 8 \
        --json "$place/evaluate.json"
done
