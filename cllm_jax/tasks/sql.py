"""The text-to-SQL task: a schema and an English question in, one SQL query out.

Questions are composed: a query has a source (one table, a join of two, a join of three), a
selection (columns, aggregates, groups), filters (comparisons, a comparison with an average, a
membership in another table), an order and a limit; each part has a few phrasings. Tables,
clauses and columns follow one rule, so question and schema determine the query:

- a join lists its tables in the order of the schema, and names the table of every column;
- selected columns and filters stand in the order of the question, a group's column first.

The text is made by the program, without any data set. Its style follows the cross-domain
text-to-SQL benchmark Spider (Yu et al. 2018, arXiv 1809.08887), as does the idea of a split by
schema. Here training and held-out examples share neither a schema nor a template; a template is
the structure of a query together with the phrasing of its parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

from cllm_jax.errors import ConfigError
from cllm_jax.tasks.example import Example
from cllm_jax.tasks.sql_check import check
from cllm_jax.tasks.sql_schema import (
    NUMBERS,
    PLURALS,
    WORDS,
    Table,
    describe,
    draw_schema,
    is_held_out,
    schema_key,
)

__all__ = ['CUE', 'check', 'generate']

CUE = 'SQL:'

_COMPARISONS = {
    '>': ('is above {}', 'is greater than {}', 'is over {}'),
    '<': ('is below {}', 'is less than {}', 'is under {}'),
    '>=': ('is at least {}', 'is {} or more'),
    '<=': ('is at most {}', 'is {} or less'),
    'BETWEEN': ('is between {} and {}', 'is from {} to {}'),
    '=': ('is {}', 'equals {}'),
    '!=': ('is not {}', 'is other than {}'),
}
_AGGREGATES = {
    'AVG': ('the average {}', 'the mean {}'),
    'SUM': ('the total {}', 'the sum of {}'),
    'MIN': ('the minimum {}', 'the smallest {}'),
    'MAX': ('the maximum {}', 'the largest {}'),
}
_COUNT = ('the number of {}', 'the count of {}')
_LISTS = (
    'List the {what} of {source}',
    'Show the {what} for all {source}',
    'What are the {what} of {source}',
    'Find the {what} of the {source}',
)
_TOTALS = (
    'Give {what} over {source}',
    'Compute {what} for {source}',
    'What are {what} of {source}',
)
_GROUPS = (
    'For each {group}, show {what} over {source}',
    'Show {what} per {group} for {source}',
    'Group {source} by {group} and give {what}',
)
_SOURCES = {
    'one': ('{0}',),
    'join': ('{0} and their {1}', '{1} with their {0}', '{0} joined with {1}'),
    'link': ('{0} and {2} linked by {1}', '{0} with their {2} through {1}'),
}
_WHERE = {
    'one': (' whose {}', ' where {}', ' such that {}'),
    'join': (' where {}', ' such that {}', ' in which {}'),
}
_INNER_WHERE = (' whose {}', ' for which {}')
_CONNECTORS = ((' and ', 'AND'), (' and also ', 'AND'), (' or ', 'OR'))
_MEMBERS = (
    ('that have no {}', 'NOT IN'),
    ('without any {}', 'NOT IN'),
    ('that have {}', 'IN'),
    ('with some {}', 'IN'),
)
_HAVING = (', keeping groups where {}', ', only if {}')
_ORDERS = (
    (', sorted by {} descending', 'DESC'),
    (', arranged by {}, highest first', 'DESC'),
    (', ordered by {} from high to low', 'DESC'),
    (', sorted by {} ascending', 'ASC'),
    (', arranged by {}, lowest first', 'ASC'),
    (', ordered by {} from low to high', 'ASC'),
)
_LIMITS = (', only the first {}', ', top {} only', ', limited to {} rows')

# (source, selection, nesting) and how often each is drawn.
_KINDS = {
    ('one', 'list', 'plain'): 5,
    ('one', 'total', 'plain'): 3,
    ('one', 'group', 'plain'): 7,
    ('one', 'list', 'average'): 7,
    ('one', 'list', 'member'): 8,
    ('one', 'total', 'member'): 4,
    ('one', 'group', 'member'): 8,
    ('join', 'list', 'plain'): 14,
    ('join', 'list', 'average'): 9,
    ('join', 'total', 'plain'): 6,
    ('join', 'group', 'plain'): 40,
    ('link', 'list', 'plain'): 3,
    ('link', 'group', 'plain'): 5,
}


@dataclass(frozen=True)
class _Term:
    """A column or an aggregate: its SQL, its words, and the column it is about."""

    sql: str
    say: str
    table: str
    column: str


@dataclass
class _Draft:
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


def generate(index: int, *, seed: int, split: Literal['train', 'heldout']) -> Example:
    """Make example number `index` of a split; equal arguments give equal examples.

    Raises:
        ConfigError: if `split` is neither 'train' nor 'heldout'.
    """
    if split not in ('train', 'heldout'):
        raise ConfigError(f"split '{split}' is unknown; use 'train' or 'heldout'")
    held_out = split == 'heldout'
    rng = Random(f'sql {seed} {split} {index}')
    kind = rng.choices(tuple(_KINDS), tuple(_KINDS.values()))[0]
    while True:
        tables = draw_schema(rng, 3 if kind[0] == 'link' else 2)
        if is_held_out(schema_key(tables)) == held_out:
            break
    while True:
        draft = _Draft(rng)
        question, query = _compose(draft, tables, *kind)
        structure = ' '.join((*kind, *draft.parts))
        template = ' '.join((structure, *draft.choices))
        if is_held_out(template) == held_out:
            break
    return Example(
        id=f'sql-{split}-{seed}-{index}',
        prompt=f'{describe(tables)}\n{question}\n{CUE}',
        answer=f' {query}',
        meta={
            'tables': {table.name: list(table.columns) for table in tables},
            'filters': draft.filters,
            'having': draft.having,
            'rows_seed': rng.getrandbits(32),
            'structure': structure,
            'template': template,
            'schema': schema_key(tables),
        },
    )


def _compose(
    draft: _Draft, tables: tuple[Table, ...], source: str, selection: str, nesting: str
) -> tuple[str, str]:
    """One question and its query."""
    rng = draft.rng
    child = tables[1]
    if source == 'one':
        # Only a parent can be asked for its children.
        tables = tables[:1] if nesting == 'member' else (rng.choice(tables),)
        prefixes = ('',)
    else:
        prefixes = tuple(f'{table.name}.' for table in tables)
    columns = [
        _Term(prefix + column, f'{table.name} {column}' if prefix else column, table.name, column)
        for table, prefix in zip(tables, prefixes, strict=True)
        for column in table.values
    ]
    plurals = [PLURALS[table.name] for table in tables]
    source_say = draft.pick('source', _SOURCES[source]).format(*plurals)
    where_sql, where_say = _where(draft, columns, tables[0], child, nesting)
    source_say += where_say
    tail_sql = tail_say = ''
    if selection == 'list':
        selected = rng.sample(columns, min(len(columns), rng.choice((2, 2, 3))))
        what = _enumerate([term.say for term in selected])
        question = draft.pick('list', _LISTS).format(what=what, source=source_say)
        keys = [term for term in columns if term.column in NUMBERS]
    else:
        count = rng.choice((2, 3) if selection == 'total' else (1, 2, 2))
        selected = aggregates = _aggregates(draft, columns, plurals[:2][-1], count)
        what = _enumerate([term.say for term in aggregates])
        if selection == 'total':
            question = draft.pick('total', _TOTALS).format(what=what, source=source_say)
            keys = []
        else:
            group = _group(draft, columns, source)
            selected = [group, *aggregates]
            opener = draft.pick('group', _GROUPS)
            question = opener.format(group=group.say, what=what, source=source_say)
            tail_sql = f' GROUP BY {group.sql}'
            keys = aggregates
            if rng.random() < 0.7:
                draft.parts.append('having')
                sql, say = _having(draft, aggregates)
                tail_sql += f' HAVING {sql}'
                tail_say = draft.pick('having', _HAVING).format(say)
    order_sql, order_say = _order(draft, keys)
    draft.parts.append(f'select{len(selected)}')
    columns_sql = ', '.join(term.sql for term in selected)
    question += tail_say + order_say + ('?' if question.startswith('What') else '.')
    return question, f'SELECT {columns_sql} FROM {_from(tables)}{where_sql}{tail_sql}{order_sql}'


def _from(tables: tuple[Table, ...]) -> str:
    """The FROM clause: a bare table, or a chain of joins along the foreign keys."""
    if len(tables) == 1:
        return tables[0].name
    first, second = tables[:2]
    text = f'{first.name} JOIN {second.name} ON {first.name}.id = {second.name}.{first.name}_id'
    for third in tables[2:]:
        text += f' JOIN {third.name} ON {second.name}.{third.name}_id = {third.name}.id'
    return text


def _where(
    draft: _Draft, columns: list[_Term], table: Table, child: Table, nesting: str
) -> tuple[str, str]:
    """The WHERE clause and its words, nested query last; both begin with a space."""
    joined = '.' in columns[0].sql
    plain = draft.rng.choice((1, 2, 2) if nesting == 'plain' else (0, 1, 1))
    usable = [term for term in columns if term.column in NUMBERS or term.column in WORDS]
    sqls, says = [], []
    averaged = None
    if nesting == 'average':
        averaged = draft.rng.choice([term for term in usable if term.column in NUMBERS])
        usable = [term for term in usable if term is not averaged]
    if plain:
        draft.parts.append(f'where{plain}')
        sql, say = _filters(draft, usable, plain)
        sqls.append(sql)
        says.append(say)
    if averaged:
        sql, say = _average(draft, averaged, [] if joined else usable)
        sqls.append(sql)
        says.append(say)
    openers = _WHERE['join' if joined else 'one']
    text = draft.pick('where', openers).format(' and '.join(says)) if says else ''
    if nesting == 'member':
        count = draft.rng.choice((1, 2, 2))
        draft.parts.append(f'inner{count}')
        inner = [_Term(c, c, child.name, c) for c in child.values if c in NUMBERS or c in WORDS]
        sql, say = _filters(draft, inner, count)
        member, operator = draft.pick('member', _MEMBERS)
        member = member.format(PLURALS[child.name])
        sqls.append(f'id {operator} (SELECT {table.name}_id FROM {child.name} WHERE {sql})')
        text += (' and ' if text else ' ') + member + draft.pick('inner', _INNER_WHERE).format(say)
    return ' WHERE ' + ' AND '.join(sqls), text


def _filters(draft: _Draft, terms: list[_Term], count: int) -> tuple[str, str]:
    """Comparisons of `count` distinct columns with values."""
    parts = [_filter(draft, term) for term in draft.rng.sample(terms, count)]
    if count == 1:
        return parts[0]
    say, connector = draft.pick('connector', _CONNECTORS)
    return f' {connector} '.join(sql for sql, _ in parts), say.join(say for _, say in parts)


def _filter(draft: _Draft, term: _Term) -> tuple[str, str]:
    """A comparison of a column with a value of its range or pool."""
    rng = draft.rng
    if term.column in WORDS:
        operator = rng.choice(('=', '=', '=', '!='))
        values = [rng.choice(WORDS[term.column])]
        quoted = [f"'{values[0]}'"]
    else:
        operator = rng.choice(('>', '>', '<', '<', '>=', '<=', 'BETWEEN'))
        low, high = NUMBERS[term.column]
        # A fifth of the range stays on either side, so that most results hold something.
        margin = (high - low) // 5
        values = [rng.randint(low + margin, high - margin)]
        if operator == 'BETWEEN':
            start = rng.randint(low, high - 2 * margin)
            values = [start, rng.randint(start + margin, high)]
        quoted = [str(value) for value in values]
    draft.filters.append([term.table, term.column, operator, values])
    say = rng.choice(_COMPARISONS[operator]).format(*values)
    return f'{term.sql} {operator} {" AND ".join(quoted)}', f'{term.say} {say}'


def _average(draft: _Draft, term: _Term, inner: list[_Term]) -> tuple[str, str]:
    """A comparison with the average, least or greatest of a column; `inner` may be filtered by."""
    options = (('>', 'AVG'), ('<', 'AVG'), ('>', 'MIN'), ('<', 'MAX'))
    operator, aggregate = draft.rng.choice(options)
    say = draft.rng.choice(_COMPARISONS[operator])
    value = draft.pick('nested', _AGGREGATES[aggregate]).format(term.column)
    plural = PLURALS[term.table]
    sql = f'SELECT {aggregate}({term.column}) FROM {term.table}'
    if inner:
        inner_sql, inner_say = _filters(draft, inner, 1)
        sql += f' WHERE {inner_sql}'
        plural += draft.pick('inner', _INNER_WHERE).format(inner_say)
    else:
        plural = 'all ' + plural
    return f'{term.sql} {operator} ({sql})', f'{term.say} {say.format(f"{value} of {plural}")}'


def _aggregates(draft: _Draft, columns: list[_Term], counted: str, count: int) -> list[_Term]:
    """`count` different aggregates over the numbers of the source, and over its rows."""
    rng = draft.rng
    numbers = [term for term in columns if term.column in NUMBERS]
    options = [('COUNT', None)] * 3 + [(name, term) for name in _AGGREGATES for term in numbers]
    chosen = []
    while len(chosen) < count:
        option = rng.choice(options)
        if option not in chosen:
            chosen.append(option)
    return [
        _Term('COUNT(*)', draft.pick('count', _COUNT).format(counted), '', '')
        if term is None
        else _Term(
            f'{name}({term.sql})',
            draft.pick(name.lower(), _AGGREGATES[name]).format(term.say),
            term.table,
            term.column,
        )
        for name, term in chosen
    ]


def _group(draft: _Draft, columns: list[_Term], source: str) -> _Term:
    """The column to group by: a word, or the parent's name in a join; if possible unfiltered."""
    if source != 'one' and draft.rng.random() < 0.5:
        return columns[0]
    words = [term for term in columns if term.column in WORDS]
    filtered = [(table, column) for table, column, *_ in draft.filters]
    free = [term for term in words if (term.table, term.column) not in filtered]
    return draft.rng.choice(free or words)


def _having(draft: _Draft, aggregates: list[_Term]) -> tuple[str, str]:
    """A condition on one of the group's aggregates."""
    rng = draft.rng
    term = rng.choice(aggregates)
    operator = rng.choice(('>', '>=', '<', '<='))
    if not term.column:
        first = {'>': 1, '>=': 2, '<': 3, '<=': 2}[operator]
        value = rng.randint(first, first + 2)
    else:
        low, high = NUMBERS[term.column]
        margin = (high - low) // 5
        value = rng.randint(low + margin, high - margin)
        draft.having.append([term.table, term.column, operator, [value]])
    say = rng.choice(_COMPARISONS[operator]).format(value)
    return f'{term.sql} {operator} {value}', f'{term.say} {say}'


def _order(draft: _Draft, keys: list[_Term]) -> tuple[str, str]:
    """ORDER BY one of the keys, perhaps with a LIMIT; often nothing."""
    if not keys or draft.rng.random() >= 0.8:
        return '', ''
    draft.parts.append('order')
    key = draft.rng.choice(keys)
    words, direction = draft.pick('order', _ORDERS)
    sql, say = f' ORDER BY {key.sql} {direction}', words.format(key.say)
    if draft.rng.random() < 0.6:
        draft.parts.append('limit')
        count = draft.rng.randint(2, 6)
        sql += f' LIMIT {count}'
        say += draft.pick('limit', _LIMITS).format(count)
    return sql, say


def _enumerate(items: list[str]) -> str:
    """'a, b and c'."""
    return ' and '.join([', '.join(items[:-1]), items[-1]] if len(items) > 1 else items)
