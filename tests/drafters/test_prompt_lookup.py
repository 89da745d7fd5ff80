"""Prompt lookup, in references too: exact, and quotes come in whole blocks."""

import jax.numpy as jnp
import pytest

import cllm_jax as cllm
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.prompt_lookup import BETWEEN, PromptLookup, reference_rows, with_references
from tests.drafters.examples import GREEDY, sequences_of
from tests.tiny import ragged_prompts, random_model, tiny_config

PROMPTS = ragged_prompts(0, (1, 2, 9, 5))
MODEL = random_model(config=tiny_config(layers=1))


def answers(drafter, sampling):
    return decode_all(MODEL, Request(drafter, 24, sampling), PROMPTS)


def test_references_change_the_forwards_and_not_the_answer():
    sampling = Sampling(0.7, top_k=10)
    plain = answers(AutoRegressive(), sampling)
    alone = answers(PromptLookup(6), sampling)
    texts = [prompt[-1:] + tokens for prompt, tokens in zip(PROMPTS, plain.tokens, strict=True)]
    found = answers(with_references(MODEL, texts, block=6), sampling)
    assert found.tokens == alone.tokens == plain.tokens
    assert sum(found.forwards) < 0.5 * sum(alone.forwards)


@pytest.mark.parametrize(
    ('text', 'guesses'),
    [
        ([1, 2, 3, 9, 9, 2, 3, 7, 1, 2, 3], [9, 9, 2]),  # three tokens match, then two
        ([5, 3, 6, 4, 4, 3, 8, 4, 1, 3], [8, 4, 1]),  # of single tokens the latest
        ([7, 8, 6, 5, 6, 5], [6, 5, 6]),  # a pattern goes on beyond its end
        ([1, 2, 3, 4], None),
    ],
)
def test_the_longest_and_then_the_latest_match_is_proposed(text, guesses):
    draft, _ = PromptLookup(4).draft((), sequences_of([text], 20), GREEDY)
    assert draft.valid_BN[0, 1:].all() == (guesses is not None)
    if guesses:
        assert draft.tokens_BN.tolist() == [[text[-1], *guesses]]


def test_a_reference_of_each_row_ends_where_its_tokens_do():
    rows_BR = reference_rows([[1, 2, 3], [4]], rows=3, width=5)
    nothing = [BETWEEN] * 5
    assert rows_BR.tolist() == [[BETWEEN, 1, 2, 3, BETWEEN], [*nothing[:3], 4, BETWEEN], nothing]
    drafter = PromptLookup(3, references=jnp.asarray(rows_BR))
    sequences = sequences_of([[9, 2], [9, 2], [9, 2]], 12)
    draft, _ = drafter.draft(drafter.init(sequences), sequences, GREEDY)
    assert draft.valid_BN.tolist() == [[True, True, False], [False] * 3, [False] * 3]
    assert draft.tokens_BN[0].tolist() == [2, 3, 0]


def test_an_empty_reference_is_refused():
    with pytest.raises(cllm.ConfigError, match='at least one token'):
        cllm.with_references(MODEL, [[]])
