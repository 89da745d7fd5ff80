#!/usr/bin/env bash
# What each choice of the training recipe is worth: one short training run per choice.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash launch/ablations.sh CONFIG --root DIR [--steps N] [--dry-run] [-- OVERRIDE...]

Trains a CLLM for every row of the table below and each of two seeds, from DIR/target (made by
`bash launch/local.sh CONFIG --out DIR`) with one setting of CONFIG's stage cllm changed, or from the
CLLM of another row on other trajectories; evaluates it, and prints a table of all rows, or at an
interruption of those that are done. What is done already is not done again.

  --root DIR      directory with the run `target`; rows go to DIR/ablations
  --steps N       optimisation steps of each row (default 400)
  --dry-run       only print the commands
  -- OVERRIDE...  settings for every training

SEEDS of the environment names other seeds than `0 1`, and ROWS a pattern of rows to run, such as
'recipe|spans'; a row that starts from another needs that one too.
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

# name | what is changed | row to start from | whose trajectories, schedule and n | settings
rows=(
    'recipe|the recipe|target|target-sliding-16|'
    'measured|states of texts as right as measured|target|target-sliding-16|--noise.measured'
    'forced|student-forced labels in place of global|target|target-sliding-16|--loss.global-weight 0 --loss.forced-weight 1'
    'global-forced|student-forced labels beside global|target|target-sliding-16|--loss.forced-weight 1'
    'frozen|the target as teacher in place of itself|target|target-sliding-16|--loss.global-weight 0 --loss.frozen-weight 1'
    'global-frozen|the target as teacher beside itself|target|target-sliding-16|--loss.frozen-weight 1'
    'shortest|random lengths of 2 to 16|target|target-sliding-16|--noise.shortest 2'
    'spans|random spans, no trajectories|target||--objective spans --noise.fresh 1'
    'n-8|n = 8|target|target-sliding-8|--held-out.block 8'
    'n-32|n = 32|target|target-sliding-32|--held-out.block 32'
    'longer|as many steps again|recipe|target-sliding-16|'
    'own|as many steps again, own states|recipe|recipe-sliding-16|'
    'own-32|as many steps again, own states of n = 32|recipe|recipe-sliding-32|--held-out.block 32'
    'own-64|and again, own states of n = 64|own-32|own-32-sliding-64|--held-out.block 64'
    'own-own|and again, own states|own|own-sliding-16|'
    'local|local consistency in place of global, no texts|target|target-sliding-16|--loss.global-weight 0 --loss.local-weight 1 --noise.pairs --noise.fresh 0 --texts='
    'no-texts|no texts|target|target-sliding-16|--texts='
    'ar-1|AR weight 1|target|target-sliding-16|--loss.ar-weight 1'
    'flat|no position decay|target|target-sliding-16|--noise.decay 0'
    'decay-16|position decay 16|target|target-sliding-16|--noise.decay 16'
    'no-fresh|no fresh starts|target|target-sliding-16|--noise.fresh 0'
    'corrupted|30 % of the guesses corrupted|target|target-sliding-16|--noise.corruption 0.3'
    'right-only|right answers only|target|target-sliding-16|--cleaning.wrong'
    'block|states of the block schedule|target|target-block-16|'
    'adamw|AdamW in place of Muon|target|target-sliding-16|--optimizer.kind adamw --optimizer.learning-rate 1e-3'
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
python=${PYTHON:-python} out=$root/ablations/$steps-steps
seeds=${SEEDS:-0 1} wanted=${ROWS:-.*}

names=()
for row in "${rows[@]}"; do
    IFS='|' read -r name changed _ <<<"$row"
    [[ $name =~ ^($wanted)$ ]] && names+=("$name|$changed")
done
[[ ${#names[@]} -gt 0 ]] || refuse "ROWS '$wanted': no row has such a name"

show_rows() {
    "$python" - "$out" "$seeds" "${names[@]}" <<'PYTHON'
import json
import sys
from pathlib import Path

out, seeds, names = sys.argv[1], sys.argv[2].split(), sys.argv[3:]
print('| changed | task | quality | loop-free tokens/forward | identical |')
print('| --- | --- | ---: | ---: | ---: |')
for name, changed in (pair.split('|') for pair in names):
    files = [Path(out, f'seed-{seed}', name, 'evaluate.json') for seed in seeds]
    found = [json.loads(file.read_text()) for file in files if file.is_file()]
    found = [one if isinstance(one, list) else [one] for one in found]
    for tasks in zip(*found):
        quality = (task['quality']['cllm'] for task in tasks)
        cells = (
            ', '.join('-' if q is None else f'{q:.1%}' for q in quality),
            ', '.join(f'{t["loop_free_tokens_per_forward"]:.2f}' for t in tasks),
            ', '.join(f'{t["identical"]:.0%}' for t in tasks),
        )
        print('|', ' | '.join((changed, tasks[0]['task'], *cells)), '|')
PYTHON
}
$dry_run || trap show_rows EXIT

declare -A collected
for seed in $seeds; do
    of_seed=$out/seed-$seed
    for row in "${rows[@]}"; do
        IFS='|' read -r name _ start states flags <<<"$row"
        [[ $name =~ ^($wanted)$ && ! -f $of_seed/$name/evaluate.json ]] || continue
        read -ra settings <<<"$flags"
        model=$of_seed/$start/cllm block=16
        [[ $start != target ]] || model=$root/target
        if [[ -n $states ]]; then
            block=${states##*-} whose=${states%-*-*} mode=${states%-*} data=$of_seed/$states
            collector=$of_seed/$whose/cllm mode=${mode##*-}
            if [[ $whose == target ]]; then
                collector=$root/target data=$root/ablations/$states
            fi
            settings=(--data "$data" "${settings[@]}")
            if [[ -z ${collected[$data]-} ]]; then
                run "$python" -m cllm_jax.collect --config "$config" --model "$collector" \
                    --out "$data" --mode "$mode" --block "$block" --prompts 2048
                collected[$data]=yes
            fi
        fi
        run "$python" -m cllm_jax.train --config "$config" --stage cllm --root "$of_seed/$name" \
            --model "$model" --seed "$seed" --steps "$steps" --held-out.every "$steps" \
            --save-every "$steps" "${settings[@]}" "${rest[@]}"
        run "$python" -m cllm_jax.evaluate --config "$config" --model "$of_seed/$name/cllm" \
            --target "$root/target" --block "$block" --limit 100 --timed 1 \
            --json "$of_seed/$name/evaluate.json"
    done
done
