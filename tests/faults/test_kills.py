"""Collection and training are killed at random moments, over and over, and lose nothing.

    pytest tests/faults -m faults -n 0 -s

CLLM_KILLS sets how often each of them is killed (20).
"""

import json
import os
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cllm_jax.hf.load import load
from cllm_jax.hf.model import fingerprint

KILLS = int(os.environ.get('CLLM_KILLS', '20'))
COLLECT = shlex.split(
    '--model embedded-target --data sql+arithmetic --prompts 96 --max-tokens 64 --batch 8 --shard 8'
)
TRAIN = shlex.split(
    '--objective ar --model embedded-target --data sql+arithmetic --task sql --examples 256 '
    '--steps 30 --batch 8 --log-every 1 --save-every 2 --held-out.every 10 --held-out.prompts 2 '
    '--held-out.max-tokens 16 --stage target'
)

pytestmark = pytest.mark.faults


def start(module: str, *arguments: str | Path) -> subprocess.Popen:
    command = [sys.executable, '-m', f'cllm_jax.{module}', *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err.decode()


def attack(command, finished_as_whole, rng: random.Random) -> tuple[int, int]:
    """Kill `command(directory)` KILLS times; whenever one gets through, check it and begin anew.

    Returns how many runs were finished and how many of those had been killed before.
    """
    kills = runs = survivors = 0
    while kills < KILLS or survivors == 0:
        killed = 0
        while True:
            process = command(runs)
            try:
                # Imports take the first seconds; most kills should hit the work behind them.
                process.wait(rng.uniform(2, 30) if kills < KILLS else None)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills, killed = kills + 1, killed + 1
        finish(process)
        finished_as_whole(runs)
        runs, survivors = runs + 1, survivors + (killed > 0)
    print(f'{kills} kills, {runs} runs finished, {survivors} of them killed before, 0 lost')
    return runs, survivors


def collected(directory: Path) -> dict[str, bytes]:
    kept = [p for p in directory.iterdir() if p.name not in ('lock', 'settings.json')]
    return {p.name: p.read_bytes() for p in kept}


def test_a_killed_collection_ends_with_the_same_bytes(tmp_path):
    begin = time.monotonic()
    finish(start('collect', *COLLECT, '--out', tmp_path / 'whole'))
    print(f'uninterrupted: {time.monotonic() - begin:.0f} s')
    whole = collected(tmp_path / 'whole')

    def check(run):
        assert collected(tmp_path / str(run)) == whole

    attack(
        lambda run: start('collect', *COLLECT, '--out', tmp_path / str(run)),
        check,
        random.Random(0),
    )


def trained(root: Path) -> tuple[list[dict], str]:
    lines = (root / 'target/metrics.jsonl').read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    for record in metrics:
        record.pop('tokens_per_second', None)
    return metrics, fingerprint(load(str(root / 'target')))


def test_a_killed_training_ends_with_the_same_metrics_and_weights(tmp_path):
    finish(start('train', *TRAIN, '--root', tmp_path / 'whole'))
    whole = trained(tmp_path / 'whole')

    def check(run):
        assert trained(tmp_path / str(run)) == whole

    attack(
        lambda run: start('train', *TRAIN, '--root', tmp_path / str(run)), check, random.Random(1)
    )
