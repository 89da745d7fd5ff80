"""The verdict names its promise, and where answers part it says where and how near a tie was."""

import dataclasses

import pytest

from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.jacobi_tree import JacobiTree
from cllm_jax.drafters.medusa import Medusa
from cllm_jax.evaluation.speed import Method
from cllm_jax.evaluation.verdict import verdict
from tests.drafters.examples import DRAFTERS
from tests.tiny import ragged_prompts, random_model, tiny_config

MODEL = random_model(config=tiny_config(layers=1))
PROMPTS = ragged_prompts(5, (3, 7, 4))
RESULT = decode_all(MODEL, Request(Jacobi(4), 9), PROMPTS)


def lines(request, has_class=False, other=RESULT):
    model = dataclasses.replace(MODEL)
    vars(model)['has_class'] = has_class
    return verdict('Jacobi', Method(model, request), PROMPTS, RESULT, other)


@pytest.mark.parametrize(
    ('request_', 'has_class', 'begins'),
    [
        (
            Request(Jacobi(4), exact='class'),
            True,
            'IDENTICAL by class: Jacobi and AR in its class agree',
        ),
        (
            Request(Jacobi(4), exact='program'),
            False,
            "IDENTICAL by program: Jacobi and AR by this drafter's program agree",
        ),
        (Request(Jacobi(4), exact='class'), False, 'IDENTICAL, without a guarantee: '),
        (Request(Jacobi(4), exact='off'), True, 'IDENTICAL, without a guarantee: '),
        (Request(JacobiTree(6, 2), exact='class'), True, 'IDENTICAL, without a guarantee: '),
    ],
)
def test_identical_says_by_what(request_, has_class, begins):
    first, *rest = lines(request_, has_class)
    assert first.startswith(begins) and first.endswith(' on 3 of 3 prompts (27 tokens)')
    assert len(rest) == ('guarantee' in begins)
    if 'guarantee' in begins:
        assert 'docs/exactness.md' in rest[0]


def test_a_difference_is_shown_where_it_is():
    tokens = [list(row) for row in RESULT.tokens]
    tokens[1][4] = (tokens[1][4] + 1) % 29
    other = dataclasses.replace(RESULT, tokens=tokens)
    first, place = lines(Request(Jacobi(4), exact='class'), True, other)
    assert first.startswith('DIFFERENT, although promised by class (a fault): ')
    assert first.endswith(' on 2 of 3 prompts (27 tokens)')
    assert place.startswith('first in prompt 2, token 5: AR has ')
    assert place.endswith(' units in the last place of float32 apart')
    tokens[1] = tokens[1][:2]
    *_, place = lines(Request(Jacobi(4), exact='class'), True, other)
    assert place.startswith('first in prompt 2, token 3: AR has no more, Jacobi ')


def test_what_is_lossy_is_called_so():
    medusa = next(d for d in DRAFTERS.values() if isinstance(d, Medusa))
    [line] = lines(Request(medusa, sampling=Sampling(1.0, typical=0.1)), True)
    assert line.startswith('LOSSY: ')
