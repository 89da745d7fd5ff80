"""Datasets of the `datasets` package, from local copies: offline, and without running code."""

import json
import socket
import struct

import pyarrow as pa
import pytest
from pyarrow import parquet

from cllm_jax.data.hub import read_hf
from cllm_jax.data.sources import open_source
from cllm_jax.errors import ConfigError, DataError

datasets = pytest.importorskip('datasets')

ROWS = {
    'question': [f'What is {i} + {i}, said José?' for i in range(120)],
    'response': [str(2 * i) for i in range(120)],
    'value': list(range(120)),
}
ASKED = 'prompt=question&answer=response'


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """One dataset as `save_to_disk` leaves it, whole and in splits, and as files."""
    place = tmp_path_factory.mktemp('hf')
    whole = datasets.Dataset.from_dict(ROWS)
    whole.save_to_disk(place / 'whole')
    parts = {'train': whole.select(range(100)), 'test': whole.select(range(100, 120))}
    datasets.DatasetDict(parts).save_to_disk(place / 'parts')
    (place / 'files').mkdir()
    for split, rows in (('train', slice(0, 100)), ('test', slice(100, 120))):
        table = pa.table({name: values[rows] for name, values in ROWS.items()})
        parquet.write_table(table, place / f'files/{split}-00000-of-00001.parquet')
    return place


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """Nothing is asked of the network; what the package writes goes away."""

    def refuse(*_):
        raise AssertionError('a connection')

    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.mark.parametrize('form', ['parts', 'files'])
def test_a_local_copy_is_read_by_split_and_field(saved, form, monkeypatch):
    spec = f'hf:{saved / form}?{ASKED}&split=test#all'
    rows = open_source(spec).rows
    pairs = [(r.prompt, r.answer) for r in rows]
    assert pairs == list(zip(ROWS['question'][100:], ROWS['response'][100:], strict=True))
    assert [r.id for r in rows] == [f'hf-{i}' for i in range(1, 21)]
    monkeypatch.chdir(saved)
    turned = open_source(f'hf:{form}?prompt=response&answer=question&split=test#all').rows
    assert [(r.answer, r.prompt) for r in turned] == pairs
    assert len(open_source(f'hf:./{form}?{ASKED}#all')) == 100  # train
    train = open_source(f'hf:{form}?{ASKED}')
    heldout = open_source(f'hf:{form}?{ASKED}', split='heldout')
    assert train.checkable and train.check(train[0], train[0].answer)
    both = {r.prompt for r in train.rows} | {r.prompt for r in heldout.rows}
    assert both == set(ROWS['question'][:100]) and len(train) + len(heldout) == 100
    assert {r.answer for r in open_source(f'hf:{form}?prompt=question#all').rows} == {''}


def test_a_dataset_of_one_split_needs_none_named(saved):
    assert len(read_hf(str(saved / 'whole'), prompt='question')) == 120
    with pytest.raises(DataError, match="one split, None, and not 'test'"):
        read_hf(str(saved / 'whole'), prompt='question', split='test')


def test_rows_without_text_are_counted_and_named(tmp_path):
    rows = {'prompt': ['a', None, 'c', None], 'answer': ['1', '2', None, None]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / 'some')
    source = open_source(f'hf:{tmp_path}/some#all')
    assert [r.prompt for r in source.rows] == ['a']
    faults = {"no text in 'prompt' (rows 2, 4)": 2, "no text in 'answer' (row 3)": 1}
    assert source.dropped == faults


@pytest.mark.parametrize(
    'spec, said',
    [
        ('parts?prompt=qestion', "no field 'qestion'; did you mean 'question'"),
        ('parts?prompt=value', "field 'value' is int64; only text"),
        ('parts?prompt=question&split=tset', "no split 'tset'; did you mean 'test'"),
        ('files?prompt=question&split=tset', 'cannot be opened .*split.*; check the name, split='),
        ('files?prompt=question&config=odd', 'cannot be opened .*; check the name, split='),
        ('absent', 'no such directory; name one, or a hub id OWNER/NAME'),
    ],
)
def test_faults_are_one_line(saved, spec, said):
    with pytest.raises(DataError, match=said) as caught:
        open_source(f'hf:{saved}/{spec}')
    assert '\n' not in str(caught.value)


def test_names_that_the_package_would_take_for_its_own_readers_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.csv').write_text('prompt\nsecret\n')
    for name in ('csv', 'pandas', './absent', '../x', 'a.csv'):
        with pytest.raises(DataError, match='no such directory'):
            open_source(f'hf:{name}')
    (tmp_path / 'csv').mkdir()  # a directory of that name is the directory
    parquet.write_table(pa.table({'prompt': ['open']}), tmp_path / 'csv/train.parquet')
    assert [row.prompt for row in open_source('hf:csv#all').rows] == ['open']


def test_a_script_is_never_run(tmp_path):
    (tmp_path / 'made').mkdir()
    ran = tmp_path / 'ran'
    (tmp_path / 'made/made.py').write_text(f'open({str(ran)!r}, "w")')
    with pytest.raises(DataError, match='made by a script, which is never run; convert it'):
        open_source(f'hf:{tmp_path}/made')
    assert not ran.exists()


def test_packages_that_run_scripts_are_refused(saved, monkeypatch):
    monkeypatch.setattr(datasets, '__version__', '3.6.0')
    with pytest.raises(ConfigError, match=r'datasets 3\.6\.0 can run the scripts'):
        open_source(f'hf:{saved}/whole')


def test_a_hub_id_that_cannot_be_reached_is_one_line():
    """HF_HUB_OFFLINE is set for all tests."""
    with pytest.raises(DataError, match=r'nobody/nothing: cannot be opened .*, and the connection'):
        open_source('hf:nobody/nothing')


@pytest.mark.parametrize('damage', ['cut', 'emptied', 'gone'])
def test_damaged_copies_are_refused(saved, tmp_path, damage):
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / 'copy')
    (shard,) = (tmp_path / 'copy').glob('*.arrow')
    if damage == 'gone':
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[: 900 if damage == 'cut' else 0])
    with pytest.raises(DataError, match='cannot be') as caught:
        open_source(f'hf:{tmp_path}/copy?prompt=question')
    assert '\n' not in str(caught.value)
    datasets.Dataset.from_dict({'prompt': ['abc', 'de']}).save_to_disk(tmp_path / 'far')
    (shard,) = (tmp_path / 'far').glob('*.arrow')
    data = shard.read_bytes()
    shard.unlink()  # it is mapped
    shard.write_bytes(data.replace(struct.pack('<3i', 0, 3, 5), struct.pack('<3i', 0, 3, 2**30)))
    with pytest.raises(DataError, match='far: cannot be read'):
        open_source(f'hf:{tmp_path}/far')
    raw = pa.array([b'good', b'\xff\xfe']).cast(pa.string(), safe=False)
    datasets.Dataset(pa.table({'prompt': raw})).save_to_disk(tmp_path / 'latin')
    with pytest.raises(DataError, match=r'latin: cannot be read .*UTF8'):
        open_source(f'hf:{tmp_path}/latin')
    (tmp_path / 'copy/dataset_info.json').write_text(json.dumps({'features': 3}))
    with pytest.raises(DataError, match='cannot be'):
        open_source(f'hf:{tmp_path}/copy?prompt=question')
