"""Datasets in local files: one function per format, each `path -> list[Example]`.

Whatever is not as the format says raises DataError (see json_rows.py): a row is never skipped in
silence. Unless a row brings its own id, ids are `format-line` or, in a file that is one JSON list,
`format-item`, both counted from 1.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cllm_jax.data import prompts
from cllm_jax.data.json_rows import (
    expect_object,
    expect_sound,
    items,
    list_field,
    rows,
    short,
    text_field,
    texts_field,
)
from cllm_jax.errors import DataError
from cllm_jax.tasks.example import Example
from cllm_jax.tasks.grader import final_number

MAX_HUMAN_TURN = 1024  # characters; CLLM's limit for ShareGPT

_CALCULATOR_MARK = re.compile(r'<<[^<>]*>>')
_HUMAN = ('human', 'user')
_MODEL = ('gpt', 'chatgpt', 'assistant', 'bing', 'bard')


def read_jsonl(path: str | Path) -> list[Example]:
    """Rows `{"prompt": str, "answer": str, "id": str}`; answer (then '') and id are optional.

    An id may be a whole number too.

    Prompt and answer are used as they stand. Ids must differ, since results are kept by id.
    """
    examples: list[Example] = []
    line_of: dict[str, int] = {}
    for where, number, row in rows(path):
        prompt = text_field(row, 'prompt', where)
        answer = text_field(row, 'answer', where) if 'answer' in row else ''
        name = f'jsonl-{number}'
        if 'id' in row:
            number_id = type(row['id']) is int
            name = str(row['id']) if number_id else text_field(row, 'id', where)
        if name in line_of:
            first = line_of[name]
            raise DataError(
                f'{where}: id {short(name)} is that of line {first} too; make it unique'
            )
        line_of[name] = number
        examples.append(Example(name, prompt, answer))
    return _some(examples, path)


def read_gsm8k(path: str | Path, *, calculator_marks: bool = True) -> list[Example]:
    """GSM8K (arXiv 2110.14168), rows `{"question", "answer"}`, in CLLM's prompt.

    Every answer must have the line `#### N` with its final number. `calculator_marks=False` takes
    the `<<48/2=24>>` marks out of the answers.
    """
    examples = []
    for where, number, row in rows(path):
        prompt = prompts.gsm8k(text_field(row, 'question', where))
        answer = text_field(row, 'answer', where)
        if final_number(answer) is None:
            raise DataError(
                f"{where}: 'answer' has no line '#### N' with the final number, as GSM8K's have; "
                'open other files as jsonl'
            )
        if not calculator_marks:
            answer = _CALCULATOR_MARK.sub('', answer)
        examples.append(Example(f'gsm8k-{number}', prompt, answer))
    return _some(examples, path)


def read_wikisql(path: str | Path) -> list[Example]:
    """WikiSQL (arXiv 1709.00103) as rows `{"question": str, "columns": [str, ...], "sql": str}`.

    The columns are all that the model is told of the table; queries call the table `table`.
    """
    examples = []
    for where, number, row in rows(path):
        columns = texts_field(row, 'columns', where)
        prompt = prompts.wikisql(text_field(row, 'question', where), columns)
        answer = ' ' + text_field(row, 'sql', where)
        examples.append(Example(f'wikisql-{number}', prompt, answer))
    return _some(examples, path)


def read_codesearchnet(path: str | Path) -> list[Example]:
    """CodeSearchNet (arXiv 1909.09436), docstring to function, in CLLM's prompt.

    Rows have the corpus' fields `docstring` and `code`, or those of its Hugging Face copy,
    `func_documentation_string` and `func_code_string`.
    """
    examples = []
    for where, number, row in rows(path):
        if 'func_documentation_string' in row:
            doc, code = 'func_documentation_string', 'func_code_string'
        else:
            doc, code = 'docstring', 'code'
        prompt = prompts.codesearchnet(text_field(row, doc, where))
        examples.append(Example(f'codesearchnet-{number}', prompt, text_field(row, code, where)))
    return _some(examples, path)


def read_spider(path: str | Path) -> list[Example]:
    """Spider (arXiv 1809.08887): `[{"db_id", "question", "query"}]` beside its `tables.json`.

    `path` is a question file such as `train_spider.json`, or a directory, of which `dev.json` is
    read. The prompt lists the tables and columns of the question's database; the databases
    themselves are not used. `meta` holds the `db_id`.
    """
    path = Path(os.path.expanduser(path))
    if os.path.isdir(path):
        path = path / 'dev.json'
    schemas = {}
    for where, _, item in items(path.with_name('tables.json')):
        schemas[text_field(item, 'db_id', where)] = _spider_schema(item, where)
    examples = []
    for where, number, item in items(path):
        database = text_field(item, 'db_id', where)
        if database not in schemas:
            raise DataError(
                f'{where}: database {short(database)} is not in the tables.json beside the file; '
                'take both files from the same release'
            )
        prompt = prompts.spider(text_field(item, 'question', where), schemas[database])
        query = text_field(item, 'query', where)
        examples.append(Example(f'spider-{number}', prompt, query, {'db_id': database}))
    return _some(examples, path)


def read_sharegpt(path: str | Path, dropped: Counter[str] | None = None) -> list[Example]:
    """ShareGPT: `[{"conversations": [{"from", "value"}, ...]}]`, first human turn and its reply.

    As in CLLM, later turns are ignored and conversations whose human turn is longer than 1024
    characters are left out; so are those without such a turn or a reply to it. `dropped`, where
    given, counts what was left out, by reason. White space around both texts is removed.
    """
    dropped = Counter() if dropped is None else dropped
    examples = []
    for where, number, item in items(path):
        message, reply = _first_exchange(list_field(item, 'conversations', where), where)
        if not message:
            dropped['no human turn'] += 1
        elif len(message) > MAX_HUMAN_TURN:
            dropped[f'human turn longer than {MAX_HUMAN_TURN} characters'] += 1
        elif not reply:
            dropped['no reply'] += 1
        else:
            prompt = prompts.vicuna(message)
            examples.append(Example(f'sharegpt-{number}', prompt, ' ' + reply))
    return _some(examples, path)


def _first_exchange(turns: list[Any], where: str) -> tuple[str, str]:
    """The first human turn and the turn after it, if that is the model's; '' for what is absent."""
    speakers, values = [], []
    for turn in turns:
        expect_object(turn, f"{where}, turn in 'conversations'")
        speakers.append(text_field(turn, 'from', where).lower())
        values.append(text_field(turn, 'value', where).strip())
    first = next((i for i, speaker in enumerate(speakers) if speaker in _HUMAN), len(turns))
    reply = next(zip(speakers[first + 1 :], values[first + 1 :], strict=True), ('', ''))
    return ''.join(values[first : first + 1]), reply[1] if reply[0] in _MODEL else ''


def _spider_schema(item: Mapping[str, Any], where: str) -> list[tuple[str, list[str]]]:
    """`(table, columns)` pairs; Spider lists columns as `[table index, name]`, `*` as -1."""
    tables = [(name, []) for name in texts_field(item, 'table_names_original', where)]
    for column in list_field(item, 'column_names_original', where):
        match column:
            case [int(table), str(name)] if -1 <= table < len(tables):
                if table >= 0:
                    tables[table][1].append(expect_sound(name, 'column_names_original', where))
            case _:
                raise DataError(
                    f"{where}: 'column_names_original' has {short(column)}; every entry must be "
                    '[table index, column name]'
                )
    return tables


def _some(examples: list[Example], path: str | Path) -> list[Example]:
    if not examples:
        raise DataError(f'{path}: no usable row; check that the file is of this format')
    return examples
