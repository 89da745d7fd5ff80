"""A config checks itself: a model of impossible sizes is refused before anything is computed."""

import dataclasses

import pytest

from cllm_jax.errors import ConfigError
from cllm_jax.model.config import RopeScaling
from tests.tiny_model import TINY, refusal


@pytest.mark.parametrize(
    'changes',
    [
        {'vocab_size': 0},
        {'kv_heads': 0},
        {'layers': 10**9},
        {'dim': True},
        {'heads': 2.0},
        {'norm_eps': float('nan')},
        {'rope_theta': float('inf')},
        {'heads': 3, 'kv_heads': 2},
        {'head_dim': 3},
    ],
)
def test_a_config_checks_itself(changes):
    message = refusal(lambda: dataclasses.replace(TINY, **changes), of=ConfigError)
    assert any(str(value) in message for value in changes.values())


@pytest.mark.parametrize('values', [(0.0, 1, 4), (2.0, 4, 4), (float('nan'), 1, 4), (2.0, 0, 4)])
def test_a_rope_scaling_checks_itself(values):
    refusal(lambda: RopeScaling('llama3', *values), of=ConfigError)
