"""Streamed text is the batch's text in pieces; stop strings cut both at the same token."""

import dataclasses

import numpy as np
import pytest

from cllm_jax.decoding import engine
from cllm_jax.decoding import stream as stream_module
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request, encode
from cllm_jax.decoding.stream import stream
from cllm_jax.decoding.text import cut, text_of
from cllm_jax.drafters.jacobi import Jacobi
from tests.tiny import (
    byte_tokenizer,
    compilations,
    echo_config,
    echo_model,
    fallback_tokenizer,
    random_model,
)

REQUEST = Request(Jacobi(8), max_tokens=40, batch=1)
PHRASES = ('the 😀, 你好\n', 'aababaac', '🙂🙃x')
TOKENIZERS = {'bytes': byte_tokenizer, 'byte fallback': fallback_tokenizer}
REPLACEMENT = '\ufffd'


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS)
def tokenizer(request):
    return request.param()


def joined(model, request, prompt) -> str:
    pieces = list(stream(model, request, prompt))
    assert all(pieces)
    return ''.join(pieces)


@pytest.mark.parametrize('phrase', PHRASES)
def test_characters_of_several_tokens_are_never_shown_in_part(phrase, tokenizer):
    model = echo_model(phrase, tokenizer)
    ids = encode(model, phrase)
    assert len(ids) > len(phrase) or phrase.isascii()
    result = decode_all(model, REQUEST, [phrase])
    assert result.tokens == [(ids * 40)[:40]]
    pieces = list(stream(model, REQUEST, phrase))
    assert ''.join(pieces) == result.texts[0] and len(pieces) > 1
    assert not any(REPLACEMENT in piece for piece in pieces[:-1])
    assert result.texts[0].startswith(phrase * (40 // len(ids)))


def test_an_incomplete_last_character_is_reported_at_the_end(tokenizer):
    model = echo_model('你', tokenizer)
    for tokens, tail in ((39, ''), (40, REPLACEMENT), (41, REPLACEMENT)):
        request = dataclasses.replace(REQUEST, max_tokens=tokens)
        assert joined(model, request, '你') == '你' * 13 + tail
        assert decode_all(model, request, ['你']).texts == ['你' * 13 + tail]


@pytest.mark.parametrize('iterations', [1, 3, 50])
@pytest.mark.parametrize('phrase', PHRASES)
def test_stop_strings_cut_at_the_completing_token(phrase, iterations, tokenizer, monkeypatch):
    """However often the text is looked at; the stop may lie across pieces and tokens."""
    for user in (engine, stream_module):
        monkeypatch.setattr(user, 'STREAM_ITERATIONS', iterations)
    model = echo_model(phrase, tokenizer)
    whole = decode_all(model, REQUEST, [phrase])
    text, tokens, accepted = whole.texts[0], whole.tokens[0], whole.accepted[0]
    stops = [(text[i : i + n],) for i, n in ((0, 1), (1, 3), (3, 2), (5, 4), (2, 7), (4, 1))]
    for stop in (*stops, (text[4:6], text[1:6]), ('never',)):
        request = dataclasses.replace(REQUEST, stop=stop)
        result = decode_all(model, request, [phrase])
        prefixes = (text_of(model, tokens[:n]) for n in range(len(tokens) + 1))
        size, shown = next(
            ((n, c) for n, t in enumerate(prefixes) if (c := cut(t, stop)) is not None),
            (len(tokens), text),
        )
        assert result.texts == [shown] and result.tokens == [tokens[:size]]
        assert joined(model, request, phrase) == shown
        counts, ends = result.accepted[0], np.cumsum(accepted)
        assert sum(counts) == size and counts[:-1] == accepted[: len(counts) - 1]
        assert len(counts) == 1 + np.searchsorted(ends, size)


def test_pieces_of_random_bytes_join_to_the_text(tokenizer):
    """Random tokens are mostly invalid UTF-8, special tokens among them; nothing is recompiled."""
    compiled, invalid = None, 0
    for seed in range(12):
        model = random_model(seed, echo_config(tokenizer), tokenizer)
        text = decode_all(model, REQUEST, [[5, seed]]).texts[0]
        invalid += REPLACEMENT in text
        assert joined(model, REQUEST, [5, seed]) == text
        words = [word for word in text.split(REPLACEMENT) if len(word) > 1]
        if words:
            request = dataclasses.replace(REQUEST, stop=(words[-1][-2:], words[0][-2:]))
            result = decode_all(model, request, [[5, seed]])
            assert joined(model, request, [5, seed]) == result.texts[0] != text
        compiled = compiled or compilations()
    assert invalid > 6
    assert compilations() == compiled


def test_an_answer_keeps_the_space_that_stands_between_it_and_the_prompt(tokenizer):
    model = echo_model(' the b', tokenizer)
    result = decode_all(model, REQUEST, [' the b'])
    assert result.texts[0].startswith(' the b the b')
    assert joined(model, REQUEST, ' the b') == result.texts[0]
    stopped = decode_all(model, dataclasses.replace(REQUEST, stop=(' the',)), [' the b'])
    assert stopped.texts == ['']


def test_a_stop_token_ends_the_stream_inside_a_window():
    model = echo_model('aababaa!')
    result = decode_all(model, REQUEST, ['aababaa!'])
    assert joined(model, REQUEST, 'aababaa!') == result.texts[0] == 'aababaa'
    assert result.tokens[0][-1] == model.config.eos_ids[1] and result.accepted[0][-1] > 1
