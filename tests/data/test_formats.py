"""Readers of local files: what they make of good files, and that bad ones end in one line."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_jax.data import formats
from cllm_jax.errors import DataError
from cllm_jax.tasks import grader
from cllm_jax.tasks.example import Example

SHARED = Path(__file__).parents[3] / 'shared' / 'data'
ROW = b'{"prompt": "p", "answer": "a"}\n'


def write(path: Path, *rows) -> Path:
    path.write_text('\n'.join(json.dumps(row) for row in rows))
    return path


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f'{name} is not beside this checkout (../shared/data)')
    return path


# Damaged rows.


VALID = {
    formats.read_jsonl: {'prompt': 'p', 'answer': 'a', 'id': 'i'},
    formats.read_gsm8k: {'question': 'q', 'answer': '#### 1'},
    formats.read_wikisql: {'question': 'q', 'columns': ['c'], 'sql': 's'},
    formats.read_codesearchnet: {'docstring': 'd', 'code': 'c'},
    formats.read_spider: {
        'db_id': 'd',
        'question': 'q',
        'query': 's',
        'table_names_original': ['t'],
        'column_names_original': [[0, 'c']],
    },
    formats.read_sharegpt: {
        'conversations': [{'from': 'human', 'value': 'h'}, {'from': 'gpt', 'value': 'g'}]
    },
}
VALID[formats.read_sharegpt_chat] = VALID[formats.read_sharegpt]
LISTS = (formats.read_spider, formats.read_sharegpt, formats.read_sharegpt_chat)
JSON = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=3,
)


def read_or_refuse(read, path: Path) -> bool:
    """Whether `path` was read; anything but sound examples or a one-line DataError fails."""
    try:
        found = read(path)
    except DataError as error:
        assert '\n' not in str(error)
        return False
    assert found
    for example in found:
        chat = [] if isinstance(example.prompt, str) else [m['content'] for m in example.prompt]
        texts = chat or [example.prompt]
        ''.join([example.id, *texts, example.answer]).encode('utf-8')
    return True


@pytest.mark.parametrize('read', VALID)
def test_damaged_rows_give_examples_or_data_error(tmp_path, read):
    path = tmp_path / 'tables.json'  # Spider reads it as its schema too
    row = VALID[read]
    path.write_text(json.dumps([row] if read in LISTS else row))
    assert read_or_refuse(read, path)

    @settings(max_examples=40, deadline=None)
    @given(
        field=st.sampled_from(sorted(row)), value=JSON, cut=st.integers(0, 40), pack=st.booleans()
    )
    def damage(field, value, cut, pack):
        text = json.dumps([row | {field: value}] if read in LISTS else row | {field: value})
        data = text.encode()[: len(text) - max(0, cut - 30)]
        path.write_bytes(gzip.compress(data) if pack else data)
        read_or_refuse(read, path)

    damage()


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_refused_or_read(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / 'bytes.jsonl'
    path.write_bytes(data)
    read_or_refuse(formats.read_jsonl, path)


# Formats: rows to examples.


def test_prompts_end_where_answers_begin():
    ends = {kind: text[-1] for kind, text in formats.PROMPTS.items()}
    assert ends == dict(gsm8k='\n', spider='\n', codesearchnet='\n', sharegpt=':', wikisql=':')


def test_jsonl_fields_are_used_as_they_stand(tmp_path):
    path = write(
        tmp_path / 'a.jsonl', {'prompt': ' p\n', 'answer': ' a ', 'id': 'x'}, {'prompt': ''}
    )
    assert formats.read_jsonl(path) == [Example('x', ' p\n', ' a '), Example('jsonl-2', '', '')]


USER, ASSISTANT = {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': ' b'}
SYSTEM = {'role': 'system', 'content': 's'}


def test_a_row_of_messages_is_a_chat_up_to_its_last_answer(tmp_path):
    path = write(
        tmp_path / 'a.jsonl',
        {'messages': [SYSTEM, USER, ASSISTANT], 'id': 'x'},
        {'prompt': 'p'},
        {'messages': [USER, ASSISTANT, USER]},
    )
    assert formats.read_jsonl(path) == [
        Example('x', (SYSTEM, USER), ' b'),
        Example('jsonl-2', 'p', ''),
        Example('jsonl-3', (USER, ASSISTANT, USER), ''),
    ]


@pytest.mark.parametrize(
    ('row', 'words'),
    [
        ({'messages': [USER], 'prompt': 'p'}, "both 'messages' and 'prompt'; a chat has"),
        ({'messages': [USER], 'answer': 'p'}, "both 'messages' and 'answer'; a chat has"),
        ({'messages': 'x'}, "'messages' is a string; it must be a list"),
        ({'messages': []}, r'messages \[\]: must be a list of one or more; write'),
        ({'messages': [USER, USER]}, "message 2: role 'user': must be 'assistant'.*; join"),
        ({'messages': [{'role': 'user'}]}, 'message 1: no content; write'),
        ({'messages': [ASSISTANT]}, "message 1: role 'assistant': must be 'user'"),
        (
            {'messages': [{'role': 'user', 'content': '\ud800'}]},
            'message 1: content has .* write UTF-8',
        ),
    ],
)
def test_messages_that_are_no_chat_are_refused_with_the_line(row, words, tmp_path):
    path = write(tmp_path / 'a.jsonl', {'prompt': 'p'}, row)
    with pytest.raises(DataError, match=rf'a\.jsonl line 2: {words}'):
        formats.read_jsonl(path)


def test_sharegpt_chats_have_all_their_turns(tmp_path):
    """From the first human one on; what does not alternate is left out and counted."""
    names = {'s': 'system', 'h': 'human', 'u': 'User', 'g': 'gpt', 'c': 'chatgpt', 't': 'tool'}

    def item(kinds: str, **changes) -> dict:
        values = [changes.get(str(i), f' {kind}{i}\n') for i, kind in enumerate(kinds)]
        turns = [{'from': names[k], 'value': v} for k, v in zip(kinds, values, strict=True)]
        return {'conversations': turns}

    kinds = ('hgug', 'ghg', 'shghc', 'h', 'hgh', 'hh', 'ggs', 'htg', 'sg', '')
    rows = [item(k) for k in kinds] + [item('hg', **{'1': ' '})]
    (tmp_path / 'a.json').write_text(json.dumps(rows))
    found = formats.read_sharegpt_chat(tmp_path / 'a.json', dropped := Counter())
    said = {
        row.id: (' '.join(f'{m["role"][0]}:{m["content"]}' for m in row.prompt), row.answer)
        for row in found
    }
    assert said == {
        'sharegpt-1': ('u:h0 a:g1 u:u2', 'g3'),
        'sharegpt-2': ('u:h1', 'g2'),
        'sharegpt-3': ('s:s0 u:h1 a:g2 u:h3', 'c4'),
        'sharegpt-4': ('u:h0', ''),
        'sharegpt-5': ('u:h0 a:g1 u:h2', ''),
    }
    wanted = {'no human turn': 3, 'turns of others, or out of turn': 2, 'an empty turn': 1}
    assert dropped == wanted


def test_gsm8k_prompt_and_marks(tmp_path):
    answer = 'He has 48/2 = <<48/2=24>>24.\n#### 24'
    path = write(tmp_path / 'a.jsonl', {'question': 'Why?', 'answer': answer})
    (row,) = formats.read_gsm8k(path)
    assert row.prompt == "Question:\nWhy?\nAnswer:\nLet's think step by step.\n"
    assert row.answer == answer
    (plain,) = formats.read_gsm8k(path, calculator_marks=False)
    assert plain.answer == 'He has 48/2 = 24.\n#### 24'
    write(path, {'question': 'Why?', 'answer': 'because'})
    with pytest.raises(DataError, match=r'line 1.*#### N'):
        formats.read_gsm8k(path)


def test_wikisql_row(tmp_path):
    sql = 'SELECT "a" FROM table WHERE "say ""x""" = 1'
    path = write(tmp_path / 'a', {'question': 'Who?', 'columns': ['a', 'say "x"'], 'sql': sql})
    (row,) = formats.read_wikisql(path)
    assert row.prompt == 'columns: "a", "say ""x"""\nquestion: Who?\nSQL:'
    assert row.answer == ' ' + sql
    write(path, {'question': 'Who?', 'columns': ['a', 3], 'sql': sql})
    with pytest.raises(DataError, match="line 1: 'columns' holds a number"):
        formats.read_wikisql(path)


def test_codesearchnet_both_spellings(tmp_path):
    path = write(
        tmp_path / 'a',
        {'docstring': 'Adds.', 'code': 'def f(): ...'},
        {'func_documentation_string': 'Adds.', 'func_code_string': 'def f(): ...'},
    )
    first, second = formats.read_codesearchnet(path)
    assert (first.prompt, first.answer) == (second.prompt, second.answer)
    assert first.prompt.startswith('### Instruction:\nPlease generate code based on the following')
    assert first.prompt.endswith('doc:\nAdds.\n### Response:\n')


def spider_files(directory: Path, **change) -> Path:
    schema = {
        'db_id': 'zoo',
        'table_names_original': ['cage', 'animal'],
        'column_names_original': [[-1, '*'], [0, 'id'], [1, 'id'], [1, 'name']],
    } | change
    (directory / 'tables.json').write_text(json.dumps([schema]))
    row = {'db_id': 'zoo', 'question': 'How many?', 'query': 'SELECT count(*) FROM animal'}
    (directory / 'dev.json').write_text(json.dumps([row]))
    return directory


def test_spider_lists_every_table_with_its_own_columns(tmp_path):
    (row,) = formats.read_spider(spider_files(tmp_path))
    assert 'cage (id); animal (id, name)' in row.prompt and '*' not in row.prompt
    assert row.prompt.startswith('### Instruction:\n') and row.prompt.endswith('\n### Response:\n')
    assert (row.answer, row.meta) == ('SELECT count(*) FROM animal', {'db_id': 'zoo'})
    assert formats.read_spider(tmp_path / 'dev.json') == [row]


@pytest.mark.parametrize(
    'change, word',
    [
        ({'db_id': 'farm'}, "item 1: database 'zoo' is not in"),
        ({'column_names_original': [[2, 'id']]}, r"item 1.*has \[2, 'id'\]"),
        ({'column_names_original': ['id']}, "item 1.*has 'id'"),
        ({'table_names_original': None}, "item 1: 'table_names_original' is null"),
    ],
)
def test_spider_schema_faults(tmp_path, change, word):
    with pytest.raises(DataError, match=word):
        formats.read_spider(spider_files(tmp_path, **change))


def test_spider_needs_both_files(tmp_path):
    spider_files(tmp_path)
    (tmp_path / 'tables.json').unlink()
    with pytest.raises(DataError, match=r'tables\.json: no such file'):
        formats.read_spider(tmp_path)


def test_sharegpt_first_exchange_and_counts(tmp_path):
    def conversation(*turns):
        return {'conversations': [{'from': who, 'value': text} for who, text in turns]}

    rows = [
        conversation(
            ('system', 's'), ('human', 'Hi'), ('gpt', 'Yes.\n'), ('human', 'B'), ('gpt', 'C')
        ),
        conversation(('human', 'x' * 1024), ('gpt', 'long')),
        conversation(('human', 'x' * 1025), ('gpt', 'too long')),
        conversation(('gpt', 'alone')),
        conversation(('human', 'Hi')),
        conversation(('human', 'Hi'), ('human', 'again'), ('gpt', 'no')),
        conversation(('human', 'Hi'), ('gpt', ' ')),
        conversation(),
    ]
    path = tmp_path / 'a.json'
    path.write_text(json.dumps(rows))
    dropped = Counter()
    first, second = formats.read_sharegpt(path, dropped)
    assert (first.id, first.prompt, first.answer) == ('sharegpt-1', 'USER: Hi ASSISTANT:', ' Yes.')
    assert second.answer == ' long'
    assert sum(dropped.values()) + 2 == len(rows)
    assert dropped == {
        'human turn longer than 1024 characters': 1,
        'no human turn': 2,
        'no reply': 3,
    }
    path.write_text(json.dumps([{'conversations': [{'from': 'human'}]}]))
    with pytest.raises(DataError, match="item 1: no 'value' field"):
        formats.read_sharegpt(path)
    path.write_text(json.dumps(rows[2:]))
    with pytest.raises(DataError, match='no usable row'):
        formats.read_sharegpt(path)


# Real files, where they are at hand.


def test_gsm8k_train():
    rows = formats.read_gsm8k(shared('gsm8k/train.jsonl.gz'))
    assert len(rows) == 7473
    for row in rows:  # by the rule of openai/grade-school-math
        number = re.search(r'#### (\-?[0-9\.\,]+)', row.answer)[1].replace(',', '')
        assert grader.final_number(row.answer) == int(number)
        assert grader.same_number(row, f'{row.answer}\n\nQuestion: {row.prompt}\n#### 0.5')
    plain = formats.read_gsm8k(shared('gsm8k/train.jsonl.gz'), calculator_marks=False)
    assert not any('<<' in row.answer for row in plain)


def test_wikisql_dev():
    rows = formats.read_wikisql(shared('wikisql/dev.jsonl.gz'))
    assert len(rows) == 8412 and all(row.answer.startswith(' SELECT ') for row in rows)


def test_spider_sample():
    rows = formats.read_spider(shared('spider_sample'))
    assert len(rows) == 120
    unquoted = [row for row in rows if not set('"\'') & set(row.answer)]
    assert unquoted and all(grader.same_sql(r, r.answer.upper() + ' ;') for r in unquoted)
