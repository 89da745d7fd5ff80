"""Files of JSON: what is accepted, and that each fault of a file ends in one line that names it."""

import gzip

import pytest

from cllm_jax.data import formats, json_rows
from cllm_jax.errors import DataError

ROW = b'{"prompt": "p", "answer": "a"}\n'


@pytest.mark.parametrize(
    'data',
    [
        b'{"prompt": "one"}\n{"prompt": "two"}\n',
        b'{"prompt": "one"}\r\n{"prompt": "two"}\r\n',
        b'\xef\xbb\xbf{"prompt": "one"}\n{"prompt": "two"}',
        b'{"prompt": "one"}\n \t\r\n\n{"prompt": "two"}\n\n',
        gzip.compress(b'{"prompt": "one"}\n{"prompt": "two"}'),
        gzip.compress(b'{"prompt": "one"}\n') + gzip.compress(b'{"prompt": "two"}'),
    ],
    ids=['plain', 'crlf', 'bom', 'blank lines', 'gzip without .gz', 'gzip of two members'],
)
def test_accepted_spellings_of_one_file(tmp_path, data):
    path = tmp_path / 'rows.jsonl'
    path.write_bytes(data)
    assert [row.prompt for row in formats.read_jsonl(path)] == ['one', 'two']


DEEP = b'[' * 200_000
BAD_FILES = {
    'empty': (b'', ['empty']),
    'blank': (b'\n \n', ['blank']),
    'bom only': (b'\xef\xbb\xbf', ['blank']),
    'empty gzip': (gzip.compress(b''), ['blank']),
    'latin-1': (ROW + b'{"prompt": "caf\xe9"}', ['line 2', 'UTF-8', 'byte 16']),
    'utf-16': ('{"prompt": "p"}'.encode('utf-16'), ['line 1', 'UTF-8']),
    'half a line': (ROW + ROW[:-9], ['line 2', 'not JSON']),
    'line number counts blanks': (b'\n\n' + ROW + b'\n{', ['line 5', 'not JSON']),
    'two values': (b'{} {}', ['line 1', 'not JSON']),
    'git-lfs': (b'version https://git-lfs.github.com/spec/v1\n', ['line 1', 'git lfs pull']),
    'deep': (DEEP, ['line 1', 'unreadable JSON']),
    'long number': (b'{"prompt": ' + b'9' * 5000 + b'}', ['line 1', 'unreadable JSON']),
    'list': (b'[1]', ['line 1', 'a list', 'object']),
    'null': (b'null', ['line 1', 'null', 'object']),
    'no prompt': (b'{"text": "x"}', ['line 1', "no 'prompt' field", "'text'"]),
    'prompt number': (b'{"prompt": 3}', ['line 1', "'prompt' is a number", 'string']),
    'answer null': (b'{"prompt": "p", "answer": null}', ['line 1', "'answer' is null", 'string']),
    'id of half': (b'{"prompt": "p", "id": 7.5}', ['line 1', "'id' is a number", 'string']),
    'ids alike': (b'{"prompt":"p","id":7}\n{"prompt":"q","id":"7"}', ['line 2', "'7'", 'line 1']),
    'surrogate': (b'{"prompt": "\\ud83d!"}', ['line 1', 'surrogate']),
    'same id': (b'{"prompt":"p","id":"a"}\n{"prompt":"q","id":"a"}', ['line 2', "'a'", 'line 1']),
    'truncated gzip': (gzip.compress(ROW * 99)[:-12], ['gzip', 'early']),
    'bytes after gzip': (gzip.compress(ROW) + b'tail', ['line 2', 'cannot be read']),
}


@pytest.mark.parametrize('case', BAD_FILES)
def test_bad_file_is_one_line_that_names_it(tmp_path, case):
    data, words = BAD_FILES[case]
    path = tmp_path / 'bad.jsonl'
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        formats.read_jsonl(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and '\n' not in message and ';' in message
    assert [word for word in words if word not in message] == []


def test_bad_paths(tmp_path):
    (tmp_path / 'named.jsonl.gz').write_bytes(ROW)
    for path, word in [
        (tmp_path / 'absent.jsonl', 'no such file'),
        (tmp_path, 'directory'),
        (tmp_path / 'named.jsonl.gz', 'not a gzip file'),
        (tmp_path / ('x' * 300), 'cannot be opened'),
        ('~no-such-user/x.jsonl', 'no such file'),
        ('a\0b.jsonl', 'cannot be opened'),
    ]:
        with pytest.raises(DataError, match=word):
            formats.read_jsonl(path)


def test_every_cut_of_a_gzip_is_found(tmp_path):
    whole = gzip.compress(b''.join(b'{"prompt": "%d"}\n' % i for i in range(40)))
    path = tmp_path / 'cut.jsonl.gz'
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError):
            formats.read_jsonl(path)


def test_long_lines_and_documents_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, 'MAX_LINE', 64)
    monkeypatch.setattr(json_rows, 'MAX_DOCUMENT', 64)
    path = tmp_path / 'bomb.jsonl.gz'
    path.write_bytes(gzip.compress(ROW + b'{"prompt": "' + b'x' * 100 + b'"}'))
    with pytest.raises(DataError, match='line 2: longer than 64 bytes'):
        formats.read_jsonl(path)
    with pytest.raises(DataError, match='longer than 64 bytes'):
        formats.read_sharegpt(path)
    exact = b'{"prompt": "' + b'x' * 50 + b'"}'
    path.write_bytes(gzip.compress(exact))
    assert len(exact) == 64 and len(formats.read_jsonl(path)) == 1
