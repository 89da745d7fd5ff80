"""Several processes with several devices each: the bytes and numbers of one process."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from cllm_jax import collect, train
from cllm_jax.runs.run_dir import read_metrics
from cllm_jax.trajectories.store import read_records
from tests.tiny import model_directory

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / 'launch/local_multiprocess.sh'
COLLECT = shlex.split('--data arithmetic --prompts 15 --max-tokens 16 --batch 3 --shard 3')
TRAIN = shlex.split(
    '--objective ar --data sql --task sql --examples 64 --steps 4 '
    '--batch 8 --log-every 1 --save-every 2 --held-out.every 4 --held-out.prompts 2 '
    '--held-out.max-tokens 8 --stage target'
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('usual_signals')]


def start(processes: int, devices: int, module: str, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, '-m', f'cllm_jax.{module}', *map(str, arguments)]
    launcher = ['bash', str(LAUNCHER), str(processes), str(devices)]
    return subprocess.Popen(
        launcher + command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> int:
    _, err = process.communicate(timeout=300)
    assert 'Traceback' not in err, err
    return process.returncode


def run(*arguments) -> None:
    process = start(*arguments)
    code = finish(process)
    assert code == 0, process.args


def here(monkeypatch, module, *arguments) -> None:
    """The same command in this process, on its eight devices."""
    monkeypatch.setattr(sys, 'argv', [module.__name__, *map(str, arguments)])
    with jax.numpy_dtype_promotion('standard'):  # optax relies on it
        module.run()


def collected(directory: Path) -> dict[str, bytes]:
    names = [p for p in directory.iterdir() if p.name not in ('lock', 'settings.json')]
    return {p.name: p.read_bytes() for p in names}


def test_a_collection_has_the_same_bytes_on_one_two_and_four_processes(tmp_path, monkeypatch):
    arguments = (*COLLECT, '--model', model_directory(tmp_path / 'tiny'), '--out')
    here(monkeypatch, collect, *arguments, tmp_path / '1')
    for processes, devices in ((2, 2), (4, 1)):
        run(processes, devices, 'collect', *arguments, tmp_path / str(processes))
    one, two, four = (collected(tmp_path / name) for name in ('1', '2', '4'))
    assert one == two == four
    assert len(read_records(tmp_path / '1')) == 15


def test_a_collection_of_two_processes_ends_with_sigterm(tmp_path):
    arguments = (*COLLECT, '--prompts', '4000', '--model', model_directory(tmp_path / 'tiny'))
    process = start(2, 1, 'collect', *arguments, '--out', tmp_path / 'out')
    while process.poll() is None and not (tmp_path / 'out/manifest.json').exists():
        time.sleep(0.1)
    process.terminate()  # passed on to both
    assert finish(process) == 128 + signal.SIGTERM


def metrics(root: Path) -> list[dict]:
    found = read_metrics(root / 'target/metrics.jsonl')
    return [{k: v for k, v in m.items() if k != 'tokens_per_second'} for m in found]


def test_training_on_two_processes_is_training_on_one_and_survives_sigterm(tmp_path, monkeypatch):
    """A SIGTERM to one process stops both after a step; one process continues on another mesh."""
    arguments = (*TRAIN, '--model', model_directory(tmp_path / 'tiny'), '--root')
    here(monkeypatch, train, *arguments, tmp_path / 'one')
    first = start(2, 4, 'train', *arguments, tmp_path / 'two', '--mesh.fsdp', '2')
    log = tmp_path / 'two/target/metrics.jsonl'
    while first.poll() is None and not (log.exists() and log.read_text().count('\n') > 1):
        time.sleep(0.1)
    children = subprocess.run(
        ['pgrep', '-P', str(first.pid)], capture_output=True, text=True, check=True
    )
    os.kill(int(children.stdout.split()[-1]), signal.SIGTERM)
    code = finish(first)
    assert code in (0, 75)  # it may have been at its last step
    here(monkeypatch, train, *arguments, tmp_path / 'two', '--mesh.fsdp', '4')
    one, two = metrics(tmp_path / 'one'), metrics(tmp_path / 'two')
    assert [m['step'] for m in one] == [m['step'] for m in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), (key, a, b)
    settings = json.loads((tmp_path / 'two/target/settings.json').read_text())
    assert 'mesh' not in settings
