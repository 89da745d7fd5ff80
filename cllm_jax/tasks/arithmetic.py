"""Arithmetic word problems: an endless generated task with step-by-step solutions.

The answer grammar is GSM8K's (Cobbe et al. 2021, arXiv 2110.14168): one step a line with calculator
marks, then `#### N`. The prompt determines every character of the answer.

Held out means held out twice. A template is the sequence of event kinds and wordings; a cast is a
name with an object. A tenth of each, chosen by hash, never occurs in the train split, and every
held-out example is built from a held-out template and a held-out cast.
"""

import re
from collections.abc import Mapping, Sequence
from operator import add, floordiv, mul, sub
from random import Random

from cllm_jax.errors import ConfigError
from cllm_jax.tasks.arithmetic_events import CLOSINGS, HAPPENINGS, OPENINGS, Event, Numbers
from cllm_jax.tasks.example import Example, Split, is_held_out
from cllm_jax.tasks.grader import final_number

# fmt: off
MEN = ('Tom', 'Ben', 'Sam', 'Max', 'Leo', 'Jack', 'Adam', 'Mark', 'Paul', 'Eric', 'Luke', 'Ryan',
       'David', 'Peter', 'Henry')
WOMEN = ('Anna', 'Sara', 'Lucy', 'Emma', 'Kate', 'Mary', 'Jane', 'Rosa', 'Lily', 'Nina', 'Ella',
         'Amy', 'Julia', 'Laura', 'Grace')
EATEN = ('apples', 'pears', 'plums', 'cookies', 'cakes', 'nuts', 'grapes', 'eggs', 'carrots',
         'buns', 'figs', 'lemons', 'peaches', 'berries', 'mints', 'dates', 'rolls', 'muffins',
         'oranges', 'candies')
USED = ('pencils', 'stickers', 'cards', 'stamps', 'balloons', 'candles', 'ribbons', 'nails',
        'buttons', 'beads', 'pens', 'crayons', 'straws', 'bricks', 'tickets', 'screws', 'napkins',
        'sticks', 'pins', 'magnets')
CONTAINERS = {'bag': 'bags', 'box': 'boxes', 'basket': 'baskets', 'jar': 'jars', 'bowl': 'bowls',
              'crate': 'crates', 'tin': 'tins', 'tray': 'trays'}
PLACES = ('market', 'park', 'school', 'store', 'beach', 'farm', 'fair', 'camp')
# fmt: on
OBJECTS = EATEN + USED

_TIMES = {2: 'twice', 3: 'three times', 4: 'four times'}
_MULTIPLIES = {2: 'doubles', 3: 'triples'}

_STEP_COUNTS, _STEP_WEIGHTS = (2, 3, 4), (20, 55, 25)
_OPENING_WEIGHTS = tuple(2 if event.kind == 'has' else 1 for event in OPENINGS)
_CLOSING_WEIGHTS = tuple(4 if event.kind == 'left' else 1 for event in CLOSINGS)
# Several draws per plan keep plans that few numbers suit (halving, sharing) from dying out.
_DRAWS_PER_PLAN = 8

_OPERATIONS = {'+': add, '-': sub, '*': mul, '/': floordiv}
_CALCULATION = re.compile(r'\[(\w)([-+*/])(\w)\]')


def generate(index: int, *, seed: int, split: Split) -> Example:
    """The problem number `index` of a split: a pure function of its arguments.

    `meta` holds `answer` (the right number), `template`, `cast` and `place`.
    Raises ConfigError for any other split.
    """
    if split not in ('train', 'heldout'):
        raise ConfigError(f"split {split!r}: arithmetic has 'train' and 'heldout'; name one")
    rng = Random(f'arithmetic {seed} {split} {index}')
    held_out = split == 'heldout'
    words = _draw_words(rng, held_out)
    while True:
        plan = _draw_plan(rng)
        wordings = [rng.randrange(len(event.wordings)) for event in plan]
        template = ' '.join(f'{e.kind}.{w}' for e, w in zip(plan, wordings, strict=True))
        if is_held_out(template) != held_out:
            continue
        for _ in range(_DRAWS_PER_PLAN):
            story = _unfold(plan, wordings, words, rng)
            if story is not None:
                problem, lines, number = story
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


def check(example: Example, text: str) -> bool:
    """Whether the last line `#### N` of a generated answer has the right number."""
    return final_number(text) == example.meta['answer']


def _draw_words(rng: Random, held_out: bool) -> dict[str, str]:
    """Draws the cast and place; a train story has no held-out pair, not even a friend's."""
    while True:
        is_man = rng.random() < 0.5
        name, friend = rng.choice(MEN), rng.choice(WOMEN)
        if not is_man:
            name, friend = friend, name
        things, others = rng.sample(OBJECTS, 2)
        if held_out and is_held_out(f'{name} {things}'):
            break
        pairs = (f'{name} {things}', f'{name} {others}', f'{friend} {things}')
        if not held_out and not any(map(is_held_out, pairs)):
            break
    container, second = rng.sample(sorted(CONTAINERS), 2)
    he, him, his = ('he', 'him', 'his') if is_man else ('she', 'her', 'her')
    return dict(
        N=name, F=friend, o=things, q=others, verb='eat' if things in EATEN else 'use',
        c=container, cs=CONTAINERS[container], ds=CONTAINERS[second], p=rng.choice(PLACES),
        he=he, He=he.capitalize(), him=him, His=his.capitalize(), he2='she' if is_man else 'he',
    )  # fmt: skip


def _draw_plan(rng: Random) -> list[Event]:
    """Draws an opening, one or more different happenings and a closing: 2 to 4 solution steps."""
    while True:
        steps = rng.choices(_STEP_COUNTS, _STEP_WEIGHTS)[0]
        opening = rng.choices(OPENINGS, _OPENING_WEIGHTS)[0]
        closing = rng.choices(CLOSINGS, _CLOSING_WEIGHTS)[0]
        remaining = steps - len(opening.steps) - len(closing.steps)
        if remaining < 1:
            continue
        middle: list[Event] = []
        while remaining:
            event = rng.choice([e for e in HAPPENINGS if len(e.steps) <= remaining])
            if event not in middle:
                middle.append(event)
                remaining -= len(event.steps)
        return [opening, *middle, closing]


def _unfold(
    plan: Sequence[Event], wordings: Sequence[int], words: Mapping[str, str], rng: Random
) -> tuple[str, list[str], int] | None:
    """Tells one story: the problem on one line, its solution lines and the final number.

    `wordings[i]` picks the wording of `plan[i]`; `words` fills the fields that are not numbers.
    Returns None where the numbers drawn for some event do not suit the state it meets.
    """
    told: list[str] = []
    lines: list[str] = []
    state = 0
    for event, wording in zip(plan, wordings, strict=True):
        numbers = event.draw(rng, state)
        if numbers is None:
            return None
        scope = {'s': state, **numbers}
        fields = {**words, **scope}
        if 'r' in scope:
            fields['times'] = _TIMES[scope['r']]
            fields['multiplies'] = _MULTIPLIES.get(scope['r'], '')
        told.append(event.wordings[wording].format_map(fields))
        state = scope['s']
        for step in event.steps:
            calculation, state = _calculate(step, scope)
            lines.append(_CALCULATION.sub(calculation, step).format_map(fields))
            scope['t'] = state
    return ' '.join(told), lines, state


def _calculate(step: str, scope: Numbers) -> tuple[str, int]:
    """Writes out the step's one calculation with its calculator mark; returns text and result."""
    left, operator, right = _CALCULATION.search(step).groups()
    a, b = (int(term) if term.isdigit() else scope[term] for term in (left, right))
    result = _OPERATIONS[operator](a, b)
    return f'{a}{operator}{b}=<<{a}{operator}{b}={result}>>{result}', result
