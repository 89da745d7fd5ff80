"""Arithmetic word problems: an endless generated task with step-by-step solutions.

A story is an opening, a few happenings and a closing question, which `arithmetic.yaml` holds. The
answer grammar is GSM8K's (Cobbe et al. 2021, arXiv 2110.14168): one step a line with calculator
marks, then `#### N`. The prompt determines every character of the answer.

Held out means held out twice. A template is the sequence of event kinds and wordings; a cast is a
name with an object. A tenth of each, chosen by hash, never occurs in the train split, and every
held-out example is built from a held-out template and a held-out cast.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import add, floordiv, mul, sub
from random import Random

from cllm_jax.tasks.example import Example, Split, holds_out, is_held_out, read_words
from cllm_jax.tasks.grader import same_number as check

__all__ = ['CLOSINGS', 'HAPPENINGS', 'MEN', 'OBJECTS', 'OPENINGS', 'WOMEN', 'check', 'generate']

WORDS = read_words('arithmetic')
MEN, WOMEN = tuple(WORDS['men']), tuple(WORDS['women'])
OBJECTS = (*WORDS['eaten'], *WORDS['used'])

# Several draws per plan keep plans that few numbers suit (halving, sharing) from dying out.
_DRAWS_PER_PLAN = 8

MAX_SUM = 99
MAX_OPERAND = 20
# The multiplication table in use: one factor up to 9, the other up to 12.
MAX_FACTOR, MAX_COFACTOR = 9, 12

_OPERATIONS = {'+': add, '-': sub, '*': mul, '/': floordiv}
_CALCULATION = re.compile(r'\[(\w)([-+*/])(\w)\]')

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

OPENINGS, HAPPENINGS, CLOSINGS = (
    tuple(Event(**entry | {'draw': _RULES[entry['draw']]}) for entry in WORDS[part])
    for part in ('openings', 'happenings', 'closings')
)


def generate(index: int, *, seed: int, split: Split) -> Example:
    """The problem number `index` of a split: a pure function of its arguments.

    `meta` holds `answer` (the right number), `template`, `cast` and `place`. Raises ConfigError for
    a split that does not exist.
    """
    held_out = holds_out(split)
    rng = Random(f'arithmetic {seed} {split} {index}')
    words = _draw_words(rng, held_out)
    while True:
        plan = _draw_plan(rng)
        wordings = [rng.randrange(len(event.wordings)) for event in plan]
        template = ' '.join(f'{e.kind}.{w}' for e, w in zip(plan, wordings, strict=True))
        if is_held_out(template) != held_out:
            continue
        for _ in range(_DRAWS_PER_PLAN):
            with suppress(Unsuited):
                problem, lines, number = _unfold(plan, wordings, words, rng)
                return Example(
                    id=f'arithmetic-{split}-{seed}-{index}',
                    prompt=f'Question: {problem}\nAnswer:',
                    answer='\n' + '\n'.join([*lines, f'#### {number}']),
                    meta={
                        'answer': number,
                        'template': template,
                        'cast': f'{words["N"]} {words["o"]}',
                        'place': f'{words["c"]} {words["p"]}',
                    },
                )


def _draw_words(rng: Random, held_out: bool) -> dict[str, str]:
    """Draws the cast and place; a train story has no held-out pair, not even a friend's."""
    while True:
        is_man = rng.random() < 0.5
        name, friend = rng.choice(MEN), rng.choice(WOMEN)
        if not is_man:
            name, friend = friend, name
        things, others = rng.sample(OBJECTS, 2)
        casts = (f'{name} {things}', f'{name} {others}', f'{friend} {things}')
        if is_held_out(casts[0]) if held_out else not any(map(is_held_out, casts)):
            break
    plurals = WORDS['containers']
    container, second = rng.sample(sorted(plurals), 2)
    he, him, his = ('he', 'him', 'his') if is_man else ('she', 'her', 'her')
    return dict(
        N=name, F=friend, o=things, q=others, verb='eat' if things in WORDS['eaten'] else 'use',
        c=container, cs=plurals[container], ds=plurals[second], p=rng.choice(WORDS['places']),
        he=he, He=he.capitalize(), him=him, His=his.capitalize(), he2='she' if is_man else 'he',
    )  # fmt: skip


def _draw_plan(rng: Random) -> list[Event]:
    """Draws an opening, one or more different happenings and a closing: 2 to 4 solution steps."""
    while True:
        steps = rng.choices(*zip(*WORDS['step_counts'].items(), strict=True))[0]
        opening, closing = (
            rng.choices(ends, [event.weight for event in ends])[0] for ends in (OPENINGS, CLOSINGS)
        )
        remaining = steps - len(opening.steps) - len(closing.steps)
        middle: list[Event] = []
        while remaining > 0:
            event = rng.choice([e for e in HAPPENINGS if len(e.steps) <= remaining])
            if event not in middle:
                middle.append(event)
                remaining -= len(event.steps)
        if middle:
            return [opening, *middle, closing]


def _unfold(
    plan: Sequence[Event], wordings: Sequence[int], words: Mapping[str, str], rng: Random
) -> tuple[str, list[str], int]:
    """Tells one story: the problem on one line, its solution lines and the final number.

    `wordings[i]` picks the wording of `plan[i]`; `words` fills the fields that are not numbers.
    Raises Unsuited where the numbers drawn for some event do not suit the state it meets.
    """
    told, lines, state = [], [], 0
    for event, wording in zip(plan, wordings, strict=True):
        scope = {'s': state} | event.draw(rng, state)
        fields = {**words, **scope}
        if 'r' in scope:
            fields['times'] = WORDS['times'][scope['r']]
            fields['multiplies'] = WORDS['multiplies'].get(scope['r'], '')
        told.append(event.wordings[wording].format_map(fields))
        state = scope['s']
        for step in event.steps:
            left, operator, right = _CALCULATION.search(step).groups()
            a, b = (int(term) if term.isdigit() else scope[term] for term in (left, right))
            scope['t'] = state = _OPERATIONS[operator](a, b)
            calculation = f'{a}{operator}{b}=<<{a}{operator}{b}={state}>>{state}'
            lines.append(_CALCULATION.sub(calculation, step).format_map(fields))
    return ' '.join(told), lines, state
