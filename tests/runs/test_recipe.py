"""Recipes: what is read, every refusal, and the way to plain data and back."""

import json
from dataclasses import dataclass
from functools import partial

import pytest

from cllm_jax.errors import ConfigError
from cllm_jax.runs.recipe import from_mapping, read_recipe, to_json
from tests.tiny_settings import Optimizer, Training, write_recipe


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and returns the path as text."""
    return partial(write_recipe, tmp_path)


def read(path: str) -> Training:
    """The settings of its first stage."""
    stage, settings = next(iter(read_recipe(path).items()))
    return from_mapping(Training, settings, f'{path}: {stage}')


@pytest.mark.parametrize(
    ('text', 'said'),
    [
        ('target: {stpes: 3}', "no setting 'stpes'; did you mean 'steps'?"),
        ('target: {optimizer: {beta: [1, 2]}}', "target.optimizer: no setting 'beta'; did you"),
        ('target: {zzz: 3}', "no setting 'zzz'; there are steps, loss, resume"),
        ('targte: {}', "no stage 'targte'; did you mean 'target'?"),
        ('target: {steps: "8"}', "target.steps is '8'; it should be a valid integer; write 8 w"),
        ('target: {steps: true}', 'target.steps is true; it should be a valid integer'),
        ('target: {steps: 8.0}', 'target.steps is 8.0; it should be a valid integer'),
        ('target: {steps: [1]}', 'target.steps is [1]; it should be a valid integer'),
        ('target: {steps: null}', 'target.steps is null; it should be a valid integer; leave the'),
        ('target: {resume: 1}', 'target.resume is 1; it should be a valid boolean'),
        ('target: {resume: "true"}', "target.resume is 'true'; it should be a valid boolean; wri"),
        ('target: {name: 12}', 'target.name is 12; it should be a valid string; put it in quotes'),
        ('target: {name: yes}', 'target.name is true; it should be a valid string; put it in'),
        ('target: {model: 3}', 'target.model is 3; it should be a valid string'),
        ('target: {data: 3}', 'target.data is 3; it should be a valid string'),
        ('target: {loss: locla}', "target.loss is 'locla'; it should be 'global' or 'local'"),
        ('target: {width: 3}', 'target.width is 3; it should be 1 or 2'),
        ('target: {limit: some}', "is 'some'; it should be a valid integer or it should be 'all'"),
        ('target: {blocks: 4}', 'target.blocks is 4; it should be a valid list'),
        ('target: {blocks: [4, x]}', "target.blocks[1] is 'x'; it should be a valid integer"),
        ('target: {optimizer: {betas: [1]}}', 'optimizer.betas[1] is missing; '),
        ('target: {optimizer: {betas: [1, 2, 3]}}', 'should have at most 2 items'),
        ('target: {optimizer: {betas: [1, 1e-4]}}', "betas[1] is '1e-4'; it should be a valid"),
        ('target: {optimizer: {betas: [1, 1e-4]}}', 'write 1.0e-4'),
        ('target: {name: 2024-01-01}', 'it should be a valid string; put it in quotes'),
        ('target: {optimizer: 3}', 'target.optimizer is 3; it must map settings to values'),
        ('target: {optimizer: {learning_rate: 1e-4}}', 'it should be a valid number; YAML wants'),
        ('target: {optimizer: {learning_rate: 1e-4}}', 'write 1.0e-4'),
        ('target: {optimizer: {learning_rate: 1.5E3}}', 'write 1.5e+3'),
        ('target: {optimizer: {learning_rate: -1}}', 'learning_rate is -1.0; it must not be neg'),
        ('target: {optimizer: {learning_rate: .nan}}', 'rate is nan; it should be a finite'),
        ('target: {optimizer: {betas: [.inf, 1]}}', 'betas[0] is inf; it should be a finite'),
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
        read(path)
    message = str(caught.value)
    assert said in message
    assert '\n' not in message
    assert caught.value.exit_code == 2
    assert message.startswith(path)


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r'absent\.yaml: No such file or directory; --config'):
        read_recipe(tmp_path / 'absent.yaml')
    with pytest.raises(ConfigError, match='Is a directory; --config takes a YAML recipe'):
        read_recipe(tmp_path)


def test_read_recipe_returns_every_stage_unchecked(recipe):
    assert read_recipe(recipe('description: x\ntarget:\ncollect: {any: [1]}\n')) == {
        'target': {},
        'collect': {'any': [1]},
    }


@dataclass(frozen=True)
class Drafter:
    """What a file and its reader describe together."""

    sampling: Optimizer
    depth: int


def test_fields_that_are_given_are_not_read():
    given = {'sampling': Optimizer()}
    assert from_mapping(Drafter, {'depth': 3}, 'x', given) == Drafter(Optimizer(), 3)
    with pytest.raises(ConfigError, match="x: no setting 'sampling'; there are depth"):
        from_mapping(Drafter, {'sampling': {}}, 'x', given)


def test_plain_form_survives_json():
    config = Training(model='m', data='x/y', blocks=(1, 2), limit=3)
    plain = json.loads(json.dumps(to_json(config)))
    assert plain['blocks'] == [1, 2]
    assert plain['data'] == 'x/y'
    assert plain['optimizer'] == {'learning_rate': 0.001, 'betas': [0.9, 0.95]}
    assert from_mapping(Training, plain, 'config.json') == config


def test_numbers_that_json_cannot_hold_are_refused():
    for wrong in (Training(optimizer=Optimizer(betas=(0.5, float('inf')))), (1.0, float('nan'))):
        with pytest.raises(ConfigError, match='a setting must be a finite number'):
            to_json(wrong)
