"""Any prepared TensorFlow Datasets dataset, read without TensorFlow.

TFDS can read array_record files by index without TensorFlow; other formats are refused. Nothing is
downloaded or prepared: the dataset must be on disk.
"""

import os
from pathlib import Path
from typing import Any

from cllm_jax.errors import ConfigError, DataError, no_such, one_line
from cllm_jax.tasks.example import Example

OPTIONS = ('split', 'data_dir', 'prompt', 'answer')


def read_tfds(
    name: str,
    split: str = 'train',
    data_dir: str | Path | None = None,
    prompt: str = 'prompt',
    answer: str | None = 'answer',
) -> list[Example]:
    """Reads two text fields of a prepared dataset; ids are `tfds-row`, counted from 0.

    `name` is a TFDS name (`ds`, `ds/config`, `ds:1.0.0`) prepared under `data_dir` (None: TFDS'
    own directory), or the path of a version directory, the one with dataset_info.json. `split` is
    any split TFDS knows, slices included (`train[:10%]`). `prompt` and `answer` name the fields;
    without `answer` (None or ''), answers are ''.

    Raises DataError if the dataset is absent, damaged, not array_record, or has no such split or
    field, or if a field is not UTF-8 text; ConfigError if tensorflow-datasets is not installed.
    """
    builder = _builder(name, data_dir)
    fields = [prompt, answer] if answer else [prompt]
    known = list(builder.info.features)
    for field in fields:
        if field not in known:
            hint = no_such('field', field, known)
            raise DataError(f'{name}: {hint} (prompt= and answer= name the fields)')
    try:
        rows = builder.as_data_source(split)
    except Exception as error:  # TFDS raises a dozen types here, unknown splits among them
        splits = ', '.join(builder.info.splits) or 'none'
        fault = f'split {split!r} cannot be read ({one_line(error, 120)}); splits: {splits}'
        raise DataError(f'{name}: {fault}') from None
    examples = []
    for number in range(len(rows)):
        where = f'{name} {split} row {number}'
        try:
            row = rows[number]
        except Exception as error:  # a damaged shard: the types come from C++ and protobuf
            fault = f'cannot be read ({one_line(error, 120)}); prepare the dataset again'
            raise DataError(f'{where}: {fault}') from None
        texts = [_text(row[field], field, where) for field in fields]
        examples.append(Example(f'tfds-{number}', texts[0], ''.join(texts[1:])))
    if not examples:
        raise DataError(f'{name}: split {split!r} has no rows; choose another')
    return examples


def _builder(name: str, data_dir: str | Path | None) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        fault = 'TFDS datasets need a package that is not installed'
        raise ConfigError(f'{name}: {fault}; pip install tensorflow-datasets') from None
    try:
        directory = os.path.expanduser(name)
        if os.path.isfile(os.path.join(directory, 'dataset_info.json')):
            builder = tfds.builder_from_directory(directory)
        else:
            where = data_dir and os.path.expanduser(data_dir)
            # Not tfds.builder: it may reach for the network, and it needs the dataset's code.
            builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=where)
    except Exception as error:  # TFDS raises a dozen types for absent and damaged directories
        place = data_dir or "TFDS' own directory (name another with data_dir=)"
        raise DataError(
            f'{name}: no prepared TFDS dataset in {place} ({one_line(error, 120)}); run its '
            "download_and_prepare() with file_format='array_record'"
        ) from None
    found = getattr(builder.info.file_format, 'value', builder.info.file_format)
    if found != 'array_record':
        again = "tfds.builder(NAME, file_format='array_record', data_dir=NEW)"
        fault = f'prepared as {found}, which needs TensorFlow to read'
        raise DataError(f'{name}: {fault}; prepare it again with {again}.download_and_prepare()')
    return builder


def _text(value: Any, field: str, where: str) -> str:
    if value is None:  # TFDS gives None for a record that a truncated shard lost
        fault = 'is missing; the file is damaged, prepare the dataset again'
    elif not isinstance(value, bytes):
        fault = f'is {type(value).__name__}; only text fields can be used'
    else:
        try:
            return value.decode('utf-8')
        except UnicodeDecodeError as error:
            fault = f'is not UTF-8 text (byte {error.start + 1}); choose a text field'
    raise DataError(f'{where}: field {field!r} {fault}')
