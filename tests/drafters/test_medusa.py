"""Medusa: its tree, what its heads learn, and its rule of acceptance that is lossy."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.decoding.sampling import Sampling, choose
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.medusa import Medusa, tree_of
from cllm_jax.drafters.trained import AnswerBatch, LastHidden, TargetTables
from cllm_jax.errors import ConfigError
from cllm_jax.model.llama import forward
from tests.drafters.examples import (
    DRAFTERS,
    FREE,
    GREEDY,
    MODEL,
    PROMPTS,
    decoded,
    sequences_of,
    with_random_weights,
)


def test_typical_acceptance_takes_what_is_likely_enough_and_says_that_it_is_lossy():
    """Each token of an answer is chosen, as without it, or its probability is above the border."""
    drafter = with_random_weights(DRAFTERS['medusa, shared table'])
    lossy = Request(drafter, 20, dataclasses.replace(FREE, typical=0.09), seed=1)
    found = decode_all(MODEL, lossy, PROMPTS)
    keys, others = row_keys(1, range(len(PROMPTS))), 0
    logits_of = jax.jit(partial(forward, MODEL.module))
    for row, (prompt, answer) in enumerate(zip(PROMPTS, found.tokens, strict=True)):
        text_1T = np.zeros((1, 48), np.int32)
        text_1T[0, : len(prompt) + len(answer)] = [*prompt, *answer]
        from_answer = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logits_1TV = logits_of(MODEL.params, text_1T)[:, from_answer]
        at_1T = len(prompt) + jnp.arange(len(answer), dtype=jnp.int32)[None]
        chosen_T = np.asarray(choose(logits_1TV, keys[row : row + 1], at_1T, FREE))[0]
        p_TV = np.asarray(jax.nn.softmax(logits_1TV[0]))
        for token, best, p_V in zip(answer, chosen_T, p_TV, strict=True):
            entropy = -(p_V * np.log(p_V)).sum()
            assert token == best or p_V[token] > min(0.09, 0.3 * np.exp(-entropy)) - 1e-5
            others += token != best
    assert others, 'something was taken that would not have been chosen'
    assert sum(found.forwards) < sum(decoded(drafter, FREE).forwards)
    with pytest.raises(ConfigError, match='lossy rule of Medusa, not of AutoRegressive'):
        dataclasses.replace(lossy, drafter=AutoRegressive())
    with pytest.raises(ConfigError, match='set a temperature'):
        Sampling(typical=0.09)


def test_the_tree_of_medusa_holds_the_likeliest_nodes():
    right = np.array([[0.6, 0.2, 0.1], [0.5, 0.3, 0.0]])
    assert tree_of(right, 4) == ((0,), (1,), (0, 0), (0, 1))
    everything = tree_of(right, 99)
    assert len(everything) == 3 + 9
    assert all(path[:-1] in {(), *everything} for path in everything)
    for wrong in (((1, 0),), ((0,), (0,)), ((9,),), ((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0))):
        with pytest.raises(ConfigError):
            Medusa(3, wrong)


def test_heads_learn_the_tokens_after_the_next_and_choose_their_tree():
    """New heads say what the target says: here, of its table the identity, the token they see."""
    seen_BA, labels_BA, vocab = jnp.array([[1, 2, 3, 2]]), jnp.array([[0, 1, 2, 3]]), 9
    here_BA, nothing = jnp.arange(4)[None], jnp.zeros((1, 4), jnp.int32)
    answers = AnswerBatch(
        hidden_BTD=jax.nn.one_hot(seen_BA, vocab),
        tokens_BT=nothing,
        positions_BT=nothing,
        mask_BTT=nothing[..., None],
        rows_BA=here_BA,
        labels_BA=labels_BA,
        weight_BA=jnp.ones((1, 4)),
        later_A=jnp.array([4.0, 3, 2, 1]),
    )
    drafter = Medusa(2, ((0,), (1,), (0, 0)))
    own = drafter.new_weights(jax.random.key(0), TargetTables(jnp.eye(vocab), jnp.eye(vocab)))
    drafter = drafter.with_weights(own, {'embed': jnp.eye(vocab)})
    loss, metrics = drafter.loss(answers)
    assert metrics == {'accuracy_1': 1.0, 'accuracy_2': 0.0}
    logp = jax.nn.log_softmax(jax.nn.one_hot(0, vocab))
    assert float(loss) == pytest.approx(-float(0.8 * logp[0] + 0.64 * logp[1]), rel=1e-5)
    # Of head 1 the first guess is right, of head 2 the third and the fourth once each.
    assert drafter.calibrated(answers).choices == ((0,), (0, 2), (0, 3))


def test_every_node_holds_the_guess_of_its_path():
    """Node `(a, b)` is guess b of head 2, after guess a of head 1."""
    drafter = with_random_weights(DRAFTERS['medusa'])
    sequences = sequences_of([[1, 2], [3, 4]], 20)
    hidden_BD = jax.random.normal(jax.random.key(1), (2, MODEL.config.dim))
    draft, _ = drafter.draft(LastHidden(hidden_BD, jnp.array([True, False])), sequences, GREEDY)
    ranked_BKR = jnp.argsort(-drafter.logits(hidden_BD[:, None])[:, 0], axis=-1)
    for row, parents in enumerate(draft.parent_BN.tolist()):
        paths = {0: ()}
        for node, path in enumerate(drafter.choices, start=1):
            assert paths[parents[node]] == path[:-1]
            paths[node] = path
            assert draft.tokens_BN[row, node] == ranked_BKR[row, len(path) - 1, path[-1]]
    assert draft.valid_BN.tolist() == [[True] * drafter.nodes, [False] * drafter.nodes]
    assert draft.tokens_BN[:, 0].tolist() == [2, 4] and draft.depth == 3
