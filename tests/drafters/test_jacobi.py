"""Jacobi with chains of quotes and of guesses that were dropped."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.errors import ConfigError
from tests.tiny import random_model, tiny_config


@pytest.mark.parametrize('mode', ['sliding', 'block'])
def test_jacobi_quotes_the_prompt(mode):
    """Of a model without attention, whose answer goes on as after the same token in the prompt."""

    def blind(path, leaf):
        return jnp.zeros_like(leaf) if path[-1].key == 'o' else leaf

    model = random_model(config=tiny_config(layers=1))
    params = jax.tree_util.tree_map_with_path(blind, model.params)
    model = dataclasses.replace(model, params=params)
    (walk,) = decode_all(model, Request(AutoRegressive(), 24), [[1]]).tokens
    plain, quoting = (
        decode_all(model, Request(drafter, 24), [[1, *walk, 1]])
        for drafter in (Jacobi(9, mode), Jacobi(9, mode, lookup=True))
    )
    assert plain.tokens == quoting.tokens == [walk]
    assert quoting.forwards[0] <= 4 < plain.forwards[0] / 2


@pytest.mark.parametrize(
    ('settings', 'rule'),
    [
        ({'block': 0}, 'block 0: must be'),
        ({'block': 1025}, 'block 1025: must be'),
        ({'mode': 'both'}, "mode 'both': must be 'sliding' or 'block'"),
        ({'recycle': -1}, 'recycle -1 with block 16'),
        ({'block': 1, 'recycle': 2}, 'recycle 2 with block 1'),
        ({'block': 1, 'lookup': True}, 'block of at least 2'),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, rule):
    with pytest.raises(ConfigError, match=rule):
        Jacobi(**settings)
