"""Trained drafters: exact whatever their weights, compiled once for all weights of a shape."""

import itertools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import chisquare

from cllm_jax.decoding.engine import decode_all, decoder_of, start
from cllm_jax.decoding.loop import programs
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.sampling import Sampling, choose
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.medusa import Medusa
from cllm_jax.drafters.trained import AnswerBatch, perturbed
from cllm_jax.model.llama import forward
from tests.drafters.examples import (
    DRAFTERS,
    FREE,
    GREEDY,
    MODEL,
    PROMPTS,
    decoded,
    plain,
    sequences_of,
    with_random_weights,
)
from tests.tiny import compilations, random_model, tiny_config


@pytest.mark.parametrize(
    ('name', 'sampling'),
    [
        ('medusa, shared table', FREE),
        ('redrafter', GREEDY),
        ('eagle, two levels', FREE),
        ('space', GREEDY),
    ],
    ids=('medusa', 'redrafter', 'eagle', 'space'),
)
def test_the_answer_is_that_of_the_target(name, sampling):
    one, other = (with_random_weights(DRAFTERS[name], seed=seed) for seed in range(2))
    found = decoded(one, sampling)
    assert found.tokens == plain(sampling)
    assert all(map(sum, found.accepted))
    compiled = compilations()
    assert decoded(other, sampling).tokens == plain(sampling)
    assert compilations() == compiled, 'other weights of the same shapes'
    # Nothing moves between host and device inside of the loop.
    request, keys = Request(one, 20, sampling), row_keys(0, range(len(PROMPTS)))
    state = start(MODEL, request, PROMPTS, keys)
    decoder = jax.device_put(decoder_of(MODEL, request))
    until, idle = jnp.int32(20), jnp.int32(8)
    with jax.transfer_guard('disallow'):
        programs(MODEL.backend).advance(decoder, until, idle, state)


@pytest.mark.exhaustive
@pytest.mark.parametrize('batch', [1, 3, 8])
@pytest.mark.parametrize('sampling', [GREEDY, Sampling(0.7, 10, 0.9), FREE], ids=str)
@pytest.mark.parametrize('name', DRAFTERS)
def test_the_answer_is_that_of_the_target_however_it_is_decoded(name, sampling, batch):
    found = decoded(with_random_weights(DRAFTERS[name]), sampling, batch)
    assert found.tokens == plain(sampling)
    assert all(map(sum, found.accepted))


@pytest.mark.parametrize('name', ['AR', 'medusa'])
def test_the_sampled_law_is_the_softmax_of_the_target(name):
    """Chi-square over all answers of two tokens, of a vocabulary of five."""
    model = random_model(3, tiny_config(vocab=5, layers=1))
    drafter = AutoRegressive()
    if name == 'medusa':
        drafter = with_random_weights(Medusa(2, ((0,), (1,), (0, 0), (1, 0)), False), model)
    count = 4096
    result = decode_all(model, Request(drafter, 3, FREE, batch=1024), [[1, 2]] * count)
    seen = Counter(tuple(tokens[:2]) for tokens in result.tokens)
    pairs = np.array([[1, 2, t] for t in range(5)], np.int32)
    logits_VTV = np.asarray(forward(model.module, model.params, pairs), np.float64)
    first_V, second_VV = (softmax(x, axis=-1) for x in (logits_VTV[0, 1], logits_VTV[:, 2]))
    expected = (first_V[:, None] * second_VV).ravel() * count
    found = np.array([seen[pair] for pair in itertools.product(range(5), repeat=2)])
    often = expected >= 5
    assert often.sum() > 8
    ratio = found[often].sum() / expected[often].sum()
    assert chisquare(found[often], expected[often] * ratio).pvalue > 1e-3


def test_a_drafter_with_the_targets_scores_guesses_what_the_target_chooses():
    """With the noise of its position, at any temperature."""
    sequences, ahead_T = sequences_of([[1, 2, 3], [4, 5, 6]], 20), jnp.array([1, 2, 5])
    logits_BTV = 3 * jax.random.normal(jax.random.key(4), (2, 3, 29))
    for sampling in (GREEDY, Sampling(0.7), FREE):
        guess_BT = jnp.argmax(perturbed(logits_BTV, sequences, ahead_T, sampling), axis=-1)
        at_BT = sequences.length_B[:, None] + ahead_T[None]
        chosen_BT = choose(logits_BTV, sequences.keys_B, at_BT, sampling)
        assert guess_BT.tolist() == chosen_BT.tolist()


def test_what_a_drafter_learns_from_counts_only_labels_that_are_there():
    """Two answers, of three tokens and of one; what comes after an answer weighs nothing."""
    labels_BA, weight_BA = jnp.array([[5, 6, 7], [8, 0, 0]]), jnp.array([[1.0, 1, 1], [1, 0, 0]])
    hidden_BTD = jnp.arange(10, dtype=jnp.float32).reshape(2, 5, 1)
    rows_BA = jnp.array([[1, 2, 3], [4, 0, 0]])
    nothing, later_A = jnp.zeros((2, 5), jnp.int32), jnp.array([4.0, 2, 1])
    batch = AnswerBatch(
        hidden_BTD, nothing, nothing, nothing[:, :, None], rows_BA, labels_BA, weight_BA, later_A
    )
    assert batch.hidden_BAD[:, :, 0].tolist() == [[1, 2, 3], [9, 5, 5]]
    assert [x.tolist() for x in batch.later(1)] == [[[6, 7, 0], [0] * 3], [[1, 1, 0], [0] * 3]]
    assert batch.later(9)[1].sum() == 0
    sure_BAV = 99 * jax.nn.one_hot(jnp.array([[6, 1, 1], [1, 1, 1]]), 9)
    loss, right = batch.scored(sure_BAV, 1)
    assert float(right) == 0.5 and float(loss) == pytest.approx(99 / 2)
