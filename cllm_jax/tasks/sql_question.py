"""Composing a question of the text-to-SQL task together with its query.

A query has a source (one table, a join of two, a join of three), a selection (columns, aggregates,
groups), filters (comparisons, a comparison with an average, a membership in another table), an
order and a limit. Question and schema determine the query: a join lists its tables in the order of
the schema and names the table of every column; selected columns and filters stand in the order of
the question, a group's column first. A function that adds a part returns its SQL and its words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from cllm_jax.tasks.sql_schema import NAMES, NUMBERS, PLURALS, SQL, WORDS, Table


@dataclass(frozen=True)
class Term:
    """A column or an aggregate: its SQL, its words, and the column it is about."""

    sql: str
    say: str
    table: str
    column: str


@dataclass
class Draft:
    """What one question has collected: the phrasings chosen, the clauses used, the filters."""

    rng: Random
    parts: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    filters: list[list] = field(default_factory=list)
    having: list[list] = field(default_factory=list)

    def pick(self, part: str, options: Sequence[Any]) -> Any:
        """Choose a phrasing of a part and note the choice in the template."""
        chosen = self.rng.randrange(len(options))
        self.choices.append(f'{part}{chosen}')
        return options[chosen]


def compose(
    draft: Draft, tables: tuple[Table, ...], source: str, selection: str, nesting: str
) -> tuple[str, str]:
    """One question and its query, of a kind that `sql.KINDS` names; `draft` notes the choices."""
    rng, child = draft.rng, tables[1]
    if source == 'one':
        # Only a parent can be asked for its children.
        tables = tables[:1] if nesting == 'member' else (rng.choice(tables),)
    columns = [term for table in tables for term in _columns(table, joined=source != 'one')]
    plurals = [PLURALS[table.name] for table in tables]
    source_say = draft.pick('source', SQL['sources'][source]).format(*plurals)
    where_sql, where_say = _where(draft, columns, tables[0], child, nesting)
    group, keys = None, []
    if selection == 'list':
        asked = rng.sample(columns, min(len(columns), rng.choice((2, 2, 3))))
        keys = [term for term in columns if term.column in NUMBERS]
    else:
        count = rng.choice((2, 3) if selection == 'total' else (1, 2, 2))
        asked = _aggregates(draft, columns, plurals[:2][-1], count)
        if selection == 'group':
            group, keys = _group(draft, columns, source), asked
    *most, last = [term.say for term in asked]
    question = draft.pick(selection, SQL['selections'][selection]).format(
        group=group and group.say,
        what=f'{", ".join(most)} and {last}' if most else last,
        source=source_say + where_say,
    )
    group_sql, group_say = _group_by(draft, group, asked) if group else ('', '')
    order_sql, order_say = _order(draft, keys)
    selected = [term.sql for term in (group, *asked) if term]
    draft.parts.append(f'select{len(selected)}')
    query = f'SELECT {", ".join(selected)} FROM {_from(*tables)}'
    question += group_say + order_say + ('?' if question.startswith('What') else '.')
    return question, query + where_sql + group_sql + order_sql


def _columns(table: Table, joined: bool) -> list[Term]:
    """The columns of a table that are not keys; a join puts the table's name before each."""
    dot, space = (f'{table.name}.', f'{table.name} ') if joined else ('', '')
    return [Term(dot + column, space + column, table.name, column) for column in table.values]


def _from(first: Table, *others: Table) -> str:
    """The FROM clause: a bare table, or a chain of joins along the foreign keys of the second."""
    text = first.name
    if others:
        second, *thirds = (table.name for table in others)
        text += f' JOIN {second} ON {first.name}.id = {second}.{first.name}_id'
        text += ''.join(f' JOIN {third} ON {second}.{third}_id = {third}.id' for third in thirds)
    return text


def _where(
    draft: Draft, columns: list[Term], table: Table, child: Table, nesting: str
) -> tuple[str, str]:
    """The WHERE clause, nested query last; SQL and words begin with a space."""
    joined = '.' in columns[0].sql
    plain = draft.rng.choice((1, 2, 2) if nesting == 'plain' else (0, 1, 1))
    usable = [term for term in columns if term.column not in NAMES]
    averaged = None
    if nesting == 'average':
        averaged = draft.rng.choice([term for term in usable if term.column in NUMBERS])
        usable.remove(averaged)
    found = []
    if plain:
        draft.parts.append(f'where{plain}')
        found.append(_filters(draft, usable, plain))
    if averaged:
        found.append(_average(draft, averaged, [] if joined else usable))
    text = ''
    if found:
        opener = draft.pick('where', SQL['join_where' if joined else 'where'])
        text = opener.format(' and '.join(say for _, say in found))
    if nesting == 'member':
        found.append(_member(draft, table, child))
        text += (' and ' if text else ' ') + found[-1][1]
    return ' WHERE ' + ' AND '.join(sql for sql, _ in found), text


def _member(draft: Draft, table: Table, child: Table) -> tuple[str, str]:
    """Whether a row of `table` has a row of `child` that meets one or two filters."""
    count = draft.rng.choice((1, 2, 2))
    draft.parts.append(f'inner{count}')
    inner = [term for term in _columns(child, joined=False) if term.column not in NAMES]
    sql, say = _filters(draft, inner, count)
    member, operator = draft.pick('member', SQL['members'])
    text = member.format(PLURALS[child.name])
    text += draft.pick('inner', SQL['inner_where']).format(say)
    return f'id {operator} (SELECT {table.name}_id FROM {child.name} WHERE {sql})', text


def _filters(draft: Draft, terms: list[Term], count: int) -> tuple[str, str]:
    """Comparisons of `count` distinct columns with values."""
    filters = [_filter(draft, term) for term in draft.rng.sample(terms, count)]
    if count == 1:
        return filters[0]
    words, connector = draft.pick('connector', SQL['connectors'])
    return f' {connector} '.join(sql for sql, _ in filters), words.join(say for _, say in filters)


def _filter(draft: Draft, term: Term) -> tuple[str, str]:
    """A comparison of a column with a value of its range or pool."""
    rng = draft.rng
    if term.column in WORDS:
        operator = rng.choice(('=', '=', '=', '!='))
        values = [rng.choice(WORDS[term.column])]
    else:
        operator = rng.choice(('>', '>', '<', '<', '>=', '<=', 'BETWEEN'))
        low, high = NUMBERS[term.column]
        margin = (high - low) // 5
        values = [_limit(rng, term.column)]
        if operator == 'BETWEEN':
            start = rng.randint(low, high - 2 * margin)
            values = [start, rng.randint(start + margin, high)]
    draft.filters.append([term.table, term.column, operator, values])
    say = rng.choice(SQL['comparisons'][operator]).format(*values)
    return f'{term.sql} {operator} {" AND ".join(map(repr, values))}', f'{term.say} {say}'


def _limit(rng: Random, column: str) -> int:
    """A number to compare a column with; with a fifth on either side, most results hold a row."""
    low, high = NUMBERS[column]
    margin = (high - low) // 5
    return rng.randint(low + margin, high - margin)


def _average(draft: Draft, term: Term, inner: list[Term]) -> tuple[str, str]:
    """A comparison with the average, least or greatest of a column; `inner` may be filtered by."""
    operator, name = draft.rng.choice((('>', 'AVG'), ('<', 'AVG'), ('>', 'MIN'), ('<', 'MAX')))
    say = draft.rng.choice(SQL['comparisons'][operator])
    value = draft.pick('nested', SQL['aggregates'][name]).format(term.column)
    sql, rows = f'SELECT {name}({term.column}) FROM {term.table}', PLURALS[term.table]
    if inner:
        inner_sql, inner_say = _filters(draft, inner, 1)
        sql += f' WHERE {inner_sql}'
        rows += draft.pick('inner', SQL['inner_where']).format(inner_say)
    else:
        rows = 'all ' + rows
    return f'{term.sql} {operator} ({sql})', f'{term.say} {say.format(f"{value} of {rows}")}'


def _aggregates(draft: Draft, columns: list[Term], counted: str, count: int) -> list[Term]:
    """`count` different aggregates over the numbers of the source, and over its rows."""
    options = [('COUNT', Term('*', counted, '', ''))] * 3
    numbers = [term for term in columns if term.column in NUMBERS]
    options += [(name, term) for name in ('AVG', 'SUM', 'MIN', 'MAX') for term in numbers]
    chosen = []
    while len(chosen) < count:
        option = draft.rng.choice(options)
        if option not in chosen:
            chosen.append(option)
    aggregates = []
    for name, term in chosen:
        say = draft.pick(name.lower(), SQL['aggregates'][name]).format(term.say)
        aggregates.append(Term(f'{name}({term.sql})', say, term.table, term.column))
    return aggregates


def _group(draft: Draft, columns: list[Term], source: str) -> Term:
    """The column to group by: a word, or the parent's name in a join; if possible unfiltered."""
    if source != 'one' and draft.rng.random() < 0.5:
        return columns[0]
    words = [term for term in columns if term.column in WORDS]
    filtered = [(table, column) for table, column, *_ in draft.filters]
    free = [term for term in words if (term.table, term.column) not in filtered]
    return draft.rng.choice(free or words)


def _group_by(draft: Draft, group: Term, aggregates: list[Term]) -> tuple[str, str]:
    """The GROUP BY clause, often with a condition on one of the group's aggregates."""
    rng, sql = draft.rng, f' GROUP BY {group.sql}'
    if rng.random() >= 0.7:
        return sql, ''
    draft.parts.append('having')
    term = rng.choice(aggregates)
    operator = rng.choice(('>', '>=', '<', '<='))
    if term.column:
        value = _limit(rng, term.column)
        draft.having.append([term.table, term.column, operator, [value]])
    else:
        value = {'>': 1, '>=': 2, '<': 3, '<=': 2}[operator] + rng.randint(0, 2)
    say = f'{term.say} {rng.choice(SQL["comparisons"][operator]).format(value)}'
    sql += f' HAVING {term.sql} {operator} {value}'
    return sql, draft.pick('having', SQL['having']).format(say)


def _order(draft: Draft, keys: list[Term]) -> tuple[str, str]:
    """ORDER BY one of the keys, perhaps with a LIMIT; often nothing."""
    if not keys or draft.rng.random() >= 0.8:
        return '', ''
    draft.parts.append('order')
    key = draft.rng.choice(keys)
    words, direction = draft.pick('order', SQL['orders'])
    sql, say = f' ORDER BY {key.sql} {direction}', words.format(key.say)
    if draft.rng.random() < 0.6:
        draft.parts.append('limit')
        count = draft.rng.randint(2, 6)
        sql += f' LIMIT {count}'
        say += draft.pick('limit', SQL['limits']).format(count)
    return sql, say
