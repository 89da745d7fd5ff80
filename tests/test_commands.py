"""The commands, run as a user runs them: the whole pipeline tiny, plans, and polite refusals."""

import dataclasses
import hashlib
import io
import json
import shutil
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import cllm_jax
from cllm_jax import bench, collect, evaluate, export, train
from cllm_jax.cli.console import size
from cllm_jax.cli.guard import guard
from cllm_jax.drafters.checkpoint import drafter_arrays
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.evaluation.bandwidth import weight_bytes
from cllm_jax.hf.load import SHIPPED
from cllm_jax.hf.tokenizer import read_tokenizer, tokenizer_fingerprint, vocabulary_fingerprint
from cllm_jax.hf.write import write_model
from cllm_jax.runs.recipe import read_recipe
from cllm_jax.runs.run_dir import append_metrics, claim
from cllm_jax.runs.stages import STAGES, exported_run
from cllm_jax.runtime import backend
from cllm_jax.training.config import TrainConfig, architecture, quick, with_names
from cllm_jax.training.data import held_out_rows, inputs_of
from cllm_jax.training.held_out import HeldOut
from cllm_jax.training.objectives import checked
from cllm_jax.trajectories.clean import Cleaning
from cllm_jax.trajectories.store import open_manifest
from tests.evaluation.results import needs_matplotlib
from tests.gguf_files import GQA, tokenizer_facts, write_gguf
from tests.tiny import byte_tokenizer, chat_model, model_directory, random_model, text_config
from tests.tiny_model import model_of

api = cllm_jax.decode
decode = import_module('cllm_jax.decode')
cllm_jax.decode = api  # importing the command hides the function of that name; put it back

CONFIGS = Path(__file__).parents[1] / 'configs'
RECIPE = str(CONFIGS / 'embedded.yaml')


@pytest.fixture(autouse=True)
def mixed_dtypes():
    """optax itself relies on implicit promotion, which the tests otherwise forbid."""
    with jax.numpy_dtype_promotion('standard'):
        yield


def call(monkeypatch, module, *arguments: str) -> None:
    monkeypatch.setattr(sys, 'argv', [module.__name__, *map(str, arguments)])
    module.run()


@pytest.mark.slow
@needs_matplotlib
def test_the_pipeline_from_nothing_to_an_evaluated_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common = ('--config', RECIPE, '--root', '.', '--quick')  # relative, as in the README
    fast = ('--optimizer.kind', 'adamw')  # to compile
    call(monkeypatch, train, *common, *fast, '--stage', 'target')
    call(monkeypatch, collect, *common)
    call(monkeypatch, train, *common, *fast)
    call(monkeypatch, export, *common[:-1])
    call(monkeypatch, evaluate, *common, '--task', 'sql', '--json', tmp_path / 'result.json')
    assert not (tmp_path / 'evaluate.json').exists()  # --quick is no result of the run
    few = ('--limit', '1', '--timed', '1', '--repeats', '1', '--max-tokens', '4')
    call(monkeypatch, evaluate, *common[:-1], *few, '--task', 'sql', '--plots', 'plots')
    drawn = {path.name for path in Path('plots').iterdir()}
    assert {'speedup-sql.svg', 'training-target.svg', 'training-cllm.svg'} <= drawn
    assert json.loads((tmp_path / 'evaluate.json').read_text())['n'] == 1
    assert 'CLLM: export/cllm; target: export/target' in capsys.readouterr().out
    found = json.loads((tmp_path / 'result.json').read_text())
    wanted = {
        'task', 'n', 'quality', 'tokens_per_forward', 'speedup', 'tokens_per_second', 'identical',
        'block', 'device', 'versions', 'loop_free_tokens_per_forward', 'acceptance',
    }  # fmt: skip
    assert wanted <= found.keys()
    assert found['task'] == 'sql' and found['n'] == 4 and found['identical'] == 1
    assert {'target', 'cllm'} == found['tokens_per_forward'].keys() == found['exact_match'].keys()
    quality = found['quality']
    assert quality['cllm'] == quality['cllm_ar'] and quality['target'] == quality['target_jacobi']
    speed, single = found['tokens_per_second'], found['ar_tokens_per_second']
    assert single.keys() - {'in its class'} == {'mixed', 'float32', 'bfloat16'}
    assert speed['ar'] == max(single.values())
    assert found['speedup'] == speed['jacobi'] / speed['ar']
    for name in ('target', 'cllm'):
        assert 'held-out test' in (tmp_path / 'export' / name / 'README.md').read_text()

    answers = tmp_path / 'answers.jsonl'
    model = tmp_path / 'export' / 'cllm'
    call(
        monkeypatch, decode, '--model', model, '--prompts', 'a question', 'another', '--output',
        answers, '--max-tokens', '12',
    )  # fmt: skip
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [r['prompt'] for r in rows] == ['a question', 'another']
    for row in rows:
        assert (
            sum(row['accepted']) == len(row['tokens']) and len(row['accepted']) == row['forwards']
        )
        assert row['seconds'] > 0 and isinstance(row['text'], str)
    assert 'IDENTICAL' in capsys.readouterr().out


@pytest.mark.parametrize('config', sorted(p.name for p in CONFIGS.glob('*.yaml')))
def test_every_recipe_is_valid_and_has_every_stage(config, monkeypatch):
    from cllm_jax.cli.settings import parse
    from cllm_jax.collect import CollectConfig
    from cllm_jax.evaluate import EvaluateConfig
    from cllm_jax.export import ExportConfig

    classes = {name: TrainConfig for name, stage in STAGES.items() if stage.command == 'train'}
    classes |= dict.fromkeys(('collect', 'recollect'), CollectConfig)
    classes |= {'export': ExportConfig, 'evaluate': EvaluateConfig}
    stages = read_recipe(CONFIGS / config)
    assert {'target', 'collect', 'cllm', 'export', 'evaluate'} <= stages.keys()
    for stage in stages:
        kind = classes[stage]
        argv = ['--config', str(CONFIGS / config), '--stage', stage]
        found, _ = parse(kind, description='x', stage=stage, argv=argv)
        if kind is TrainConfig:
            assert found.dtype == 'float32', 'small updates would be lost'
            checked(found)
            tiny = checked(dataclasses.replace(found, quick=True))
            assert tiny.cleaning == Cleaning(repetitive=False, truncated=False)
            taken = quick(dataclasses.replace(found, steps=0))  # the model as it is
            assert taken.steps == 0 and tiny.steps == min(found.steps, 6)
            assert found.objective == STAGES[stage].objective
            assert found.model != 'new' or architecture(tiny).dim < architecture(found).dim


def test_plans_start_nothing(tmp_path, monkeypatch, capsys):
    call(monkeypatch, train, '--config', RECIPE, '--stage', 'target', '--root', tmp_path, '--plan')
    out = capsys.readouterr().out
    new = read_recipe(RECIPE)['target']['new']
    dim, layer = new['dim'], 4 * new['dim'] ** 2 + 3 * new['dim'] * new['mlp_dim'] + 2 * new['dim']
    parameters = new['vocab_size'] * dim + new['layers'] * layer + dim
    assert f'{parameters:,}' in out and 'steps' in out and 'learning_rate' in out
    assert not any(tmp_path.iterdir())


def test_the_plan_of_a_collection_in_mixed_precision_has_half_the_sizes(
    tmp_path, monkeypatch, capsys
):
    sizes = []
    for dtype in ('float32', 'mixed', 'bfloat16'):
        call(monkeypatch, collect, '--plan', '--dtype', dtype, '--model', 'embedded-target')
        lines = capsys.readouterr().out.splitlines()
        sizes.append([line for line in lines if 'weights' in line or 'KV cache' in line])
    assert sizes[0] != sizes[1] == sizes[2] and len(sizes[0]) == 2


@pytest.mark.parametrize('name', ['decode', 'collect'])
def test_plans_count_what_auto_stands_for(name, monkeypatch, capsys):
    mixed = dataclasses.replace(backend.CPU, default_dtype='mixed')
    monkeypatch.setattr('cllm_jax.hf.load.backend_of', lambda weights, sharing=1: mixed)
    command, shown = import_module(f'cllm_jax.{name}'), {}
    for dtype in ('auto', 'mixed', 'float32'):
        call(monkeypatch, command, '--plan', '--dtype', dtype, '--model', 'embedded-target')
        lines = capsys.readouterr().out.splitlines()
        shown[dtype] = [line for line in lines if 'weights' in line or 'KV cache' in line]
    assert shown['auto'] == shown['mixed'] != shown['float32']


def test_the_plan_of_decoding_counts_matrices_that_are_kept_twice(monkeypatch, capsys):
    """On one device with AMX, if they are bfloat16."""
    monkeypatch.setattr(backend, 'hardware', lambda: (backend.AMX, '0.10'))
    for dtype, tensor, twice in (('mixed', 1, True), ('float32', 1, False), ('mixed', 2, False)):
        command = import_module('cllm_jax.decode')
        call(monkeypatch, command, '--plan', '--dtype', dtype, '--tensor', tensor)
        assert ('matrices once more' in ' '.join(capsys.readouterr().out.split())) == twice


def test_the_plan_of_decoding_counts_all_models_that_will_be_there(monkeypatch, capsys):
    """A draft model, and AR in other precisions where it is compared with."""
    command, shown = import_module('cllm_jax.decode'), {}
    for line in ('', '--no-compare', '--drafter model:embedded-target', '--dtype float32'):
        call(monkeypatch, command, '--plan', '--dtype', 'mixed', *line.split())
        text = ' '.join(capsys.readouterr().out.split())
        shown[line] = ['AR in other precisions' in text, 'weights of the draft model' in text]
    assert list(shown.values()) == [[True, False], [False, False], [True, True], [False, False]]


def test_the_plan_of_space_counts_its_states(tmp_path, monkeypatch, capsys):
    facts = []
    lines = ('space --heads.ahead 3', 'consistency --held-out.block 4', 'spans --held-out.block 4')
    for line in (*lines, 'consistency --held-out.block 4 --loss.frozen-weight 1', 'ar'):
        common = ('--model', 'embedded-target', '--root', tmp_path, '--plan')
        call(monkeypatch, train, *common, '--objective', *line.split())
        lines = capsys.readouterr().out.splitlines()
        wanted = ('states per', 'activations', 'batch per', 'before training')
        facts.append([line for line in lines if any(word in line for word in wanted)])
    space, consistency, spans, frozen, ar = facts
    assert space == consistency == spans and len(space) == 3
    assert len(set(frozen) - set(space)) == 1 and set(space) < set(frozen)
    assert not set(space) & set(ar)


def test_a_run_without_held_out_tests_needs_no_held_out_rows(tmp_path, monkeypatch, capsys):
    (tmp_path / 'mine.csv').write_text('prompt,answer\nQ1:,one\nQ2:,two\n')
    base, data = model_directory(tmp_path / 'base'), tmp_path / 'mine.csv'
    common = ('--stage', 'target', '--model', base, '--data', data, '--max-length', '64')
    common += ('--steps', '0', '--batch', '8', '--root', tmp_path)
    with pytest.raises(DataError, match='with --task: another file'):
        call(monkeypatch, train, *common)
    for every, told in (('500', 1), ('0', 'none')):
        task = ('--held-out.every', every, '--task', 'sql', '--plan')
        call(monkeypatch, train, *common, *task)
        lines = [line for line in capsys.readouterr().out.splitlines() if 'held-out tests ' in line]
        assert lines[-1].split()[-1] == str(told)
    for again in ((), ('--on-collapse', 'warn')):  # which may change
        call(monkeypatch, train, *common, '--held-out.every', '0', *again)
    assert f'the last is in {tmp_path}/target/model' in capsys.readouterr().err
    call(monkeypatch, export, '--root', tmp_path, '--runs', 'target')
    told = (tmp_path / 'export/target/README.md').read_text()
    assert 'those of step 0, the last.' in told and '| held-out test' not in told
    assert not quick(TrainConfig(held_out=HeldOut(every=0))).held_out.every


def test_refinement_starts_from_the_cllm_and_is_exported_in_its_place(tmp_path):
    for run in ('target', 'cllm'):
        (tmp_path / run / 'model').mkdir(parents=True)
    settings = TrainConfig(root=str(tmp_path))
    for stage, model, data in (
        ('cllm', 'target', 'trajectories'),
        ('refine', 'cllm', 'retrajectories'),
    ):
        found = with_names(settings, stage)
        assert (found.model, found.data) == (f'{tmp_path}/{model}', f'{tmp_path}/{data}')
    for run in ('target', 'cllm'):
        assert exported_run(run, str(tmp_path)) == tmp_path / run
    (tmp_path / 'refine' / 'model').mkdir(parents=True)
    assert exported_run('cllm', str(tmp_path)) == tmp_path / 'refine'


def test_heads_are_exported_without_a_model(tmp_path, monkeypatch, capsys):
    shutil.copytree(SHIPPED / 'medusa', tmp_path / 'medusa' / 'drafter')
    common = ('--root', tmp_path, '--runs', 'medusa')
    weights = drafter_arrays(SHIPPED / 'medusa')
    call(monkeypatch, export, *common, '--plan')
    assert size(2 * sum(w.size for w in weights.values())) in capsys.readouterr().out
    call(monkeypatch, export, *common)
    written = drafter_arrays(tmp_path / 'export' / 'medusa')
    assert written.keys() == weights.keys()
    for name, array in written.items():
        assert array.dtype == 'bfloat16'
        np.testing.assert_array_equal(array, weights[name].astype(array.dtype))


def test_an_export_replaces_the_last_one_and_nothing_else(tmp_path, monkeypatch):
    """Of a run that gives a model with heads, and of heads alone over the run they came from."""
    joint = tmp_path / 'joint'
    model = random_model(config=text_config(layers=1), tokenizer=byte_tokenizer())
    write_model(joint / 'model', model)
    shutil.copytree(SHIPPED / 'medusa', joint / 'drafter')
    (joint / 'settings.json').write_text(json.dumps({'held_out': {'prompts': 1, 'seed': 0}}))
    (joint / 'metrics.jsonl').write_text('{"step": 1, "held_out_score": 1.0}\n')
    for _ in range(2):
        call(monkeypatch, export, '--root', tmp_path, '--runs', 'joint')
    out = tmp_path / 'export' / 'joint'
    assert (out / 'config.json').exists() and drafter_arrays(out / 'drafter')
    modes = {p.stat().st_mode for p in out.rglob('*') if p.is_file()}
    assert len(modes) == 1, 'as readable as any other file'
    shutil.rmtree(joint / 'model')
    with pytest.raises(DataError, match=r'holds .* would be lost'):
        call(monkeypatch, export, '--root', tmp_path, '--runs', 'joint', '--out', tmp_path)
    assert (joint / 'metrics.jsonl').exists() and drafter_arrays(joint / 'drafter')


def write_rows(path, word: str) -> None:
    rows = [{'prompt': f'{word} {i}', 'answer': f'{i}'} for i in range(40)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def test_a_resumed_run_has_the_data_and_the_tokenizer_that_it_began_with(tmp_path, monkeypatch):
    data, run = tmp_path / 'rows.jsonl', tmp_path / 'target'
    arguments = [
        '--stage', 'target', '--root', tmp_path, '--objective', 'ar', '--model', 'new', '--data',
        f'{data}#all', '--task', 'sql', '--steps', 1, '--batch', 8, '--new.vocab-size', 260,
        '--new.dim', 8, '--new.layers', 1, '--new.mlp-dim', 8, '--held-out.prompts', 1,
        '--held-out.max-tokens', 2, '--held-out.block', 2,
    ]  # fmt: skip
    write_rows(data, 'none of these')
    with pytest.raises(DataError, match='no training sample is left'):
        call(monkeypatch, train, *arguments, '--max-length', 3)
    claimed_nothing = (run / 'tokenizer/tokenizer.json').read_bytes()
    write_rows(data, 'question')
    call(monkeypatch, train, *arguments)
    tokenizer = (run / 'tokenizer/tokenizer.json').read_bytes()
    assert tokenizer != claimed_nothing
    assert (run / 'model/tokenizer.json').read_bytes() == tokenizer
    write_rows(data, 'another')
    with pytest.raises(ConfigError, match=r'begun with samples = .* sha256 .*put back'):
        call(monkeypatch, train, *arguments)
    write_rows(data, 'question')
    inputs = json.loads((run / 'inputs.json').read_text())
    of_run = read_tokenizer(run / 'tokenizer')
    assert inputs['tokenizer'] == tokenizer_fingerprint(of_run)[:16]
    older = vocabulary_fingerprint(of_run)[:16]  # as a run of an older version
    for noted, goes_on in ((older, True), (older[::-1], False)):
        (run / 'inputs.json').write_text(json.dumps(inputs | {'tokenizer': noted}))
        if goes_on:
            call(monkeypatch, train, *arguments)
        else:
            with pytest.raises(ConfigError, match=r'begun with tokenizer = .*put back'):
                call(monkeypatch, train, *arguments)
    write_rows(data, 'another')
    (run / 'inputs.json').unlink()  # as a run of a still older version
    call(monkeypatch, train, *arguments)
    assert (run / 'tokenizer/tokenizer.json').read_bytes() == tokenizer
    write_rows(data, 'question')
    with pytest.raises(ConfigError, match='begun with samples'):
        call(monkeypatch, train, *arguments)


def test_a_gguf_file_is_a_target(tmp_path, monkeypatch):
    """It is planned, taken as it is, and known again; the run has its tokenizer."""
    facts = tokenizer_facts('smollm')
    config = dataclasses.replace(GQA, vocab_size=len(facts['tokenizer.ggml.tokens']))
    path = write_gguf(tmp_path / 'm.gguf', model_of(config), **facts)
    data = tmp_path / 'prompts.jsonl'
    data.write_text(''.join(json.dumps({'prompt': f'the city {i}'}) + '\n' for i in range(40)))
    arguments = [
        '--stage', 'target', '--root', tmp_path, '--model', path, '--data', f'{data}#all',
        '--steps', 0, '--held-out.prompts', 1, '--held-out.max-tokens', 2, '--max-length', 32,
    ]  # fmt: skip
    call(monkeypatch, train, *arguments, '--plan')
    call(monkeypatch, train, *arguments)
    given, kept = (cllm_jax.load(str(place), 'float32') for place in (path, tmp_path / 'target'))
    assert kept.config == given.config
    jax.tree.map(np.testing.assert_array_equal, kept.params, given.params)
    assert tokenizer_fingerprint(kept.tokenizer) == tokenizer_fingerprint(given.tokenizer)
    noted = json.loads((tmp_path / 'target/inputs.json').read_text())
    assert noted['model_files'] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    call(monkeypatch, train, *arguments)
    write_gguf(path, model_of(config, seed=1), **facts)
    with pytest.raises(ConfigError, match='model_files'):
        call(monkeypatch, train, *arguments)


def test_a_model_is_taken_as_it_is_without_answers_to_learn(tmp_path, monkeypatch):
    data = tmp_path / 'prompts.jsonl'
    data.write_text(''.join(json.dumps({'prompt': f'question {i}'}) + '\n' for i in range(40)))
    model = model_directory(tmp_path / 'model')
    arguments = [
        '--stage', 'target', '--root', tmp_path, '--model', model, '--data', f'{data}#all',
        '--steps', 0, '--held-out.prompts', 1, '--held-out.max-tokens', 2, '--max-length', 32,
    ]  # fmt: skip
    call(monkeypatch, train, *arguments)
    kept, given = (cllm_jax.load(place).params for place in (str(tmp_path / 'target'), model))
    jax.tree.map(np.testing.assert_array_equal, kept, given)


def test_a_quick_batch_can_be_divided_among_the_devices(monkeypatch):
    for devices, batch in ((1, 8), (6, 12), (8, 8), (12, 12), (16, 16)):
        monkeypatch.setattr(jax, 'device_count', lambda count=devices: count)
        assert quick(TrainConfig()).batch == batch


@pytest.mark.parametrize('sums', [False, True])
def test_a_resumed_run_has_the_model_that_it_began_with(tmp_path, sums):
    config, tokenizer = text_config(layers=1), byte_tokenizer()
    place, settings = tmp_path / 'target', TrainConfig(objective='ar', root=str(tmp_path))
    settings = dataclasses.replace(settings, model=f'{tmp_path}/target')

    append_metrics(tmp_path / 'metrics.jsonl', {'step': 1})

    def begin(seed: int, layers: int) -> None:
        model = random_model(seed, dataclasses.replace(config, layers=layers), tokenizer)
        write_model(place, model, sums=sums)
        claim(tmp_path, {}, inputs_of(settings, model, [], tmp_path))

    begin(0, 1)
    begin(0, 1)
    for seed, layers in ((1, 1), (0, 2)):
        if sums or layers == 2:
            with pytest.raises(ConfigError, match='begun with model_files'):
                begin(seed, layers)
    settings = dataclasses.replace(settings, model='embedded-target')
    with pytest.raises(ConfigError, match="begun with model = 'ROOT/target', now 'embedded-target"):
        begin(0, 1)


def test_a_resumed_collection_has_the_rows_that_it_began_with(tmp_path, monkeypatch):
    data, model = tmp_path / 'rows.jsonl', model_directory(tmp_path / 'tiny')
    arguments = [
        '--model', model, '--data', f'{data}#all', '--out', tmp_path / 'out', '--block', 2,
        '--max-tokens', 2,
    ]  # fmt: skip
    write_rows(data, 'question')
    for _ in range(2):
        call(monkeypatch, collect, *arguments)
    write_rows(data, 'another')
    with pytest.raises(ConfigError, match=r'begun with prompts = .* sha256'):
        call(monkeypatch, collect, *arguments)
    (tmp_path / 'out/inputs.json').unlink()  # as a collection of an older version
    call(monkeypatch, collect, *arguments)


def test_a_resumed_collection_has_the_precision_that_it_began_with(tmp_path, monkeypatch):
    """Where none is asked for: what suits a machine may be another one on the next."""
    model = model_directory(tmp_path / 'tiny')
    write_rows(tmp_path / 'rows.jsonl', 'question')
    arguments = [
        '--model', model, '--data', f'{tmp_path}/rows.jsonl#all', '--out', tmp_path / 'out',
        '--block', 2, '--max-tokens', 2,
    ]  # fmt: skip
    for dtype in ('float32', 'mixed'):
        suits = dataclasses.replace(backend.CPU, default_dtype=dtype)
        found = partial(lambda suits, weights, sharing=1: suits, suits)
        monkeypatch.setattr('cllm_jax.hf.load.backend_of', found)
        call(monkeypatch, collect, *arguments)
    assert json.loads((tmp_path / 'out/inputs.json').read_text())['dtype'] == 'float32'
    with pytest.raises(ConfigError, match='begun with model'):
        call(monkeypatch, collect, *arguments, '--dtype', 'mixed')


def test_a_collection_of_an_older_version_goes_on(tmp_path, monkeypatch):
    """It noted the vocabulary of its tokenizer, and goes on with that and no other."""
    data, model = tmp_path / 'rows.jsonl', model_directory(tmp_path / 'tiny')
    write_rows(data, 'question')
    arguments = [
        '--model', model, '--data', f'{data}#all', '--out', tmp_path / 'out', '--block', 2,
        '--max-tokens', 2,
    ]  # fmt: skip
    call(monkeypatch, collect, *arguments)
    now = tokenizer_fingerprint(byte_tokenizer())

    def note(fingerprint: str) -> None:
        for name in ('settings', 'manifest'):
            path = tmp_path / f'out/{name}.json'
            assert path.read_text().count(now) == 1
            path.write_text(path.read_text().replace(now, fingerprint))

    note(older := vocabulary_fingerprint(byte_tokenizer()))
    for _ in range(2):
        call(monkeypatch, collect, *arguments)
    now = older
    note(older[::-1])
    with pytest.raises(ConfigError, match=r'begun with tokenizer = .* use the old settings'):
        call(monkeypatch, collect, *arguments)


@pytest.mark.parametrize(
    ('module', 'arguments', 'code', 'words'),
    [
        (decode, ['--model', '/no/such/model'], 2, 'no such directory'),
        (decode, ['--prompts', 'a', '--input', 'b.jsonl'], 2, 'give one of them'),
        (decode, ['--tensor', '9', '--prompts', 'a'], 2, 'tensor 9: must be 1 to 8'),
        (train, ['--devices', '8', '--root', 'ROOT'], 2, 'add --plan'),
        (train, ['--root', 'ROOT', '--plan'], 2, '/target: has no model; run that stage'),
        (train, ['--root', 'ROOT', '--stage', 'refine'], 2, '/cllm: has no model'),
        (collect, ['--root', 'ROOT', '--plan'], 2, '/target: has no model'),
        (collect, ['--root', 'ROOT', '--stage', 'recollect'], 2, '/cllm: has no model'),
        (decode, ['--block', '0', '--prompts', 'a'], 2, 'block 0'),
        (decode, ['--drafter', 'jakobi', '--prompts', 'a'], 2, "did you mean 'jacobi'"),
        (decode, ['--drafter', 'model', '--prompts', 'a'], 2, 'write model:DIR'),
        (decode, ['--drafter', 'ar:x', '--prompts', 'a'], 2, 'write ar'),
        (decode, ['--typical', '0.1', '--prompts', 'a'], 2, 'set a temperature'),
        (decode, ['--reference', 'a.txt', '--prompts', 'a'], 2, 'only lookup'),
        (decode, ['--reference', '/no.txt', '--drafter', 'lookup', '--prompts', 'a'], 3, '/no.txt'),
        (decode, ['--drafter', 'model:/no/such', '--prompts', 'a'], 2, 'no such directory'),
        (decode, ['--input', '/no/such.jsonl'], 3, '/no/such.jsonl'),
        (decode, ['--plan', '--max-tokens', '-3'], 2, 'max_tokens -3: must be at least 1'),
        (decode, ['--plan', '--batch', '0'], 2, 'batch 0: must be at least 1'),
        (decode, ['--plan', '--top-p', '2'], 2, 'top_p 2.0: must be in'),
        (decode, ['--plan', '--output', 'ROOT'], 2, 'is a directory; name a file'),
        (decode, ['--plan', '--output', 'ROOT/a', '--input', 'ROOT/./a'], 2, 'is read too'),
        (decode, ['--plan', '--output', 'a', '--stream', '--prompts', 'a'], 2, 'both stream and'),
        (decode, ['--watch', '--output', 'a', '--prompts', 'a'], 2, 'both watch and output'),
        (decode, ['--watch', '--stream', '--prompts', 'a'], 2, 'both watch and stream'),
        (decode, ['--watch', '--chat'], 2, 'both watch and chat without prompts'),
        (decode, ['--chat'], 2, 'embedded has no chat template; name an instruct model'),
        (decode, ['--chat', '--prompts', 'a'], 2, 'embedded has no chat template'),
        (decode, ['--system', 'a', '--prompts', 'a'], 2, "system 'a': is a message of a chat; add"),
        (decode, ['--chat', '--output', 'a'], 2, "output 'a': of a chat in the terminal; give"),
        (evaluate, ['--task', 'sqll'], 2, "did you mean 'sql'"),
        *(
            (evaluate, [f'--{name}', '0', '--plan'], 2, f'{name} 0: must be at least 1')
            for name in ('timed', 'repeats', 'limit', 'batch', 'tensor')
        ),
        (evaluate, ['--timed', '-1', '--plan'], 2, 'timed -1: must be at least 1'),
        (evaluate, ['--json', 'ROOT', '--plan'], 2, 'is a directory; name a file'),
        (evaluate, ['--json', f'{__file__}/x.json'], 2, 'cannot write below'),
        (bench, ['--json', 'ROOT', '--plan'], 2, 'is a directory; name a file'),
        (bench, ['--nodes', '--plan'], 2, 'nodes: no value is given'),
        (bench, ['--nodes', '1', '0', '--plan'], 2, 'nodes 0: must be at least 1'),
        (bench, ['--batches', '--plan'], 2, 'batches: no value is given'),
        (bench, ['--parts', '0', '--plan'], 2, 'parts 0: must be at least 1'),
        (bench, ['--repeats', '0', '--plan'], 2, 'repeats 0: must be at least 1'),
        (bench, ['--limit', '0', '--plan'], 2, 'limit 0: must be at least 1'),
        (bench, ['--blocks', '8', '99999', '--plan'], 2, 'block 99999: must be'),
        (bench, ['--tasks', 'sql', 'sqll', '--plan'], 2, "did you mean 'sql'"),
        (collect, ['--data', 'gsm8k:/no/file.jsonl'], 3, '/no/file.jsonl'),
        (train, ['--objective', 'ar', '--root', 'ROOT'], 2, 'without data'),
        (train, ['--loss.global-weight', '0', '--root', 'ROOT'], 2, 'use objective ar'),
        (train, ['--texts', 'sql', '--noise.pairs', '--root', 'ROOT'], 2, 'no successor'),
        (train, ['--loss.local-weight', '1', '--root', 'ROOT'], 2, 'add noise.pairs'),
        (train, ['--noise.measured', '--root', 'ROOT'], 2, 'noise.measured without texts'),
        (train, ['--noise.pairs', '--noise.shortest', '2', '--root', 'ROOT'], 2, 'have one length'),
        (train, ['--lora.alpha', '8', '--root', 'ROOT'], 2, 'without lora.rank, which asks'),
        (train, ['--lora.rank', '8', '--lora.targets', 'z', '--root', 'ROOT'], 2, "'z' is unknown"),
        (
            train,
            ['--lora.rank', '8', '--optimizer.kind', 'muon', '--root', 'ROOT'],
            2,
            'are trained by AdamW',
        ),
        (
            train,
            ['--stage', 'medusa', '--lora.rank', '8', '--root', 'ROOT'],
            2,
            'lora with objective medusa, which ignores it',
        ),
        (train, ['--loss.forced-weight', '-1', '--root', 'ROOT'], 2, 'must be at least 0'),
        (train, ['--objective', 'spans', '--model', 'embedded-target'], 2, 'without texts'),
        (train, ['--objective', 'spans', '--data', 'sql'], 2, 'name it as texts'),
        (train, ['--objective', 'spans', '--noise.pairs'], 2, 'a span has no successor'),
        (
            train,
            ['--objective', 'spans', '--loss.frozen-weight', '1'],
            2,
            'loss.frozen_weight with',
        ),
        (train, ['--stage', 'space', '--noise.measured'], 2, 'noise.measured with'),
        (train, ['--noise.pairs', '--noise.fresh', '1', '--root', 'ROOT'], 2, 'is changed has no'),
        (train, ['--noise.pairs', '--objective', 'space', '--root', 'ROOT'], 2, 'masks have no'),
        (train, ['--noise.mask', '1536', '--model', 'embedded'], 2, 'the vocabulary 0..1535'),
        (train, ['--objective', 'ar', '--texts', 'sql', '--root', 'ROOT'], 2, 'leave texts out'),
        (train, ['--objective', 'ar', '--loss.ar-weight', '0', '--root', 'ROOT'], 2, 'no other'),
        (train, ['--tokenizer', 'embedded', '--root', 'ROOT'], 2, 'set model: new'),
        (train, ['--optimizer.accumulate', '3', '--root', 'ROOT'], 2, 'accumulate 3'),
        (train, ['--stage', 'medusa', '--noise.decay', '3'], 2, 'noise with objective medusa'),
        (train, ['--objective', 'ar', '--noise.fresh', '0.5'], 2, 'noise with objective ar, which'),
        (train, ['--objective', 'ar', '--cleaning.wrong'], 2, 'cleaning with objective ar, which'),
        (train, ['--objective', 'eagle', '--noise.decay', '3'], 2, 'noise with objective eagle'),
        (train, ['--heads.ahead', '9'], 2, 'heads with objective consistency, which'),
        (train, ['--objective', 'ar', '--loss.global-weight', '7'], 2, 'loss.global_weight with'),
        (train, ['--objective', 'ar', '--new.dim', '512'], 2, 'write model: new'),
        (train, ['--stage', 'space', '--noise.corruption', '0.9'], 2, 'noise.corruption with'),
        (train, ['--stage', 'space', '--heads.joint'], 2, 'heads.joint with objective space'),
        (train, ['--examples', '10'], 2, 'examples without texts'),
        (train, ['--stage', 'medusa', '--loss.ar-weight', '7'], 2, 'without heads.joint'),
        (train, ['--stage', 'eagle', '--held-out.block', '4'], 2, 'held_out.block with'),
        (train, ['--max-length', '2', '--plan'], 2, 'max_length 2: must be at least 3'),
        (
            train,
            ['--stage', 'target', '--data', 'sql', '--model', 'new', '--new.vocab-size', '9'],
            2,
            'vocab_size 9: at least 258',
        ),
        (train, ['--max-length', '2048', '--model', 'embedded'], 2, 'the model has 1024 positions'),
        (export, ['--root', '/no/run'], 2, '/no/run/target: no such directory; run that stage'),
        (export, ['--root', 'nothere'], 2, 'nothere/target: no such directory; run that stage'),
        (export, ['--root', 'nothere', '--plan'], 2, 'nothere/target: no such directory'),
    ],
)
def test_bad_requests_end_with_one_line_and_a_code(
    module, arguments, code, words, monkeypatch, capsys, tmp_path
):
    arguments = [a.replace('ROOT', str(tmp_path)) for a in arguments]
    monkeypatch.setattr(sys, 'argv', ['x', *arguments])
    with pytest.raises(SystemExit) as e:
        guard(module.run)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error')]
    assert e.value.code == code
    assert len(lines) == 1 and words in lines[0]


@pytest.mark.parametrize(
    ('module', 'line'),
    [
        (collect, '--out ROOT'),
        (train, '--root ROOT --task sql'),
        (train, '--root ROOT --objective ar'),
    ],
)
def test_a_model_without_a_tokenizer_is_refused(module, line, monkeypatch, tmp_path):
    model = random_model(config=text_config(layers=1, max_positions=1024))
    write_model(tmp_path / 'model', model)
    common = ('--model', tmp_path / 'model', '--data', 'sql', *line.split())
    with pytest.raises(ConfigError, match='model has no tokenizer; copy'):
        call(monkeypatch, module, *(tmp_path / 'run' if a == 'ROOT' else a for a in common))


def test_training_tells_of_rows_that_a_reader_left_out(monkeypatch, capsys, tmp_path):
    for name, long in (('train', 3), ('test', 2)):
        turns = [('hello ' * 500, 'yes')] * long + [('hello', 'yes')] * 4
        rows = [
            {'conversations': [{'from': 'human', 'value': a}, {'from': 'gpt', 'value': b}]}
            for a, b in turns
        ]
        (tmp_path / f'{name}.json').write_text(json.dumps(rows))
    data, test = (f'sharegpt:{tmp_path}/{name}.json#all' for name in ('train', 'test'))
    common = ('--objective', 'ar', '--model', model_directory(tmp_path / 'tiny'), '--data', data)
    monkeypatch.setattr('cllm_jax.training.trainer.train', lambda *arguments: None)
    for task in (test, data):
        call(monkeypatch, train, *common, '--task', task, '--root', tmp_path / 'run')
        said = capsys.readouterr().err
        assert said.count(f'{data}: 3 rows left out') == 1
        assert said.count(f'{test}: 2 rows left out') == (task == test)
        assert 'warning: 4 of 4 held-out prompts are trained on too' in said
        shutil.rmtree(tmp_path / 'run')


def test_rows_without_an_answer_are_no_samples(monkeypatch, capsys, tmp_path):
    data = tmp_path / 'rows.jsonl'
    common = ('--objective', 'ar', '--model', model_directory(tmp_path / 'tiny'))
    common += ('--data', f'{data}#all', '--task', 'arithmetic', '--max-length', '64')
    monkeypatch.setattr('cllm_jax.training.trainer.train', lambda *arguments: None)
    rows = [{'prompt': f'question {i}', 'completion': 'yes'} for i in range(3)]
    data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    with pytest.raises(DataError, match='no training sample is left'):
        call(monkeypatch, train, *common, '--root', tmp_path / 'run')
    rows += [{'prompt': 'question', 'answer': 'yes'}]
    data.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    call(monkeypatch, train, *common, '--root', tmp_path / 'run')
    said = capsys.readouterr().err
    assert said.count('3 rows without an answer left out') == 2 and '\n1 samples' in said
    assert 'trained on too' not in said


def test_held_out_prompts_are_of_the_dataset_that_is_learnt(tmp_path):
    open_manifest(tmp_path, {'block': 4, 'data': 'arithmetic'}, 1, [])
    trajectories = TrainConfig(data=str(tmp_path))
    for settings, task in (
        (TrainConfig(objective='ar', data='sql'), 'sql'),
        (trajectories, 'arithmetic'),
        (dataclasses.replace(trajectories, texts='sql+arithmetic'), 'sql+arithmetic'),
        (dataclasses.replace(trajectories, texts='sql+arithmetic', task='sql'), 'sql'),
    ):
        assert held_out_rows(settings).name == task


def test_a_mesh_that_one_device_cannot_be_is_refused(monkeypatch, tmp_path):
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, 'devices', lambda: first)
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    with pytest.raises(ConfigError, match='tensor 4: 4 does not fit 1 devices'):
        call(monkeypatch, train, '--model', 'embedded', '--mesh.tensor', '4', '--root', tmp_path)
    assert not any(tmp_path.iterdir())


OUT_OF_RANGE = {
    train: (
        'save-every 0', 'log-every 0', 'batch 0', 'batch -4', 'seed -1', 'steps -3', 'examples 0',
        'held-out.every -1', 'held-out.prompts 0', 'held-out.max-tokens 0', 'held-out.block 0',
        'held-out.keep 0', 'new.heads 0', 'noise.windows -2', 'noise.fresh 7.0', 'noise.mask -2',
        'noise.corruption -1.0', 'noise.decay -3.0', 'cleaning.seed -1', 'cleaning.augment 5.0',
        'heads.ahead 0', 'heads.nodes 1', 'loss.local-weight -1.0', 'optimizer.warmup 3.0',
        'seed 4294967296', 'held-out.seed -1', 'optimizer.clip 0.0', 'optimizer.beta1 1.0',
        'optimizer.beta2 -0.1', 'optimizer.weight-decay -1.0', 'optimizer.final 2.0',
    ),
    collect: (
        'block 0', 'block 2000', 'batch 0', 'shard 0', 'shard -5', 'max-tokens 0',
        'max-tokens 1024', 'seed -1', 'seed 99999999999999999999',
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ('module', 'line'), [(module, line) for module, lines in OUT_OF_RANGE.items() for line in lines]
)
def test_numbers_out_of_range_are_refused_before_anything_is_written(
    module, line, monkeypatch, capsys, tmp_path
):
    option, value = line.split()
    where = '--root' if module is train else '--out'
    with pytest.raises(ConfigError) as e:
        call(monkeypatch, module, f'--{option}', value, where, tmp_path / 'run')
    name = option.rpartition('.')[2].replace('-', '_')
    assert str(e.value).startswith(f'{name} {value}: ')
    assert not any(tmp_path.iterdir())


def test_decoding_over_several_devices_writes_the_same_answer(monkeypatch, tmp_path):
    rows = []
    for tensor in (1, 4):
        call(
            monkeypatch, decode, '--prompts', 'Question: how many', '--max-tokens', '8',
            '--no-compare', '--tensor', tensor, '--output', tmp_path / f'{tensor}.jsonl',
        )  # fmt: skip
        rows.append(json.loads((tmp_path / f'{tensor}.jsonl').read_text()))
        rows[-1].pop('seconds')
    assert rows[0] == rows[1]


def test_the_plan_of_decode_counts_mixed_weights_as_they_are_kept(monkeypatch, capsys):
    model = cllm_jax.load('embedded', 'mixed')
    call(monkeypatch, decode, '--plan', '--dtype', 'mixed')
    rows = [line.split('│') for line in capsys.readouterr().out.splitlines()]
    found = {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}
    assert found['weights'] == size(weight_bytes(model.params))
    assert found['KV cache per token'] == size(2 * model.config.cache_values)


def test_answers_are_written_whole_or_not_at_all(monkeypatch, tmp_path):
    path = tmp_path / 'answers.jsonl'
    path.write_text('before')

    def torn():
        yield 'first'
        raise KeyboardInterrupt

    columns = {k: [1, 2] for k in ('tokens', 'forwards', 'accepted', 'seconds')}
    with pytest.raises(KeyboardInterrupt):
        decode.write_answers(path, ['a', 'b'], SimpleNamespace(texts=torn(), **columns))
    assert path.read_text() == 'before'


def test_decode_shows_a_prompt_as_it_is(monkeypatch, capsys):
    prompt = 'x[:100:2] :apple:\r'
    call(monkeypatch, decode, '--prompts', prompt, '--max-tokens', '2', '--no-compare')
    assert capsys.readouterr().out.startswith(prompt)


def test_commands_name_the_adapter_that_they_merged(monkeypatch, capsys, tmp_path):
    """With the tokenizer of its base; one that lies with a model is not passed over either."""
    base = model_directory(tmp_path / 'base')
    shape = cllm_jax.load(base).config
    made = tmp_path / 'adapter'
    made.mkdir()
    about = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4, 'target_modules': ['down_proj']}
    (made / 'adapter_config.json').write_text(
        json.dumps(about | {'base_model_name_or_path': '../base'})
    )
    names = [f'base_model.model.model.layers.0.mlp.down_proj.lora_{half}.weight' for half in 'AB']
    factors = (np.ones((2, shape.mlp_dim), 'f4'), np.ones((shape.dim, 2), 'f4'))
    save_file(dict(zip(names, factors, strict=True)), made / 'adapter_model.safetensors')
    whole = shutil.copytree(made, tmp_path / 'whole')
    shutil.copytree(base, whole, dirs_exist_ok=True)
    about = json.loads((whole / 'adapter_config.json').read_text())
    (whole / 'adapter_config.json').write_text(json.dumps(about | {'base_model_name_or_path': '.'}))
    short = ('--prompts', 'the', '--max-tokens', '2', '--no-compare')
    said = []
    for place, into in ((base, ''), (made, '../base'), (whole, whole)):
        call(monkeypatch, decode, '--model', place, *short)
        told = capsys.readouterr()
        assert (f'model {place} (LoRA rank 2 merged into {into})' in told.err) == bool(into)
        said.append(told.out)
    assert said[0] != said[1] == said[2]
    out = tmp_path / 'out'
    data = ('--data', 'arithmetic', '--prompts', '2', '--max-tokens', '4', '--block', '2')
    call(monkeypatch, collect, '--model', made, *data, '--out', out)
    assert f'model {made} (LoRA rank 2 merged into ../base)' in capsys.readouterr().err
    with pytest.raises(ConfigError, match='model'):
        call(monkeypatch, collect, '--model', base, *data, '--out', out)


@pytest.mark.parametrize('module', [evaluate, bench])
def test_models_that_were_not_asked_for_are_not_measured(module, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    recipes = [('--config', CONFIGS / f'{name}.yaml') for name in ('embedded', 'wikisql')]
    if module is bench:  # has no stage in these recipes
        recipes = [('--root', 'runs/embedded'), ('--root', 'runs/wikisql')]
    for line in ((), recipes[0], ('--root', 'runs/embedded/')):
        call(monkeypatch, module, *line, '--plan')
        assert 'model: embedded\ntarget: embedded-target\n' in capsys.readouterr().out
    (tmp_path / 'runs/embedded/export/cllm').mkdir(parents=True)
    for line in (
        ('--root', 'runs/wikisqll'),
        recipes[1],
        ('--root', 'runs/embedded'),  # has no target
        ('--root', 'runs/wikisqll', '--model', 'embedded'),
    ):
        with pytest.raises(ConfigError, match='no such directory; train and export first'):
            call(monkeypatch, module, *line, '--task' if module is evaluate else '--tasks', 'sql')
    call(monkeypatch, module, '--target', 'embedded-target', '--plan')
    assert 'model: runs/embedded/export/cllm\n' in capsys.readouterr().out


def test_results_of_a_run_that_could_not_be_written_are_not_measured(monkeypatch, tmp_path):
    (tmp_path / 'evaluate.json').mkdir()
    for name in ('cllm', 'target'):
        (tmp_path / 'export' / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r'evaluate\.json.*is a directory'):
        call(monkeypatch, evaluate, '--root', tmp_path, '--plan')
    call(monkeypatch, evaluate, '--root', tmp_path, '--plan', '--quick')  # writes none


def test_what_cannot_be_judged_has_no_quality(monkeypatch, tmp_path, capsys):
    chats = [
        {'id': str(i), 'conversations': [{'from': who, 'value': 'hello'}]}
        for i, who in enumerate(('human', 'gpt'))
    ]
    chats[0]['conversations'].append({'from': 'gpt', 'value': 'hello'})
    (tmp_path / 'chats.json').write_text(json.dumps(chats))
    call(
        monkeypatch, evaluate, '--quick', '--task', f'sharegpt:{tmp_path}/chats.json#all',
        '--model', 'embedded-target', '--json', tmp_path / 'result.json', '--block', '2',
    )  # fmt: skip
    found = json.loads((tmp_path / 'result.json').read_text())
    assert {*found['quality'].values(), *found['exact_match'].values()} == {None}
    said = capsys.readouterr()
    cells = [[cell.strip() for cell in line.split('│')] for line in said.out.splitlines()]
    rows = [row for row in cells if row[0].startswith(('target, ', 'CLLM, '))]
    assert len(rows) == 4 and {row[1] for row in rows} == {'-'}
    assert '1 rows left out' in said.err


def test_stream_takes_one_prompt(monkeypatch):
    with pytest.raises(ConfigError, match='exactly one prompt'):
        call(monkeypatch, decode, '--prompts', 'a', 'b', '--stream')


def chat_directory(directory, **changes) -> str:
    write_model(directory, chat_model(**changes), dtype='float32')
    return str(directory)


def test_each_prompt_of_a_chat_is_what_a_user_says(tmp_path, monkeypatch, capsys):
    """Its ids are the template's, and the verdict is printed as without a chat."""
    where, answers = chat_directory(tmp_path / 'm'), tmp_path / 'answers.jsonl'
    common = ('--model', where, '--dtype', 'float32', '--max-tokens', '8', '--exact', 'program')
    said = ['--prompts', 'the city', 'def']
    call(monkeypatch, decode, *common, *said, '--chat', '--system', 'x', '--output', answers)
    told = capsys.readouterr()
    assert 'agree token for token on 2 of 2 prompts' in told.out
    assert 'has a chat template' not in told.err
    chats = [
        [{'role': 'system', 'content': 'x'}, {'role': 'user', 'content': text}] for text in said[1:]
    ]
    model = cllm_jax.load(where, 'float32')
    result = cllm_jax.decode(model, chats, max_tokens=8, exact='program')
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [row['messages'] for row in rows] == chats and 'prompt' not in rows[0]
    assert [row['tokens'] for row in rows] == result.tokens
    inputs = tmp_path / 'inputs.jsonl'
    answered = [*chats[0], {'role': 'assistant', 'content': 'reference'}]
    inputs.write_text(
        ''.join(json.dumps(r) + '\n' for r in ({'messages': answered}, {'prompt': 'def'}))
    )
    few = (*common, '--no-compare', '--input', inputs)
    call(monkeypatch, decode, *few)
    shown = capsys.readouterr().out
    assert shown.startswith(f'> the city\n{result.texts[0]}') and '\ndef' in shown
    call(monkeypatch, decode, *few, '--chat', '--output', answers)
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert rows[0]['tokens'] == result.tokens[0]
    assert rows[1]['messages'] == chats[1][1:]
    with pytest.raises(ConfigError, match="a chat has 'x' already; leave one out"):
        call(monkeypatch, decode, *few, '--chat', '--system', 'y')


def test_a_chat_in_the_terminal_is_that_of_python(tmp_path, monkeypatch, capsys):
    where = chat_directory(tmp_path / 'm', eos_ids=(), max_positions=160)
    monkeypatch.setattr('sys.stdin', io.StringIO('the city\ndef\n'))
    call(monkeypatch, decode, '--chat', '--model', where, '--max-tokens', '9', '--system', 'x')
    told = capsys.readouterr()
    model, chat = cllm_jax.load(where), [{'role': 'system', 'content': 'x'}]
    for text in ('the city', 'def'):
        chat.append({'role': 'user', 'content': text})
        chat.append({'role': 'assistant', 'content': model.chat(chat, max_tokens=9)})
    assert told.out == ''.join(m['content'] + '\n' for m in chat if m['role'] == 'assistant')
    assert told.err.count('(cut off after 9 tokens; --max-tokens sets how many)') == 2


def test_a_prompt_for_a_chat_model_may_have_wanted_its_template(tmp_path, monkeypatch, capsys):
    where = chat_directory(tmp_path / 'm')
    few = ('--max-tokens', '2', '--no-compare')
    for prompt, hint in (('the city', 1), ('<|im_start|>user\nthe city', 0)):
        call(monkeypatch, decode, '--model', where, *few, '--prompts', prompt)
        assert capsys.readouterr().err.count('has a chat template; with --chat') == hint
    call(monkeypatch, decode, '--prompts', 'the city', *few)
    assert 'chat template' not in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'longest'), [((), 128), (('--chat',), 512), (('--chat', '--max-tokens', '7'), 7)]
)
def test_answers_in_a_chat_may_be_longer(arguments, longest, monkeypatch, capsys):
    call(monkeypatch, decode, '--plan', '--prompts', 'a', *arguments)
    assert f'max_tokens: {longest}\n' in capsys.readouterr().out
