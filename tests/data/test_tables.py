"""CSV, TSV and Parquet: the rows that were written are read, or refused, or counted."""

import csv
import gzip
import io
import sys

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from cllm_jax.data.sources import open_source
from cllm_jax.data.tables import read_csv, read_parquet
from cllm_jax.errors import ConfigError, DataError

TEXT = st.text(st.characters(exclude_categories=['Cs'], exclude_characters='\0'), max_size=8)


def csv_of(header, rows, delimiter=',', end='\r\n') -> bytes:
    file = io.StringIO()
    # With a line end of its own this writer leaves a carriage return without quotes.
    quoting = csv.QUOTE_ALL if end == '\n' else csv.QUOTE_MINIMAL
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writerows([header, *rows])
    return file.getvalue().encode()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5),
    tab=st.booleans(),
    end=st.sampled_from(['\n', '\r\n']),
    how=st.sampled_from(['plain', 'gzip', 'bom']),
)
def test_what_was_written_is_read_whatever_is_in_it(tmp_path_factory, rows, tab, end, how):
    data = csv_of(['x', 'prompt', 'answer'], rows, '\t' if tab else ',', end)
    data = {'plain': data, 'gzip': gzip.compress(data), 'bom': b'\xef\xbb\xbf' + data}[how]
    name = ('a.tsv' if tab else 'a.csv') + '.gz' * (how == 'gzip')
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    source = open_source(f'{path}#all')
    assert [(row.prompt, row.answer) for row in source.rows] == [row[1:] for row in rows]
    assert not source.dropped and len({row.id for row in source.rows}) == len(rows)
    table = pa.table(dict(zip(('x', 'prompt', 'answer'), zip(*rows, strict=True), strict=True)))
    parquet.write_table(table, path := path.with_name('a.parquet'), row_group_size=2)
    again = open_source(f'{path}#all').rows
    assert [(r.prompt, r.answer) for r in again] == [(r.prompt, r.answer) for r in source.rows]


def test_ids_and_faults_name_the_line_that_a_row_begins_on(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_text('prompt,answer\n"two\nlines",1\n\nshort\nlong,1,2\nlast,\n')
    source = open_source(f'{path}#all')
    assert [(r.id, r.prompt, r.answer) for r in source.rows] == [
        ('csv-2', 'two\nlines', '1'),
        ('csv-7', 'last', ''),
    ]
    fault = 'another number of fields than the first line (lines 5, 6)'
    assert source.dropped == {fault: 2} and not source.checkable


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60), head=st.sampled_from([b'prompt,answer\n', b'prompt\n', b'']))
def test_any_bytes_are_refused_or_read(tmp_path_factory, data, head):
    path = tmp_path_factory.getbasetemp() / 'bytes'
    path.write_bytes(head + data)
    for read in (read_csv, read_parquet):
        try:
            found = read(path)
        except DataError as error:
            assert str(error).startswith(str(path)) and '\n' not in str(error)
        else:
            for example in found:
                (example.id + example.prompt + example.answer).encode('utf-8')


@pytest.mark.parametrize(
    'text, said',
    [
        ('', 'the file is empty'),
        ('\n\n', 'only blank lines'),
        ('prompt,answer\n', 'no usable row .it has no row'),
        ('promt,answer\na,b\n', "no field 'prompt'; did you mean 'promt'.*prompt= and answer="),
        ('prompt,prompt\na,b\n', "two fields are called 'prompt'"),
        ('prompt\n"never closed\nb\nc\n', r'line 2: not CSV .*close or double its quotes'),
        ('prompt\na\n"b" c\n', r'line 3: not CSV'),
        ('prompt\n' + 'a' * 200_000 + '\n', r'line 2: not CSV .field larger than field limit'),
        ('prompt,answer\na\nb\n', r'no usable row .2 with another number .*lines 2, 3'),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_the_line(tmp_path, text, said):
    path = tmp_path / 'a.csv'
    path.write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        read_csv(path)
    assert str(path) in str(caught.value)


def test_parquet_gives_text_and_counts_rows_without(tmp_path):
    path = tmp_path / 'a.parquet'
    columns = {
        'q.x': pa.array(['a', None, 'c'], pa.large_string()),
        'answer': pa.array(['1', '2', None]).dictionary_encode(),
        'number': [1, 2, 3],
        'list': [['a'], [], ['b']],
        'raw': pa.array([b'a', b'\xff', b'b']),
    }
    parquet.write_table(pa.table(columns), path)
    source = open_source(f'parquet:{path}?prompt=q.x#all')
    assert [(r.id, r.prompt, r.answer) for r in source.rows] == [('parquet-1', 'a', '1')]
    missing = {"no text in 'q.x' (row 2)": 1, "no text in 'answer' (row 3)": 1}
    assert source.dropped == missing
    assert len(open_source(f'{path}?prompt=q.x&answer=#all')) == 2
    for field, kind in (('number', 'int64'), ('list', 'list<'), ('raw', 'binary')):
        with pytest.raises(DataError, match=f"field '{field}' is {kind}.*; only text"):
            open_source(f'{path}?prompt={field}')
    with pytest.raises(DataError, match="no field 'anwser'; did you mean 'answer'"):
        open_source(f'{path}?prompt=q.x&answer=anwser')
    with pytest.raises(DataError, match=f'a directory; .* hf:{tmp_path}'):
        read_parquet(tmp_path)


def test_text_of_parquet_that_is_not_utf8_is_refused(tmp_path):
    path, raw = tmp_path / 'a.parquet', pa.array([b'good', b'\xff\xfe'])
    parquet.write_table(pa.table({'prompt': raw.cast(pa.string(), safe=False)}), path)
    with pytest.raises(DataError, match=r'cannot be read .*utf-8') as caught:
        read_parquet(path)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['pyarrow', 'datasets'])
def test_without_the_packages_the_error_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    kind = 'parquet' if name == 'pyarrow' else 'hf'
    with pytest.raises(ConfigError, match=r"pip install 'cllm_jax\[datasets\]'"):
        open_source(f'{kind}:{tmp_path}/x')
