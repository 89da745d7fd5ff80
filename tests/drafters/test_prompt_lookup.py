"""Prompt lookup, in references and beside Jacobi: exact, and quotes come in whole blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import cllm_jax as cllm
from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.prompt_lookup import PromptLookup, with_references
from cllm_jax.drafters.registry import Named, open_drafter
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


@pytest.mark.parametrize('mode', ['sliding', 'block'])
def test_jacobi_quotes_the_prompt(mode):
    """Of a model without attention, whose answer goes on as after the same token in the prompt."""

    def blind(path, leaf):
        return jnp.zeros_like(leaf) if path[-1].key == 'o' else leaf

    model = random_model()
    params = jax.tree_util.tree_map_with_path(blind, model.params)
    model = dataclasses.replace(model, params=params)
    (walk,) = decode_all(model, Request(AutoRegressive(), 24), [[1]]).tokens
    found = {
        drafter: decode_all(model, Request(drafter, 24), [[1, *walk, 1]])
        for drafter in (Jacobi(9, mode), Jacobi(9, mode, lookup=True))
    }
    plain, quoting = found.values()
    assert plain.tokens == quoting.tokens == [walk]
    assert quoting.forwards[0] <= 4 < plain.forwards[0] / 2


@pytest.mark.parametrize(
    ('named', 'rule'),
    [
        (Named('ar', lookup=True), 'an option of jacobi'),
        (Named('lookahead', recycle=3), 'recycle with .* an option of jacobi'),
        (Named('ar', mode='block'), 'mode with .* an option of jacobi'),
        (Named('ar', block=-3), 'block -3: must be'),
        (Named(lookup=True, branches=2), 'branches 2: .* no recycling or lookup'),
        (Named(lookup=True, block=1), 'block of at least 2'),
    ],
)
def test_lookup_where_it_has_no_place_is_refused(named, rule):
    with pytest.raises(cllm.ConfigError, match=rule):
        open_drafter(named, random_model(), Sampling())


def test_an_empty_reference_is_refused():
    with pytest.raises(cllm.ConfigError, match='at least one token'):
        cllm.with_references(random_model(), [[]])
