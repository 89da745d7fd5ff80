"""What speed means: the same prompts, the same tokens, and AR at its best."""

import dataclasses

import jax

import cllm_jax as cllm
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.result import (
    DecodeResult,
    acceptance,
    loop_free,
    share_identical,
    tokens_per_forward,
)
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.evaluation.speed import Method, one_by_one, plain_methods, tokens_per_second
from tests.tiny import random_model, tiny_config

PROMPTS = [[1, 2, 3], [4, 5], [6]]


def result(tokens, accepted):
    return DecodeResult([''] * len(tokens), tokens, accepted, [0.0] * len(tokens))


def test_tokens_per_forward_weighs_prompts_by_their_forwards():
    found = result([[1] * 9, [1]], [[1, 4, 4], [1]])
    assert tokens_per_forward(found) == 10 / 4
    assert found.tokens_per_forward == [3.0, 1.0]
    assert share_identical(found, result([[1] * 9, [2]], [[9], [1]])) == 0.5


def test_answers_that_repeat_themselves_do_not_count_as_fast():
    found = result([list(range(9)), [7] * 30], [[1, 4, 4], [15, 15]])
    assert tokens_per_forward(found) == 39 / 5
    assert loop_free(found) == 9 / 3
    assert loop_free(result([[7] * 30], [[15, 15]])) == 0


def test_acceptance_of_a_slot_is_conditional_on_those_before():
    """The forward that ends an answer does not say what would have come after its last token, and
    a prefill, which by program commits one token by rule, says nothing."""
    found = result([[0] * 9, [0] * 5, []], [[1, 4, 2, 1, 1], [1, 1, 3], []])
    assert acceptance(found) == [3 / 5, 2 / 3, 1.0]
    assert acceptance(result([[0, 0]], [[1, 1]])) == []
    assert acceptance(result([[0] * 4], [[4]])) == []


def test_speed_is_measured_on_the_same_tokens():
    plain = Method(random_model(config=tiny_config(layers=1)), Request(AutoRegressive(), 8))
    methods, seen = {'ar': plain, 'jacobi': plain.with_drafter(Jacobi(4))}, []
    speed = tokens_per_second(methods, PROMPTS, repeats=1, progress=seen.append, batch=2)
    assert speed.keys() == methods.keys() and min(speed.values()) > 0 and seen == [2, 1]
    ar, jacobi = (one_by_one(method, PROMPTS) for method in methods.values())
    assert ar.tokens == jacobi.tokens == decode_all(plain.model, plain.request, PROMPTS).tokens
    assert tokens_per_forward(ar) == 1


def test_ar_is_tried_in_every_precision_where_another_may_be_faster(monkeypatch):
    request = Request(AutoRegressive(), 8, seed=5, exact='off')
    plain = Method(cllm.load('embedded', 'mixed'), request)
    methods = plain_methods('AR', plain)
    assert list(methods) == ['AR', 'AR, bfloat16', 'AR, float32']
    assert methods['AR, bfloat16'].model.precision == 'bfloat16'
    wide, off = methods['AR, float32'], dataclasses.replace(plain.request, exact='off')
    assert methods['AR'].model is plain.model and wide.request == methods['AR'].request == off
    assert {leaf.dtype.name for leaf in jax.tree.leaves(wide.model.params)} == {'float32'}
    assert list(plain_methods('AR', wide)) == ['AR']
    quick = dataclasses.replace(plain.model)
    backend = dataclasses.replace(plain.model.backend, any_precision_may_be_faster=False)
    vars(quick)['backend'] = backend  # in the place of what its devices suggest
    assert list(plain_methods('AR', Method(quick, plain.request))) == ['AR']
    monkeypatch.setattr(
        'cllm_jax.evaluation.speed.MOST_COPIED', 4 * plain.model.config.parameters - 1
    )
    assert list(plain_methods('AR', plain)) == ['AR']


def test_ar_is_timed_at_its_best_and_in_the_class_that_its_text_is_of():
    model = cllm.load('embedded', 'bfloat16')
    for has_class, asked, named in (
        (True, 'auto', True),
        (True, 'off', False),
        (True, 'program', False),
        (False, 'auto', False),
        (False, 'class', True),
    ):
        other = dataclasses.replace(model)
        vars(other)['has_class'] = has_class
        plain = Method(other, Request(AutoRegressive(), 8, exact=asked))
        methods = plain_methods('AR', plain)
        assert methods['AR'].request.exact == 'off'
        assert ('AR, in its class' in methods) == named
        assert not named or methods['AR, in its class'] is plain
