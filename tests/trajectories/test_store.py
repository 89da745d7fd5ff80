"""Shards and their manifest: what was written is read, and damage is found."""

import dataclasses
import json

import numpy as np
import pytest

from cllm_jax.errors import ConfigError, DataError
from cllm_jax.trajectories.store import (
    Collection,
    finish,
    open_manifest,
    read_manifest,
    read_records,
    write_shard,
)
from tests.trajectories.examples import SETTINGS, identity, trajectory

RECORDS = [
    trajectory([4, 5, 6], [[4, 9], [4, 5]], [0, 0], id='a', forwards=3, right=1),
    trajectory([7], np.zeros((0, 2)), (), id='b', forwards=1, finished=False),
    trajectory([8, 9], [[8, 8]], [0], id='c', forwards=2, right=0),
]
KNOWN = identity(dataclasses.replace(SETTINGS, block=2))


def written(directory, shards=(RECORDS[:2], RECORDS[2:])) -> dict:
    """Two finished shards, and their manifest."""
    manifest = open_manifest(directory, KNOWN, len(shards), range(len(shards)))
    for i, records in enumerate(shards):
        write_shard(directory, manifest, i, records, {'prompts': len(records)})
    return manifest


def as_lists(record) -> dict:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in dataclasses.asdict(record).items()
    }


def test_records_are_read_as_they_were_written(tmp_path):
    written(tmp_path)
    with pytest.raises(DataError, match='manifest'):
        read_records(tmp_path / 'nowhere')
    finish(tmp_path)
    assert not list(tmp_path.glob('shard-*.json')), 'their entries are in the manifest'
    assert list(map(as_lists, read_records(tmp_path))) == list(map(as_lists, RECORDS))
    assert [entry['records'] for entry in read_manifest(tmp_path)['shards']] == [2, 1]


def test_an_unfinished_collection_is_not_read(tmp_path):
    manifest = open_manifest(tmp_path, KNOWN, 3, range(3))
    write_shard(tmp_path, manifest, 1, RECORDS, {})
    with pytest.raises(DataError, match='2 of 3 shards are not collected yet'):
        read_records(tmp_path)


def test_damaged_and_missing_shards_are_set_aside_and_forgotten(tmp_path):
    """And only by the process whose shards they are."""
    (tmp_path / 'gone').mkdir()
    first, second = (tmp_path / entry['file'] for entry in written(tmp_path)['shards'])
    data = first.read_bytes()
    first.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    second.unlink()
    assert all(open_manifest(tmp_path, KNOWN, 2, [])['shards'])
    assert open_manifest(tmp_path, KNOWN, 2, [0, 1])['shards'] == [None, None]
    assert (tmp_path / f'{first.name}.damaged').exists() and not first.exists()


def test_other_settings_are_refused(tmp_path):
    written(tmp_path)
    with pytest.raises(ConfigError, match='seed = 3, now 4; use the old settings'):
        open_manifest(tmp_path, KNOWN | {'seed': 4}, 2, range(2))
    with pytest.raises(ConfigError, match='shards = 2, now 3'):
        open_manifest(tmp_path, KNOWN, 3, range(3))
    assert open_manifest(tmp_path, KNOWN, 2, range(2))['identity'] == KNOWN


@pytest.mark.parametrize(
    'text',
    [
        '[]',
        '{"identity": {}, "shards": []}',
        '{"identity": [], "shards": []}',
        '{"identity": {"block": 8}, "shards": {}}',
        '{"identity": {"block": 8}, "shards": [{}]}',
        '{"identity": {"block": 8}, "shards": [1]}',
        '{"identity": {"block": 8}, "shar',
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    (tmp_path / 'manifest.json').write_text(text)
    with pytest.raises(DataError, match=r'manifest\.json: damaged'):
        read_records(tmp_path)


def test_a_damaged_entry_of_a_shard_is_named(tmp_path):
    written(tmp_path)
    (tmp_path / 'shard-00001.json').write_text(json.dumps({'file': 'x'}))
    with pytest.raises(DataError, match=r'shard-00001\.json: damaged'):
        read_manifest(tmp_path)


def test_a_collection_is_a_tfds_dataset(tmp_path):
    import tensorflow_datasets as tfds

    written(tmp_path)
    finish(tmp_path)
    rows = tfds.builder_from_directory(str(tmp_path)).as_data_source('train')
    assert len(rows) == 3 and rows[2]['id'].decode() == 'c'
    assert (rows[0]['states'] == RECORDS[0].states).all()


@pytest.mark.parametrize(
    ('change', 'rule'),
    [({'block': 0}, 'block 0: must be'), ({'batch': 0}, 'batch 0'), ({'seed': -1}, 'seed -1')],
)
def test_settings_out_of_range_are_refused(change, rule):
    with pytest.raises(ConfigError, match=rule):
        Collection(**change)
