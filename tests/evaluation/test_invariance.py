"""The probe finds what changes a row's bits, and nothing else."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.evaluation import invariance
from cllm_jax.evaluation.invariance import (
    Bits,
    Setup,
    bits_of,
    checksum,
    one_class,
    probe,
    setups,
)
from cllm_jax.model import llama
from tests.tiny import random_model, tiny_config

MODEL = random_model(config=tiny_config(layers=1))
PROMPT = np.random.default_rng(2).integers(0, 29, 9).tolist()


@pytest.fixture(scope='module')
def answer():
    model = dataclasses.replace(MODEL, config=dataclasses.replace(MODEL.config, eos_ids=()))
    request = Request(AutoRegressive(), invariance.ANSWER, invariance.VARIED_TEXT)
    return decode_all(model, request, [PROMPT]).tokens[0]


def test_a_checksum_sees_every_bit_and_every_place():
    x = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)
    plain = checksum(jnp.asarray(x))
    assert plain.shape == (2,) and plain.dtype == jnp.uint32 and plain[0] != plain[1]
    for place in range(50):
        for bit in (0, 7, 22, 31):
            other = x.copy()
            other[0].view(np.uint32)[place] ^= np.uint32(1 << bit)
            changed = checksum(jnp.asarray(other))
            assert changed[0] != plain[0] and changed[1] == plain[1]
    assert checksum(jnp.asarray(x[:, ::-1])).tolist() != plain.tolist()


def test_bits_are_of_the_positions_and_of_nothing_else(answer):
    """Twice the same is the same; another token before it is another."""
    one = bits_of(MODEL, PROMPT, answer, Setup(nodes=4))
    assert one.scores.shape == (invariance.ANSWER,) and (one.scores != 0).all()
    assert one.prompt_cache.shape == (4, len(PROMPT) - 1)
    assert one.answer_cache.shape == (4, invariance.ANSWER)
    assert one.forwards == invariance.ANSWER // 4
    assert all(one.equal_parts(bits_of(MODEL, PROMPT, answer, Setup(nodes=4))).values())
    other = bits_of(MODEL, [*PROMPT[:-2], PROMPT[-2] ^ 1, PROMPT[-1]], answer, Setup(nodes=4))
    assert not any(one.equal_parts(other).values())


def test_a_batch_that_goes_on_with_half_of_its_rows_is_looked_at_whole(answer):
    """On a CPU the rows that end late go on by themselves (`Backend.narrowest`)."""
    found = [bits_of(MODEL, PROMPT, answer, Setup(nodes=4, batch=16, place=i)) for i in (0, 9)]
    assert all((bits.scores != 0).all() for bits in found)
    assert all(found[0].equal_parts(found[1]).values())


def test_what_rounds_otherwise_is_found_and_nothing_else(answer, monkeypatch):
    """A single row is multiplied as if in bfloat16."""
    exact = llama.linear

    def coarse(x, weight, *rest, **more):
        y = exact(x, weight, *rest, **more)
        return y.astype(jnp.bfloat16).astype(y.dtype) if y.size == y.shape[-1] else y

    usual = [bits_of(MODEL, PROMPT, answer, Setup(nodes=n)) for n in (2, 4)]
    monkeypatch.setattr(llama, 'linear', coarse)
    renamed = dataclasses.replace(
        MODEL, config=dataclasses.replace(MODEL.config, max_positions=255)
    )
    single, several = (bits_of(renamed, PROMPT, answer, Setup(nodes=n)) for n in (1, 4))
    assert several.equal_parts(usual[1]) == dict.fromkeys(
        ('scores', 'prompt_cache', 'answer_cache'), True
    )
    assert not single.equal_parts(several)['scores']


def test_values_that_agree_are_one_class(monkeypatch):
    def pretended(model, prompt, answer, setup, exact):
        assert model.config.eos_ids == ()
        assert exact == 'off' and len(prompt) == 40 and len(answer) == invariance.ANSWER
        kind = np.array([setup.nodes > 4, setup.slots > 500, setup.tensor > 1])
        return Bits(kind, kind[:1], kind[:1])

    monkeypatch.setattr(invariance, 'bits_of', pretended)
    varied = setups((1, 2, 8, 16), (1, 4), (128, 256, 512, 1024), (1, 2))
    seen = []
    found = probe({1: MODEL, 2: MODEL}, varied, 'off', seen.append)
    assert sum(seen) == sum(1 + len(some) for some in varied.values())
    assert found['nodes']['classes'] == [[1, 2], [8, 16]]
    assert found['slots of the cache']['classes'] == [[128, 256], [512, 1024]]
    assert found['devices']['classes'] == [[1], [2]] and not one_class(found)
    assert one_class({'devices': found['devices'], 'batch': found['batch']})
    assert found['place in the batch']['classes'] == [[0, 1, 2, 3]]
    assert found['batch']['rows'][4] == {'scores': True, 'prompt_cache': True, 'answer_cache': True}
    assert not found['nodes']['rows'][1]['scores']
