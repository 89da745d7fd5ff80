"""Settings of a command: precedence, refusals, and help."""

from dataclasses import dataclass
from functools import partial

import pytest

from cllm_jax.cli.settings import Flags, parse
from cllm_jax.errors import ConfigError
from tests.tiny_settings import Optimizer, Training, write_recipe


def read(argv):
    return parse(Training, stage='target', description='Trains a model.', argv=argv)


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and returns the path as text."""
    return partial(write_recipe, tmp_path)


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
        return parse(Rooted, description='x', stage='target', argv=argv)[0].root

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


def test_a_stage_that_the_recipe_lacks_is_refused(recipe):
    path = recipe('collect: {}')
    with pytest.raises(ConfigError, match=r"no stage 'target' \(it has collect\); add 'target: "):
        read(['--config', path])


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
        '--stage {target,cllm,refine,draft,medusa,medusa2,redrafter,eagle,space}',
        '--plan',
        '--debug',
    ):
        assert part in text
    assert 'A reason for the reader' not in text
