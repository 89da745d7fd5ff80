"""Arithmetic word problems: an endless generated task with step-by-step solutions.

The answer grammar is GSM8K's (Cobbe et al. 2021, arXiv 2110.14168): one step a line with calculator
marks, then `#### N`. The prompt determines every character of the answer.

Held out means held out twice. A template is the sequence of event kinds and wordings; a cast is a
name with an object. A tenth of each, chosen by hash, never occurs in the train split, and every
held-out example is built from a held-out template and a held-out cast.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import add, floordiv, mul, sub
from random import Random

from cllm_jax.tasks import arithmetic_events as events
from cllm_jax.tasks.arithmetic_events import WORDS, Event, Unsuited
from cllm_jax.tasks.example import Example, Split, holds_out, is_held_out
from cllm_jax.tasks.grader import same_number as check

__all__ = ['MEN', 'OBJECTS', 'WOMEN', 'check', 'generate']

MEN, WOMEN = tuple(WORDS['men']), tuple(WORDS['women'])
OBJECTS = (*WORDS['eaten'], *WORDS['used'])

# Several draws per plan keep plans that few numbers suit (halving, sharing) from dying out.
_DRAWS_PER_PLAN = 8

_OPERATIONS = {'+': add, '-': sub, '*': mul, '/': floordiv}
_CALCULATION = re.compile(r'\[(\w)([-+*/])(\w)\]')


def generate(index: int, *, seed: int, split: Split) -> Example:
    """The problem number `index` of a split: a pure function of its arguments.

    `meta` holds `answer` (the right number), `template`, `cast` and `place`.
    Raises ConfigError for any other split.
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
        if held_out and is_held_out(f'{name} {things}'):
            break
        pairs = (f'{name} {things}', f'{name} {others}', f'{friend} {things}')
        if not held_out and not any(map(is_held_out, pairs)):
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
            rng.choices(ends, [event.weight for event in ends])[0]
            for ends in (events.OPENINGS, events.CLOSINGS)
        )
        remaining = steps - len(opening.steps) - len(closing.steps)
        if remaining < 1:
            continue
        middle: list[Event] = []
        while remaining:
            event = rng.choice([e for e in events.HAPPENINGS if len(e.steps) <= remaining])
            if event not in middle:
                middle.append(event)
                remaining -= len(event.steps)
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
