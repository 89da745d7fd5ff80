"""The events that arithmetic word problems are made of.

A story is an opening, a few happenings and a closing question. Each is an `Event`: it turns the
number of things someone has (the state `s`) into a new one, in none, one or two solution steps.
`arithmetic.yaml` has the events with their texts, and says what their fields mean. A calculation
`[a+b]` is written out in GSM8K's grammar `12+5=<<12+5=17>>17` (Cobbe et al. 2021, arXiv
2110.14168). Every number is at least 2, so that a plural is always right.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from cllm_jax.tasks.example import read_words

MAX_SUM = 99
MAX_OPERAND = 20
# The multiplication table in use: one factor up to 9, the other up to 12.
MAX_FACTOR, MAX_COFACTOR = 9, 12

Numbers = dict[str, int]
Draw = Callable[[Random, int], Numbers | None]


@dataclass(frozen=True)
class Event:
    """One kind of event: the numbers that suit a state, its solution steps, its wordings.

    `draw(rng, s)` returns the event's numbers, or None where those it drew do not suit the state
    `s`. An opening without steps returns the first state itself. The last step's result is the
    new state. `weight` says how often an opening or a closing is drawn.
    """

    kind: str
    draw: Draw
    wordings: Sequence[str]
    steps: Sequence[str] = ()
    weight: int = 1


def _operand(rng: Random, room: int) -> Numbers | None:
    high = min(MAX_OPERAND, room)
    return {'x': rng.randint(2, high)} if high >= 2 else None


def _groups(rng: Random, most: int, most_in_each: int, room: int) -> Numbers | None:
    k, m = rng.randint(2, most), rng.randint(2, most_in_each)
    return {'k': k, 'm': m} if k * m <= room else None


def _factor(name: str, most: int) -> Draw:
    return lambda rng, s: {name: rng.randint(2, most)} if s <= MAX_COFACTOR else None


def _half(_: Random, s: int) -> Numbers | None:
    return {} if s % 2 == 0 and 4 <= s <= 2 * MAX_COFACTOR else None


def _divisor(rng: Random, s: int) -> Numbers | None:
    fits = [k for k in range(2, MAX_FACTOR + 1) if s % k == 0 and 2 <= s // k <= MAX_COFACTOR]
    return {'k': rng.choice(fits)} if fits else None


def _gain(rng: Random, s: int) -> Numbers | None:
    return _operand(rng, MAX_SUM - s)


def _loss(rng: Random, s: int) -> Numbers | None:
    return _operand(rng, s - 2)


def _other_count(draw: Draw, sign: int) -> Draw:
    """The other's count `y` itself, which differs by the number that `draw` finds."""

    def rule(rng: Random, s: int) -> Numbers | None:
        gap = draw(rng, s)
        return gap and {'y': s + sign * gap['x']}

    return rule


def _with_sum(draw: Draw, sign: int) -> Draw:
    """What `draw` finds, if the two counts together are not too many."""

    def rule(rng: Random, s: int) -> Numbers | None:
        gap = draw(rng, s)
        return gap if gap and 2 * s + sign * gap['x'] <= MAX_SUM else None

    return rule


_RULES: Mapping[str, Draw] = {
    'nothing': lambda rng, s: {},
    'start': lambda rng, s: {'s': rng.randint(4, rng.choice((20, 60)))},
    'start_groups': lambda rng, s: _groups(rng, MAX_FACTOR, MAX_COFACTOR, MAX_SUM),
    'start_pair': lambda rng, s: {
        'x': rng.randint(2, 2 * MAX_OPERAND),
        'y': rng.randint(2, MAX_OPERAND),
    },
    'gain': _gain,
    'loss': _loss,
    'group_gain': lambda rng, s: _groups(rng, 6, MAX_FACTOR, MAX_SUM - s),
    'group_loss': lambda rng, s: _groups(rng, 6, MAX_FACTOR, s - 2),
    'twice_or_thrice': _factor('r', 3),
    'two_to_four_times': _factor('r', 4),
    'price': _factor('k', MAX_FACTOR),
    'half': _half,
    'divisor': _divisor,
    'smaller': _other_count(_loss, -1),
    'larger': _other_count(_gain, 1),
    'more_and_sum': _with_sum(_gain, 1),
    'fewer_and_sum': _with_sum(_loss, -1),
}


def _events(entries: Sequence[Mapping]) -> tuple[Event, ...]:
    return tuple(Event(**{**entry, 'draw': _RULES[entry['draw']]}) for entry in entries)


WORDS = read_words('arithmetic')
OPENINGS, HAPPENINGS, CLOSINGS = (_events(WORDS[k]) for k in ('openings', 'happenings', 'closings'))
