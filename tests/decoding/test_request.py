"""Prompts, stop strings and requests that cannot be decoded are refused; shapes are few."""

import dataclasses

import pytest

import cllm_jax as cllm
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request, bucket, encode
from cllm_jax.decoding.stream import stream
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.errors import ConfigError
from tests.tiny import byte_tokenizer, compilations, echo_model, random_model

REQUEST = Request(Jacobi(8), max_tokens=40, batch=1)


def test_prompts_and_tokenizers_that_do_not_fit_are_refused():
    tokenizer = byte_tokenizer()
    model = echo_model('x')
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
        ([[1]], {'stop': ('x',)}, 'no tokenizer; leave out stop'),
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
        lambda: cllm.decode(echo_model('x'), ['x'], stop='a'),
        lambda: list(cllm.stream(echo_model('x'), 'x', stop='a')),
        lambda: cllm.decode(echo_model('x'), ['a\ud800']),
        lambda: cllm.with_references(echo_model('x'), 'text'),
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
