"""Datasets in local files: one function per format, each `path -> list[Example]`.

Whatever is not as the format says raises DataError (see json_rows.py): a row is never skipped in
silence. Unless a row brings its own id, ids are `format-line` or, in a file that is one JSON list,
`format-item`, both counted from 1. `prompts.yaml` says how a question is put to the model.
"""

import os
import re
from collections import Counter
from pathlib import Path

from cllm_jax.data.chat import fault_of, split_answer
from cllm_jax.data.json_rows import Row, expect_object, items, rows, short
from cllm_jax.errors import DataError
from cllm_jax.tasks.example import Example, Messages, Prompt, read_words
from cllm_jax.tasks.grader import final_number

PROMPTS = read_words('prompts', __package__)
MAX_HUMAN_TURN = 1024  # characters; CLLM's limit for ShareGPT

_CALCULATOR_MARK = re.compile(r'<<[^<>]*>>')
_HUMAN = ('human', 'user')
_MODEL = ('gpt', 'chatgpt', 'assistant', 'bing', 'bard')


def read_jsonl(
    path: str | Path, *, prompt: str = 'prompt', answer: str | None = None
) -> list[Example]:
    """Rows `{"prompt": str, "answer": str, "id": str}`; answer (then '') and id are optional.

    A row may have `messages`, a chat, instead of both; its answer is the last message if that is
    the assistant's. An id may be a whole number too; ids must differ. Prompt and answer are used as
    they stand. Fields of other names can be asked for; such an `answer` is not optional, and ''
    asks for none.
    """
    examples: list[Example] = []
    line_of: dict[str, int] = {}
    for row in rows(path):
        texts = _prompt_and_answer(row, prompt, answer)
        name = f'jsonl-{row.number}'
        if 'id' in row.fields:
            name = str(row.fields['id']) if type(row.fields['id']) is int else row.text('id')
        if (first := line_of.setdefault(name, row.number)) != row.number:
            raise row.error(f'id {short(name)} is that of line {first} too; make it unique')
        examples.append(Example(name, *texts))
    return examples


def _prompt_and_answer(row: Row, prompt: str, answer: str | None) -> tuple[Prompt, str]:
    if 'messages' not in row.fields or (prompt, answer) != ('prompt', None):
        wanted = 'answer' if answer is None and 'answer' in row.fields else answer
        return row.text(prompt), row.text(wanted) if wanted else ''
    for name in ('prompt', 'answer'):
        if name in row.fields:
            raise row.error(f"both 'messages' and {name!r}; a chat has its answer as a message")
    messages = row.array('messages')
    if fault := fault_of(messages):
        raise row.error(fault)
    return split_answer(messages)


def read_gsm8k(path: str | Path, *, calculator_marks: bool = True) -> list[Example]:
    """GSM8K (arXiv 2110.14168), rows `{"question", "answer"}`, in CLLM's prompt.

    Every answer must have the line `#### N`. `calculator_marks=False` removes the `<<48/2=24>>`.
    """
    examples = []
    for row in rows(path):
        prompt, answer = PROMPTS['gsm8k'].format(row.text('question')), row.text('answer')
        if final_number(answer) is None:
            fault = "'answer' has no line '#### N' with the final number, as GSM8K's have"
            raise row.error(f'{fault}; open other files as jsonl')
        if not calculator_marks:
            answer = _CALCULATOR_MARK.sub('', answer)
        examples.append(Example(f'gsm8k-{row.number}', prompt, answer))
    return examples


def read_wikisql(path: str | Path) -> list[Example]:
    """WikiSQL (arXiv 1709.00103) as rows `{"question": str, "columns": [str, ...], "sql": str}`.

    The columns are all that the model is told of the table; queries call the table `table`.
    """
    examples = []
    for row in rows(path):
        question = row.text('question')
        names = ', '.join('"' + name.replace('"', '""') + '"' for name in row.texts('columns'))
        prompt = PROMPTS['wikisql'].format(columns=names, question=question)
        examples.append(Example(f'wikisql-{row.number}', prompt, ' ' + row.text('sql')))
    return examples


def read_codesearchnet(path: str | Path) -> list[Example]:
    """CodeSearchNet (arXiv 1909.09436), docstring to function, in CLLM's prompt.

    Rows have the corpus' fields `docstring` and `code`, or those of its Hugging Face copy,
    `func_documentation_string` and `func_code_string`.
    """
    examples = []
    for row in rows(path):
        doc, code = 'docstring', 'code'
        if 'func_documentation_string' in row.fields:
            doc, code = 'func_documentation_string', 'func_code_string'
        prompt = PROMPTS['codesearchnet'].format(row.text(doc))
        examples.append(Example(f'codesearchnet-{row.number}', prompt, row.text(code)))
    return examples


def read_spider(path: str | Path) -> list[Example]:
    """Spider (arXiv 1809.08887): `[{"db_id", "question", "query"}]` with its `tables.json`.

    `path` is a question file such as `train_spider.json`, or a directory, of which `dev.json` is
    read; `tables.json` is in the same directory. The prompt lists the tables and columns of the
    question's database; the databases themselves are not used. `meta` holds the `db_id`.
    """
    path = Path(os.path.expanduser(path))
    if os.path.isdir(path):
        path = path / 'dev.json'
    tables = items(path.with_name('tables.json'))
    schemas = {item.text('db_id'): _spider_schema(item) for item in tables}
    examples = []
    for item in items(path):
        database = item.text('db_id')
        if database not in schemas:
            fault = f'database {short(database)} is not in the tables.json of the same directory'
            raise item.error(f'{fault}; take both files from the same release')
        question = item.text('question')
        prompt = PROMPTS['spider'].format(schema=schemas[database], question=question)
        query = item.text('query')
        examples.append(Example(f'spider-{item.number}', prompt, query, {'db_id': database}))
    return _some(examples, path)


def read_sharegpt(path: str | Path, dropped: Counter[str] | None = None) -> list[Example]:
    """ShareGPT: `[{"conversations": [{"from", "value"}, ...]}]`, first human turn and its reply.

    As in CLLM, later turns are ignored and a conversation is left out whose human turn is longer
    than 1024 characters; so is one without such a turn or a reply. `dropped` counts what was left
    out, by reason. White space around both texts is removed.
    """
    dropped = Counter() if dropped is None else dropped
    examples = []
    for item in items(path):
        message, reply = _first_exchange(item)
        if not message:
            dropped['no human turn'] += 1
        elif len(message) > MAX_HUMAN_TURN:
            dropped[f'human turn longer than {MAX_HUMAN_TURN} characters'] += 1
        elif not reply:
            dropped['no reply'] += 1
        else:
            prompt = PROMPTS['sharegpt'].format(message)
            examples.append(Example(f'sharegpt-{item.number}', prompt, ' ' + reply))
    return _some(examples, path)


def read_sharegpt_chat(path: str | Path, dropped: Counter[str] | None = None) -> list[Example]:
    """ShareGPT with all turns from the first human one on, as chats for a model's own template.

    A system turn before them is kept, and a model's is not. `dropped` counts the conversations that
    are left out, by reason. White space around each turn is removed.
    """
    dropped = Counter() if dropped is None else dropped
    examples = []
    for item in items(path):
        turns = list(zip(*_turns(item), strict=True))
        system = turns[:1] if turns and turns[0][0] == 'system' else []
        first = next((i for i, (who, _) in enumerate(turns) if who in _HUMAN), len(turns))
        turns = system + turns[first:]
        if len(turns) == len(system):
            dropped['no human turn'] += 1
        elif not all(value for _, value in turns):
            dropped['an empty turn'] += 1
        elif fault_of(messages := _messages(turns)):
            dropped['turns of others, or out of turn'] += 1
        else:
            examples.append(Example(f'sharegpt-{item.number}', *split_answer(messages)))
    return _some(examples, path)


def _messages(turns: list[tuple[str, str]]) -> Messages:
    role_of = dict.fromkeys(_HUMAN, 'user') | dict.fromkeys(_MODEL, 'assistant')
    return [{'role': role_of.get(who, who), 'content': value} for who, value in turns]


def _first_exchange(item: Row) -> tuple[str, str]:
    """The first human turn and the turn after it, if that is the model's; '' for what is absent."""
    speakers, values = _turns(item)
    first = next((i for i, speaker in enumerate(speakers) if speaker in _HUMAN), len(speakers))
    reply = next(zip(speakers[first + 1 :], values[first + 1 :], strict=True), ('', ''))
    return ''.join(values[first : first + 1]), reply[1] if reply[0] in _MODEL else ''


def _turns(item: Row) -> tuple[list[str], list[str]]:
    """Who speaks in a conversation of ShareGPT, and what they say."""
    speakers, values = [], []
    for value in item.array('conversations'):
        expect_object(value, f"{item.where}, turn in 'conversations'")
        turn = Row(value, item.where, item.number)
        speakers.append(turn.text('from').lower())
        values.append(turn.text('value').strip())
    return speakers, values


def _spider_schema(item: Row) -> str:
    """`table (column, column); table (...)`; Spider lists `[table index, name]`, `*` as -1."""
    tables = [(name, []) for name in item.texts('table_names_original')]
    for column in item.array('column_names_original'):
        match column:
            case [int(table), str(name)] if -1 <= table < len(tables):
                if table >= 0:
                    tables[table][1].append(item.encodable(name, 'column_names_original'))
            case _:
                fault = f"'column_names_original' has {short(column)}"
                raise item.error(f'{fault}; every entry must be [table index, column name]')
    return '; '.join(f'{table} ({", ".join(columns)})' for table, columns in tables)


def _some(examples: list[Example], path: Path | str) -> list[Example]:
    if not examples:
        raise DataError(f'{path}: no usable row; check that the file is of this format')
    return examples
