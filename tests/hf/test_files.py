"""Which files of weights are not opened, and how it is said: the file, and a remedy."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from cllm_jax.errors import CllmError, DataError
from cllm_jax.hf.files import INDEX, SINGLE
from cllm_jax.hf.load import load
from cllm_jax.hf.model import fingerprint
from cllm_jax.hf.weights import read_model
from tests.tiny_model import refusal, to_cache, write_sharded

Q = 'model.layers.0.self_attn.q_proj.weight'


FILES = {
    'empty': (lambda data: b'', 'an empty file'),
    'lfs': (lambda data: b'version https://git-lfs.github.com/spec/v1\noid x\n', 'git lfs pull'),
    'html': (lambda data: b'\n<!DOCTYPE html><html>404</html>', 'an HTML page'),
    'html2': (lambda data: b'<html lang="en">', 'an HTML page'),
    'cut in the weights': (lambda data: data[:-1], 'damaged'),
    'cut in the header': (lambda data: data[:50], 'damaged'),
    'cut in the length': (lambda data: data[:5], 'damaged'),
    'tail': (lambda data: data + b'\0', 'damaged'),
    'garbage': (lambda data: bytes(range(256)) * 4, 'damaged'),
    'zeros': (lambda data: bytes(1000), 'damaged'),
    'pickle': (lambda data: b'\x80\x04\x95' + bytes(100), 'damaged'),
}


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('kind', ['single', 'sharded'])
def test_damaged_files_are_named(request, kind, name):
    directory = request.getfixturevalue(kind)
    damage, reason = FILES[name]
    path = sorted(directory.glob('*.safetensors'))[-1]
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(read_model, directory, of=DataError)
    assert str(path) in message and reason in message


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'consolidated.00.pth'])
def test_pickles_are_never_opened(single, name):
    (single / SINGLE).unlink()
    (single / name).write_bytes(b'cos\nsystem\n(S"exit 1"\ntR.')
    message = refusal(read_model, single, of=DataError)
    assert name in message and 'save_pretrained' in message
    (single / name).unlink()
    assert f'no {SINGLE}' in refusal(read_model, single, of=DataError)


INDEXES = {
    'not json': '{',
    'list': '[]',
    'no map': '{}',
    'null map': '{"weight_map": null}',
    'empty map': '{"weight_map": {}}',
    'list map': '{"weight_map": ["a"]}',
    'unhashable': '{"weight_map": {"a": ["model.safetensors"]}}',
    'deep': '[' * 200_000,
}
OUTSIDE = [
    '../other/model.safetensors',
    '/etc/passwd',
    '/tmp/model.safetensors',
    'sub/model.safetensors',
    '..',
    '.safetensors',
    '',
    'pytorch_model.bin',
    'C:\\model.safetensors\0',
    '\ud800.safetensors\x1b[2J',
    'x' * 5000 + '.safetensors',
    7,
    None,
]


@pytest.mark.parametrize('name', INDEXES)
def test_a_broken_index_is_refused(sharded, name):
    (sharded / INDEX).write_text(INDEXES[name])
    assert f'{INDEX}: not a safetensors index' in refusal(read_model, sharded, of=DataError)


@pytest.mark.parametrize('file', OUTSIDE, ids=range(len(OUTSIDE)))
def test_an_index_only_names_files_of_its_directory(sharded, file, tmp_path):
    shutil.copytree(sharded, tmp_path / 'other')
    (sharded / 'sub').mkdir()
    (sharded / 'sub' / SINGLE).touch()
    index = json.loads((sharded / INDEX).read_text())
    index['weight_map'][Q] = file
    (sharded / INDEX).write_text(json.dumps(index))
    message = refusal(read_model, sharded, of=DataError)
    assert f'{INDEX}: names' in message


def test_missing_linked_and_doubled_shards_are_refused(sharded, tmp_path):
    first, second, *_ = sorted(sharded.glob('*.safetensors'))
    second.rename(tmp_path / 'away.safetensors')
    assert second.name in refusal(read_model, sharded, of=DataError)
    second.symlink_to(second.name)
    assert second.name in refusal(read_model, sharded, of=DataError)
    second.unlink()
    shutil.copy(first, second)
    message = refusal(read_model, sharded, of=DataError)
    assert f'also in {first.name}' in message


# Two sets of weights

SHARD = 'model-{:05}-of-{:05}.safetensors'


def load_all(directory):
    return {k: v for path in directory.glob('*.safetensors') for k, v in load_file(path).items()}


STALE = {
    'a later file beside an index': ([SINGLE], True),
    'shards of another number': ([SHARD.format(1, 99), SHARD.format(2, 99)], True),
    'a shard that the index forgot': ([SHARD.format(99, 99)], True),
    'shards beside a file': ([SHARD.format(1, 2), SHARD.format(2, 2)], False),
    'one shard beside a file': ([SHARD.format(2, 2)], False),
}


@pytest.mark.parametrize('name', STALE)
def test_two_sets_of_weights_are_refused_by_name(request, name):
    stale, has_index = STALE[name]
    directory = request.getfixturevalue('sharded' if has_index else 'single')
    own = sorted(path.name for path in directory.glob('*.safetensors'))
    changed = {key: array + 1 for key, array in load_all(directory).items()}
    for file in stale:
        save_file(changed, directory / file)
    message = refusal(read_model, directory, of=DataError)
    assert 'two sets of weights' in message and 'delete the stale one' in message
    assert all(file in message for file in (own[0], *stale))
    for file in stale:
        (directory / file).unlink()
    read_model(directory)


def test_an_index_without_its_shards_beside_a_file_is_refused(sharded, single):
    """What `save_pretrained` leaves of a larger model; and the first half of a download."""
    shutil.copy(sharded / INDEX, single)
    message = refusal(read_model, single, of=DataError)
    assert INDEX in message and f'and {SINGLE};' in message
    (single / INDEX).unlink()
    read_model(single)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_the_same_weights_twice_are_one_set(sharded, dtype):
    for path in sharded.glob('*.safetensors'):
        tensors = load_file(path)
        save_file({name: array.astype(jnp.dtype(dtype)) for name, array in tensors.items()}, path)
    whole = load_all(sharded)
    save_file(whole, sharded / SINGLE)
    read_model(sharded)
    whole[Q].view(np.uint8)[0, 0] ^= 1
    save_file(whole, sharded / SINGLE)
    assert 'two sets of weights' in refusal(read_model, sharded, of=DataError)
    del whole[Q]
    save_file(whole, sharded / SINGLE)
    assert 'two sets of weights' in refusal(read_model, sharded, of=DataError)


def test_two_sets_of_quantised_weights_are_refused_unread(sharded):
    whole = load_all(sharded)
    for path in sharded.glob('*.safetensors'):
        small = {name: array.astype(jnp.float8_e4m3fn) for name, array in load_file(path).items()}
        save_file(small, path)
    save_file({k: v.astype(jnp.float8_e4m3fn) for k, v in whole.items()}, sharded / SINGLE)
    assert 'two sets of weights' in refusal(read_model, sharded, of=DataError)


def test_what_no_reader_takes_for_weights_is_no_second_set(single, sharded):
    """Another layout, another precision; and an index that names the one file."""
    for name in ('consolidated', 'model.fp16', 'drafter', 'model-extra'):
        shutil.copy(single / SINGLE, single / f'{name}.safetensors')
        shutil.copy(single / SINGLE, sharded / f'{name}.safetensors')
    read_model(single)
    read_model(sharded)
    names = dict.fromkeys(load_file(single / SINGLE), SINGLE)
    (single / INDEX).write_text(json.dumps({'weight_map': names}))
    read_model(single)


def test_shards_without_their_index_are_refused_by_name(sharded):
    (sharded / INDEX).unlink()
    message = refusal(read_model, sharded, of=DataError)
    assert f'without {INDEX}' in message and 'model-00001-of' in message


# Links


@pytest.mark.parametrize('kind', ['single', 'sharded'])
def test_links_in_a_users_own_directory_are_followed(request, tmp_path, kind):
    """Of one file, of every file, in a row, and of the directory itself."""
    directory = request.getfixturevalue(kind)
    expected = fingerprint(load(str(directory)))
    disk = tmp_path / 'disk'
    disk.mkdir()
    path = sorted(directory.glob('*.safetensors'))[-1]
    path.rename(directory / 'inner')
    path.symlink_to('inner')
    assert fingerprint(load(str(directory))) == expected
    for path in sorted(directory.glob('*.safetensors')):
        path.resolve().rename(disk / path.name)
        path.unlink(missing_ok=True)
        (disk / f'to {path.name}').symlink_to(path.name)
        path.symlink_to(disk / f'to {path.name}')
        assert fingerprint(load(str(directory))) == expected
    (tmp_path / 'link').symlink_to(directory)
    assert fingerprint(load(str(tmp_path / 'link'))) == expected
    (disk / path.name).unlink()
    assert f'{path.name}' in refusal(read_model, directory, of=DataError)


def moved(path, elsewhere):
    elsewhere.parent.mkdir(exist_ok=True, parents=True)
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


CACHES = {
    'as it is': lambda cache, disk: None,
    'blobs on another disk': lambda cache, disk: moved(cache / 'models--a--b/blobs', disk / 'x'),
    'a repository on another disk': lambda cache, disk: moved(cache / 'models--a--b', disk / 'x'),
    'a cache on another disk': lambda cache, disk: moved(cache, disk / 'x'),
    'both': lambda cache, disk: (
        moved(cache / 'models--a--b/blobs', disk / 'x'),
        moved(cache, disk / 'y'),
    ),
    'each blob on another disk': lambda cache, disk: [
        moved(blob, disk / 'blobs' / blob.name)
        for blob in list((cache / 'models--a--b/blobs').iterdir())
    ],
}


@pytest.mark.parametrize('name', CACHES)
@pytest.mark.parametrize('kind', ['single', 'sharded'])
def test_a_hub_cache_is_read_wherever_its_blobs_are(request, tmp_path, kind, name):
    directory = request.getfixturevalue(kind)
    snapshot = to_cache(directory, tmp_path / 'hub')
    CACHES[name](tmp_path / 'hub', tmp_path / 'disk')
    expected = fingerprint(load(str(directory)))
    assert fingerprint(load(str(snapshot))) == expected
    (tmp_path / 'mine').symlink_to(snapshot)
    assert fingerprint(load(str(tmp_path / 'mine'))) == expected


@pytest.mark.parametrize('to', ['{0}', '../../../../{1}', '../../blobs/../../{1}'])
@pytest.mark.parametrize('kind', ['single', 'sharded'])
def test_links_out_of_a_hub_cache_are_refused(request, tmp_path, kind, to):
    directory = request.getfixturevalue(kind)
    snapshot = to_cache(directory, tmp_path / 'hub')
    path = sorted(snapshot.glob('*.safetensors'))[0]
    away = tmp_path / 'away.safetensors'
    shutil.copy(path, away)
    shutil.copy(path, tmp_path / 'hub' / away.name)
    path.unlink()
    path.symlink_to(to.format(away, away.name))
    assert path.is_file()
    message = refusal(read_model, snapshot, of=DataError)
    assert path.name in message and 'a link that leads out' in message


@given(data=st.binary(max_size=60), where=st.integers(0, 1 << 12), cut=st.booleans())
def test_any_bytes_in_index_or_weights_are_read_or_refused(tmp_path_factory, data, where, cut):
    directory = tmp_path_factory.getbasetemp() / 'fuzzed'
    for pattern in (INDEX, '*.safetensors'):
        shutil.rmtree(directory, ignore_errors=True)
        path = sorted(write_sharded(directory).glob(pattern))[0]
        old = path.read_bytes()
        at = where % len(old)
        path.write_bytes(old[:at] + data + (b'' if cut else old[at + len(data) :]))
        try:
            read_model(directory)
        except CllmError as e:
            assert str(e).isprintable() and len(str(e)) < 900
