"""Traces on disk: what was written is read, and damage is one line."""

import json

import pytest

from cllm_jax.errors import DataError
from cllm_jax.evaluation.trace import accepted, checked, read_traces, write_traces
from tests.evaluation.traces import jacobi, plain, tree

TRACES = [jacobi(), tree(), plain(seconds=None, timed='AR, float32', prompt='</script>\u2028')]


@pytest.fixture
def file(tmp_path):
    write_traces(path := tmp_path / 'new' / 'trace.json', TRACES)
    return path


def test_traces_are_read_as_they_were_written(file):
    assert read_traces(file) == TRACES
    assert json.loads(file.read_text())['format'] == 'cllm_jax trace 1'


def test_places_follow_from_parents():
    assert jacobi().forwards[1].places == [0, 1, 2, 3]
    assert tree().forwards[1].places == [0, 1, 1, 2, 2, 2, 2, 3, 3]
    assert tree().answer == [1, 2, 3, 4] and jacobi().answer == plain().answer


def test_the_first_of_the_longest_paths_is_accepted():
    assert accepted((1, 2, 2, 3), (-1, 0, 0, 2), [2, 3, 4]) == (2, 3)
    assert accepted((1, 2, 2), (-1, 0, 0), [2, 3]) == (1,)
    assert accepted((1, 2, 3), (-1, 0, 1), [2]) == (1,), 'no more than was committed'
    assert accepted((1, 5), (-1, 0), [2]) == ()


CHANGES = {
    'another format': lambda d: d.update(format='cllm_jax trace 2'),
    'no format': lambda d: d.pop('format'),
    'no decode': lambda d: d.update(decodes=[]),
    'a field too many': lambda d: d['decodes'][0].update(more=1),
    'no forward': lambda d: d['decodes'][0].update(forwards=[]),
    'no tokens': lambda d: d['decodes'][0]['forwards'][1].update(tokens=[], parents=[]),
    'nothing committed': lambda d: d['decodes'][0]['forwards'][-1].update(committed=[]),
    'a forward missing': lambda d: d['decodes'][0]['forwards'].pop(1),
    'words for tokens': lambda d: d['decodes'][0]['forwards'][0].update(tokens=['a'] * 4),
    'a parent that is later': lambda d: d['decodes'][1]['forwards'][1]['parents'].__setitem__(1, 3),
    'two roots': lambda d: d['decodes'][1]['forwards'][1]['parents'].__setitem__(3, -1),
    'a window too large': lambda d: d['decodes'][0]['forwards'][1].update(window=5),
    'others accepted': lambda d: d['decodes'][0]['forwards'][3].update(accepted=[1]),
    'seconds': lambda d: d['decodes'][0].update(seconds=0.0),
    'no seconds': lambda d: d['decodes'][0].update(seconds=float('nan')),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_a_damaged_trace_is_refused_in_one_line(change, file):
    change(content := json.loads(file.read_text()))
    file.write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        read_traces(file)
    message = str(caught.value)
    assert message.startswith(f'{file}: ') and '\n' not in message and '; ' in message


@pytest.mark.parametrize('data', [b'', b'{"format"', b'\xff\xfe', b'[]', b'null', b'[' * 100_000])
def test_what_is_not_a_trace_is_refused(data, file):
    file.write_bytes(data)
    with pytest.raises(DataError, match='not a trace'):
        read_traces(file)


def test_a_cut_file_is_refused_wherever_it_was_cut(file):
    data = file.read_bytes()
    for size in range(0, len(data) - 2, 97):
        file.write_bytes(data[:size])
        with pytest.raises(DataError):
            read_traces(file)


def test_what_was_made_by_hand_is_sound():
    assert [checked(trace) for trace in TRACES] == TRACES
