"""What speed means."""

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
from tests.tiny import random_model


def result(tokens, accepted):
    return DecodeResult([''] * len(tokens), tokens, accepted, [0.0] * len(tokens))


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
