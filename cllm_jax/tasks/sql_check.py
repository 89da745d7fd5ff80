"""Judging a SQL answer: run it and the reference on the same generated rows and compare.

The answer comes from a model, so it is untrusted: it runs in a private in-memory database that
permits reading only, for a bounded number of steps, rows and bytes.
"""

import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import count, groupby, islice
from operator import itemgetter
from random import Random
from typing import Any

from cllm_jax.tasks.example import Example
from cllm_jax.tasks.sql_schema import NUMBERS, WORDS, Table

DATABASES = 3
_MAX_TEXT = 2000  # characters of an answer; a reference has fewer than 400
_MAX_ROWS = 2000
_MAX_BYTES = 100_000  # longest string or blob
_STEP = 1000  # virtual machine instructions between two calls of the progress handler
_MAX_STEPS = 500
_TAIL = re.compile(r'(?: ORDER BY (\S+) (?:ASC|DESC))?(?: LIMIT (\d+))?$')
_FUNCTIONS = {'avg', 'count', 'max', 'min', 'sum', 'total'}
_FUNCTIONS |= {'abs', 'coalesce', 'ifnull', 'length', 'like', 'lower', 'round', 'upper'}


def check(example: Example, text: str) -> bool:
    """Whether a generated answer is right: its results equal the reference's on every database.

    Rows are compared in order if the reference orders them, else as a multiset; rows that tie in
    the reference's order may change places. If the reference finds nothing in any database, the
    text itself must be equal up to white space. Any text is safe to pass; what is not a single
    reading query is wrong.
    """
    if len(text) > _MAX_TEXT:
        return False
    if text.split() == example.answer.split():
        return True
    key, limit = _TAIL.search(example.answer).groups()
    # Without its limit and with its sort key in front, the reference shows which rows tie.
    reference = example.answer.replace('SELECT', f'SELECT {key or 0},', 1)
    reference = reference.removesuffix(f' LIMIT {limit}')
    informative = False
    for number in range(DATABASES):
        with closing(open_database(example.meta, number)) as connection:
            wanted = run_query(connection, reference)
            _guard(connection)
            try:
                found = run_query(connection, text)
            except (sqlite3.Error, sqlite3.Warning, UnicodeError):
                return False
        if not _agree(found, wanted, int(limit or _MAX_ROWS)):
            return False
        informative = informative or is_informative(found)
    return informative


def _agree(found: list[tuple], wanted: list[tuple], limit: int) -> bool:
    """Whether rows are the first `limit` wanted ones, where equal first cells leave a choice."""
    rest = iter(found)
    ties = (Counter(row[1:] for row in block) for _, block in groupby(wanted, key=itemgetter(0)))
    agree = all(Counter(islice(rest, rows.total())) <= rows for rows in ties)
    return agree and len(found) == min(limit, len(wanted))


def is_informative(rows: list[tuple]) -> bool:
    """Whether a result holds anything but NULL and 0, which many wrong queries also give."""
    return any(cell not in (None, 0) for row in rows for cell in row)


def run_query(connection: sqlite3.Connection, query: str) -> list[tuple]:
    """All rows of one query, real numbers rounded: the order of a sum makes no difference.

    Raises sqlite3.Error or sqlite3.Warning if the query fails, is refused or runs past a limit.
    """
    rows = connection.execute(query).fetchmany(_MAX_ROWS + 1)
    if len(rows) > _MAX_ROWS:
        raise sqlite3.DataError(f'more than {_MAX_ROWS} rows')
    return [tuple(round(c, 6) if isinstance(c, float) else c for c in row) for row in rows]


def _guard(connection: sqlite3.Connection) -> None:
    """Permit nothing but bounded reading from here on."""
    steps = count(1)

    def authorize(action: int, _first: str | None, second: str | None, *_: str | None) -> int:
        calls = action == sqlite3.SQLITE_FUNCTION and str(second).lower() in _FUNCTIONS
        reads = action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ)
        return sqlite3.SQLITE_OK if reads or calls else sqlite3.SQLITE_DENY

    connection.execute('PRAGMA query_only = ON')
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_BYTES)
    connection.set_progress_handler(lambda: next(steps) > _MAX_STEPS, _STEP)
    connection.set_authorizer(authorize)


def open_database(meta: Mapping[str, Any], number: int) -> sqlite3.Connection:
    """An in-memory database of an example's schema, filled with rows.

    In databases 0 and 1 most rows meet all the filters of the query and many miss exactly one, so
    that results are seldom empty and a query that lacks a filter finds too much. In database 2
    every number that the query compares lies within 1 of the limit, which tells > from >=.
    """
    rng = Random(meta['rows_seed'] * DATABASES + number)
    sharp = number == DATABASES - 1
    tables = [Table(name, tuple(columns)) for name, columns in meta['tables'].items()]
    parents, children = ((20, 28), (28, 28), (20, 14))[number]
    sizes = {t.name: (children if t.parents else parents) + rng.randint(-2, 2) for t in tables}
    connection = sqlite3.connect(':memory:', isolation_level=None)
    for table in tables:
        rules = {column: rule for name, column, *rule in meta['filters'] if name == table.name}
        limits: dict[str, list[int]] = defaultdict(list)
        for name, column, _, values in (*meta['filters'], *meta['having']) if sharp else ():
            if name == table.name:
                limits[column] += values
        columns = ', '.join(('id INTEGER PRIMARY KEY', *table.columns))
        connection.execute(f'CREATE TABLE {table.name} ({columns})')
        rows = _draw_rows(rng, table, rules, limits, sizes)
        marks = ', '.join('?' * (1 + len(table.columns)))
        connection.executemany(f'INSERT INTO {table.name} VALUES ({marks})', rows)
    return connection


def _draw_rows(
    rng: Random, table: Table, rules: Mapping, limits: Mapping, sizes: Mapping[str, int]
) -> Iterator[list]:
    used = defaultdict(set)
    for number in range(1, sizes[table.name] + 1):
        fate = rng.random()
        missed = rng.choice(list(rules)) if rules and 0.6 < fate < 0.85 else None
        row: list = [number]
        for column in table.columns:
            rule = rules.get(column) if fate < 0.85 else None
            if column.endswith('_id'):
                # Low ids have more children, so that groups differ in size.
                value = 1 + int(sizes[column.removesuffix('_id')] * rng.random() ** 2)
            elif column in WORDS:
                value = _draw_word(rng, column, rule, column == missed)
            elif column in limits:
                value = rng.choice(limits[column]) + rng.randint(-1, 1)
            elif column in NUMBERS:
                # Equal numbers would tie in an order, so a few more draws avoid them.
                for _ in range(8):
                    value = _draw_number(rng, column, rule, column == missed)
                    if value not in used[column]:
                        break
                used[column].add(value)
            else:
                value = f'{column} {rng.randrange(1000)} {number}'
            row.append(value)
        yield row


def _draw_word(rng: Random, column: str, rule: list | None, missed: bool) -> str:
    """A word of the column's pool that meets the rule (or misses it); any without a rule."""
    pool = WORDS[column]
    if rule:
        operator, (word,) = rule
        if (operator == '=') != missed:
            return word
        pool = [other for other in pool if other != word]
    return rng.choice(pool)


def _draw_number(rng: Random, column: str, rule: list | None, missed: bool) -> int:
    """A number of the column's range that meets the rule (or misses it); any without a rule."""
    low, high = NUMBERS[column]
    if rule is None:
        return rng.randint(low, high)
    operator, values = rule
    first = values[0] + (operator == '>') if operator in ('>', '>=', 'BETWEEN') else low
    last = values[-1] - (operator == '<') if operator in ('<', '<=', 'BETWEEN') else high
    if missed:
        outside = [(low, first - 1), (last + 1, high)]
        first, last = rng.choice([(a, b) for a, b in outside if a <= b])
    return rng.randint(first, last)
