"""Which fields of a table are the prompt and the answer, and what becomes of rows without them.

A dataset's name ends in what it is asked for: `PATH?prompt=FIELD&answer=FIELD`, percent-encoded.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import parse_qsl

from cllm_jax.data.json_rows import short
from cllm_jax.errors import ConfigError, DataError, no_such, one_line
from cllm_jax.tasks.example import Example

OPTIONS = ('prompt', 'answer')
SHOWN = 5
"""Rows that are named of those with the same fault."""

_ASKED = re.compile(r'(.*?)\?(\w+=.*)', re.DOTALL)


def without_options(spec: str) -> str:
    """The path in `PATH?option=value`; a question mark that no option follows is part of it."""
    asked = _ASKED.fullmatch(spec)
    return asked[1] if asked else spec


def read_options(spec: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """A path and the options after it; only `answer=` may be empty: it asks for no answers.

    Raises ConfigError for an option that is not known, empty, or there twice.
    """
    options: dict[str, str] = {}
    path = without_options(spec)
    for option, value in parse_qsl(spec[len(path) + 1 :], keep_blank_values=True):
        if option not in known:
            raise ConfigError(f'{spec}: {no_such("option", option, known)}')
        if option in options:
            raise ConfigError(f'{spec}: option {option!r} is there twice; name it once')
        if not value and option != 'answer':
            raise ConfigError(f'{spec}: option {option!r} is empty; leave it out or set it')
        options[option] = value
    return path, options


def chosen_fields(
    names: Sequence[str], prompt: str, answer: str | None, where: object
) -> list[str]:
    """The fields to read: the prompt's and, if there are answers, theirs.

    `answer` None is 'answer' where there is such a field, and '' asks for none. Raises DataError
    for a field that is absent or there twice.
    """
    if answer is None:
        answer = 'answer' if 'answer' in names else ''
    fields = [prompt, answer] if answer else [prompt]
    for field in fields:
        if field not in names:
            hint = one_line(no_such('field', field, names))
            raise DataError(f'{where}: {hint}; ?prompt= and answer= after the name choose fields')
        if names.count(field) > 1:
            raise DataError(f'{where}: two fields are called {short(field)}; rename one')
    return fields


def examples_of(
    kind: str,
    rows: Iterable[tuple[int, Sequence[Any] | None]],
    fields: Sequence[str],
    where: object,
    dropped: Counter[str],
    unit: str = 'row',
) -> list[Example]:
    """Numbered rows as examples with ids `kind-number`; those that do not fit are left out.

    A row has a value for each of the `fields`, or is None where it has other fields than the table.
    `dropped` counts what is left out by fault, and names the first few. Raises DataError if no row
    is left.
    """
    examples, faults = [], {}
    for number, values in rows:
        fault = _fault(values, fields)
        if fault:
            faults.setdefault(fault, []).append(number)
        else:
            examples.append(Example(f'{kind}-{number}', values[0], ''.join(values[1:])))
    told = {}
    for fault, numbers in faults.items():
        some = ', '.join(map(str, numbers[:SHOWN])) + ', ...' * (len(numbers) > SHOWN)
        told[f'{fault} ({unit}{"s" * (len(numbers) > 1)} {some})'] = len(numbers)
    if not examples:
        why = '; '.join(f'{count} with {fault}' for fault, count in told.items()) or 'it has no row'
        raise DataError(f'{where}: no usable row ({why}); check that the fields are the right ones')
    dropped.update(told)
    return examples


def _fault(values: Sequence[Any] | None, fields: Sequence[str]) -> str:
    if values is None:
        return 'another number of fields than the first line'
    missing = (field for field, value in zip(fields, values, strict=True) if value is None)
    return ''.join(f'no text in {short(field)}' for field in [*missing][:1])
