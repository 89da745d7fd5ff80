"""Text of tokens: what a stop token and a stop string leave, and what a stream may already show."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_jax.decoding.request import encode
from cllm_jax.decoding.text import cut, find_stop, settled, text_of
from tests.tiny import byte_tokenizer, echo_model, fallback_tokenizer

REPLACEMENT = '\ufffd'


@pytest.mark.parametrize('make', [byte_tokenizer, fallback_tokenizer])
def test_the_stop_token_is_not_text_and_other_special_tokens_are(make):
    model = echo_model('x', make())
    ids = encode(model, 'the')
    assert text_of(model, [*ids, 1]) == text_of(model, ids) == 'the'
    assert text_of(model, [0, *ids, 2]) == '<s>the<pad>'
    assert text_of(model, []) == text_of(model, [1]) == ''
    assert find_stop(model, [*ids, 2, *ids, 1], ('<pad>',)) == ('the', 2)


def test_the_stop_completed_first_decides_even_if_a_longer_one_began_earlier():
    """Otherwise the text would depend on how far decoding had run ahead."""
    model = echo_model('x')
    ids = encode(model, 'xabc')
    assert find_stop(model, ids, ('abc', 'b')) == ('xa', 3)
    assert find_stop(model, ids[:2], ('abc', 'b')) is None
    assert find_stop(model, ids, ()) is None


@pytest.mark.parametrize(
    ('text', 'stop', 'shown'),
    [
        ('abc', (), 'abc'),
        ('abc', ('cd',), 'ab'),
        ('abab', ('abac',), 'ab'),
        ('aab', ('abx', 'bx'), 'a'),
        ('ab' + REPLACEMENT, ('b你',), 'a'),
        ('a' + REPLACEMENT + 'b' + REPLACEMENT * 2, (), 'a' + REPLACEMENT + 'b'),
        ('', ('x',), ''),
    ],
)
def test_what_could_still_change_is_held(text, stop, shown):
    assert settled(text, stop) == shown


@given(st.text('abc', max_size=12), st.lists(st.text('abc', min_size=1, max_size=4), max_size=3))
def test_what_is_shown_is_never_taken_back(text, stop):
    """Wherever decoding stands, and whatever stop string is completed first."""
    looks = [cut(text[:size], stop) for size in range(len(text) + 1)]
    shown = next((found for found in looks if found is not None), text)
    for size, found in enumerate(looks):
        if found is not None:
            break
        assert shown.startswith(settled(text[:size], stop))
