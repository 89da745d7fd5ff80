"""Collected trajectories: true, complete, byte for byte the same after an interruption."""

import dataclasses
from itertools import pairwise
from unittest.mock import patch

import jax
import numpy as np
import pytest

from cllm_jax.cli.console import Console
from cllm_jax.data.sources import Source
from cllm_jax.data.tokenizer import train_tokenizer
from cllm_jax.decoding.engine import decode_all, decode_batch, stop_ids
from cllm_jax.decoding.request import Request, encode
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.load import tokenizer_fingerprint
from cllm_jax.model.llama import param_axes
from cllm_jax.runtime.mesh import MeshConfig, make_mesh
from cllm_jax.runtime.sharding import RULES, param_shardings
from cllm_jax.tasks.example import Example
from cllm_jax.training.config import TrainConfig
from cllm_jax.training.data import trajectory_samples
from cllm_jax.trajectories import collector as collecting
from cllm_jax.trajectories import sharded as batching
from cllm_jax.trajectories.clean import Cleaning, clean
from cllm_jax.trajectories.collector import CollectPlan, collect
from cllm_jax.trajectories.store import read_records
from tests.tiny import byte_tokenizer, random_model, text_config

MODEL = random_model(0, text_config(eos_ids=tuple(range(1, 261, 23))), byte_tokenizer())
PLAN = CollectPlan(block=8, mode='block', max_tokens=30, seed=3, batch=8, shard=8)


def source(count: int = 20) -> Source:
    rows = [
        Example(f'row-{i}', 'some words to draw from'[: 3 + i], 'an answer') for i in range(count)
    ]
    return Source('rows', rows, lambda example, text: 'e' in text)


def identity(plan: CollectPlan = PLAN) -> dict:
    return dataclasses.asdict(plan) | {'model': 'tiny'}


@pytest.fixture(scope='module')
def collected(tmp_path_factory):
    directory = tmp_path_factory.mktemp('collected')
    counts = collect(directory, MODEL, source(), PLAN, identity())
    return directory, counts


def compiled(model) -> list[str]:
    """The programs of both modes."""
    mesh = batching.mesh_of(model)
    rows = mesh.shape['data']
    lengths, keys = np.ones(rows, np.int32), jax.random.split(jax.random.key(0), rows)
    prompts = np.ones((rows, 16), np.int32)
    texts = []
    for drafter, weights in ((Jacobi(8), ()), (batching.FINDER, prompts)):
        run = batching._decoder(model.module, drafter, mesh, 64, 32)
        args = (model.params, stop_ids(model), prompts, lengths, lengths, keys, weights)
        texts.append(run.lower(*args).compile().as_text())
    sequences, cache, *_ = run(*args)
    follow = batching._follower(model.module, mesh, 8, 2, 64)
    lowered = follow.lower(model.params, np.int32(0), sequences, cache)
    return [*texts, lowered.compile().as_text()]


def shared(model):
    """The same model with every layer on two devices; its vocabulary of 261 is not divided."""
    mesh = make_mesh(MeshConfig(tensor=2))
    with patch.dict(RULES, vocab=None):
        places = param_shardings(param_axes(model.config), model.params, mesh)
    return dataclasses.replace(model, params=jax.device_put(model.params, places))


def test_devices_with_a_model_each_do_not_communicate():
    names = ('all-reduce', 'all-gather', 'all-to-all', 'collective-permute', 'reduce-scatter')
    assert jax.device_count() == 8
    assert not any(name in text for name in names for text in compiled(MODEL))
    assert all('all-reduce' in text for text in compiled(shared(MODEL)))


def test_devices_that_share_a_model_collect_the_same(collected, tmp_path):
    collect(tmp_path, shared(MODEL), source(), PLAN, identity())
    for a, b in zip(read_records(tmp_path), read_records(collected[0]), strict=True):
        assert a.id == b.id and a.answer.tolist() == b.answer.tolist()
        assert a.states.tolist() == b.states.tolist() and a.start.tolist() == b.start.tolist()


def test_answers_are_those_of_ar(collected):
    records = read_records(collected[0])
    prompts = [source()[i].prompt for i in range(20)]
    ar = decode_all(MODEL, Request(AutoRegressive(), max_tokens=30), prompts)
    assert [r.answer.tolist() for r in records] == ar.tokens
    assert [r.id for r in records] == [f'row-{i}' for i in range(20)]
    assert len({len(r.answer) for r in records}) > 3
    assert [r.finished for r in records] == [t[-1] in MODEL.config.eos_ids for t in ar.tokens]
    assert collected[1]['tokens'] == sum(map(len, ar.tokens))


def test_block_states_go_from_random_to_the_fixed_point(collected):
    n = PLAN.block
    for record in read_records(collected[0]):
        answer, prompt = record.answer, set(record.prompt.tolist())
        for begin in sorted(set(record.start.tolist())):
            states = record.states[record.start == begin]
            truth = answer[begin : begin + n]
            assert begin % n == 0
            assert states[0, 0] == truth[0]
            assert set(states[0, 1:].tolist()) <= prompt
            assert (states[-1, : len(truth)] == truth).all()
            right = [int(np.cumprod(s[: len(truth)] == truth).sum()) for s in states[:-1]]
            assert all(a < b for a, b in pairwise(right))
        assert 1 + sum(record.start[1:] == record.start[:-1]) == record.forwards or not len(
            record.start
        )


def as_decoded(prompt: str, key: jax.Array, n: int) -> tuple[list, list, int]:
    """States, starts and forwards of one prompt, from decoding it block by block.

    The windows that were verified, each behind what its block had converged to by then, and the
    fixed point behind the last of each block.
    """
    request = Request(Jacobi(n, 'block'), max_tokens=30, trace=True)
    one = decode_batch(MODEL, request, [encode(MODEL, prompt)], key[None])
    answer, (trajectory,) = one.tokens[0], one.trajectories
    windows, starts = trajectory.states.tolist(), trajectory.start.tolist()
    blocks, states, begins = [at - at % n for at in starts], [], []
    for i, (at, begin, window) in enumerate(zip(starts, blocks, windows, strict=True)):
        states.append(answer[begin:at] + window[: n - (at - begin)])
        begins.append(begin)
        if begin not in blocks[i + 1 :]:
            states.append((answer + [0] * n)[begin : begin + n])
            begins.append(begin)
    return states, begins, one.forwards[0]


@pytest.mark.parametrize('block', (1, 3, 8, 100))
def test_block_states_are_those_of_decoding_block_by_block(block, tmp_path, monkeypatch):
    monkeypatch.setattr(batching, 'TOGETHER', 2 * block)  # two blocks of a row at a time
    plan = dataclasses.replace(PLAN, block=block)
    collect(tmp_path, MODEL, source(), plan, identity(plan))
    lengths = set()
    for i, record in enumerate(read_records(tmp_path)):
        key = batching.prompt_keys(plan.seed, [record.id])[0]
        states, starts, forwards = as_decoded(source()[i].prompt, key, block)
        assert record.states.tolist() == states
        assert record.start.tolist() == starts
        assert record.forwards == forwards
        lengths.add(len(record.answer))
    assert 1 in lengths and 30 in lengths and len(lengths) > 5


def test_references_find_answers_sooner_and_change_nothing(monkeypatch):
    prompts = [np.asarray(encode(MODEL, source()[i].prompt), np.int32) for i in range(6)]
    keys = batching.prompt_keys(3, [f'row-{i}' for i in range(6)])
    answers = decode_all(MODEL, Request(AutoRegressive(), max_tokens=30), prompts).tokens
    beside = [[*answer[:3], 259, *answer[3:]] for answer in answers]
    decoder, forwards = batching._decoder, []

    def counting(*shape):
        def run(*args):
            decoded = decoder(*shape)(*args)
            forwards.append(np.asarray(decoded[2])[:6])
            return decoded

        return run

    monkeypatch.setattr(batching, '_decoder', counting)
    shape = {'block': 8, 'mode': 'block', 'max_tokens': 30, 'rows': 8, 'width': 32}
    plain, *others = (
        batching.trajectories(MODEL, prompts, keys, texts, **shape)
        for texts in ([[]] * 6, answers, beside, [answer * 9 for answer in answers])
    )
    assert [found.answer.tolist() for found in plain] == answers
    for other in others:
        jax.tree.map(
            np.testing.assert_array_equal,
            *([dataclasses.asdict(x) for x in found] for found in (plain, other)),
        )
    length = np.asarray(list(map(len, answers)))
    assert (forwards[1] == -(-length // batching.FINDER.block)).all()
    assert (forwards[2] <= forwards[1] + 2).all() and (forwards[3] == forwards[1]).all()
    assert forwards[1].sum() < 0.5 * forwards[0].sum()


def test_sliding_states_begin_at_the_pending_token(tmp_path):
    plan = dataclasses.replace(PLAN, mode='sliding')
    collect(tmp_path, MODEL, source(8), plan, identity(plan))
    for record in read_records(tmp_path):
        assert (record.states[:, 0] == record.answer[record.start]).all()
        assert (np.diff(record.start) >= 1).all()
        assert len(record.states) == record.forwards - 1


def test_an_interrupted_collection_ends_with_the_same_bytes(collected, tmp_path, monkeypatch):
    decode, calls = collecting.trajectories, {'n': 0}

    def crash(*args, **kwargs):
        calls['n'] += 1
        if calls['n'] in (2, 4):
            raise KeyboardInterrupt
        return decode(*args, **kwargs)

    monkeypatch.setattr(collecting, 'trajectories', crash)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path, MODEL, source(), PLAN, identity())
    collect(tmp_path, MODEL, source(), PLAN, identity())
    files = sorted(p.name for p in collected[0].iterdir())
    assert files == sorted(p.name for p in tmp_path.iterdir())
    for name in files:
        assert (tmp_path / name).read_bytes() == (collected[0] / name).read_bytes(), name


def test_a_flipped_bit_is_found_and_only_that_shard_collected_again(
    collected, tmp_path, monkeypatch
):
    collect(tmp_path, MODEL, source(), PLAN, identity())
    shard = sorted(tmp_path.glob('*array_record*'))[1]
    good = shard.read_bytes()
    shard.write_bytes(good[:100] + bytes([good[100] ^ 4]) + good[101:])
    with pytest.raises(DataError, match=r'00001-of-00003.*damaged'):
        read_records(tmp_path)
    decode, calls = collecting.trajectories, []
    monkeypatch.setattr(
        collecting, 'trajectories', lambda *a, **k: calls.append(1) or decode(*a, **k)
    )
    collect(tmp_path, MODEL, source(), PLAN, identity())
    assert len(calls) == 1
    assert shard.read_bytes() == good
    assert (tmp_path / (shard.name + '.damaged')).exists()


def test_prompts_without_a_token_are_left_out_and_counted(tmp_path):
    rows = [Example(f'row-{i}', 'words' * (i % 2), 'an answer') for i in range(6)]
    empty = Source('rows', rows, lambda example, text: True)
    model = dataclasses.replace(MODEL, config=dataclasses.replace(MODEL.config, bos_id=None))
    counts = collect(tmp_path, model, empty, PLAN, identity())
    assert [r.id for r in read_records(tmp_path)] == ['row-1', 'row-3', 'row-5']
    assert (counts['prompts'], counts['empty'], counts['too long']) == (6, 3, 0)
    records, left_out = collecting.collect_records(MODEL, empty, PLAN, range(6))
    assert not any(left_out.values())
    assert records[0].prompt.tolist() == [MODEL.config.bos_id]


def test_other_settings_are_refused(collected):
    other = dataclasses.replace(PLAN, seed=4)
    with pytest.raises(ConfigError, match='seed = 3, now 4'):
        collect(collected[0], MODEL, source(), other, identity(other))
    with pytest.raises(DataError, match='collect trajectories first'):
        read_records(collected[0] / 'nowhere')


@pytest.mark.parametrize(
    'text',
    [
        '[]',
        '{"identity": {}, "shards": []}',
        '{"identity": [], "shards": []}',
        '{"identity": {"block": 8}, "shards": {}}',
        '{"identity": {"block": 8}, "shards": [{}]}',
        '{"identity": {"block": 8}, "shards": [1]}',
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    (tmp_path / 'manifest.json').write_text(text)
    with pytest.raises(DataError, match=r'manifest\.json: damaged'):
        read_records(tmp_path)
    with pytest.raises(DataError, match=r'manifest\.json: damaged'):
        trajectory_samples(TrainConfig(data=str(tmp_path)), MODEL, Console())


def test_trajectories_of_another_tokenizer_are_refused(tmp_path):
    known = identity() | {'tokenizer': tokenizer_fingerprint(MODEL.tokenizer)}
    collect(tmp_path, MODEL, source(2), PLAN, known)
    settings, console = TrainConfig(data=str(tmp_path)), Console()
    assert len(trajectory_samples(settings, MODEL, console)) <= 2
    other = train_tokenizer(['some other text'] * 9, len(MODEL.tokenizer))
    with pytest.raises(ConfigError, match='another tokenizer'):
        trajectory_samples(settings, dataclasses.replace(MODEL, tokenizer=other), console)


def test_a_collection_is_a_tfds_dataset(collected):
    import tensorflow_datasets as tfds

    rows = tfds.builder_from_directory(str(collected[0])).as_data_source('train')
    records = read_records(collected[0])
    assert len(rows) == len(records) == 20
    assert (rows[11]['states'] == records[11].states).all()
    assert rows[11]['id'].decode() == records[11].id


def test_cleaning_counts_every_record(collected):
    records = read_records(collected[0])
    loop = np.asarray([5, 6] * 12, np.int32)
    records.append(dataclasses.replace(records[0], answer=loop, finished=True))
    kept, counts = clean(records, Cleaning())
    fates = ('kept', 'truncated', 'repetitive', 'wrong', 'no states')
    assert sum(counts[f] for f in fates) == len(records)
    assert counts['repetitive'] >= 1
    assert counts['kept'] == len(kept)
    strict, strict_counts = clean(records, Cleaning(wrong=True))
    assert all(r.right != 0 for r in strict)
    assert strict_counts['wrong'] > 0


def test_augmented_states_correct_some_wrong_guesses_but_not_the_first(collected):
    truth = np.arange(10, 22, dtype=np.int32)
    state = np.asarray([14, 15, 0, 17, 1, 2, 3, 4], np.int32)
    record = dataclasses.replace(
        read_records(collected[0])[0],
        answer=truth,
        states=np.stack([truth[:8], state]),
        start=np.asarray([0, 4], np.int32),
    )
    (more,), counts = clean([record], Cleaning(truncated=False, augment=1.0))
    assert counts['augmented states'] == 1 and more.start.tolist() == [0, 4, 4]
    assert (more.states[:2] == record.states).all()
    changed = np.flatnonzero(more.states[2] != state)
    assert set(changed) < {4, 5, 6, 7} and len(changed) == 2
    assert (more.states[2][changed] == truth[4:][changed]).all()
    (again,), _ = clean([record], Cleaning(truncated=False, augment=1.0))
    assert (again.states == more.states).all()
