"""The table of stages: it agrees with itself, with the recipes and with the launch scripts."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from cllm_jax.errors import ConfigError
from cllm_jax.runs import stages
from cllm_jax.runs.recipe import read_recipe
from cllm_jax.runs.run_dir import append_metrics
from cllm_jax.runs.stages import (
    STAGES,
    exported_run,
    model_of,
    output_of,
    pair_of,
    pipeline,
    tokenizer_of,
    trajectories_of,
)

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / 'configs').glob('*.yaml'))


def test_what_a_stage_reads_is_written_by_an_earlier_one():
    known = set()
    for name, stage in STAGES.items():
        assert stage.reads <= known, name
        assert find_spec(f'cllm_jax.{stage.command}')
        assert bool(stage.objective) == (stage.command == 'train')
        assert not stage.trajectories or STAGES[stage.trajectories].command == 'collect'
        assert not stage.exported_as or stage.exported_as in known
        known.add(name)
    written = [stage.writes for stage in STAGES.values() if stage.writes]
    assert len(written) == len(set(written))
    for name in ('target', 'cllm'):
        assert (ROOT / 'cllm_jax/embedded' / name).is_dir() and STAGES[name].embedded


@pytest.mark.parametrize('config', CONFIGS, ids=lambda path: path.name)
def test_a_recipe_has_every_stage_that_its_pipeline_runs(config):
    recipe = read_recipe(config)
    assert recipe.keys() <= STAGES.keys()
    assert {stage for _, stage in pipeline(recipe)} <= recipe.keys()


def test_the_pipeline_is_refined_if_the_recipe_says_so():
    plain = ['target', 'collect', 'cllm', 'export', 'evaluate']
    assert [stage for _, stage in pipeline(['target', 'medusa'])] == plain
    refined = [*plain[:3], 'recollect', 'refine', *plain[3:]]
    assert pipeline(['refine']) == [(STAGES[stage].command, stage) for stage in refined]


@pytest.mark.parametrize('refined', [False, True])
def test_hosts_of_a_job_run_the_same_steps_up_to_the_export(tmp_path, refined):
    """launch/host.sh cannot ask: it is also run where only the cloud's own tools are installed."""
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('refine: {}\n' if refined else 'cllm: {}\n')
    command = ['bash', 'launch/host.sh', str(recipe), '--root', 'r', '--dry-run']
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    words = [line.split('cllm_jax.')[1].split() for line in done.stdout.splitlines()]
    steps = pipeline(read_recipe(recipe))[:-2]
    assert [(line[0], (line[line.index('r') + 2 :] or line[:1])[0]) for line in words] == steps


def test_the_command_prints_steps_or_one_line_of_error(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    command = [sys.executable, '-m', 'cllm_jax.runs', str(recipe)]

    def run():
        return subprocess.run(command, capture_output=True, text=True)

    recipe.write_text('target: {}\n')
    steps = 'train --stage target\ncollect\ntrain --stage cllm\nexport\nevaluate\n'
    assert (run().stdout, run().stderr) == (steps, '')
    recipe.write_text('targte: {}\n')
    done = run()
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert done.stderr.startswith(f"error: {recipe}: no stage 'targte'; did you mean 'target'?")


def test_names_that_are_given_count_and_others_are_below_root():
    assert model_of('cllm', 'r', 'mine') == tokenizer_of('draft', 'r', 'mine') == 'mine'
    assert trajectories_of('cllm', 'r', 'mine') == 'mine'
    assert model_of('target', 'r') == model_of('draft', 'r') == 'embedded-target'
    assert tokenizer_of('target', 'r') == ''
    assert trajectories_of('medusa', 'r') == output_of('collect', 'r') == 'r/trajectories'
    assert trajectories_of('refine', 'r') == output_of('recollect', 'r') == 'r/retrajectories'
    assert pair_of('r', 'mine', 'yours') == ('mine', 'yours')
    assert pair_of('runs/embedded/', '', 'yours')[1] == 'yours'
    with pytest.raises(ConfigError, match='r/export/target: no such directory; train and export'):
        pair_of('r', 'mine', '')
    with pytest.raises(ConfigError, match='r/medusa: no such directory; run that stage first'):
        exported_run('medusa', 'r')


def test_a_stage_takes_the_model_of_a_run_that_has_one(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, 'EMBEDDED_ROOT', f'{tmp_path}/embedded')
    for root in ('embedded', 'other'):
        run = tmp_path / root / 'target'

        def named(root=tmp_path / root):
            return model_of('collect', str(root))

        for _ in range(2):  # not there, and nothing in it but a lock
            if root == 'embedded':
                assert named() == 'embedded-target'
            else:
                with pytest.raises(ConfigError, match='other/target: has no model; run that stage'):
                    named()
            run.mkdir(parents=True, exist_ok=True)
            (run / 'lock').touch()
        append_metrics(run / 'metrics.jsonl', {'step': 20})
        with pytest.raises(ConfigError, match='target: has no model yet; run that stage to its'):
            named()
        (run / 'model').mkdir()
        assert named() == str(run)
