"""Collected trajectories: true, complete, byte for byte the same after an interruption."""

import dataclasses
from unittest.mock import patch

import jax
import numpy as np
import pytest

from cllm_jax.data.sources import Source
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request, encode_each
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.runtime.backend import backend_of
from cllm_jax.tasks.example import Example
from cllm_jax.trajectories import collector
from cllm_jax.trajectories.collector import collect, collect_rows
from cllm_jax.trajectories.store import Collection, read_records
from tests.tiny import chat_model, larger_tokenizer
from tests.trajectories.examples import MODEL, SETTINGS, collect_into, identity, source


def test_answers_are_those_of_ar(collected):
    directory, counts = collected
    records = read_records(directory)
    prompts = [source()[i].prompt for i in range(20)]
    ar = decode_all(MODEL, Request(AutoRegressive(), max_tokens=30), prompts)
    assert [r.answer.tolist() for r in records] == ar.tokens
    assert [r.id for r in records] == [f'row-{i}' for i in range(20)]
    assert len({len(r.answer) for r in records}) > 3
    assert [r.finished for r in records] == [t[-1] in MODEL.config.eos_ids for t in ar.tokens]
    assert [r.right for r in records] == [int('e' in text) for text in ar.texts]
    assert counts['prompts'] == 20 and counts['tokens'] == sum(map(len, ar.tokens))
    assert counts['right'] + counts['wrong'] == 20 and counts['right'] * counts['wrong'] > 0


def test_sliding_states_begin_at_the_pending_token(tmp_path):
    collect_into(tmp_path, dataclasses.replace(SETTINGS, mode='sliding'), rows=source(8))
    for record in read_records(tmp_path):
        assert (record.states[:, 0] == record.answer[record.start]).all()
        assert (np.diff(record.start) >= 1).all()
        assert len(record.states) == record.forwards - 1


def test_an_interrupted_collection_ends_with_the_same_bytes(collected, tmp_path, monkeypatch):
    decode, calls = collector.trajectories, {'n': 0}

    def crash(*args, **kwargs):
        calls['n'] += 1
        if calls['n'] in (2, 4):
            raise KeyboardInterrupt
        return decode(*args, **kwargs)

    monkeypatch.setattr(collector, 'trajectories', crash)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            collect_into(tmp_path)
    collect_into(tmp_path)
    files = sorted(p.name for p in collected[0].iterdir())
    assert files == sorted(p.name for p in tmp_path.iterdir())
    for name in files:
        assert (tmp_path / name).read_bytes() == (collected[0] / name).read_bytes(), name


def test_a_flipped_bit_is_found_and_only_that_shard_collected_again(tmp_path, monkeypatch):
    collect_into(tmp_path)
    shard = sorted(tmp_path.glob('*array_record*'))[1]
    good = shard.read_bytes()
    shard.write_bytes(good[:100] + bytes([good[100] ^ 4]) + good[101:])
    with pytest.raises(DataError, match=r'00001-of-00003.*damaged'):
        read_records(tmp_path)
    decode, calls = collector.trajectories, []
    monkeypatch.setattr(collector, 'trajectories', lambda *a: calls.append(1) or decode(*a))
    collect_into(tmp_path)
    assert len(calls) == 1
    assert shard.read_bytes() == good
    assert (tmp_path / (shard.name + '.damaged')).exists()


def test_prompts_without_a_token_are_left_out_and_counted(tmp_path):
    rows = [Example(f'row-{i}', 'words' * (i % 2), 'an answer') for i in range(6)]
    empty = Source('rows', rows, lambda example, text: True)
    model = dataclasses.replace(MODEL, config=dataclasses.replace(MODEL.config, bos_id=None))
    counts = collect_into(tmp_path, model=model, rows=empty)
    assert [r.id for r in read_records(tmp_path)] == ['row-1', 'row-3', 'row-5']
    assert (counts['prompts'], counts['empty'], counts['too long']) == (6, 3, 0)
    records, left_out = collect_rows(MODEL, empty, SETTINGS, range(6))
    assert not any(left_out.values())
    assert records[0].prompt.tolist() == [MODEL.config.bos_id]


@pytest.mark.parametrize('where', ['prompt', 'answer'])
def test_rows_with_a_token_that_the_model_lacks_are_refused_before_any_work(where, tmp_path):
    model, foreign = dataclasses.replace(MODEL, tokenizer=larger_tokenizer()), source(20)
    foreign.rows[-1] = dataclasses.replace(foreign[19], **{where: 'a <call>'})
    message = r"^row row-19: token id 262 \('<call>'\): outside the vocabulary 0\.\.260"
    with pytest.raises(DataError, match=message):
        collect_into(tmp_path / 'out', model=model, rows=foreign)
    assert not (tmp_path / 'out').exists()
    with pytest.raises(DataError, match=message):
        collect_rows(model, foreign, SETTINGS, range(16, 20))


def test_a_larger_tokenizer_collects_the_same_where_its_tokens_do_not_occur():
    larger = dataclasses.replace(MODEL, tokenizer=larger_tokenizer())
    found, wanted = (collect_rows(m, source(), SETTINGS, range(4))[0] for m in (larger, MODEL))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a.answer, b.answer)
        np.testing.assert_array_equal(a.states, b.states)


def test_a_bos_outside_the_table_is_refused_where_it_would_be_read():
    config = dataclasses.replace(MODEL.config, bos_id=261)
    model, two = dataclasses.replace(MODEL, config=config), source(2)
    assert collect_rows(model, two, SETTINGS, range(2))[0]
    empty = dataclasses.replace(two, rows=[dataclasses.replace(two[0], prompt='')])
    with pytest.raises(DataError, match='row row-0: token id 261: outside'):
        collect_rows(model, empty, SETTINGS, range(1))


def test_a_model_without_an_end_token_is_refused(tmp_path):
    model = dataclasses.replace(MODEL, config=dataclasses.replace(MODEL.config, eos_ids=()))
    with pytest.raises(ConfigError, match='no end token'):
        collect_into(tmp_path, model=model)


@pytest.mark.parametrize('mode', ['block', 'sliding'])
def test_a_collection_has_the_same_bytes_with_any_number_of_cores(tmp_path, mode, monkeypatch):
    settings, files = Collection(8, mode, max_tokens=20, seed=3, batch=4, shard=16), []
    params = jax.device_put(MODEL.params, jax.devices()[0])
    for count in (1, 3):
        backend = dataclasses.replace(backend_of(params), threads=count)
        monkeypatch.setattr(
            'cllm_jax.hf.model.backend_of', lambda weights, backend=backend: backend
        )
        model = dataclasses.replace(MODEL, params=params)
        out, told = tmp_path / f'{count}', []
        with patch('jax.local_devices', return_value=jax.devices()[:1]):
            collect(
                out, model, source(), settings, identity(settings), lambda n, _, t=told: t.append(n)
            )
        assert told == [4] * 5
        files.append({path.name: path.read_bytes() for path in out.glob('*-of-*')})
    assert files[0] == files[1] and files[0]


def test_chats_are_answered_after_their_last_user_turn(tmp_path):
    model = chat_model()
    user, answer = ({'role': r, 'content': 'the city'} for r in ('user', 'assistant'))
    chats = [(user,), (user, answer, user)]
    rows = [Example(f'row-{i}', chat, 'x' * i) for i, chat in enumerate(chats)]
    both = Source('rows', rows, lambda example, text: True)
    collect_into(tmp_path / 'a', model=model, rows=both)
    records = read_records(tmp_path / 'a')
    request = Request(AutoRegressive(), max_tokens=SETTINGS.max_tokens)
    assert [r.answer.tolist() for r in records] == decode_all(model, request, chats).tokens
    assert [r.prompt.tolist() for r in records] == encode_each(model, chats)
    rows.append(Example('row-2', 'a text', ''))
    with pytest.raises(ConfigError, match='tiny has no chat template'):
        base = dataclasses.replace(MODEL, source='tiny')
        collect_into(tmp_path / 'b', model=base, rows=dataclasses.replace(both, rows=rows[::-1]))
    assert not (tmp_path / 'b').exists()
