"""Tables in files: CSV and TSV, whose first line names the fields, and Parquet.

Prompt and answer are used as they stand. Rows that do not fit are left out and counted
(`fields.py`); a file that is damaged, or whose fields hold something else than text, is refused.
"""

import csv
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllm_jax.data.fields import chosen_fields, examples_of
from cllm_jax.data.json_rows import lines, short, utf8
from cllm_jax.errors import ConfigError, DataError, one_line
from cllm_jax.tasks.example import Example


def read_csv(
    path: str | Path,
    dropped: Counter[str] | None = None,
    *,
    prompt: str = 'prompt',
    answer: str | None = None,
    delimiter: str = ',',
) -> list[Example]:
    """CSV as spreadsheets write it, plain or gzip, in UTF-8; ids are `csv-line` or `tsv-line`."""
    dropped = Counter() if dropped is None else dropped
    records = _records(path, delimiter)
    _, header = next(records, (0, None))
    if header is None:
        raise DataError(f'{path}: only blank lines; the first line must name the fields')
    fields = chosen_fields(header, prompt, answer, path)
    places = [header.index(field) for field in fields]
    rows = (
        (line, [record[i] for i in places] if len(record) == len(header) else None)
        for line, record in records
    )
    return examples_of('csv' if delimiter == ',' else 'tsv', rows, fields, path, dropped, 'line')


def _records(path: str | Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Each record with the line that it begins on; a blank line is none."""
    texts = (utf8(line, where) for _, where, line in lines(path))
    # Strict: else a quote that is never closed would take the rest of the file for one field.
    reader, begin = csv.reader(texts, delimiter=delimiter, strict=True), 1
    while True:
        try:
            record = next(reader, None)
        except csv.Error as error:
            fault = f'not CSV ({error}); close or double its quotes, or write the rows as JSONL'
            raise DataError(f'{path} line {begin}: {fault}') from None
        if record is None:
            return
        if record:
            yield begin, record
        begin = reader.line_num + 1


def read_parquet(
    path: str | Path,
    dropped: Counter[str] | None = None,
    *,
    prompt: str = 'prompt',
    answer: str | None = None,
) -> list[Example]:
    """One Parquet file; ids are `parquet-row`, counted from 1."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        fault = "Parquet needs a package that is not installed; pip install 'cllm_jax[datasets]'"
        raise ConfigError(f'{path}: {fault}') from None
    place = os.path.expanduser(path)
    if os.path.isdir(place):
        raise DataError(f'{path}: a directory; name a file in it, or all of it as hf:{path}')
    dropped = Counter() if dropped is None else dropped
    try:
        with open(place, 'rb') as opened, parquet.ParquetFile(opened) as file:
            schema = file.schema_arrow
            fields = chosen_fields(schema.names, prompt, answer, path)
            for field in fields:
                if not _is_text(kind := schema.field(field).type):
                    raise DataError(
                        f'{path}: field {short(field)} is {one_line(kind, 40)}; only text fields '
                        'can be used'
                    )
            batches = file.iter_batches(columns=fields)
            columns = ([batch.column(field).to_pylist() for field in fields] for batch in batches)
            rows = (row for batch in columns for row in zip(*batch, strict=True))
            return examples_of('parquet', enumerate(rows, 1), fields, path, dropped)
    except FileNotFoundError:
        raise DataError(f'{path}: no such file; check the path') from None
    except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: text not in UTF-8
        fault = f'cannot be read ({one_line(error, 120)}); write or download it again'
        raise DataError(f'{path}: {fault}') from None


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):  # a column of few values
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind)
