"""Streamed text is the batch's text in pieces; stop strings cut both at the same token.

Also what is refused: prompts, stop strings and requests that cannot be decoded.
"""

import dataclasses

import numpy as np
import pytest

import cllm_jax as cllm
from cllm_jax.decoding import engine as generate
from cllm_jax.decoding.engine import decode_all, stream
from cllm_jax.decoding.request import Request, bucket, encode
from cllm_jax.decoding.text import cut, find_stop, settled, text_of
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.errors import ConfigError
from cllm_jax.hf.load import Model
from cllm_jax.model.config import LlamaConfig
from tests.tiny import (
    byte_tokenizer,
    compilations,
    copy_model,
    fallback_tokenizer,
    random_model,
    text_config,
)

REQUEST = Request(Jacobi(8), max_tokens=40, batch=1)
PHRASES = ('the 😀, 你好\n', 'aababaac', '🙂🙃x')
TOKENIZERS = {'bytes': byte_tokenizer, 'byte fallback': fallback_tokenizer}
REPLACEMENT = '\ufffd'


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS)
def tokenizer(request):
    return request.param()


def config_of(tokenizer) -> LlamaConfig:
    """Answers end at `</s>` or an exclamation mark."""
    bang = tokenizer('!')['input_ids'][0]
    return dataclasses.replace(text_config(), vocab_size=len(tokenizer), eos_ids=(1, bang))


def echo(phrase: str, tokenizer=None) -> Model:
    """A model that answers the phrase with the phrase, again and again."""
    tokenizer = tokenizer or byte_tokenizer()
    period = len(tokenizer(phrase)['input_ids'])
    return copy_model(period, config_of(tokenizer), tokenizer)


def joined(model, request, prompt) -> str:
    pieces = list(stream(model, request, prompt))
    assert all(pieces)
    return ''.join(pieces)


@pytest.mark.parametrize('phrase', PHRASES)
def test_characters_of_several_tokens_are_never_shown_in_part(phrase, tokenizer):
    model = echo(phrase, tokenizer)
    ids = encode(model, phrase)
    assert len(ids) > len(phrase) or phrase.isascii()
    result = decode_all(model, REQUEST, [phrase])
    assert result.tokens == [(ids * 40)[:40]]
    pieces = list(stream(model, REQUEST, phrase))
    assert ''.join(pieces) == result.texts[0] and len(pieces) > 1
    assert not any(REPLACEMENT in piece for piece in pieces[:-1])
    assert result.texts[0].startswith(phrase * (40 // len(ids)))


def test_an_incomplete_last_character_is_reported_at_the_end(tokenizer):
    model = echo('你', tokenizer)
    for tokens, tail in ((39, ''), (40, REPLACEMENT), (41, REPLACEMENT)):
        request = dataclasses.replace(REQUEST, max_tokens=tokens)
        assert joined(model, request, '你') == '你' * 13 + tail
        assert decode_all(model, request, ['你']).texts == ['你' * 13 + tail]


@pytest.mark.parametrize('iterations', [1, 3, 50])
@pytest.mark.parametrize('phrase', PHRASES)
def test_stop_strings_cut_at_the_completing_token(phrase, iterations, tokenizer, monkeypatch):
    """However often the text is looked at; the stop may lie across pieces and tokens."""
    monkeypatch.setattr(generate, 'STREAM_ITERATIONS', iterations)
    model = echo(phrase, tokenizer)
    whole = decode_all(model, REQUEST, [phrase])
    text, tokens, accepted = whole.texts[0], whole.tokens[0], whole.accepted[0]
    stops = [(text[i : i + n],) for i, n in ((0, 1), (1, 3), (3, 2), (5, 4), (2, 7), (4, 1))]
    for stop in (*stops, (text[4:6], text[1:6]), ('never',)):
        request = dataclasses.replace(REQUEST, stop=stop)
        result = decode_all(model, request, [phrase])
        prefixes = (text_of(model, tokens[:n]) for n in range(len(tokens) + 1))
        size, before = next(
            ((n, c) for n, t in enumerate(prefixes) if (c := cut(t, stop)) is not None),
            (len(tokens), text),
        )
        assert result.texts == [before] and result.tokens == [tokens[:size]]
        assert joined(model, request, phrase) == before
        counts, ends = result.accepted[0], np.cumsum(accepted)
        assert sum(counts) == size and counts[:-1] == accepted[: len(counts) - 1]
        assert len(counts) == 1 + np.searchsorted(ends, size)


def test_pieces_of_random_bytes_join_to_the_text(tokenizer):
    """Random tokens are mostly invalid UTF-8, special tokens among them; nothing is recompiled."""
    compiled, invalid = None, 0
    for seed in range(12):
        model = random_model(seed, config_of(tokenizer), tokenizer)
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


def test_the_stop_token_is_no_text_and_other_special_tokens_are(tokenizer):
    model = echo('x', tokenizer)
    ids = encode(model, 'the')
    assert text_of(model, [*ids, 1]) == text_of(model, ids) == 'the'
    assert text_of(model, [0, *ids, 2]) == '<s>the<pad>'
    assert text_of(model, []) == text_of(model, [1]) == ''
    assert find_stop(model, [*ids, 2, *ids, 1], ('<pad>',)) == ('the', 2)


def test_an_answer_keeps_the_space_that_stands_between_it_and_the_prompt(tokenizer):
    model = echo(' the b', tokenizer)
    result = decode_all(model, REQUEST, [' the b'])
    assert result.texts[0].startswith(' the b the b')
    assert joined(model, REQUEST, ' the b') == result.texts[0]
    stopped = decode_all(model, dataclasses.replace(REQUEST, stop=(' the',)), [' the b'])
    assert stopped.texts == ['']


def test_the_stop_completed_first_decides_even_if_a_longer_one_began_earlier():
    """Otherwise the text would depend on how far decoding had run ahead."""
    model = echo('x')
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


def test_a_stop_token_ends_the_stream_inside_a_window():
    model = echo('aababaa!')
    result = decode_all(model, REQUEST, ['aababaa!'])
    assert joined(model, REQUEST, 'aababaa!') == result.texts[0] == 'aababaa'
    assert result.tokens[0][-1] == model.config.eos_ids[1] and result.accepted[0][-1] > 1


def test_prompts_and_tokenizers_that_do_not_fit_are_refused():
    tokenizer = byte_tokenizer()
    model = echo('x')
    assert encode(model, '') == [0], 'an empty prompt is the BOS token'
    no_bos = dataclasses.replace(model, config=dataclasses.replace(model.config, bos_id=None))
    with pytest.raises(ConfigError, match='empty prompt'):
        encode(no_bos, '')
    small = dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=200))
    with pytest.raises(ConfigError, match=r'outside the vocabulary 0\.\.199'):
        encode(small, 'the')
    bare = dataclasses.replace(model, tokenizer=None)
    with pytest.raises(ConfigError, match='no tokenizer'):
        next(stream(bare, REQUEST, [3]))
    with pytest.raises(ConfigError, match='exceed'):
        next(stream(model, dataclasses.replace(REQUEST, max_tokens=250), 'the prompt'))
    assert tokenizer.decode(encode(model, 'the 你')) == 'the 你'


@pytest.mark.parametrize(
    ('prompts', 'changes', 'message'),
    [
        ([[1], []], {}, 'empty prompt'),
        ([[1], [29]], {}, r'token id 29: outside the vocabulary 0\.\.28'),
        ([[-1]], {}, 'token id -1'),
        ([[1.5]], {}, r'prompts\[0\]: token ids \[1\.5\]: must be whole numbers'),
        ([1, 2], {}, 'prompt 1: must be a text or a list'),
        ('text', {}, r"prompts 'text': must be a list"),
        (['text'], {}, 'no tokenizer'),
        ([[1]], {'stop': ('x',)}, 'no tokenizer; stop'),
        ([[1], [2] * 217], {'max_tokens': 40}, 'prompt 1: 217 tokens .* 40 exceed .* 256'),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_any_work(prompts, changes, message):
    compiled = compilations()
    with pytest.raises(ConfigError, match=message):
        decode_all(random_model(), Request(Jacobi(8), **changes), prompts)
    assert compilations() == compiled


@pytest.mark.parametrize(
    'make',
    [
        lambda: Request(Jacobi(8), max_tokens=0),
        lambda: Request(Jacobi(8), batch=0),
        lambda: Request(Jacobi(8), max_tokens=4.5),
        lambda: Request(Jacobi(8), seed=-1),
        lambda: Request(Jacobi(8), seed=1 << 32),
        lambda: Request(Jacobi(8), seed=1.5),
        lambda: Request(Jacobi),
        lambda: Request('jacobi'),
        lambda: Request(Jacobi(8), stop=('a', '')),
        lambda: Request(Jacobi(8), stop='a'),
        lambda: cllm.decode(echo('x'), ['x'], stop='a'),
        lambda: list(cllm.stream(echo('x'), 'x', stop='a')),
        lambda: cllm.decode(echo('x'), ['a\ud800']),
        lambda: cllm.with_references(echo('x'), 'text'),
        lambda: Jacobi(0),
        lambda: Jacobi(16.0),
        lambda: Lookahead(1, 3, 65),
        lambda: Jacobi(1025),
        lambda: Jacobi(4, 'blocks'),
    ],
)
def test_requests_out_of_range_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_buckets_are_few_and_waste_little():
    sizes = [bucket(n) for n in range(1, 5000)]
    assert sizes == sorted(sizes) and len(set(sizes)) < 36
    for n, size in enumerate(sizes, 1):
        assert n <= size < max(17, (1.5 if n <= 64 else 1.25) * n)
