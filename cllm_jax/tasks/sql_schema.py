"""Random database schemas for the text-to-SQL task: the pools of words, and the drawing.

A schema is two tables (a parent and its child) or three (two parents around a link table). Every
word belongs to a small pool, so a model sees each of them often and only their combinations are
new.
"""

from dataclasses import dataclass
from random import Random

_REGULAR = (
    'singer concert student teacher school book author movie actor hotel guest doctor patient '
    'nurse driver car truck train station airport flight pilot ship port player team club '
    'stadium artist painting museum farmer farm chef restaurant store customer worker product '
    'project village river bridge park camera phone garden song'
)
PLURALS = {word: word + 's' for word in _REGULAR.split()}
PLURALS |= {'company': 'companies', 'match': 'matches'}

# fmt: off
# Whole numbers, each with its lowest and highest value.
NUMBERS = {
    'age': (18, 80), 'area': (20, 900), 'budget': (100, 990), 'capacity': (50, 900),
    'cost': (10, 490), 'debt': (10, 900), 'depth': (5, 95), 'distance': (10, 800),
    'height': (50, 250), 'income': (100, 990), 'length': (10, 600), 'level': (1, 60),
    'power': (50, 700), 'price': (10, 990), 'profit': (10, 990), 'rank': (1, 99),
    'rating': (10, 99), 'rent': (100, 990), 'salary': (100, 990), 'score': (10, 99),
    'size': (10, 99), 'speed': (20, 300), 'stock': (10, 900), 'volume': (10, 500),
    'weight': (20, 300), 'width': (5, 95), 'year': (1980, 2024),
}
# fmt: on

_POOLS = {
    'country origin': 'France Spain Italy Japan China Brazil Canada India',
    'city location': 'Paris London Rome Berlin Madrid Tokyo Oslo Vienna',
    'color': 'red blue green black white yellow orange purple',
    'genre style': 'rock jazz pop folk soul metal opera dance',
    'status state': 'active pending closed open paused blocked ready draft',
    'language': 'English French German Spanish Greek Arabic Hindi Dutch',
    'brand maker': 'Nova Apex Orion Delta Atlas Vega Luna Titan',
    'material': 'wood steel glass stone paper cotton silver gold',
    'sport hobby': 'tennis soccer golf hockey rugby boxing chess cricket',
    'region': 'north south east west center coast valley island',
    'month': 'January March April May June July August October',
}
WORDS = {name: tuple(pool.split()) for names, pool in _POOLS.items() for name in names.split()}
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
    names = rng.sample(tuple(PLURALS), size)
    if size == 2:
        return (
            _draw_table(rng, names[0], (), named=True),
            _draw_table(rng, names[1], (names[0],), named=rng.random() < 0.3),
        )
    return (
        _draw_table(rng, names[0], (), named=True, wide=False),
        _draw_table(rng, names[1], (names[0], names[2]), named=False, wide=False),
        _draw_table(rng, names[2], (), named=True, wide=False),
    )


def _draw_table(
    rng: Random, name: str, parents: tuple[str, ...], *, named: bool, wide: bool = True
) -> Table:
    numbers = rng.sample(tuple(NUMBERS), 2)
    words = rng.sample(tuple(WORDS), 2)
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
