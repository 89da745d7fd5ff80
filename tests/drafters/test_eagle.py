"""EAGLE: its tree, and its layer, which says the same with a cache as without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.drafters.eagle import Eagle
from cllm_jax.drafters.trained import AnswerBatch
from cllm_jax.errors import ConfigError
from cllm_jax.model.cache import init_cache
from tests.drafters.examples import DRAFTERS, GREEDY, MODEL, sequences_of, with_random_weights


@pytest.mark.parametrize('name', ['eagle', 'eagle, chain', 'eagle, two levels'])
def test_the_tree_of_eagle_holds_every_node_after_the_one_it_follows(name):
    drafter, sequences = with_random_weights(DRAFTERS[name]), sequences_of([[1, 2], [3, 4]], 40)
    state = drafter.init(sequences)
    feature_BD = jax.random.normal(jax.random.key(1), state.feature_BD.shape)
    state = state.replace(feature_BD=feature_BD, known_B=jnp.ones(2, bool))
    draft, _ = jax.jit(drafter.draft, static_argnums=2)(state, sequences, GREEDY)
    assert draft.tokens_BN.shape == (2, drafter.nodes)
    assert draft.tokens_BN[:, 0].tolist() == [2, 4] and draft.valid_BN.all()
    for tokens, parents in zip(*jax.device_get((draft.tokens_BN, draft.parent_BN)), strict=True):
        paths = [()]
        for token, parent in zip(tokens[1:].tolist(), parents[1:].tolist(), strict=True):
            assert 0 <= parent < len(paths)
            paths.append((*paths[parent], token))
        assert len(set(paths)) == len(paths), 'every path is tried once'
        assert max(map(len, paths)) <= draft.depth == drafter.depth
        if drafter.width == 1:
            assert parents.tolist() == list(range(-1, drafter.depth))
    # The first level holds the best guesses for the feature itself.
    best_BW = jax.lax.top_k(drafter.logits(feature_BD[:, None])[:, 0], drafter.width)[1]
    first = np.asarray(draft.tokens_BN)[0, np.asarray(draft.parent_BN)[0] == 0]
    assert set(first) <= set(np.asarray(best_BW)[0].tolist())


def test_a_layer_with_a_cache_says_what_it_says_without():
    drafter, keys = with_random_weights(DRAFTERS['eagle']), jax.random.split(jax.random.key(2))
    feature_BXD = jax.random.normal(keys[0], (2, 6, MODEL.config.dim))
    tokens_BX = jax.random.randint(keys[1], (2, 6), 0, MODEL.config.vocab_size, jnp.int32)
    positions_BX = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None], (2, 6))
    slots_S = jnp.arange(8, dtype=jnp.int32)
    mask_BXS = slots_S[None, None] <= positions_BX[:, :, None]
    layer = jax.jit(drafter.layer)
    whole_BXD, _ = layer(feature_BXD, tokens_BX, positions_BX, mask_BXS[:, :, :6])
    cache, parts = init_cache(MODEL.config, 2, 8, jnp.float32), []
    for some in (slice(0, 3), slice(3, 6)):
        start_B = jnp.full(2, some.start, jnp.int32)
        arrays = (x[:, some] for x in (feature_BXD, tokens_BX, positions_BX, mask_BXS))
        part_BXD, cache = layer(*arrays, cache, start_B)
        parts.append(part_BXD)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole_BXD, rtol=1e-4, atol=1e-5)


def test_the_loss_of_eagle_falls_when_it_is_followed():
    """And asks for nothing where an answer has no token after the next."""
    drafter, keys = with_random_weights(DRAFTERS['eagle']), jax.random.split(jax.random.key(3))
    tokens_BT = jax.random.randint(keys[1], (2, 6), 0, MODEL.config.vocab_size, jnp.int32)
    steps_BT = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[None], (2, 6))
    answers = AnswerBatch(
        hidden_BTD=jax.random.normal(keys[0], (2, 6, MODEL.config.dim)),
        tokens_BT=tokens_BT,
        positions_BT=steps_BT,
        mask_BTT=steps_BT[:, None] <= steps_BT[:, :, None],
        rows_BA=steps_BT[:, :3] + 2,
        labels_BA=tokens_BT[:, 3:],
        weight_BA=jnp.array([[1.0, 1, 1], [1, 0, 0]]),
        later_A=jnp.array([4.0, 2, 1]),
    )

    @jax.jit
    def loss_of(own, answers):
        return drafter.replace(own=own).loss(answers)[0]

    loss, slope = jax.value_and_grad(loss_of)(drafter.own, answers)
    stepped = jax.tree.map(lambda x, dx: x - 1e-3 * dx, drafter.own, slope)
    assert 0 < loss_of(stepped, answers) < loss
    # The second answer is one token long: what was computed for it changes nothing.
    other = answers.replace(hidden_BTD=answers.hidden_BTD.at[1].multiply(-1.0))
    assert loss_of(drafter.own, other) == loss


def test_sizes_below_the_least_are_refused():
    with pytest.raises(ConfigError, match='capacity 1: must be at least 2'):
        Eagle(MODEL.config, capacity=1)
