"""Checkers: what counts as the right answer, and what does not."""

import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_jax.tasks import arithmetic, grader
from cllm_jax.tasks.example import Example

# openai/grade-school-math finds the answer with this.
OWN_RULE = re.compile(r'#### (\-?[0-9\.\,]+)')

NUMBERS = {
    'plain': ('#### 1080', '1080'),
    'steps before': ('so 2*540=<<2*540=1080>>1080\n#### 1,080', '1080'),
    'in a line': ('which makes 7. #### 7', '7'),
    'five signs': ('##### 7', '7'),
    'no space': ('####7', '7'),
    'two spaces, tab': ('####  \t7', '7'),
    'carriage return': ('#### 7\r\n\r\n8', '7'),
    # The first marker's is the answer.
    'runs on': ('so 72\n#### 72\n\nQuestion: Tom has 1.\nAnswer: 1+1\n#### 2', '72'),
    'runs on in its line': ('#### 72 #### 2', '72'),
    'repeats without a space': ('####72####72####72', '72'),
    'says it twice': ('#### 7\n#### 1080', '7'),
    'a number below': ('#### 7\n5', '7'),
    'a marker without a number': ('#### x\n#### 7', '7'),
    'a heading': ('#### Step 1\n5 + 2\n#### 7', '7'),
    'a sentence after it': ('#### 7. 2 of them are red', '7'),
    'end token': ('#### 7</s>', '7'),
    'a sum': ('#### 5 + 5 = 10', '5'),
    'two numbers': ('#### 5 6', '5'),
    'a list': ('#### 72, 73', '72'),
    'a dash': ('#### 72 - 3 of them', '72'),
    'a colon': ('#### 72: 3', '72'),
    'why it is so': ('#### 72 = 8*9', '72'),
    # Signs.
    'plus': ('#### +5', '5'),
    'minus': ('#### -5', '-5'),
    'unicode minus': ('#### \u22125', '-5'),
    'en dash': ('#### \u20135', '-5'),
    'wide minus': ('#### \uff0d5', '-5'),
    'spaced minus': ('#### - 5', '-5'),
    'minus zero': ('#### -0', '0'),
    'minus before a currency': ('#### -$5', '-5'),
    'minus after a currency': ('#### $-5', '-5'),
    # Thousands.
    'comma': ('#### 1,234,567.50', '1234567.5'),
    'space': ('#### 1 000', '1000'),
    'spaces': ('#### 12 345 678.5', '12345678.5'),
    'no-break space': ('#### 1\u00a0000', '1000'),
    'narrow no-break space': ('#### 1\u202f000', '1000'),
    'thin space': ('#### 1\u2009000', '1000'),
    'LaTeX comma': ('#### 9{,}500', '9500'),
    'LaTeX space': (r'#### 9\,500', '9500'),
    # Decimals.
    'zeros': ('#### 5.00', '5'),
    'full stop': ('#### 5.', '5'),
    'comma after it': ('#### 5,', '5'),
    'ellipsis': ('#### 5...', '5'),
    'no integer part': ('#### .5', '0.5'),
    'long': ('#### ' + '9' * 5000, '9' * 5000),
    # Currencies, units and markup.
    'dollar': ('#### $5.00', '5'),
    'spaced dollar': ('#### $ 5', '5'),
    'euro': ('#### €5', '5'),
    'percent': ('#### 5%', '5'),
    'unit': ('#### 1,000 apples', '1000'),
    'unit without a space': ('#### 60mph', '60'),
    'why': ('#### 18 (3 * 6)', '18'),
    'bold': ('#### **5**', '5'),
    'italic': ('#### _5_', '5'),
    'code': ('#### `5`', '5'),
    'LaTeX': ('#### $5$', '5'),
    'LaTeX dollar': (r'#### \$5', '5'),
    'boxed': (r'#### $\boxed{1,000}$', '1000'),
    'boxed dollars': (r'#### \boxed{\$9{,}500}', '9500'),
    'calculator mark': ('#### <<3+4=7>>7', '7'),
    'colon': ('####: 5', '5'),
    'equals': ('#### = 5', '5'),
    # What is not a number.
    'fraction': ('#### 72/3', None),
    'spaced fraction': ('#### 72 / 3', None),
    'mixed number': ('#### 5 1/2', None),
    'unicode fraction': ('#### 5½', None),
    'power': ('#### 10²', None),
    'caret': ('#### 10^2', None),
    'equation': ('#### 5*2=10', None),
    'range': ('#### 5-6', None),
    'range with a dash': ('#### 5\u20136', None),
    'time': ('#### 7:30', None),
    'version': ('#### 1.2.3', None),
    'underscores': ('#### 1_000', None),
    'exponent': ('#### 1e3', None),
    'a fraction first': ('#### 72/3\n#### 24', None),
    'words': ('#### seven', None),
    'digits of words': ('#### x7', None),
    'next line': ('####\n7', None),
    'three signs': ('### 7', None),
    'sign alone': ('#### -', None),
    'two signs': ('#### --7', None),
    'comma alone': ('#### ,', None),
    'full stop alone': ('#### .', None),
    'no marker': ('the answer is 1080', None),
    'marker alone': ('####', None),
    'nothing': ('', None),
}


@pytest.mark.parametrize('name', NUMBERS)
def test_the_number_is_that_of_the_first_marker(name):
    text, number = NUMBERS[name]
    assert grader.final_number(text) == (None if number is None else Decimal(number))
    other = Example('', '', f'#### {Decimal(number or 0) + 1}')
    assert grader.same_number(Example('', '', f'#### {number}'), text) is (number is not None)
    assert not grader.same_number(other, text)


@given(
    number=st.decimals(-(10**9), 10**9, places=2),
    commas=st.booleans(),
    before=st.text('ab 0\n$*', max_size=9),
    after=st.sampled_from(
        ('', '\n', ' ', ' clips', '\n\nQuestion: 7\n#### 1', '\n7', '.\n', '<pad>')
    ),
)
def test_what_is_right_by_the_rule_of_gsm8k_is_right(number, commas, before, after):
    shown = f'{number:{"," if commas else ""}}'
    text = f'{before}#### {shown}{after}'
    own = OWN_RULE.search(text)[1].strip().replace(',', '').removesuffix('.')
    assert Decimal(own) == number == grader.final_number(text)


@pytest.mark.parametrize(
    'part', ['#### ', '####', '#### *', '*', '<<', '<<1>>', '1 000 ', '1,', '_', ' ', '/ ', '\t']
)
def test_repeated_text_is_read_in_one_pass(part):
    """A model that repeats itself: quadratic reading of this length would take hours."""
    for text in (part * 200_000, '#### ' + part * 200_000, '#### 5' + part * 200_000):
        grader.final_number(text)


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
