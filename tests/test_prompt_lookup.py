"""Prompt lookup in references: exact, and an answer that is in one comes in whole blocks."""

import pytest

import cllm_jax as cllm
from cllm_jax.decoding.generate import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.prompt_lookup import PromptLookup, with_references
from tests.tiny import ragged_prompts, random_model

PROMPTS = ragged_prompts(0, (1, 2, 9, 5))


def answers(drafter, sampling, weights=()):
    return decode_all(random_model(), Request(drafter, 24, sampling), PROMPTS, weights)


@pytest.mark.parametrize('sampling', [Sampling(), Sampling(0.7, top_k=10)], ids=['greedy', 'T0.7'])
def test_references_change_the_forwards_and_not_the_answer(sampling):
    plain = answers(AutoRegressive(), sampling)
    alone = answers(PromptLookup(6), sampling)
    texts = [prompt[-1:] + tokens for prompt, tokens in zip(PROMPTS, plain.tokens, strict=True)]
    loaded = with_references(random_model(), texts, block=6)
    found = answers(loaded.drafter, sampling, loaded.weights)
    assert found.tokens == alone.tokens == plain.tokens
    assert sum(found.forwards) < 0.5 * sum(alone.forwards)


def test_an_empty_reference_is_refused():
    with pytest.raises(cllm.ConfigError, match='at least one token'):
        cllm.with_references(random_model(), [[]])
