"""Prompts, stop strings and requests that cannot be decoded are refused; shapes are few."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cllm_jax as cllm
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request, bucket, encode
from cllm_jax.decoding.stream import stream
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.lookahead import Lookahead
from cllm_jax.errors import ConfigError
from tests.tiny import (
    byte_tokenizer,
    compilations,
    echo_model,
    larger_tokenizer,
    random_model,
    text_config,
    tiny_config,
)

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


@pytest.mark.parametrize('prompt', ['a <tool>', '<call>', 'the <tool> and the <call>'])
def test_a_token_without_a_row_is_refused_and_its_tokenizer_used_without_it(prompt):
    model = random_model(config=text_config(layers=1), tokenizer=larger_tokenizer())
    message = r"token id 26[12] \('<(tool|call)>'\): outside the vocabulary 0\.\.260"
    for call in (
        lambda: encode(model, prompt),
        lambda: cllm.with_references(model, ['the', prompt]),
        lambda: cllm.decode(model, ['the', prompt]),
        lambda: cllm.forward(model, [model.tokenizer(prompt)['input_ids']]),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    plain = dataclasses.replace(model, tokenizer=byte_tokenizer())
    found, wanted = (cllm.decode(m, ['the tool'], max_tokens=4) for m in (model, plain))
    assert found.tokens == wanted.tokens


@pytest.mark.parametrize('bad', [-1, 29, 300, 1 << 32, (1 << 32) + 3, -(1 << 63)])
def test_forward_refuses_ids_outside_the_table(bad):
    kinds = (list, np.asarray, *([jnp.asarray] if abs(bad) < 1 << 31 else ()))
    for kind, tokens_BT in itertools.product(kinds, ([[bad]], [[1, 2], [3, bad]])):
        with pytest.raises(ConfigError, match=rf'token id {bad}: outside the vocabulary 0\.\.28'):
            cllm.forward(random_model(), kind(tokens_BT))


@pytest.mark.parametrize(
    'tokens_BT',
    [[1, 2], 3, [], [[]], [[[1]]], [[1], [1, 2]], [[1.0]], [[True]], [['a']], 'text', [[None]]],
    ids=str,
)
def test_forward_refuses_what_is_not_rows_of_whole_numbers(tokens_BT):
    with pytest.raises(
        ConfigError, match=r'tokens_BT .*: must be rows of whole numbers, .*\[B, T\]'
    ):
        cllm.forward(random_model(), tokens_BT)


def test_forward_takes_any_kind_of_integer_also_inside_jit():
    model, rows = random_model(config=tiny_config(layers=1)), [[0, 28, 3], [5, 6, 7]]
    run = jax.jit(lambda tokens_BT: cllm.forward(model, tokens_BT))
    wanted = np.asarray(cllm.forward(model, rows))
    assert wanted.shape == (2, 3, 29)
    for kind in (np.uint8, np.int64, np.uint32):
        np.testing.assert_array_equal(cllm.forward(model, np.asarray(rows, kind)), wanted)
    for kind in (jnp.int32, jnp.uint32):
        np.testing.assert_array_equal(cllm.forward(model, jnp.asarray(rows, kind)), wanted)
        np.testing.assert_allclose(run(jnp.asarray(rows, kind)), wanted, atol=1e-4)
    each = jax.jit(lambda a, b: cllm.forward(model, [[0, a, b]]))(28, 3)
    np.testing.assert_allclose(each[0], wanted[0], atol=1e-4)
    with pytest.raises(ConfigError, match='whole numbers'):
        run(jnp.asarray([1, 2]))


def test_buckets_are_few_and_waste_little():
    sizes = [bucket(n) for n in range(1, 5000)]
    assert sizes == sorted(sizes) and len(set(sizes)) < 36
    for n, size in enumerate(sizes, 1):
        assert n <= size < max(17, (1.5 if n <= 64 else 1.25) * n)
