"""What quality means."""

import pytest

from cllm_jax.data.sources import Source
from cllm_jax.tasks.example import Example
from cllm_jax.tasks.quality import is_repetitive, share_right, token_agreement


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
