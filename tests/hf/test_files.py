"""Which files of weights are not opened, and how it is said: the file, and a remedy."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_jax.errors import CllmError, DataError
from cllm_jax.hf.files import INDEX, SINGLE
from cllm_jax.hf.load import fingerprint, load
from cllm_jax.hf.weights import read_model
from tests.tiny_model import refusal, write_sharded

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
    second.symlink_to(tmp_path / 'away.safetensors')
    message = refusal(read_model, sharded, of=DataError)
    assert second.name in message and 'a link that leads out' in message
    second.unlink()
    second.symlink_to(second.name)
    assert second.name in refusal(read_model, sharded, of=DataError)
    second.unlink()
    shutil.copy(first, second)
    message = refusal(read_model, sharded, of=DataError)
    assert f'also in {first.name}' in message


def test_links_within_a_directory_and_into_the_hubs_blobs_are_followed(sharded, tmp_path):
    expected = fingerprint(load(str(sharded)))
    first, second, *_ = sorted(sharded.glob('*.safetensors'))
    first.rename(sharded / 'inner')
    first.symlink_to('inner')
    assert fingerprint(load(str(sharded))) == expected
    snapshot = tmp_path / 'models--a--b' / 'snapshots' / 'abc'
    blobs = tmp_path / 'models--a--b' / 'blobs'
    blobs.mkdir(parents=True)
    shutil.copytree(sharded, snapshot, symlinks=True)
    (snapshot / second.name).rename(blobs / '123')
    (snapshot / second.name).symlink_to('../../blobs/123')
    assert fingerprint(load(str(snapshot))) == expected


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
