"""JSON objects out of files that may be damaged: bytes to lines to objects to fields.

Files may be plain or gzip; a byte order mark, CRLF line ends and blank lines are accepted. What is
wrong raises DataError. Lines and files are bounded in size, so a file of another kind is refused
before it fills the memory.
"""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from cllm_jax.errors import DataError

MAX_LINE = 16 * 2**20  # bytes of one line, unpacked
MAX_DOCUMENT = 2 * 2**30  # bytes of a file that is one JSON list, unpacked; ShareGPT has 0.7 GB

_GZIP = b'\x1f\x8b'
_BOM = b'\xef\xbb\xbf'


@dataclass(frozen=True)
class Row:
    """One JSON object of a file; `where` names its place in messages, `number` counts from 1.

    `text`, `array` and `texts` return a field; DataError if it is absent or of another type.
    """

    fields: Mapping[str, Any]
    where: str
    number: int

    def __post_init__(self) -> None:
        expect_object(self.fields, self.where)

    def text(self, field: str) -> str:
        """A string."""
        return self.encodable(self._get(field, str, 'a string'), field)

    def array(self, field: str) -> list[Any]:
        """A list of anything."""
        return self._get(field, list, 'a list')

    def texts(self, field: str) -> list[str]:
        """A list of strings."""
        values = self._get(field, list, 'a list of strings')
        for value in values:
            if not isinstance(value, str):
                raise self.error(f'{field!r} holds {_kind(value)}; it must hold strings only')
            self.encodable(value, field)
        return values

    def encodable(self, text: str, field: str) -> str:
        """`text`, which the field holds, or DataError if it has half a surrogate pair.

        JSON can spell one, but it is not a character: no tokenizer can encode it.
        """
        try:
            text.encode('utf-8')
        except UnicodeEncodeError as error:
            fault = f'{field!r} has a lone surrogate {text[error.start]!r}'
            raise self.error(f'{fault}; write the whole character') from None
        return text

    def error(self, fault: str) -> DataError:
        """What to raise for a fault of this row."""
        return DataError(f'{self.where}: {fault}')

    def _get(self, field: str, kind: type, wanted: str) -> Any:
        if field not in self.fields:
            found = ', '.join(short(name) for name in list(self.fields)[:8]) or 'nothing'
            raise self.error(f'no {field!r} field (found {found}); it must be {wanted}')
        value = self.fields[field]
        if not isinstance(value, kind):
            raise self.error(f'{field!r} is {_kind(value)}; it must be {wanted}')
        return value


def lines(path: str | Path) -> Iterator[tuple[int, str, bytes]]:
    """The lines of a file with their numbers and places, without a byte order mark."""
    # Unlike Path.expanduser this leaves an unknown user to be a missing file.
    path = Path(os.path.expanduser(path))
    with _opened(path) as file:
        for number in count(1):
            where = f'{path} line {number}'
            line = _read(file.readline, MAX_LINE, where)
            if not line:
                break
            yield number, where, line.removeprefix(_BOM if number == 1 else b'')


def rows(path: str | Path) -> Iterator[Row]:
    """The rows of a file with one object per line, numbered by line."""
    any_row = False
    for number, where, line in lines(path):
        if line.strip():
            any_row = True
            yield Row(_json(line, where), where, number)
    if not any_row:
        raise DataError(f'{path}: only blank lines; every line must be a JSON object')


def items(path: str | Path) -> Iterator[Row]:
    """The objects of a file that is one JSON list, numbered by item."""
    path = Path(os.path.expanduser(path))
    with _opened(path) as file:
        found = _json(_read(file.read, MAX_DOCUMENT, str(path)).removeprefix(_BOM), str(path))
    if not isinstance(found, list):
        raise DataError(f'{path}: the file is {_kind(found)}; it must be a JSON list of objects')
    for number, item in enumerate(found, 1):
        yield Row(item, f'{path} item {number}', number)


def expect_object(value: Any, where: str) -> None:
    """Raises DataError unless `value` is a JSON object."""
    if not isinstance(value, dict):
        raise DataError(f'{where}: {_kind(value)}; it must be a JSON object, {{"field": value}}')


def utf8(data: bytes, where: str) -> str:
    """The text of some bytes; DataError if they are not UTF-8."""
    try:
        return data.decode('utf-8')
    except UnicodeDecodeError as error:
        fault = f'not UTF-8 text (byte {error.start + 1}); convert the file to UTF-8'
        raise DataError(f'{where}: {fault}') from None


def short(value: Any) -> str:
    """`repr(value)` for a message, cut to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + '...'


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open('rb')
    except FileNotFoundError:
        raise DataError(f'{path}: no such file; check the path') from None
    except IsADirectoryError:
        raise DataError(f'{path}: a directory; give the file in it') from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise DataError(f'{str(path)!r}: cannot be opened ({error}); check the path') from None
    with file:
        start = _read(lambda _: file.peek(2)[:2], 2, str(path))
        if not start:
            raise DataError(f'{path}: the file is empty; download or write it again')
        if start == _GZIP:
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked
        elif path.suffix == '.gz':
            raise DataError(f'{path}: not a gzip file; remove .gz from its name or compress it')
        else:
            yield file


def _read(method: Callable[[int], bytes], limit: int, where: str) -> bytes:
    """`method(limit + 1)` of an open file; refuses what is longer than `limit` or damaged."""
    try:
        data = method(limit + 1)
    except EOFError:
        raise DataError(f'{where}: the gzip file ends too early; download it again') from None
    except (OSError, zlib.error) as error:
        raise DataError(f'{where}: cannot be read ({error}); download it again') from None
    if len(data) > limit:
        raise DataError(f'{where}: longer than {limit} bytes; split it or check the file format')
    return data


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(utf8(data, where))
    except json.JSONDecodeError as error:
        line = f'line {error.lineno} ' if error.lineno > 1 else ''
        fault = f'not JSON ({error.msg}, {line}column {error.colno}); mend it or remove it'
        if data.startswith(b'version https://git-lfs'):
            fault = 'a git-lfs pointer, not the data; run git lfs pull'
    except (ValueError, RecursionError) as error:
        fault = f'unreadable JSON ({error}); mend it or remove it'
    raise DataError(f'{where}: {fault}')


def _kind(value: Any) -> str:
    names = {dict: 'an object', list: 'a list', str: 'a string', bool: 'a boolean'}
    return 'null' if value is None else names.get(type(value), 'a number')
