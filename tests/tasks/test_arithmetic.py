import json
import re
from collections import Counter
from string import Formatter

import pytest

from cllm_jax.errors import ConfigError
from cllm_jax.tasks.arithmetic import (
    CLOSINGS,
    HAPPENINGS,
    MEN,
    OBJECTS,
    OPENINGS,
    WOMEN,
    check,
    generate,
)
from cllm_jax.tasks.example import is_held_out

DRAWS = 3000
MARK = re.compile(r'(\d+)([-+*/])(\d+)=<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)')
SPELLED = {'twice': 2, 'three times': 3, 'four times': 4, 'doubles': 2, 'triples': 3}
NUMBER = re.compile('|'.join([r'\d+', *SPELLED]))
# What each kind of event means, told apart from the code that solves it: how many numbers its
# sentence holds, and what becomes of the count.
MEANING = {
    'has': (1, lambda s, x: x),
    'has-groups': (2, lambda s, k, m: k * m),
    'has-two': (2, lambda s, x, y: x + y),
    'buys': (1, lambda s, x: s + x),
    'finds': (1, lambda s, x: s + x),
    'receives': (1, lambda s, x: s + x),
    'gives': (1, lambda s, x: s - x),
    'loses': (1, lambda s, x: s - x),
    'consumes': (1, lambda s, x: s - x),
    'buys-groups': (2, lambda s, k, m: s + k * m),
    'collects-daily': (2, lambda s, k, m: s + k * m),
    'consumes-daily': (2, lambda s, k, m: s - k * m),
    'treats-friends': (2, lambda s, k, m: s - k * m),
    'multiplies': (1, lambda s, r: s * r),
    'halves': (0, lambda s: s / 2),
    'left': (0, lambda s: s),
    'friend-more': (1, lambda s, x: s + x),
    'friend-fewer': (1, lambda s, x: s - x),
    'friend-times': (1, lambda s, r: s * r),
    'friend-half': (0, lambda s: s / 2),
    'both-more': (1, lambda s, x: s + (s + x)),
    'both-fewer': (1, lambda s, x: s + (s - x)),
    'both-times': (1, lambda s, r: s + s * r),
    'difference': (1, lambda s, y: s - y),
    'goal': (1, lambda s, y: y - s),
    'other-things': (1, lambda s, x: s + x),
    'shares': (1, lambda s, k: s / k),
    'packs': (1, lambda s, k: s / k),
    'sells': (1, lambda s, p: s * p),
}


@pytest.fixture(scope='module')
def drawn():
    return {
        split: [generate(i, seed=1, split=split) for i in range(DRAWS)]
        for split in ('train', 'heldout')
    }


@pytest.fixture(scope='module')
def examples(drawn):
    return drawn['train'] + drawn['heldout']


def kinds(example):
    return [part.split('.')[0] for part in example.meta['template'].split()]


def prompt_numbers(example):
    return [SPELLED.get(text) or int(text) for text in NUMBER.findall(example.prompt)]


def marks(example):
    """The (a, operator, b, result) of each line, after checking that the line repeats itself."""
    *steps, last = example.answer.removeprefix('\n').split('\n')
    found = []
    for step in steps:
        assert len(MARK.findall(step)) == 1, step
        a, op, b, a2, op2, b2, inner, outer = MARK.findall(step)[0]
        assert (a, op, b, inner) == (a2, op2, b2, outer), step
        found.append((int(a), op, int(b), int(outer)))
    assert last == f'#### {found[-1][3]}'
    return found


def test_an_example_depends_on_its_arguments_alone():
    for split in ('train', 'heldout'):
        forward = [generate(i, seed=3, split=split) for i in range(20)]
        assert forward == [generate(i, seed=3, split=split) for i in reversed(range(20))][::-1]
    asked = [(i, s, p) for i in range(50) for s in (0, 1) for p in ('train', 'heldout')]
    assert len({generate(i, seed=s, split=p).prompt for i, s, p in asked}) == len(asked)
    assert len({generate(i, seed=s, split=p).id for i, s, p in asked}) == len(asked)


def test_an_unknown_split_is_refused():
    with pytest.raises(ConfigError, match=r"'test'.*'train' and 'heldout'"):
        generate(0, seed=0, split='test')


def test_held_out_templates_and_casts_are_disjoint_from_train(drawn):
    for key in ('template', 'cast'):
        train = {e.meta[key] for e in drawn['train']}
        heldout = {e.meta[key] for e in drawn['heldout']}
        assert not train & heldout
        assert not any(map(is_held_out, train))
        assert all(map(is_held_out, heldout))
        assert len(train) > 500 and len(heldout) > 50


def test_the_recorded_cast_and_wordings_are_those_of_the_text(examples):
    wordings = {
        f'{event.kind}.{i}': re.sub(r'\\{\w+\\}', '.+', re.escape(wording))
        for event in (*OPENINGS, *HAPPENINGS, *CLOSINGS)
        for i, wording in enumerate(event.wordings)
    }
    for example in examples[::5]:
        name, things = example.meta['cast'].split()
        assert name in example.prompt and things in example.prompt
        told = ' '.join(wordings[part] for part in example.meta['template'].split())
        assert re.fullmatch(f'Question: {told}\nAnswer:', example.prompt), example


def test_no_train_story_pairs_anyone_named_with_a_held_out_object(drawn):
    for example in drawn['train']:
        hero, things = example.meta['cast'].split()
        words = set(re.findall(r'\w+', example.prompt))
        people = words & {*MEN, *WOMEN}
        pairs = {(person, things) for person in people}
        pairs |= {(hero, other) for other in words & set(OBJECTS)}
        assert len(people) <= 2 and (hero, things) in pairs
        assert not any(is_held_out(f'{person} {what}') for person, what in pairs), example


def test_hero_and_friend_differ_in_gender_so_pronouns_are_clear(examples):
    him, her = {'he', 'him', 'his', 'He', 'His'}, {'she', 'her', 'She', 'Her'}
    friend_if = re.compile(r' if (s?he) has (?=half|twice|three|four)')
    for example in examples:
        is_man = example.meta['cast'].split()[0] in MEN
        friend = friend_if.findall(example.prompt)
        assert friend in ([], ['she' if is_man else 'he']), example
        words = re.findall(r'\w+', friend_if.sub(' ', example.prompt))
        assert not set(words) & (her if is_man else him), example
        assert len(set(words) & set(MEN if is_man else WOMEN)) == 1
        assert len(set(words) & set(WOMEN if is_man else MEN)) <= 1


def test_every_wording_of_every_event_is_frequent_in_train(drawn):
    seen = Counter(part for e in drawn['train'] for part in e.meta['template'].split())
    for event in (*OPENINGS, *HAPPENINGS, *CLOSINGS):
        for i in range(len(event.wordings)):
            assert seen[f'{event.kind}.{i}'] >= DRAWS // 100


def test_the_answer_follows_from_the_story(examples):
    for example in examples:
        numbers = iter(prompt_numbers(example))
        state = 0
        for kind in kinds(example):
            count, becomes = MEANING[kind]
            state = becomes(state, *(next(numbers) for _ in range(count)))
        assert next(numbers, None) is None
        assert state == example.meta['answer'], example


def test_every_step_is_right_and_feeds_a_later_one(examples):
    compute = {'+': int.__add__, '-': int.__sub__, '*': int.__mul__}
    for example in examples:
        known = set(prompt_numbers(example)) | ({2} if ' half ' in example.prompt else set())
        steps = marks(example)
        for i, (a, op, b, result) in enumerate(steps):
            assert result * b == a if op == '/' else compute[op](a, b) == result, example
            assert {a, b} <= known, example
            known.add(result)
            later = {n for later in steps[i + 1 :] for n in (later[0], later[2])}
            assert result in later or i == len(steps) - 1, example
        assert steps[-1][3] == example.meta['answer']


def test_stories_stay_within_what_a_small_model_can_learn(examples):
    lengths = Counter()
    for example in examples:
        steps = marks(example)
        lengths[len(steps)] += 1
        assert len(set(kinds(example))) == len(kinds(example))
        for a, op, b, result in steps:
            assert min(a, b, result) >= 2
            if op in '+-':
                assert max(a, b, result) <= 99
            else:
                low, high = sorted((a, b) if op == '*' else (b, result))
                assert low <= 9 and high <= 12, example
    assert set(lengths) == {2, 3, 4}
    assert lengths.most_common(1)[0][0] == 3


def test_no_two_events_share_a_wording():
    wordings = [w for e in (*OPENINGS, *HAPPENINGS, *CLOSINGS) for w in e.wordings]
    blank = {re.sub(r'\{(?!N|F)\w+\}', '_', wording).lower() for wording in wordings}
    assert len(blank) == len(wordings)


def test_a_solution_line_names_only_what_its_sentence_names():
    def fields(text):
        return {name for _, name, _, _ in Formatter().parse(text) if name}

    for event in (*OPENINGS, *HAPPENINGS, *CLOSINGS):
        for wording in event.wordings:
            told = fields(wording) | {'N', 'o', 'he'}
            assert all(fields(step) <= told for step in event.steps), (event.kind, wording)


def test_the_text_has_the_agreed_shape(examples):
    assert set(MEANING) == {e.kind for e in (*OPENINGS, *HAPPENINGS, *CLOSINGS)}
    for example in examples:
        assert re.fullmatch(r'Question: [^\n]+[.?]\nAnswer:', example.prompt)
        assert re.fullmatch(r'(\n[A-Z][^\n{}\[\]]+\.){2,4}\n#### \d+', example.answer)
        assert not re.search(r'[{}\[\]]|  ', example.prompt + example.answer)
        assert json.loads(json.dumps(example.meta)) == example.meta


def test_check_accepts_the_reference_and_its_other_spellings(examples):
    for example in examples[::10]:
        n = example.meta['answer']
        assert check(example, example.answer)
        for text in (f'#### {n}.0', f'#### ${n}', f'####{n}', f'#### {n} of them'):
            assert check(example, text), text
        assert check(example, f'#### {n}\n\nQuestion: 1 + 1?\nAnswer:\n#### {n + 1}')


def test_check_refuses_any_other_number(examples):
    for example in examples[::10]:
        n = example.meta['answer']
        body = example.answer.rpartition('#### ')[0]
        for wrong in (
            n + 1, n - 1, -n, n * 10, f'{n}5', f'{n}.5', f'1{n}', f'{n}/3', f'{n}+0', '',
        ):  # fmt: skip
            assert not check(example, f'{body}#### {wrong}'), wrong
        assert not check(example, f'#### {n + 1}\n#### {n}')


def test_garbage_is_wrong_and_never_raises():
    example = generate(0, seed=0, split='train')
    for text in ('', '####', '#### ', '#### ,', '#### $', '#### -', '#### .5', '#### \u0663',
                 '####\n', '\0\ud800', '<<2+2=', '#### ' + '9' * 10_000, '#### 1.' + '0' * 10_000,
                 '#### nan', '#### 1e999999999', str(example.meta['answer'])):  # fmt: skip
        assert check(example, text) is False
