"""Checkers: what counts as the right answer, and what does not."""

import pytest

from cllm_jax.tasks import arithmetic, grader
from cllm_jax.tasks.example import Example


@pytest.mark.parametrize(
    'text, right',
    [
        ('#### 1080', True),
        ('steps\n#### 1,080', True),
        ('#### $1,080.00\n', True),
        ('#### 1080.', True),
        ('#### 7\n#### 1080', True),
        ('#### 1080\n#### 7', False),
        ('#### -1080', False),
        ('#### 1080.5', False),
        ('#### 1080 clips', False),
        ('#### 1080/2', False),
        ('the answer is 1080', False),
        ('1080', False),
        ('####', False),
        ('', False),
    ],
)
def test_same_number(text, right):
    assert grader.same_number(Example('', '', 'so\n#### 1,080'), text) is right


@pytest.mark.parametrize(
    ('text', 'number'),
    [
        ('#### 1,234', 1234),
        ('#### $1,234.0', 1234),
        ('#### -$5', -5),
        ('#### .5', 0.5),
        ('#### 3\n#### 4', 4),
        ('#### 7\n#### x', 7),
        ('a #### 3', None),
        ('#### 72/3', None),
        ('#### 72 clips', None),
        ('none', None),
    ],
)
def test_final_number_is_all_that_its_line_holds(text, number):
    assert grader.final_number(text) == number


def test_the_arithmetic_task_is_graded_by_the_same_number():
    example = arithmetic.generate(0, seed=0, split='heldout')
    number = example.meta['answer']
    for text in (example.answer, f'#### {number}', f'#### {number}/3', f'{number}', ''):
        assert arithmetic.check(example, text) is grader.same_number(example, text)


def test_same_number_without_a_reference_is_false():
    assert not grader.same_number(Example('', '', ''), '')


def test_same_text_ignores_only_white_space():
    example = Example('', '', ' SELECT "a"  FROM table')
    assert grader.same_text(example, 'SELECT "a" FROM table\n')
    assert not grader.same_text(example, 'select "a" FROM table')
    assert not grader.same_text(example, 'SELECT "a" FROM table;')
    assert not grader.same_text(Example('', '', ''), '')


@pytest.mark.parametrize(
    'text, right',
    [
        ("select  COUNT( * )\nfrom T where a>='It''s  B' ;", True),
        ("SELECT count(*) FROM t WHERE a >= 'it''s  B'", False),
        ("SELECT count(*) FROM t WHERE a >= 'It''s B'", False),
        ("SELECT count(*) FROM t WHERE a > 'It''s  B'", False),
        ('SELECT count(*) FROM t', False),
        (';', False),
    ],
)
def test_same_sql(text, right):
    reference = "SELECT count(*) FROM t WHERE a >= 'It''s  B'"
    assert grader.same_sql(Example('', '', reference), text) is right


def test_same_sql_without_a_reference_is_false():
    assert not grader.same_sql(Example('', '', ''), ';')
