"""What quality and speed mean."""

import pytest

from cllm_jax.data.sources import Source
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.result import DecodeResult
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.evaluation.speed import (
    Way,
    share_identical,
    tokens_per_forward,
    tokens_per_second,
)
from cllm_jax.tasks.example import Example
from cllm_jax.tasks.quality import is_repetitive, share_right, token_agreement
from tests.tiny import random_model


def result(tokens, accepted):
    return DecodeResult([''] * len(tokens), tokens, accepted, [0.0] * len(tokens))


def test_share_right_asks_the_checker():
    rows = [Example(str(i), 'p', str(i)) for i in range(4)]
    source = Source('rows', rows, lambda example, text: example.answer == text)
    assert share_right(source, ['0', '1', 'x', None]) == 0.5


def test_agreement_counts_tokens_at_the_same_place():
    assert token_agreement([[1, 2, 3], [4]], [[1, 9, 3, 4], [4]]) == 3 / 5
    assert token_agreement([[]], [[1]]) == 0


@pytest.mark.parametrize(
    ('tokens', 'repetitive'),
    [
        ([7] * 12, True),
        ([7] * 11, False),
        ([1, 2, 3] * 6, True),
        ([1, 2, 3] * 4 + [9], False),
        (list(range(100)), False),
        ([5, 6, *([1, 2] * 8), 9, 9], True),
        ([], False),
    ],
)
def test_repetition(tokens, repetitive):
    assert is_repetitive(tokens) == repetitive


def test_tokens_per_forward_weighs_prompts_by_their_forwards():
    found = result([[1] * 9, [1]], [[1, 4, 4], [1]])
    assert tokens_per_forward(found) == 10 / 4
    assert found.tokens_per_forward == [3.0, 1.0]
    assert share_identical(found, result([[1] * 9, [2]], [[9], [1]])) == 0.5


def test_speed_is_measured_on_the_same_tokens():
    model = random_model()
    ways = {
        'ar': Way(model, Request(AutoRegressive(), 8)),
        'jacobi': Way(model, Request(Jacobi(4), 8)),
    }
    prompts = [[1, 2, 3], [4, 5]]
    speed = tokens_per_second(ways, prompts, repeats=1)
    assert speed.keys() == ways.keys() and min(speed.values()) > 0
    ar, jacobi = (decode_all(model, way.request, prompts) for way in ways.values())
    assert share_identical(ar, jacobi) == 1
    assert tokens_per_forward(ar) == 1
