"""The text-to-SQL task: pure, split by template and schema, worded as agreed."""

import json
import re
from collections import Counter

import pytest

from cllm_jax.errors import ConfigError
from cllm_jax.tasks.example import is_held_out
from cllm_jax.tasks.sql import CUE, generate

TRAIN = [generate(i, seed=0, split='train') for i in range(3000)]
HELD_OUT = [generate(i, seed=0, split='heldout') for i in range(400)]
SAMPLE = TRAIN[:150] + HELD_OUT[:150]


def test_an_example_depends_on_its_arguments_only():
    assert generate(7, seed=0, split='train') == TRAIN[7]
    assert generate(7, seed=0, split='heldout') == HELD_OUT[7]
    for other in (generate(8, seed=0, split='train'), generate(7, seed=1, split='train')):
        assert other.prompt != TRAIN[7].prompt and other.id != TRAIN[7].id


def test_text_is_the_same_on_every_machine():
    example = TRAIN[4]
    assert example.prompt == (
        'teacher(id, name, score, location, distance)\n'
        'customer(id, teacher_id, language, profit)\n'
        'Find the language and profit of the customers where language equals Hindi and profit is '
        'less than the average profit of customers whose language is Dutch, arranged by profit, '
        'lowest first, limited to 3 rows.\n'
        'SQL:'
    )
    assert example.answer == (
        " SELECT language, profit FROM customer WHERE language = 'Hindi' AND profit < "
        "(SELECT AVG(profit) FROM customer WHERE language = 'Dutch') ORDER BY profit ASC LIMIT 3"
    )


def test_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="'test'"):
        generate(0, seed=0, split='test')


def test_training_and_held_out_share_neither_schema_nor_template():
    for key in ('schema', 'template'):
        train = {example.meta[key] for example in TRAIN}
        held_out = {example.meta[key] for example in HELD_OUT}
        assert not train & held_out
        assert not any(map(is_held_out, train))
        assert all(map(is_held_out, held_out))
        assert len(held_out) > 200


def test_held_out_text_uses_only_words_that_are_common_in_training():
    def words(example):
        return set(re.findall(r'[A-Za-z]+', example.prompt + example.answer))

    seen = Counter(word for example in TRAIN for word in words(example))
    for example in HELD_OUT:
        assert min(seen[word] for word in words(example)) >= 5
    choices = Counter(c for example in TRAIN for c in example.meta['template'].split())
    for example in HELD_OUT:
        assert min(choices[choice] for choice in example.meta['template'].split()) >= 30


def test_prompt_ends_where_the_answer_begins():
    for example in SAMPLE:
        *schema, question, cue = example.prompt.split('\n')
        assert cue == CUE
        assert [line.split('(')[0] for line in schema] == list(example.meta['tables'])
        assert question[-1] in '.?' and '{' not in question and '  ' not in question
        assert example.answer.startswith(' SELECT ')
        assert '  ' not in example.answer and '\n' not in example.answer
        assert json.loads(json.dumps(example.meta)) == example.meta


def test_values_of_the_answer_stand_in_the_question():
    for example in SAMPLE:
        question = example.prompt.split('\n')[-2]
        values = re.findall(r"'(\w+)'|(?<![T\w])(\d+)", example.answer)
        assert values or 'SELECT' in example.answer[8:]
        assert {word or number for word, number in values} <= set(re.findall(r'\w+', question))
