"""TFDS datasets are read by index, from array_record, with no TensorFlow."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from cllm_jax.data.sources import open_source
from cllm_jax.data.tfds import read_tfds
from cllm_jax.errors import ConfigError, DataError

tfds = pytest.importorskip('tensorflow_datasets')

QUESTIONS = [f'What is {i} + {i}, said José?' for i in range(60)]


class Sums(tfds.core.GeneratorBasedBuilder):
    """Questions and answers, a number, and bytes that are no text."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                'question': tfds.features.Text(),
                'answer': tfds.features.Text(),
                'value': np.int32,
                'raw': tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {'train': self._generate_examples(0, 40), 'test': self._generate_examples(40, 60)}

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            answer = str(2 * i)
            row = {'question': QUESTIONS[i], 'answer': answer, 'value': i, 'raw': b'\xff'}
            yield i, row


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp('tfds')
    Sums(data_dir=directory, file_format='array_record').download_and_prepare()
    return directory


def test_reads_every_row_of_a_split(data_dir):
    rows = read_tfds('sums', 'test', data_dir, 'question', 'answer')
    expected = {QUESTIONS[i]: str(2 * i) for i in range(40, 60)}
    assert {row.prompt: row.answer for row in rows} == expected
    assert [row.id for row in rows] == [f'tfds-{i}' for i in range(20)]
    half = read_tfds(str(data_dir / 'sums' / '1.0.0'), 'test[:50%]', None, 'question', None)
    assert [row.prompt for row in half] == [row.prompt for row in rows[:10]]
    assert {row.answer for row in half} == {''}


def test_spec_splits_again_by_prompt(data_dir):
    spec = f'tfds:sums?data_dir={data_dir}&prompt=question&split=train%2Btest'
    everything = open_source(spec + '#all')
    train = open_source(spec)
    assert len(everything) == 60 and everything.checkable
    kept = {row.prompt for row in train.rows}
    assert kept < set(QUESTIONS)
    heldout = open_source(spec, split='heldout')
    assert kept | {row.prompt for row in heldout.rows} == set(QUESTIONS)
    assert train.check(train[0], train[0].answer)
    assert not open_source(spec + '&answer=#all').checkable


@pytest.mark.parametrize(
    'arguments, word',
    [
        (('sums', 'dev', '', 'question', 'answer'), "split 'dev'.*splits: .*test"),
        (('sums', 'train', '', 'qestion', 'answer'), "no field 'qestion'; did you mean 'question'"),
        (('sums', 'train', '', 'question', 'value'), "row 0: field 'value' is int"),
        (('sums', 'train', '', 'question', 'raw'), "row 0: field 'raw' is not UTF-8"),
        (('absent', 'train', '', 'question', 'answer'), 'no prepared TFDS dataset.*array_record'),
        (('sums:9.9.9', 'train', '', 'question', 'answer'), 'no prepared TFDS dataset'),
        (('huggingface:x', 'train', '', 'question', 'answer'), 'no prepared TFDS dataset'),
        (('a b/!', 'train', '', 'question', 'answer'), 'no prepared TFDS dataset'),
        (('sums', 'train', 'none', 'question', 'answer'), 'no prepared TFDS dataset'),
    ],
)
def test_faults_are_one_line(data_dir, arguments, word):
    name, split, below, prompt, answer = arguments
    with pytest.raises(DataError, match=word) as caught:
        read_tfds(name, split, data_dir / below, prompt, answer)
    assert '\n' not in str(caught.value)


def test_other_formats_are_refused_with_the_remedy(data_dir, tmp_path):
    directory = tmp_path / 'sums' / '1.0.0'
    shutil.copytree(data_dir / 'sums' / '1.0.0', directory)
    info = directory / 'dataset_info.json'
    text = json.loads(info.read_text())
    assert text['fileFormat'] == 'array_record'
    info.write_text(json.dumps(text | {'fileFormat': 'tfrecord'}))
    with pytest.raises(DataError, match=r"prepared as tfrecord.*file_format='array_record'"):
        read_tfds('sums', 'train', tmp_path, 'question', 'answer')
    info.write_text('{')
    with pytest.raises(DataError, match='no prepared TFDS dataset'):
        read_tfds('sums', 'train', tmp_path, 'question', 'answer')


@pytest.mark.parametrize('damage', ['cut', 'half', 'flip', 'empty', 'gone'])
def test_a_damaged_shard_is_found(data_dir, tmp_path, damage):
    directory = tmp_path / 'sums' / '1.0.0'
    shutil.copytree(data_dir / 'sums' / '1.0.0', directory)
    (shard,) = (file for file in directory.iterdir() if 'test.array_record' in file.name)
    data = shard.read_bytes()
    middle = data.index(QUESTIONS[50].encode())
    if damage == 'gone':
        shard.unlink()
    elif damage == 'flip':
        shard.write_bytes(data[:middle] + b'w' + data[middle + 1 :])
    else:
        shard.write_bytes(data[: {'cut': middle, 'half': len(data) // 2, 'empty': 0}[damage]])
    assert len(read_tfds('sums', 'train', tmp_path, 'question', 'answer')) == 40
    with pytest.raises(DataError, match='sums test row') as caught:
        read_tfds('sums', 'test', tmp_path, 'question', 'answer')
    assert '\n' not in str(caught.value) and 'prepare' in str(caught.value)


def test_bad_options():
    with pytest.raises(ConfigError, match="'promt'; did you mean 'prompt'"):
        open_source('tfds:sums?promt=x')
    with pytest.raises(ConfigError, match="'split' is empty"):
        open_source('tfds:sums?split=')


def test_tensorflow_is_never_imported(data_dir, tmp_path):
    (tmp_path / 'tensorflow').mkdir()
    (tmp_path / 'tensorflow' / '__init__.py').write_text('raise SystemExit("tensorflow imported")')
    program = (
        'import sys; from cllm_jax.data.tfds import read_tfds; '
        f'print(len(read_tfds("sums", "train", {str(data_dir)!r}, "question", "answer"))); '
        'assert "tensorflow" not in sys.modules'
    )
    env = {**os.environ, 'PYTHONPATH': f'{tmp_path}{os.pathsep}{os.environ["PYTHONPATH"]}'}
    done = subprocess.run(
        [sys.executable, '-c', program], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == '40'
