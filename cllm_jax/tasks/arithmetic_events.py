"""The events that arithmetic word problems are made of.

A story is an opening, a few happenings and a closing question. Each is an `Event`: it turns the
number of things someone has (the state `s`) into a new one, in none, one or two solution steps.
`arithmetic.yaml` has the events with their texts, and says what their fields mean.
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


class Unsuited(Exception):
    """No numbers, or not those that were drawn, suit the state that an event meets."""


@dataclass(frozen=True)
class Event:
    """One kind of event: the numbers that suit a state, its solution steps, its wordings.

    `draw(rng, s)` returns the event's numbers for the state `s`, or raises Unsuited. An opening
    without steps returns the first state itself. The last step's result is the new state.
    `weight` says how often an opening or a closing is drawn.
    """

    kind: str
    draw: Callable[[Random, int], Numbers]
    wordings: Sequence[str]
    steps: Sequence[str] = ()
    weight: int = 1


def _suited(condition: bool, **numbers: int) -> Numbers:
    if not condition:
        raise Unsuited
    return numbers


def _operand(rng: Random, room: int) -> int:
    """A number to add or to take away; every number is at least 2: a plural is always right."""
    _suited(room >= 2)
    return rng.randint(2, min(MAX_OPERAND, room))


def _groups(rng: Random, most: int, most_in_each: int, room: int) -> Numbers:
    k, m = rng.randint(2, most), rng.randint(2, most_in_each)
    return _suited(k * m <= room, k=k, m=m)


def _factor(rng: Random, s: int, most: int) -> int:
    _suited(s <= MAX_COFACTOR)
    return rng.randint(2, most)


def _divisor(rng: Random, s: int) -> int:
    fits = [k for k in range(2, MAX_FACTOR + 1) if s % k == 0 and 2 <= s // k <= MAX_COFACTOR]
    _suited(bool(fits))
    return rng.choice(fits)


def _and_sum(s: int, sign: int, x: int) -> Numbers:
    return _suited(2 * s + sign * x <= MAX_SUM, x=x)


_RULES: Mapping[str, Callable[[Random, int], Numbers]] = {
    'nothing': lambda rng, s: {},
    'start': lambda rng, s: {'s': rng.randint(4, rng.choice((20, 60)))},
    'start_groups': lambda rng, s: _groups(rng, MAX_FACTOR, MAX_COFACTOR, MAX_SUM),
    'start_pair': lambda rng, s: dict(x=rng.randint(2, 2 * MAX_OPERAND), y=_operand(rng, MAX_SUM)),
    'gain': lambda rng, s: {'x': _operand(rng, MAX_SUM - s)},
    'loss': lambda rng, s: {'x': _operand(rng, s - 2)},
    'group_gain': lambda rng, s: _groups(rng, 6, MAX_FACTOR, MAX_SUM - s),
    'group_loss': lambda rng, s: _groups(rng, 6, MAX_FACTOR, s - 2),
    'twice_or_thrice': lambda rng, s: {'r': _factor(rng, s, 3)},
    'two_to_four_times': lambda rng, s: {'r': _factor(rng, s, 4)},
    'price': lambda rng, s: {'k': _factor(rng, s, MAX_FACTOR)},
    'half': lambda rng, s: _suited(s % 2 == 0 and 4 <= s <= 2 * MAX_COFACTOR),
    'divisor': lambda rng, s: {'k': _divisor(rng, s)},
    'smaller': lambda rng, s: {'y': s - _operand(rng, s - 2)},
    'larger': lambda rng, s: {'y': s + _operand(rng, MAX_SUM - s)},
    'more_and_sum': lambda rng, s: _and_sum(s, 1, _operand(rng, MAX_SUM - s)),
    'fewer_and_sum': lambda rng, s: _and_sum(s, -1, _operand(rng, s - 2)),
}

WORDS = read_words('arithmetic')
OPENINGS, HAPPENINGS, CLOSINGS = (
    tuple(Event(**entry | {'draw': _RULES[entry['draw']]}) for entry in WORDS[part])
    for part in ('openings', 'happenings', 'closings')
)
