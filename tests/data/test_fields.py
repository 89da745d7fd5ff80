"""What may be asked for after a dataset's name, and which rows fit."""

from collections import Counter

import pytest

from cllm_jax.data.fields import OPTIONS, examples_of, read_options
from cllm_jax.data.sources import open_source
from cllm_jax.errors import ConfigError, DataError


def test_options_come_after_a_question_mark_and_are_percent_encoded():
    read = {
        'a.csv': ('a.csv', {}),
        'a?.csv': ('a?.csv', {}),  # such a file has no options
        'a.csv?prompt=q&answer=': ('a.csv', {'prompt': 'q', 'answer': ''}),
        'a?b/c.csv?prompt=the%20%3F%26+one': ('a?b/c.csv', {'prompt': 'the ?& one'}),
    }
    assert {spec: read_options(spec, OPTIONS) for spec in read} == read
    for wrong, why in {
        'a?promt=q': "'promt'; did you mean 'prompt'",
        'a?prompt=': "'prompt' is empty",
        'a?prompt=q&prompt=r': 'twice',
        'a?prompt=q&split=train': "no option 'split'",
    }.items():
        with pytest.raises(ConfigError, match=why):
            read_options(wrong, OPTIONS)


def test_every_row_is_an_example_or_counted_and_the_first_of_a_kind_are_named():
    values = ['q', 'a'], ['q', None], None, [None, None], ['', '']
    rows, dropped = [(n, values[n % 5]) for n in range(40)], Counter()
    kept = examples_of('t', rows, ['p', 'r'], 'x', dropped)
    assert [e.id for e in kept] == [f't-{n}' for n in range(40) if n % 5 in (0, 4)]
    assert len(kept) + sum(dropped.values()) == 40
    assert dropped == {
        "no text in 'r' (rows 1, 6, 11, 16, 21, ...)": 8,
        'another number of fields than the first line (rows 2, 7, 12, 17, 22, ...)': 8,
        "no text in 'p' (rows 3, 8, 13, 18, 23, ...)": 8,
    }
    with pytest.raises(DataError, match=r"^x: no usable row \(1 with no text in 'p' \(row 3\)\)"):
        examples_of('t', [(3, [None])], ['p'], 'x', Counter())


def test_fields_of_json_lines_can_be_chosen(tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text('{"q": "1+1=", "a": "2", "prompt": "no"}\n{"q": "2+2=", "a": "4"}\n')
    rows = open_source(f'{path}?prompt=q&answer=a#all').rows
    assert [(r.prompt, r.answer) for r in rows] == [('1+1=', '2'), ('2+2=', '4')]
    assert {r.answer for r in open_source(f'jsonl:{path}?prompt=q&answer=#all').rows} == {''}
    assert not open_source(f'{path}?prompt=q#all').checkable
    with pytest.raises(DataError, match="line 1: no 'r' field"):  # not optional once it is named
        open_source(f'{path}?prompt=q&answer=r')
    with pytest.raises(DataError, match="line 2: no 'prompt' field"):
        open_source(str(path))
