"""Launch scripts: what they would run."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command = ['bash', 'launch/local.sh', *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_local_runs_every_stage_in_order():
    done = launch('configs/embedded.yaml', '--dry-run', '--out', 'some where')
    lines = [line for line in done.stdout.splitlines() if 'cllm_jax' in line]
    assert done.returncode == 0
    commands = [line.split('cllm_jax.')[1].split()[0] for line in lines]
    assert commands == ['train', 'collect', 'train', 'export', 'evaluate']
    assert '--stage target' in lines[0] and '--stage cllm' in lines[2]
    assert all('--config configs/embedded.yaml' in line for line in lines)
    assert all(r'some\ where' in line or "'some where'" in line for line in lines)


def test_local_refuses_what_it_does_not_know():
    for arguments in ([], ['nowhere.yaml'], ['configs/embedded.yaml', '--fast']):
        done = launch(*arguments)
        assert done.returncode == 2 and 'error: ' in done.stderr
