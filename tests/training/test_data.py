"""What a training run reads: collections, and a tokenizer that is its own or another model's."""

import dataclasses
import json
import shutil

import pytest

import cllm_jax as cllm
from cllm_jax.cli.console import Console
from cllm_jax.data.sources import open_source
from cllm_jax.data.tokenizer import train_tokenizer
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.tokenizer import tokenizer_fingerprint, vocabulary_fingerprint
from cllm_jax.hf.write import write_model
from cllm_jax.training.config import NewModel, TrainConfig, with_names
from cllm_jax.training.data import prepare, trained_on_too, trajectory_samples
from cllm_jax.training.packing import SORT_WINDOW, make_batch
from cllm_jax.trajectories.clean import Cleaning
from cllm_jax.trajectories.collector import collect
from cllm_jax.trajectories.store import finish, open_manifest, write_shard
from tests.tiny import chat_model, larger_tokenizer, model_directory
from tests.trajectories.examples import MODEL, SETTINGS, identity, source, trajectory


def test_a_manifest_that_is_none_is_no_training_data(tmp_path):
    (tmp_path / 'manifest.json').write_text('{"identity": {}, "shards": []}')
    with pytest.raises(DataError, match=r'manifest\.json: damaged'):
        trajectory_samples(TrainConfig(data=str(tmp_path)), MODEL, Console())


def test_trajectories_of_another_tokenizer_are_refused(tmp_path):
    settings, console = TrainConfig(data=str(tmp_path)), Console()
    for fingerprint in (vocabulary_fingerprint, tokenizer_fingerprint):  # of older versions, of now
        shutil.rmtree(tmp_path)
        known = identity() | {'tokenizer': fingerprint(MODEL.tokenizer)}
        collect(tmp_path, MODEL, source(2), SETTINGS, known)
        assert len(trajectory_samples(settings, MODEL, console)) <= 2
    other = train_tokenizer(['some other text'] * 9, len(MODEL.tokenizer))
    with pytest.raises(ConfigError, match='another tokenizer'):
        trajectory_samples(settings, dataclasses.replace(MODEL, tokenizer=other), console)


def test_a_collection_of_cut_answers_says_that_its_limit_was_short(tmp_path, capsys):
    known = identity() | {'block': 4, 'tokenizer': tokenizer_fingerprint(MODEL.tokenizer)}
    tokens, guesses = [4, 5, 6, 7, 8], [[9] * 4]
    records = [trajectory(tokens, guesses, id=f'{i}', finished=i > 2) for i in range(10)]
    for name, rows in (('many', records), ('few', records[2:])):
        manifest = open_manifest(tmp_path / name, known, 1, [0])
        write_shard(tmp_path / name, manifest, 0, rows, {})
        finish(tmp_path / name)
        rules = Cleaning(augment=1.0)  # what it adds is not an answer
        trajectory_samples(TrainConfig(data=str(tmp_path / name), cleaning=rules), MODEL, Console())
    limit, said = SETTINGS.max_tokens, capsys.readouterr().err
    assert f'3 of 10 answers were cut, --max-tokens {limit} is short: collect' in said
    assert '7 augmented states' in said and said.count('were cut') == 1
    rules = Cleaning(truncated=False)  # asked for
    trajectory_samples(TrainConfig(data=str(tmp_path / 'many'), cleaning=rules), MODEL, Console())
    assert 'were cut' not in capsys.readouterr().err


@pytest.mark.parametrize('field', ['prompt', 'answer', 'states'])
@pytest.mark.parametrize('bad', [-1, 261, 1 << 30])
def test_trajectories_with_ids_outside_the_table_are_refused(field, bad, tmp_path):
    good = [trajectory([4, 5, 6], [[4, 260]], id=f'row-{i}') for i in range(3)]
    array = getattr(good[1], field).copy()
    array.flat[-1] = bad
    known = identity() | {'block': 2, 'tokenizer': tokenizer_fingerprint(MODEL.tokenizer)}
    records = [good[0], dataclasses.replace(good[1], **{field: array}), good[2]]
    for name, rows in (('good', good), ('bad', records)):
        manifest = open_manifest(tmp_path / name, known, 1, [0])
        write_shard(tmp_path / name, manifest, 0, rows, {})
        finish(tmp_path / name)
    settings = TrainConfig(data=str(tmp_path / 'good'))
    assert len(trajectory_samples(settings, MODEL, Console())) == 3
    settings = TrainConfig(data=str(tmp_path / 'bad'))
    message = rf'bad: record row-1: token id {bad}: outside the vocabulary 0\.\.260'
    with pytest.raises(DataError, match=message):
        trajectory_samples(settings, MODEL, Console())


@pytest.mark.parametrize('where', ['prompt', 'answer'])
def test_texts_with_a_token_that_the_model_lacks_are_refused(where, tmp_path):
    model = dataclasses.replace(MODEL, tokenizer=larger_tokenizer())
    write_model(tmp_path / 'model', model, dtype='float32')
    path = tmp_path / 'rows.jsonl'
    settings = TrainConfig(objective='ar', model=str(tmp_path / 'model'), data=f'{path}#all')
    rows = [{'prompt': f'a tool {i}', 'answer': 'the call'} for i in range(4)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    assert len(prepare(settings, None, Console(), tmp_path)[1]) == 4
    rows[2][where] += '<tool>'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    message = r"row jsonl-3: token id 261 \('<tool>'\): outside the vocabulary 0\.\.260"
    with pytest.raises(DataError, match=message):
        prepare(settings, None, Console(), tmp_path)


def test_a_new_draft_model_takes_the_tokenizer_of_its_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run takes the place of the embedded target
    small = NewModel(dim=32, layers=1, heads=2, kv_heads=2, mlp_dim=32)
    settings = TrainConfig(objective='ar', model='new', new=small, data='sql', examples=8)
    settings = with_names(settings, 'draft')
    model, samples = prepare(settings, None, Console(), tmp_path)
    target = cllm.load('embedded-target', 'float32')
    assert samples[0].answer[-1] == target.config.eos_ids[0]
    drafted = cllm.draft_model(target, model)
    prompts = ['Question: how many cats are there?\nAnswer:']
    fast = cllm.decode(target, prompts, drafted, max_tokens=8)
    assert fast.tokens == cllm.decode(target, prompts, cllm.AutoRegressive(), max_tokens=8).tokens
    other = dataclasses.replace(settings, new=dataclasses.replace(small, vocab_size=999))
    with pytest.raises(cllm.ConfigError, match='embedded-target has 1536 tokens'):
        prepare(other, None, Console(), tmp_path)


def test_rows_without_a_prompt_are_not_trained_on(tmp_path, capsys):
    rows = [{'prompt': 'a question' * (i % 2), 'answer': 'an answer'} for i in range(8)]
    path = tmp_path / 'rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    settings = TrainConfig(objective='ar', model='embedded-target', data=f'{path}#all')
    model, kept = prepare(settings, None, Console(), tmp_path)
    assert model.config.bos_id is None
    assert len(kept) == 4 and all(len(sample.prompt) for sample in kept)
    assert '4 samples without a prompt left out' in capsys.readouterr().err


def chat_of(*texts: str) -> dict:
    roles = ('user', 'assistant')
    return {'messages': [{'role': roles[i % 2], 'content': t} for i, t in enumerate(texts)]}


def test_the_loss_is_on_what_the_assistant_says_and_nothing_else(tmp_path, capsys):
    """Each of its turns once, with its end token, after all that the template writes before it."""
    model = chat_model()
    write_model(tmp_path / 'm', model, dtype='float32')
    texts = ('the city', 'def', 'and x?', 'y\nthe', 'why')
    rows = [chat_of(*texts), {'prompt': 'a text', 'answer': ' b'}, chat_of('open')]
    rows += [chat_of('x', '\nstarts with a line break'), chat_of('x', 'a<|im_end|>b', 'y', 'z')]
    path = tmp_path / 'rows.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    settings = TrainConfig(objective='ar', model=str(tmp_path / 'm'), data=f'{path}#all')
    model, samples = prepare(settings, None, Console(), tmp_path)
    said = capsys.readouterr().err
    assert '2 answers of chats left out: the template does not go on' in said
    assert '1 rows without an answer left out' in said
    learnt = []
    for step in range(SORT_WINDOW):  # every sample is in one of the batches
        batch = make_batch(samples, len(samples), 0, step, None)
        for row in range(len(samples)):
            weighted = batch.ar_weight_BA[row] > 0
            labels = batch.labels_BR[row][: len(weighted)][weighted]
            learnt.append(model.tokenizer.decode(labels))
    assert {*learnt} == {'def<|im_end|>', 'y\nthe<|im_end|>', ' b<|im_end|>', 'z<|im_end|>'}
    template = model.tokenizer.apply_chat_template
    begun = {
        template(rows[0]['messages'][:i], tokenize=False, add_generation_prompt=True)
        for i in (1, 3)
    }
    assert begun <= {model.tokenizer.decode(sample.prompt) for sample in samples}
    assert trained_on_too(samples, open_source(f'{path}#all'), model) == 2, 'the text, and z'


def test_chats_need_a_template(tmp_path):
    path = tmp_path / 'rows.jsonl'
    path.write_text(json.dumps(chat_of('a', 'b')) + '\n')
    common = {'objective': 'ar', 'data': f'{path}#all'}
    settings = TrainConfig(model=model_directory(tmp_path / 'base'), **common)
    with pytest.raises(ConfigError, match='base has no chat template; name an instruct model'):
        prepare(settings, None, Console(), tmp_path)
    new = TrainConfig(model='new', **common)
    with pytest.raises(ConfigError, match=r'rows\.jsonl#all has chats; set tokenizer to a model'):
        prepare(new, None, Console(), tmp_path / 'run')
    write_model(tmp_path / 'm', model := chat_model(eos_ids=(5,)), dtype='float32')
    small = NewModel(
        dim=32, layers=1, heads=2, kv_heads=2, mlp_dim=32, vocab_size=model.config.vocab_size
    )
    shared = dataclasses.replace(new, new=small, tokenizer=str(tmp_path / 'm'))
    made, samples = prepare(shared, None, Console(), tmp_path / 'run')
    end = model.tokenizer.eos_token_id
    assert made.config.eos_ids == (5, end) and samples[0].answer[-1] == end
