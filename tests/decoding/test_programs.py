"""How many programs are compiled: one of each kind, whatever the numbers, and never too many."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import cllm_jax as cllm
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.loop import programs
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.draft_model import DraftModel
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.model.llama import forward
from cllm_jax.runtime import programs as kept
from tests.drafters.examples import DRAFTERS, with_random_weights
from tests.tiny import compilations, ragged_prompts, random_model, tiny_config

MODEL = random_model(config=tiny_config(layers=1))
PROMPTS = ragged_prompts(5, (3, 7, 4))


def tokens(drafter, sampling=None, model=MODEL, seed=0, max_tokens=12) -> list[list[int]]:
    request = Request(drafter, max_tokens, sampling or Sampling(), seed, batch=4)
    return decode_all(model, request, PROMPTS).tokens


@pytest.mark.parametrize(
    'drafter',
    [
        AutoRegressive(),
        Jacobi(5),
        DraftModel(MODEL.module, MODEL.params, 3),
        with_random_weights(DRAFTERS['redrafter'], MODEL),
    ],
    ids=lambda drafter: type(drafter).__name__,
)
def test_numbers_seeds_and_end_tokens_share_a_program_of_each_kind(drafter):
    plain, before = tokens(drafter), compilations()
    answers = {tuple(map(tuple, plain))}
    for i in range(12):
        ends = tuple(range(1 + i % 8, 9))
        other = dataclasses.replace(MODEL, config=dataclasses.replace(MODEL.config, eos_ids=ends))
        assert tokens(drafter, Sampling(top_k=i, top_p=0.5), seed=i) == plain, 'greedy is greedy'
        tokens(drafter, model=other)
    assert compilations() == before
    for i in range(12):
        answers.add(tuple(map(tuple, tokens(drafter, Sampling(0.5 + i / 7), seed=i))))
    assert compilations() == before + 1
    for i in range(12):
        rule = {'top_k': 1 + i} if i % 3 else {'top_p': 0.3 + i / 20}
        answers.add(tuple(map(tuple, tokens(drafter, Sampling(0.9, **rule), seed=i))))
    assert compilations() == before + 2
    assert len(answers) > 20, 'the numbers have to matter'


def test_texts_of_many_lengths_share_the_programs_of_forward():
    before, tokens_BT = cllm._forward._cache_size(), np.arange(40)[None] % 29
    module, params = MODEL.module, MODEL.params
    for length in range(1, 41):
        logits_BTV = cllm.forward(MODEL, tokens_BT[:, :length])
        assert logits_BTV.shape == (1, length, 29)
        if length in (1, 17, 40):
            plain_BTV = forward(module, params, jnp.asarray(tokens_BT[:, :length], jnp.int32))
            np.testing.assert_allclose(logits_BTV, plain_BTV, atol=2e-5)
    assert cllm._forward._cache_size() - before == 4  # 16, 24, 32, 48 tokens


def test_programs_that_must_differ_are_dropped_before_they_are_too_many(monkeypatch):
    monkeypatch.setattr(kept, 'MOST', 3)
    found = []
    for block in (2, 3, 4, 5, 6, 2):
        found.append(tokens(Jacobi(block), max_tokens=20))
        assert all(0 <= run._cache_size() <= 3 for run in programs(MODEL.backend))
    assert all(answer == found[0] for answer in found)
