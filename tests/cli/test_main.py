"""`cllm COMMAND`: the same commands under one name."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from cllm_jax.cli.main import COMMANDS, SHELLS, main
from cllm_jax.runs.stages import STAGES

HEAVY = ('transformers', 'orbax', 'tensorflow_datasets', 'grain', 'torch')
HEAVY += ('matplotlib', 'tensorboard', 'wandb')


def call(monkeypatch, *arguments: str) -> int:
    """The exit code of `cllm ARGUMENTS`."""
    monkeypatch.setattr(sys, 'argv', ['/usr/bin/cllm', *arguments])
    try:
        main()
    except SystemExit as done:
        return int(done.code or 0)
    return 0


def test_every_command_is_there():
    assert sorted(COMMANDS) == sorted({stage.command for stage in STAGES.values()})
    settings = tomllib.loads((Path(__file__).parents[2] / 'pyproject.toml').read_text())
    module, function = settings['project']['scripts']['cllm'].split(':')
    assert getattr(import_module(module), function) is main


@pytest.mark.parametrize('arguments', [[], ['-h'], ['--help']])
def test_without_a_command_the_usage_names_all(arguments, monkeypatch, capsys):
    assert call(monkeypatch, *arguments) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert set(COMMANDS) <= {words[0] for words in lines if words}


def test_a_command_is_run_as_by_its_module_and_names_itself(monkeypatch, capsys):
    assert call(monkeypatch, 'decode', '--plan', '--limits', '3') == 2
    assert 'cllm decode' in capsys.readouterr().err
    assert call(monkeypatch, 'decode', '--plan', '--model', 'nowhere/at/all') == 2
    assert capsys.readouterr().err.startswith('error: ')
    assert call(monkeypatch, 'decode', '--plan') == 0
    assert 'parameters' in capsys.readouterr().out
    assert call(monkeypatch, '--version') == 0
    assert 'cllm 0' in capsys.readouterr().out


def test_what_is_no_command_or_shell_is_refused_in_one_line(monkeypatch, capsys):
    for arguments, told in (
        (['decoed'], "did you mean 'decode'"),
        (['completion'], 'name one shell'),
        (['completion', 'fish'], 'name one shell'),
    ):
        assert call(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert told in error and error.count('\n') == 1


@pytest.mark.parametrize('shell', SHELLS)
def test_a_shell_completes_commands_and_their_options(shell, monkeypatch, capsys):
    assert call(monkeypatch, 'completion', shell) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert all(option in script for option in ('invariance', 'max-tokens', 'plan'))


@pytest.mark.parametrize('name', COMMANDS)
def test_help_waits_for_no_heavy_package(name):
    code = f"""
import sys
from importlib import import_module
sys.argv = ['cllm {name}', '--help']
try:
    import_module('cllm_jax.{name}').main()
finally:
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == '[]'
    assert done.stdout.startswith(f'usage: cllm {name}')
