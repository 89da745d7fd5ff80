"""Speculative decoding with a draft model: exact whatever it writes, fast if it writes the same."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import cllm_jax as cllm
from cllm_jax.data.tokenizer import train_tokenizer
from cllm_jax.decoding.drafter import Sequences
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.draft_model import DraftModel
from tests.drafters.examples import GREEDY
from tests.tiny import (
    byte_tokenizer,
    compilations,
    ragged_prompts,
    random_model,
    text_config,
    tiny_config,
)

PROMPTS = ragged_prompts(0, (1, 2, 9, 5))
TARGET = random_model(config=tiny_config(layers=1, eos_ids=(3, 7)))
OTHER = random_model(seed=5, config=tiny_config(layers=1, mlp_dim=8))


def answers(drafter, sampling=GREEDY):
    return decode_all(TARGET, Request(drafter, 24, sampling, batch=4), PROMPTS)


@functools.cache
def plain(sampling=GREEDY):
    return answers(AutoRegressive(), sampling)


@pytest.mark.parametrize(
    ('block', 'sampling'),
    [(1, Sampling()), (5, Sampling()), (2, Sampling(0.7, top_k=10, top_p=0.9))],
    ids=lambda value: f'T{value.temperature}' if isinstance(value, Sampling) else str(value),
)
def test_the_answer_is_that_of_the_target(block, sampling):
    """For a draft model of another size, and for the target itself, of which all is accepted."""
    for small in (OTHER, TARGET):
        found = answers(DraftModel(small.module, small.params, block), sampling)
        assert found.tokens == plain(sampling).tokens
        if small is TARGET:
            assert found.forwards == [-(-len(tokens) // block) for tokens in found.tokens]


def test_a_wrong_draft_costs_a_forward_per_token_and_other_weights_no_compilation():
    answers(DraftModel(TARGET.module, TARGET.params, 5))
    compiled = compilations()
    wrong = TARGET.params | {'head': -TARGET.params['head']}  # the least likely token
    found = answers(DraftModel(TARGET.module, wrong, 5))
    assert found.tokens == plain().tokens and found.forwards == plain().forwards
    assert compilations() == compiled


def test_the_draft_model_reads_the_prompt_and_no_room_for_the_answer():
    drafter = DraftModel(TARGET.module, TARGET.params, 4)

    def work(slots):
        tokens_BS, length_B = np.ones((2, slots), np.int32), np.ones(2, np.int32)
        sequences = Sequences(tokens_BS, length_B, length_B, row_keys(0, range(2)), prompt_width=16)
        compiled = jax.jit(lambda sequences: drafter.init(sequences)).lower(sequences).compile()
        return compiled.cost_analysis()['flops']

    assert work(slots=1024) < 1.5 * work(slots=64)


def test_a_draft_model_with_another_vocabulary_is_refused():
    target = random_model(config=text_config(layers=1), tokenizer=byte_tokenizer())
    drafter = cllm.draft_model(target, target, block=4)
    found = cllm.decode(target, ['a b'], drafter=drafter, max_tokens=8)
    assert found.tokens == cllm.decode(target, ['a b'], cllm.AutoRegressive(), 8).tokens
    with pytest.raises(cllm.ConfigError, match='29 tokens'):
        cllm.draft_model(target, random_model())
    other = train_tokenizer(['some other text'] * 9, len(byte_tokenizer()))
    same_size = dataclasses.replace(target, tokenizer=other)
    with pytest.raises(cllm.ConfigError, match='another tokenizer'):
        cllm.draft_model(target, same_size)
