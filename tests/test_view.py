"""The command that writes a page: what it decodes, reads and refuses."""

import dataclasses
import json
import sys
from importlib import import_module

import pytest

import cllm_jax
from cllm_jax import view
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.evaluation.trace import read_traces, write_traces
from cllm_jax.hf.tokenizer import tokenizer_fingerprint
from cllm_jax.trajectories.store import finish, open_manifest, write_shard
from tests.evaluation.test_page import data_of
from tests.evaluation.traces import jacobi, plain
from tests.tiny import byte_tokenizer, model_directory
from tests.trajectories.examples import SETTINGS, identity, trajectory

api = cllm_jax.decode
decode = import_module('cllm_jax.decode')
cllm_jax.decode = api  # importing the command hides the function of that name; put it back

SMALL = ('--max-tokens', '6', '--block', '4')
PROMPTS = ('--prompts', 'some words', 'other words')


def call(monkeypatch, module, *arguments) -> None:
    monkeypatch.setattr(sys, 'argv', [module.__name__, *map(str, arguments)])
    module.run()


def shown(path) -> dict:
    return data_of(path.read_text('utf-8'))


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> str:
    return model_directory(tmp_path_factory.mktemp('tiny'))


def test_prompts_are_decoded_by_every_method_and_shown(model, tmp_path, monkeypatch):
    out = tmp_path / 'new' / 'view.html'
    which = ('--model', model, '--drafter', 'jacobi', 'ar', 'lookup', 'jacobi', '--repeats', 1)
    call(monkeypatch, view, '--output', out, *which, *PROMPTS, *SMALL)
    data = shown(out)
    assert [m['name'] for m in data['methods']] == ['AR', 'Jacobi', 'prompt lookup']
    assert {m['model'] for m in data['methods']} == {model}
    assert [p['text'] for p in data['prompts']] == list(PROMPTS[1:])
    for prompt in data['prompts']:
        answers = [decoded['answer'] for decoded in prompt['decodes']]
        assert len(answers) == 3 and answers == answers[:1] * 3
        assert all(decoded['seconds'] > 0 for decoded in prompt['decodes'])


def test_decode_writes_a_trace_that_view_shows(model, tmp_path, monkeypatch, capsys):
    trace, answers, out = (tmp_path / name for name in ('t.json', 'a.jsonl', 'view.html'))
    files = ('--trace', trace, '--output', answers)
    call(monkeypatch, decode, '--model', model, *PROMPTS, *SMALL, *files, '--no-compare')
    assert f'{trace}: 2 decodes' in ' '.join(capsys.readouterr().err.split())
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    found = read_traces(trace)
    assert [t.answer for t in found] == [row['tokens'] for row in rows]
    assert [t.prompt for t in found] == [row['prompt'] for row in rows]
    assert {(t.name, t.model) for t in found} == {('Jacobi', model)}
    call(monkeypatch, view, '--trace', trace, '--output', out)
    assert [m['name'] for m in shown(out)['methods']] == ['Jacobi']
    call(monkeypatch, view, '--trace', trace, tmp_path / '.' / 't.json', '--output', out)
    assert len(shown(out)['methods']) == 1, 'the same file counts once'


def test_methods_of_several_files_are_told_apart(tmp_path, monkeypatch):
    files = [tmp_path / 'a.json', tmp_path / 'b.json']
    write_traces(files[0], [plain(), jacobi()])
    write_traces(files[1], [jacobi(seconds=0.25)])
    call(monkeypatch, view, '--trace', *files, '--output', tmp_path / 'view.html')
    methods = shown(tmp_path / 'view.html')['methods']
    names = [m['name'] for m in methods]
    assert [m['speedup'] for m in methods] == [1, 2, 4]
    assert names == [f'AR, {files[0]}', f'Jacobi, {files[0]}', f'Jacobi, {files[1]}']


def test_decode_shows_a_race_of_each_prompt(model, monkeypatch, capsys):
    """Without a terminal: the prompt, the last picture, and what each took."""
    call(monkeypatch, decode, '--watch', '--model', model, *PROMPTS, *SMALL)
    text = capsys.readouterr().out
    for prompt, part in zip(PROMPTS[1:], text.split('╭')[::2], strict=False):
        assert part.endswith(f'{prompt}\n')
    lines = [line.partition(', 1.00 tokens/forward, ')[0] for line in text.splitlines()]
    assert lines.count('AR: 6 tokens, 6 forwards') == 2
    assert sum(line.startswith('Jacobi: 6 tokens, ') for line in lines) == 2
    call(monkeypatch, decode, '--watch', '--model', model, '--prompts', 'a', *SMALL, '--no-compare')
    text = capsys.readouterr().out
    assert 'Jacobi: 6' in text and 'AR' not in text


@pytest.mark.parametrize(
    ('arguments', 'told'),
    [
        ('', r'output: no file is named; write --output'),
        ('--output .', r'is a directory'),
        ('--output x.html --trace t.json --prompts a', r'both prompts and trace are given'),
        ('--output x.html --trace t.json --trajectories d', r'both trace and trajectories'),
        ('--output t.json --trace t.json', r'is read too; name another file'),
        ('--output x.html --drafter jacoby', r"did you mean 'jacobi'"),
        ('--output x.html --drafter model', r'write model:DIR'),
        ('--output x.html --block 0', r'block 0: must be 1'),
        ('--output x.html --model nowhere/at/all', r'no such directory'),
        ('--output x.html --records', r'records: no value is given'),
        ('--output x.html --max-tokens 0', r'max_tokens 0: must be at least 1'),
        ('--output x.html --seed -1', r'seed'),
    ],
)
def test_what_cannot_be_shown_is_refused_before_any_work(arguments, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=told):
        call(monkeypatch, view, *arguments.split())
    assert not list(tmp_path.iterdir())


def test_a_trace_is_refused_where_it_would_replace_what_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'in.jsonl').write_text('{"prompt": "a"}\n')
    for arguments, told in (
        ('--input in.jsonl --trace in.jsonl', 'is read too'),
        ('--input in.jsonl --output a --trace ./a', 'is written too'),
        ('--stream --trace t.json --prompts a', 'both stream and trace'),
        ('--trace .', 'is a directory'),
    ):
        with pytest.raises(ConfigError, match=told):
            call(monkeypatch, decode, *arguments.split())


def test_files_that_are_not_there_or_no_traces_are_named(tmp_path, monkeypatch):
    (tmp_path / 't.json').write_text('{}')
    out = ('--output', tmp_path / 'x.html')
    with pytest.raises(DataError, match=r't\.json: not a trace'):
        call(monkeypatch, view, *out, '--trace', tmp_path / 't.json')
    with pytest.raises(FileNotFoundError):  # `guard` names it
        call(monkeypatch, view, *out, '--trace', tmp_path / 'none.json')
    with pytest.raises(DataError, match='collect trajectories first'):
        call(monkeypatch, view, *out, '--trajectories', tmp_path)
    assert not (tmp_path / 'x.html').exists()


def test_a_plan_decodes_nothing(tmp_path, monkeypatch, capsys):
    call(monkeypatch, view, '--output', tmp_path / 'x.html', '--plan')
    assert 'writes to' in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_records_of_a_collection_are_shown(model, tmp_path, monkeypatch):
    """Three tokens in three forwards: the prefill, a window with a wrong guess, a right one."""
    ids = byte_tokenizer()('the t')['input_ids']
    one = trajectory(ids, [[ids[0], 9], [ids[1], ids[2]]], [0, 1], id='a', forwards=3)
    known = identity(dataclasses.replace(SETTINGS, block=2, mode='sliding'))
    known |= {'tokenizer': tokenizer_fingerprint(byte_tokenizer())}
    collection, out = tmp_path / 'collection', tmp_path / 'view.html'
    manifest = open_manifest(collection, known, 1, range(1))
    write_shard(collection, manifest, 0, [one], {'prompts': 1})
    finish(collection)
    which = ('--output', out, '--trajectories', collection)
    call(monkeypatch, view, *which, '--model', model, '--records', 0)
    [prompt], data = shown(out)['prompts'], shown(out)
    assert [data['pieces'][i][0] for i in prompt['decodes'][0]['answer']] == ids
    assert [len(f['tokens']) for f in prompt['decodes'][0]['forwards']] == [1, 2, 2]
    with pytest.raises(ConfigError, match=r'records 1: .* has 0\.\.0'):
        call(monkeypatch, view, *which, '--model', model, '--records', 0, 1)
    with pytest.raises(ConfigError, match='another tokenizer than that of embedded-target'):
        call(monkeypatch, view, *which, '--records', 0)
