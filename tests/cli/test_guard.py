"""How a command ends: the exit code, and one line."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cllm_jax.cli.guard import guard
from cllm_jax.errors import CllmError, ConfigError, DataError, Interrupted, NumericalError


def raises(error):
    def main():
        raise error

    return main


def wrapped_full_disk():
    try:
        raise OSError(errno.ENOSPC, 'No space left on device', '/mnt/runs/step_9')
    except OSError as error:
        raise RuntimeError('saving failed') from error


BUG = '(this is a bug; run with --debug for the traceback)'


@pytest.mark.parametrize(
    ('main', 'code', 'line'),
    [
        (raises(CllmError('x is 1')), 1, 'error: x is 1'),
        (raises(ConfigError('x is 1;\nuse 2')), 2, 'error: x is 1; use 2'),
        (raises(DataError('bad shard')), 3, 'error: bad shard'),
        (raises(NumericalError('loss is nan')), 4, 'error: loss is nan'),
        (raises(Interrupted('saved step 3')), 75, 'interrupted: saved step 3'),
        (raises(KeyboardInterrupt()), 130, ''),
        (raises(ValueError('odd\nthing')), 1, f'error: unexpected ValueError: odd thing {BUG}'),
        (
            raises(OSError(errno.ENOSPC, 'No space left on device', '/mnt/a')),
            3,
            'error: /mnt/a: No space left on device; free space and run the same command again',
        ),
        (
            raises(OSError(errno.EFBIG, 'File too large')),
            3,
            'error: [Errno 27] File too large; free space and run the same command again',
        ),
        (
            raises(ValueError('writing k/0: No space left on device')),
            3,
            'error: writing k/0: No space left on device; '
            'free space and run the same command again',
        ),
        (
            wrapped_full_disk,
            3,
            'error: /mnt/runs/step_9: No space left on device; '
            'free space and run the same command again',
        ),
        (
            raises(PermissionError(errno.EACCES, 'Permission denied', '/some/x')),
            3,
            'error: /some/x: Permission denied; check that path',
        ),
        (raises(OSError('odd')), 1, f'error: unexpected OSError: odd {BUG}'),
        (
            raises(RuntimeError('RESOURCE_EXHAUSTED: 9 GiB')),
            1,
            'error: out of memory (RESOURCE_EXHAUSTED: 9 GiB); '
            'use a smaller batch, length or model',
        ),
    ],
)
def test_guard_ends_with_a_code_and_one_line(capsys, monkeypatch, main, code, line):
    monkeypatch.setattr(sys, 'argv', ['prog'])
    with pytest.raises(SystemExit) as caught:
        guard(main)
    assert caught.value.code == code
    assert capsys.readouterr().err == (f'{line}\n' if line else '')


def test_guard_shows_the_traceback_only_with_debug(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['prog', '--debug'])
    with pytest.raises(SystemExit) as caught:
        guard(raises(DataError('bad shard')))
    assert caught.value.code == 3
    shown = capsys.readouterr().err
    assert shown.startswith('Traceback')
    assert shown.endswith('\nerror: bad shard\n')


def test_guard_returns_after_success_and_leaves_usage_errors_alone():
    ran = []
    guard(lambda: ran.append(1))
    assert ran == [1]
    with pytest.raises(SystemExit) as caught:
        guard(raises(SystemExit(2)))
    assert caught.value.code == 2


def test_an_interrupt_that_a_callback_swallows_comes_again(usual_signals, capsys, monkeypatch):
    class Collected:
        def __del__(self):
            raise KeyboardInterrupt

    def main():
        Collected()
        for _ in range(500):
            time.sleep(0.01)

    monkeypatch.setattr(sys, 'argv', ['prog'])
    hook = sys.unraisablehook
    with pytest.raises(SystemExit) as caught:
        guard(main)
    assert caught.value.code == 130 and sys.unraisablehook is hook
    assert capsys.readouterr().err == ''


CLOSED_PIPE = """
import sys
from cllm_jax.cli.console import Console
from cllm_jax.cli.guard import guard

def main():
    {show}('first')
    sys.stdout.flush()
    sys.stdin.read()
    {show}('second')

guard(main)
"""


@pytest.mark.parametrize('show', ['print', 'Console().result'])
def test_a_closed_pipe_ends_quietly(show):
    with subprocess.Popen(
        [sys.executable, '-c', CLOSED_PIPE.format(show=show)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, 'PYTHONUNBUFFERED': ''},  # 'second' has to wait in the buffer
    ) as process:
        assert process.stdout.readline() == b'first\n'
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b''
        assert process.wait() == 141


def test_a_missing_platform_is_an_error_of_one_line():
    command = [sys.executable, '-m', 'cllm_jax.decode', '--prompts', 'a']
    environment = {**os.environ, 'JAX_PLATFORMS': 'banana'}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert "JAX_PLATFORMS='banana'" in done.stderr and 'set JAX_PLATFORMS=cpu' in done.stderr
