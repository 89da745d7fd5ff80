"""Settings: precedence, every refusal, the plain form, and how a command ends."""

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from cllm_jax.cli.settings import Flags, from_mapping, guard, parse, read_recipe, to_json
from cllm_jax.errors import CllmError, ConfigError, DataError, Interrupted, NumericalError


@dataclass(frozen=True)
class Optimizer:
    """How the weights move."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of both moments."""

    def __post_init__(self):
        if self.learning_rate < 0:
            raise ConfigError(f'learning_rate is {self.learning_rate}; it must not be negative')


@dataclass(frozen=True)
class Training:
    """One training stage."""

    steps: int = 10
    """Number of updates."""
    loss: Literal['global', 'local'] = 'global'
    """Which consistency loss."""
    resume: bool = True
    """Continue from the last checkpoint."""
    name: str = 'run'
    """Name of the run."""
    model: str | None = None
    """Model directory."""
    data: str = 'data.jsonl'
    """Training data."""
    blocks: tuple[int, ...] = (16,)
    """Block sizes."""
    width: Literal[1, 2] = 2
    """A choice of numbers."""
    limit: int | Literal['all'] = 'all'
    """How many examples."""
    # A reason for the reader of the code.
    seed: int = 0
    """Seed of the shuffle."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """What moves the weights."""


def read(argv, stages=('target', 'cllm')):
    return parse(
        Training,
        program='python -m cllm_jax.train',
        description='Trains a model.',
        stage='target',
        stages=stages,
        argv=argv,
    )


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and returns the path as text."""

    def write(text):
        path = tmp_path / 'recipe.yaml'
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_command_line_beats_recipe_beats_defaults(recipe):
    path = recipe(
        'description: both stages\n'
        'target: {steps: 20, name: recipe, optimizer: {learning_rate: 2.0e-3}}\n'
        'cllm: {steps: 30}\n'
    )
    config, flags = read(['--config', path, '--name', 'line', '--optimizer.betas', '0.5', '0.6'])
    assert config == Training(
        steps=20, name='line', optimizer=Optimizer(learning_rate=2e-3, betas=(0.5, 0.6))
    )
    assert flags == Flags(config=path, stage='target', plan=False, debug=False)
    config, flags = read([f'--config={path}', '--stage', 'cllm', '--plan', '--debug'])
    assert config == Training(steps=30)
    assert flags == Flags(config=path, stage='cllm', plan=True, debug=True)
    assert read([]) == (Training(), Flags(None, 'target', False, False))


def test_a_recipe_names_the_directory_of_its_runs(recipe):
    @dataclass(frozen=True)
    class Rooted:
        root: str = 'runs/other'

    def root(*argv):
        return parse(Rooted, program='x', description='x', stage='target', argv=argv)[0].root

    assert root() == 'runs/other'
    path = recipe('target: {}\n')
    assert root('--config', path) == 'runs/recipe'
    assert root('--config', path, '--root', 'here') == 'here'
    assert root('--config', recipe('target: {root: there}\n')) == 'there'


def test_every_kind_of_field_reads_from_yaml_and_from_the_line(recipe):
    path = recipe(
        'target:\n  loss: local\n  resume: false\n  model: some/dir\n  data: a/b.jsonl\n'
        '  blocks: [4, 8, 16]\n  limit: 5\n  optimizer: {learning_rate: 1}\n'
    )
    expected = Training(
        loss='local',
        resume=False,
        model='some/dir',
        data='a/b.jsonl',
        blocks=(4, 8, 16),
        limit=5,
        optimizer=Optimizer(learning_rate=1.0),
    )
    config, _ = read(['--config', path])
    assert config == expected
    assert type(config.optimizer.learning_rate) is float
    line = '--loss local --no-resume --model some/dir --data a/b.jsonl --blocks 4 8 16 --limit 5'
    assert read([*line.split(), '--optimizer.learning-rate', '1'])[0] == expected
    back, _ = read(['--config', path, '--resume', '--model', 'None', '--limit', 'all'])
    assert (back.resume, back.model, back.limit) == (True, None, 'all')
    assert read(['--config', recipe('target:\n')])[0] == Training()


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('target: {stpes: 3}', "no setting 'stpes'; did you mean 'steps'?"),
        ('target: {optimizer: {beta: [1, 2]}}', "target.optimizer: no setting 'beta'; did you"),
        ('target: {zzz: 3}', "no setting 'zzz'; there are steps, loss, resume"),
        ('targte: {}', "no stage 'targte'; did you mean 'target'?"),
        ('collect: {}', "no stage 'target' (it has collect); add 'target: {}'"),
        ('target: {steps: "8"}', "target.steps is '8'; it must be a whole number; write 8 without"),
        ('target: {steps: true}', 'target.steps is true; it must be a whole number'),
        ('target: {steps: 8.0}', 'target.steps is 8.0; it must be a whole number'),
        ('target: {steps: [1]}', 'target.steps is [1]; it must be a whole number'),
        ('target: {steps: null}', 'target.steps is null; it must be a whole number; leave the'),
        ('target: {resume: 1}', 'target.resume is 1; it must be true or false'),
        ('target: {resume: "true"}', "target.resume is 'true'; it must be true or false; write"),
        ('target: {name: 12}', 'target.name is 12; it must be text; put it in quotes'),
        ('target: {name: yes}', 'target.name is true; it must be text; put it in quotes'),
        ('target: {model: 3}', 'target.model is 3; it must be text'),
        ('target: {data: 3}', 'target.data is 3; it must be text'),
        ('target: {loss: locla}', "target.loss: no choice 'locla'; did you mean 'local'?"),
        ('target: {width: true}', 'target.width: no choice True; there are 1, 2'),
        ('target: {limit: some}', "target.limit: no choice 'some'; there are all"),
        ('target: {blocks: 4}', 'target.blocks is 4; it must be a list'),
        ('target: {blocks: [4, x]}', "target.blocks[1] is 'x'; it must be a whole number"),
        ('target: {optimizer: {betas: [1]}}', 'optimizer.betas has 1 entries; it must have 2'),
        ('target: {optimizer: 3}', 'target.optimizer is 3; it must map settings to values'),
        ('target: {optimizer: {learning_rate: 1e-4}}', "'1e-4'; it must be a number; YAML wants"),
        ('target: {optimizer: {learning_rate: 1e-4}}', 'write 1.0e-4'),
        ('target: {optimizer: {learning_rate: 1.5E3}}', 'write 1.5e+3'),
        ('target: {optimizer: {learning_rate: -1}}', 'learning_rate is -1.0; it must not be neg'),
        ('target: {optimizer: {learning_rate: .nan}}', 'learning_rate is nan; a setting must be'),
        ('target: {optimizer: {betas: [.inf, 1]}}', 'betas is inf; a setting must be a finite'),
        ('target: [1]', "target is [1]; a stage maps settings to values, such as 'target: {"),
        ('description: 3', 'description is 3; it must be text'),
        ('', 'holds null; a recipe maps stage names to settings'),
        ('just words', "holds 'just words'; a recipe maps"),
        ('target:\n  steps: 3\n  steps: 4\n', "line 3: the key 'steps' appears twice"),
        ('target: {}\ncollect: {}\ntarget: {}\n', "line 3: the key 'target' appears twice"),
        ('target: {3: 4}', 'line 1: the key 3 is not text'),
        ('target: {[1]: 4}', 'line 1: the key [1] is not text'),
        ('target: &a {steps: 3}\ncllm: *a\n', 'line 2: an alias; write the value out'),
        ('target: {}\n  steps: 3\n', 'line 2: '),
        ('target: !!python/object/apply:os.getcwd []', 'line 1: could not determine'),
        ('target: {name: 2024-99-99}', 'not a YAML text (month must be in'),
        (b'target: {name: \xff}', 'not a YAML text'),
        ('target: ' + '[' * 5000, 'not a YAML text'),
        ('#' * 1_000_001, 'larger than 1000000 bytes'),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line(recipe, text, said):
    path = recipe(text)
    with pytest.raises(ConfigError) as caught:
        read(['--config', path])
    message = str(caught.value)
    assert said in message
    assert '\n' not in message
    assert caught.value.exit_code == 2
    if 'finite' not in message:
        assert message.startswith(path)


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r'absent\.yaml: No such file or directory; --config'):
        read(['--config', str(tmp_path / 'absent.yaml')])
    with pytest.raises(ConfigError, match='Is a directory; --config takes a YAML recipe'):
        read(['--config', str(tmp_path)])


def test_read_recipe_returns_every_stage_unchecked(recipe):
    assert read_recipe(recipe('description: x\ntarget:\ncollect: {any: [1]}\n')) == {
        'target': {},
        'collect': {'any': [1]},
    }


@pytest.mark.parametrize(
    ('line', 'said'),
    [
        ('--stpes 3', '--steps INT'),
        ('--optimizer.beta 3', '--optimizer.betas FLOAT FLOAT'),
        ('--steps x', 'Error parsing --steps'),
        ('--steps 8.0', 'Error parsing --steps'),
        ('--loss locla', "invalid choice 'locla'"),
        ('--config', "Missing value for argument '--config'"),
        ('--config --plan', "Missing value for argument '--config'"),
        ('--stage', "Missing value for argument '--stage'"),
        ('--conf a', '--config'),
        ('stray', 'Unrecognized options: stray'),
    ],
)
def test_a_bad_command_line_exits_with_2_and_names_the_option(capsys, line, said):
    with pytest.raises(SystemExit) as caught:
        read(line.split())
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ('line', 'said'),
    [
        (
            '--stage clm',
            "--stage: python -m cllm_jax.train has no stage 'clm'; did you mean 'cllm'?",
        ),
        ('--stage collect', 'there are target, cllm'),
        ('--optimizer.learning-rate nan', 'learning_rate is nan; a setting must be a finite'),
        ('--optimizer.learning-rate -1', 'learning_rate is -1.0; it must not be negative'),
    ],
)
def test_a_bad_value_on_the_command_line_is_a_config_error(line, said):
    with pytest.raises(ConfigError) as caught:
        read(line.split())
    assert said in str(caught.value)


def test_help_shows_docstrings_defaults_and_common_flags(recipe, capsys):
    with pytest.raises(SystemExit) as caught:
        read(['--config', recipe('target: {steps: 77}'), '--help'])
    assert caught.value.code == 0
    text = ' '.join(capsys.readouterr().out.split())
    for part in (
        'Trains a model.',
        'Number of updates. (default: 77)',
        'Seed of the shuffle.',
        'What moves the weights.',
        'Peak learning rate.',
        '--optimizer.betas',
        '--config FILE',
        '--stage {target,cllm}',
        '--plan',
        '--debug',
    ):
        assert part in text
    assert 'A reason for the reader' not in text


def test_plain_form_survives_json():
    config = Training(model='m', data='x/y', blocks=(1, 2), limit=3)
    plain = json.loads(json.dumps(to_json(config)))
    assert plain['blocks'] == [1, 2]
    assert plain['data'] == 'x/y'
    assert plain['optimizer'] == {'learning_rate': 0.001, 'betas': [0.9, 0.95]}
    assert from_mapping(Training, plain, 'config.json') == config


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


def test_an_interrupt_that_a_callback_swallows_comes_again(capsys, monkeypatch):
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
from cllm_jax.cli.settings import guard

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
