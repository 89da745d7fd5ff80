"""What a disk does to files: flipped bits, cut files, no space left. Every fault is found.

pytest tests/faults -m faults -n 0 -s
"""

import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import pytest

from cllm_jax.errors import CllmError
from cllm_jax.hf.load import load
from cllm_jax.runs.checksums import SUMS
from cllm_jax.training.checkpoint import open_checkpoints
from cllm_jax.training.trainer import train
from cllm_jax.trajectories.store import read_records
from tests.tiny_training import tiny_run
from tests.trajectories.examples import collect_into

FLIPS = 100
CUTS = 40

pytestmark = pytest.mark.faults


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
    """A collection and a finished training run with its checkpoints and model."""
    root = tmp_path_factory.mktemp('whole')
    collect_into(root / 'trajectories')
    with jax.numpy_dtype_promotion('standard'):
        train(root / 'run', *tiny_run())
    return root


def kinds(root: Path) -> dict[str, list[Path]]:
    """The files of each kind that hold something."""
    found = {
        'shard': list(root.glob('trajectories/*array_record*')),
        'checkpoint': [p for p in root.glob('run/checkpoints/6/**/*') if p.is_file()],
        'weights': [p for p in root.glob('run/model/*') if p.name != 'README.md'],
    }
    return {kind: sorted(p for p in files if p.stat().st_size) for kind, files in found.items()}


def noticed(root: Path, kind: str) -> bool:
    """Whether whoever would use the damaged file refuses it."""
    notes: list[str] = []
    try:
        if kind == 'shard':
            read_records(root / 'trajectories')
        elif kind == 'weights':
            load(str(root / 'run'))
        else:
            with open_checkpoints(root / 'run/checkpoints', notes.append) as checkpoints:
                assert checkpoints.orbax.latest.step == 4
    except CllmError:
        return True
    return bool(notes)


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


@pytest.mark.parametrize(('damage', 'times'), [(flip, FLIPS), (cut, CUTS)])
def test_every_damaged_file_is_noticed(whole, tmp_path, damage, times):
    rng, counts = random.Random(0), Counter()
    for i in range(times):
        root = tmp_path / str(i)
        shutil.copytree(whole, root)
        kind = rng.choice(['shard', 'checkpoint', 'weights'])
        path = rng.choice(kinds(root)[kind])
        path.write_bytes(damage(path.read_bytes(), rng))
        assert noticed(root, kind), (kind, path)
        counts[kind] += 1
        shutil.rmtree(root)
    print(f'{damage.__name__}: {times} of {times} noticed, {dict(counts)}')


def test_sums_are_there(whole):
    for directory in ('run/checkpoints/4', 'run/checkpoints/6', 'run/model'):
        assert (whole / directory / SUMS).is_file()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few MiB; needs the right to mount one."""
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', str(disk)]
    if not shutil.which('mount') or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('mounting a tmpfs is not permitted here')
    yield disk
    subprocess.run(['umount', '-l', str(disk)], check=True)


@pytest.mark.parametrize(
    'arguments',
    [
        'collect --model embedded-target --data sql --prompts 16 --max-tokens 32 --batch 8 '
        '--shard 8 --out {disk}/run',
        'train --objective ar --model embedded-target --data sql --task sql --examples 16 '
        '--steps 2 --batch 4 --held-out.every 1 --held-out.prompts 1 --held-out.max-tokens 4 '
        '--stage target --root {disk}',
    ],
)
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(small_disk, arguments):
    command = [sys.executable, '-m', *f'cllm_jax.{arguments}'.format(disk=small_disk).split()]
    ballast = small_disk / 'ballast'
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(bytes(free - 40 * 1024))
    full = subprocess.run(command, capture_output=True, text=True)
    assert full.returncode not in (0, 1), full.stderr
    assert 'Traceback' not in full.stderr and 'error' in full.stderr, full.stderr
    subprocess.run(['mount', '-o', 'remount,size=200m', str(small_disk)], check=True)
    ballast.unlink()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
