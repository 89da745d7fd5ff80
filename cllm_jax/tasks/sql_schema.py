"""Random database schemas for the text-to-SQL task: the pools of words, and the drawing.

A schema is two tables (a parent and its child) or three (two parents around a link table). The
pools are small, so a model sees each word often and only their combinations are new.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from cllm_jax.tasks.example import read_words

SQL = read_words('sql')
for part in ('connectors', 'members', 'orders'):  # pairs: words, and what they are in SQL
    SQL[part] = tuple(SQL[part].items())
PLURALS: dict[str, str] = {word: word + 's' for word in SQL['regular']} | SQL['irregular']
NUMBERS: dict[str, tuple[int, int]] = {name: tuple(ends) for name, ends in SQL['numbers'].items()}
WORDS: dict[str, tuple[str, ...]] = {
    name: tuple(pool) for names, pool in SQL['words'].items() for name in names.split()
}
NAMES = ('name', 'title')


@dataclass(frozen=True)
class Table:
    """A table: its name and its columns after `id`, in the order in which the prompt shows them.

    A column called `<parent>_id` is a foreign key to `<parent>.id`; every other column is one of
    `NAMES`, `NUMBERS` or `WORDS`.
    """

    name: str
    columns: tuple[str, ...]

    @property
    def parents(self) -> tuple[str, ...]:
        """The tables that the foreign keys point to."""
        return tuple(column[:-3] for column in self.columns if column.endswith('_id'))

    @property
    def values(self) -> tuple[str, ...]:
        """The columns that are not keys."""
        return tuple(column for column in self.columns if not column.endswith('_id'))


def draw_schema(rng: Random, size: int) -> tuple[Table, ...]:
    """Draw a schema of `size` 2 (parent, child) or 3 (parent, link table, second parent)."""
    first, middle, *last = rng.sample(tuple(PLURALS), size)
    wide = size == 2
    parent = _draw_table(rng, first, (), True, wide)
    child = _draw_table(rng, middle, (first, *last), wide and rng.random() < 0.3, wide)
    return (parent, child, *(_draw_table(rng, name, (), True, wide) for name in last))


def _draw_table(rng: Random, name: str, parents: Sequence[str], named: bool, wide: bool) -> Table:
    numbers, words = rng.sample(tuple(NUMBERS), 2), rng.sample(tuple(WORDS), 2)
    extra = rng.choice(([], numbers[1:], words[1:])) if wide else []
    values = [numbers[0], words[0], *extra]
    rng.shuffle(values)
    if named:
        values.insert(0, rng.choice(NAMES))
    return Table(name, (*(f'{parent}_id' for parent in parents), *values))


def describe(tables: tuple[Table, ...]) -> str:
    """The schema as the prompt shows it: one line per table, `singer(id, name, country, age)`."""
    return '\n'.join(f'{table.name}({", ".join(("id", *table.columns))})' for table in tables)


def schema_key(tables: tuple[Table, ...]) -> str:
    """A schema's identity: its tables and columns, whatever their order."""
    return '|'.join(sorted(f'{t.name}:{",".join(sorted(t.columns))}' for t in tables))
