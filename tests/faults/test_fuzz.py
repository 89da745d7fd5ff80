"""Files that hold anything: every reader returns, or refuses in one line, and stays where it is.

    pytest tests/faults/test_fuzz.py -m faults -n 0 -s

CLLM_FUZZ_SECONDS sets for how long each reader is tried (20).
"""

import csv
import gzip
import io
import json
import os
import resource
import shutil
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from cllm_jax.data.sources import FORMATS, open_source
from cllm_jax.errors import CllmError
from cllm_jax.hf.config import read_config
from cllm_jax.hf.tokenizer import read_tokenizer
from cllm_jax.hf.weights import read_model
from cllm_jax.runs.recipe import from_mapping, read_recipe
from cllm_jax.training.config import TrainConfig
from tests.tiny_model import tiny_tokenizer, write_sharded, write_single

SECONDS = float(os.environ.get('CLLM_FUZZ_SECONDS', '20'))
ROUND = 200
"""Examples between two looks at the clock."""
LONGEST = 10.0
"""Seconds that reading a file of a few KiB may take on a busy machine."""
GROWTH = 1 << 30
"""Bytes by which the process may grow."""

CONFIGS = Path(__file__).parents[2] / 'configs'
ROWS = {
    'codesearchnet': {'docstring': 'adds', 'code': 'def f(): ...', 'partition': 'train'},
    'gsm8k': {'question': 'How many?', 'answer': '1 + 1 = <<1+1=2>>2\n#### 2'},
    'gsm8k-plain': {'question': 'How many?', 'answer': '1 + 1 = <<1+1=2>>2\n#### 2'},
    'jsonl': {'prompt': 'a', 'answer': 'b'},
    'sharegpt': {'conversations': [{'from': 'human', 'value': 'h'}, {'from': 'gpt', 'value': 'g'}]},
    'spider': {'db_id': 'd', 'question': 'q', 'query': 's'},
    'wikisql': {'table': 't', 'columns': ['a', 'b'], 'question': 'which?', 'sql': 'SELECT a'},
}
LISTS = ('sharegpt', 'spider')
"""Kinds whose files are one JSON list."""
TABLE_KINDS = ('csv', 'tsv', 'parquet')
TABLES = {'db_id': 'd', 'table_names_original': ['t'], 'column_names_original': [[0, 'c']]}

pytestmark = pytest.mark.faults

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(['llama', 'linear', 'llama3', 10**30, -1, 0, 1e308, '1e5', '../x', '\0'])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def edited(valid: bytes) -> st.SearchStrategy[bytes]:
    """A file with up to four pieces cut out and others put in their place."""
    edit = st.tuples(
        st.floats(0, 1),
        st.integers(0, 64),
        st.binary(max_size=16)
        | st.sampled_from([b'{', b'[' * 2000, b'"', b'&a *a', b'\xff', b'1e999', b'9' * 5000]),
    )

    def apply(edits):
        found = valid
        for where, length, piece in edits:
            at = int(where * len(found))
            found = found[:at] + piece + found[at + length :]
        return found

    return st.lists(edit, min_size=1, max_size=4).map(apply)


def changed(valid: dict) -> st.SearchStrategy[bytes]:
    """A JSON object with some of its values exchanged, and keys it should not have."""
    keys = st.sampled_from(sorted(valid)) | st.text(max_size=8)
    return st.dictionaries(keys, values, max_size=4).map(
        lambda changes: json.dumps(valid | changes).encode()
    )


def tried(name: str, read, contents: st.SearchStrategy, put) -> Counter:
    """Read what `put(contents)` leaves, over and over; returns how often it was refused."""
    counts: Counter = Counter()

    @settings(max_examples=ROUND, deadline=None, database=None, derandomize=False)
    @given(contents)
    def once(content):
        put(content)
        begin = time.monotonic()
        try:
            read()
            counts['read'] += 1
        except CllmError as error:
            assert '\n' not in str(error), str(error)
            counts['refused'] += 1
        assert time.monotonic() - begin < LONGEST

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    end = time.monotonic() + SECONDS
    while not counts or time.monotonic() < end:
        once()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(f'{name}: {sum(counts.values())} files in {SECONDS:.0f} s, {dict(counts)}')
    assert grown < GROWTH
    assert counts['refused'] and counts['read'], 'both are tried'
    return counts


def test_config(tmp_path):
    path = write_single(tmp_path / 'model') / 'config.json'
    valid = path.read_bytes()
    contents = edited(valid) | changed(json.loads(valid))
    tried('config.json', lambda: read_config(path.parent), contents, path.write_bytes)


def test_weights(tmp_path):
    model = write_single(tmp_path / 'model')
    path = model / 'model.safetensors'
    valid = path.read_bytes()
    head = edited(valid[:4096]).map(lambda head: head + valid[4096:])
    tried('model.safetensors', lambda: read_model(model), head, path.write_bytes)


def test_weight_index(tmp_path):
    """Names that lead out of the directory are never opened, though a readable file is there."""
    model = write_sharded(tmp_path / 'model')
    outside = tmp_path / 'outside.safetensors'
    shutil.copy(next(model.glob('*-00001-*.safetensors')), outside)
    (model / 'link.safetensors').symlink_to(outside)
    index = model / 'model.safetensors.index.json'
    whole = json.loads(index.read_bytes())
    inside = sorted(set(whole['weight_map'].values()))
    ways_out = ['../outside.safetensors', str(outside), 'link.safetensors', 'x/../../outside', '']
    mapped = st.dictionaries(
        st.sampled_from(sorted(whole['weight_map'])),
        st.sampled_from(inside + ways_out) | values,
        min_size=1,
        max_size=4,
    ).map(lambda changes: json.dumps({'weight_map': whole['weight_map'] | changes}).encode())

    def read():
        named = index.read_bytes()
        read_model(model)
        assert not any(json.dumps(way).encode() in named for way in ways_out)

    tried('weight index', read, edited(index.read_bytes()) | mapped, index.write_bytes)


def test_tokenizer(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / 'tokenizer.json'
    contents = edited(path.read_bytes()) | changed(json.loads(path.read_bytes()))
    tried('tokenizer.json', lambda: read_tokenizer(tmp_path), contents, path.write_bytes)


def some_rows(row: dict, is_list: bool) -> st.SearchStrategy[bytes]:
    """A file of such rows: cut and overwritten anywhere, or with other values in some rows."""

    def file(rows: list[bytes]) -> bytes:
        return b'[' + b','.join(rows) + b']' if is_list else b'\n'.join(rows)

    whole = json.dumps(row).encode()
    return edited(file([whole] * 3)) | st.lists(changed(row) | st.just(whole), max_size=3).map(file)


TABLE = {'prompt': ['a question', 'b,"c"', 'd\n'], 'answer': ['1', '', 'two words']}


def table_file(kind: str) -> bytes:
    """A table in a file of that kind."""
    if kind == 'parquet':
        parquet.write_table(pa.table(TABLE), file := io.BytesIO())
        return file.getvalue()
    writer = csv.writer(file := io.StringIO(), delimiter=',' if kind == 'csv' else '\t')
    writer.writerows([TABLE, *zip(*TABLE.values(), strict=True)])
    return file.getvalue().encode()


def test_every_format_has_rows():
    assert {*ROWS, *TABLE_KINDS, 'hf'} == set(FORMATS) - {'tfds'}


@pytest.mark.parametrize('kind', TABLE_KINDS)
def test_tables(kind, tmp_path):
    path, source = tmp_path / 'table', f'{kind}:{tmp_path / "table"}#all'
    tried(kind, lambda: open_source(source), edited(table_file(kind)), path.write_bytes)


def test_a_copy_of_a_hub_dataset(tmp_path):
    """Arrow files are mapped into memory, where an offset that is wrong would end the process."""
    datasets = pytest.importorskip('datasets')
    datasets.Dataset.from_dict(TABLE).save_to_disk(tmp_path / 'copy')
    names = sorted(file.name for file in (tmp_path / 'copy').iterdir())
    valid = {name: (tmp_path / 'copy' / name).read_bytes() for name in names}
    contents = st.sampled_from(names).flatmap(
        lambda name: st.tuples(st.just(name), edited(valid[name]))
    )

    def put(content):
        shutil.rmtree(tmp_path / 'copy')  # a new file: the one that was mapped stays as it is
        (tmp_path / 'copy').mkdir()
        for name, data in (valid | dict([content])).items():
            (tmp_path / 'copy' / name).write_bytes(data)

    tried('hf', lambda: open_source(f'hf:{tmp_path}/copy#all'), contents, put)


@pytest.mark.parametrize('packed', [False, True], ids=['plain', 'gzip'])
@pytest.mark.parametrize('kind', sorted(ROWS))
def test_rows(kind, packed, tmp_path):
    path = tmp_path / ('rows.json.gz' if packed else 'rows.json')
    (tmp_path / 'tables.json').write_text(json.dumps([TABLES]))
    contents = some_rows(ROWS[kind], kind in LISTS)
    if packed:
        contents = st.tuples(contents.map(gzip.compress), st.booleans()).flatmap(
            lambda pair: edited(pair[0]) if pair[1] else st.just(pair[0])
        )
    source = f'{kind}:{path}#all'
    tried(f'{kind} {path.suffix}', lambda: open_source(source), contents, path.write_bytes)


def test_spider_tables(tmp_path):
    (tmp_path / 'rows.json').write_text(json.dumps([ROWS['spider']]))
    source, path = f'spider:{tmp_path / "rows.json"}#all', tmp_path / 'tables.json'
    contents = some_rows(TABLES, is_list=True)
    tried('tables.json', lambda: open_source(source), contents, path.write_bytes)


def test_recipe(tmp_path):
    path = tmp_path / 'recipe.yaml'
    valid = (CONFIGS / 'embedded.yaml').read_bytes()
    stage = yaml.safe_load(valid)['cllm']

    def read():
        for name, found in read_recipe(path).items():
            from_mapping(TrainConfig, found, name)

    contents = edited(valid) | changed(stage).map(lambda text: b'cllm: ' + text)
    tried('recipe', read, contents, path.write_bytes)
