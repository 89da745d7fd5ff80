"""The events that arithmetic word problems are made of.

A story is an opening, a few happenings and a closing question. Each is an `Event`: it turns the
number of things someone has (the state `s`) into a new one, in none, one or two solution steps.

Text is written with `str.format` fields. Words: `{N}` the hero, `{F}` a friend of the other
gender (so that he and she are never ambiguous), `{o}` the things counted, `{q}` other things,
`{verb}` what one does with them (eat or use), `{c}`/`{cs}` a container and its plural, `{ds}`
another kind of container, `{p}` a place, `{he2}` the friend's pronoun. Numbers: the state `{s}`,
and `{x}`, `{y}`, `{k}`, `{m}`, `{r}` as drawn; `{times}` and `{multiplies}` put `r` in words.
In a step, `[a+b]` is one calculation over those numbers; it is written out in GSM8K's grammar
`12+5=<<12+5=17>>17` (Cobbe et al. 2021, arXiv 2110.14168), and `t` names the result of the step
before it. Every number is at least 2, so that a plural is always right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

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
    new state.
    """

    kind: str
    draw: Draw
    steps: tuple[str, ...]
    wordings: tuple[str, ...]


def _nothing(_: Random, __: int) -> Numbers:
    return {}


def _start(rng: Random, _: int) -> Numbers:
    return {'s': rng.randint(4, rng.choice((20, 60)))}


def _start_groups(rng: Random, _: int) -> Numbers | None:
    k, m = rng.randint(2, MAX_FACTOR), rng.randint(2, MAX_COFACTOR)
    return {'k': k, 'm': m} if k * m <= MAX_SUM else None


def _start_pair(rng: Random, _: int) -> Numbers:
    return {'x': rng.randint(2, 2 * MAX_OPERAND), 'y': rng.randint(2, MAX_OPERAND)}


def _gain(rng: Random, s: int) -> Numbers | None:
    high = min(MAX_OPERAND, MAX_SUM - s)
    return {'x': rng.randint(2, high)} if high >= 2 else None


def _loss(rng: Random, s: int) -> Numbers | None:
    high = min(MAX_OPERAND, s - 2)
    return {'x': rng.randint(2, high)} if high >= 2 else None


def _group_gain(rng: Random, s: int) -> Numbers | None:
    k, m = rng.randint(2, 6), rng.randint(2, MAX_FACTOR)
    return {'k': k, 'm': m} if s + k * m <= MAX_SUM else None


def _group_loss(rng: Random, s: int) -> Numbers | None:
    k, m = rng.randint(2, 6), rng.randint(2, MAX_FACTOR)
    return {'k': k, 'm': m} if s - k * m >= 2 else None


def _ratio(most: int) -> Draw:
    return lambda rng, s: {'r': rng.randint(2, most)} if s <= MAX_COFACTOR else None


def _half(_: Random, s: int) -> Numbers | None:
    return {} if s % 2 == 0 and 4 <= s <= 2 * MAX_COFACTOR else None


def _divisor(rng: Random, s: int) -> Numbers | None:
    fits = [k for k in range(2, MAX_FACTOR + 1) if s % k == 0 and 2 <= s // k <= MAX_COFACTOR]
    return {'k': rng.choice(fits)} if fits else None


def _price(rng: Random, s: int) -> Numbers | None:
    return {'k': rng.randint(2, MAX_FACTOR)} if s <= MAX_COFACTOR else None


def _smaller(rng: Random, s: int) -> Numbers | None:
    gap = _loss(rng, s)
    return {'y': s - gap['x']} if gap else None


def _larger(rng: Random, s: int) -> Numbers | None:
    gap = _gain(rng, s)
    return {'y': s + gap['x']} if gap else None


def _more_and_sum(rng: Random, s: int) -> Numbers | None:
    gap = _gain(rng, s)
    return gap if gap and 2 * s + gap['x'] <= MAX_SUM else None


def _fewer_and_sum(rng: Random, s: int) -> Numbers | None:
    gap = _loss(rng, s)
    return gap if gap and 2 * s - gap['x'] <= MAX_SUM else None


# fmt: off
OPENINGS = (
    Event('has', _start, (), (
        '{N} has {s} {o}.', '{N} has {s} {o} in a {c}.', 'There are {s} {o} in the {c} of {N}.')),
    Event('has-groups', _start_groups, ('At first {N} has [k*m] {o}.',), (
        '{N} has {k} {cs} with {m} {o} in each.',
        '{N} has {k} {cs}. Each {c} holds {m} {o}.',
        '{N} fills {k} {cs} with {m} {o} each.')),
    Event('has-two', _start_pair, ('At first {N} has [x+y] {o}.',), (
        '{N} has {x} big {o} and {y} small {o}.',
        '{N} has {x} {o} at home and {y} {o} at the {p}.',
        '{N} has {x} {o} in a {c} and {y} more on a table.')),
)

HAPPENINGS = (
    Event('buys', _gain, ('After buying more, {N} has [s+x] {o}.',), (
        '{He} buys {x} more {o}.',
        'At the {p} {he} buys {x} {o}.',
        'Then {he} pays for another {x} {o}.')),
    Event('finds', _gain, ('After finding more, {N} has [s+x] {o}.',), (
        '{He} finds {x} {o} at the {p}.',
        'On the way home {he} finds {x} more {o}.',
        'Under the bed {he} finds another {x} {o}.')),
    Event('receives', _gain, ('With the gift from {F}, {N} has [s+x] {o}.',), (
        '{F} gives {him} {x} {o}.',
        '{He} gets {x} more {o} from {F}.',
        '{His} friend {F} brings {him} {x} {o}.')),
    Event('gives', _loss, ('After giving {o} to {F}, {N} has [s-x] {o}.',), (
        '{He} gives {x} {o} to {F}.',
        'Then {F} takes {x} of the {o}.',
        '{He} lets {F} have {x} of the {o}.')),
    Event('loses', _loss, ('After losing some, {N} has [s-x] {o}.',), (
        '{He} loses {x} {o} at the {p}.',
        'On the way home {he} loses {x} of the {o}.',
        'Sadly, {x} of the {o} get lost.')),
    Event('consumes', _loss, ('After {he} {verb}s some, {N} has [s-x] {o}.',), (
        '{He} {verb}s {x} {o}.', 'Today {he} {verb}s {x} of the {o}.')),
    Event('buys-groups', _group_gain, ('The {ds} hold [k*m] {o}.', 'Now {N} has [s+t] {o}.'), (
        '{He} buys {k} {ds} of {m} {o} each.',
        'At the {p} {he} buys {k} {ds} with {m} {o} in each.')),
    Event('collects-daily', _group_gain,
          ('In {k} days {N} collects [k*m] {o}.', 'Now {N} has [s+t] {o}.'), (
        '{He} collects {m} {o} a day for {k} days.',
        'Each day for {k} days {he} collects {m} more {o}.')),
    Event('consumes-daily', _group_loss,
          ('In {k} days {N} {verb}s [k*m] {o}.', 'Now {N} has [s-t] {o}.'), (
        '{He} {verb}s {m} {o} a day for {k} days.',
        'Each day for {k} days {he} {verb}s {m} of the {o}.')),
    Event('treats-friends', _group_loss, ('The friends get [k*m] {o}.', 'Now {N} has [s-t] {o}.'), (
        '{He} gives {m} {o} to each of {k} friends.', 'Then {k} friends take {m} {o} each.')),
    Event('multiplies', _ratio(3), ('Then {N} has [s*r] {o}.',), (
        '{His} mother {multiplies} the number of {o}.', 'Soon {he} has {times} as many {o}.')),
    Event('halves', _half, ('Half of them are left, so {N} has [s/2] {o}.',), (
        '{He} gives half of the {o} to {F}.', '{He} sells half of the {o}.')),
)

CLOSINGS = (
    Event('left', _nothing, (), (
        'How many {o} does {N} have now?',
        'How many {o} does {he} have in the end?',
        'What is the number of {o} that {he} has now?')),
    Event('friend-more', _gain, ('So {F} has [s+x] {o}.',), (
        '{F} has {x} more {o} than {N}. How many {o} does {F} have?',
        '{N} has {x} fewer {o} than {F}. How many {o} does {F} have?')),
    Event('friend-fewer', _loss, ('So {F} has [s-x] {o}.',), (
        '{F} has {x} fewer {o} than {N}. How many {o} does {F} have?',
        '{N} has {x} more {o} than {F}. How many {o} does {F} have?')),
    Event('friend-times', _ratio(4), ('So {F} has [s*r] {o}.',), (
        '{F} has {times} as many {o} as {N}. How many {o} does {F} have?',
        'How many {o} does {F} have if {he2} has {times} as many as {N}?')),
    Event('friend-half', _half, ('So {F} has [s/2] {o}.',), (
        '{F} has half as many {o} as {N}. How many {o} does {F} have?',
        'How many {o} does {F} have if {he2} has half as many as {N}?')),
    Event('both-more', _more_and_sum, ('So {F} has [s+x] {o}.', 'Together they have [s+t] {o}.'), (
        '{F} has {x} more {o} than {N}. How many {o} do they have together?',
        '{F} has {x} more {o} than {N}. How many {o} do the two have in all?')),
    Event('both-fewer', _fewer_and_sum,
          ('So {F} has [s-x] {o}.', 'Together they have [s+t] {o}.'), (
        '{F} has {x} fewer {o} than {N}. How many {o} do they have together?',
        '{F} has {x} fewer {o} than {N}. How many {o} do the two have in all?')),
    Event('both-times', _ratio(4), ('So {F} has [s*r] {o}.', 'Together they have [s+t] {o}.'), (
        '{F} has {times} as many {o} as {N}. How many {o} do they have together?',
        '{F} has {times} as many {o} as {N}. How many {o} do the two have in all?')),
    Event('difference', _smaller, ('The difference is [s-y] {o}.',), (
        '{F} has {y} {o}. How many more {o} does {N} have than {F}?',
        '{F} has only {y} {o}. How many fewer {o} is that than {N} has?')),
    Event('goal', _larger, ('So {N} needs [y-s] more {o}.',), (
        '{He} wants to have {y} {o}. How many more {o} does {he} need?',
        'How many more {o} does {he} need to have {y} {o}?')),
    Event('other-things', _gain, ('In all {N} has [s+x] {o} and {q}.',), (
        '{He} also has {x} {q}. How many {o} and {q} does {he} have in all?',
        'How many {o} and {q} does {he} have in all if {he} has {x} {q}?')),
    Event('shares', _divisor, ('Each friend gets [s/k] {o}.',), (
        '{He} shares the {o} equally among {k} friends. How many {o} does each friend get?',
        'If {k} friends share the {o} equally, how many {o} does each friend get?')),
    Event('packs', _divisor, ('So {N} fills [s/k] {ds}.',), (
        '{He} packs all the {o} into {ds} of {k}. How many {ds} does {he} fill?',
        'How many {ds} does {he} fill with {k} {o} in each?')),
    Event('sells', _price, ('So {N} gets [s*k] dollars.',), (
        '{He} sells all the {o} for ${k} each. How many dollars does {he} get?',
        'How many dollars does {he} get for all the {o} at ${k} each?')),
)
# fmt: on
