"""SPACE: where its masks are, and models that it cannot draft for."""

import dataclasses

import jax.numpy as jnp
import pytest

from cllm_jax.decoding.drafter import Verdict
from cllm_jax.drafters.space import Masked, Space
from cllm_jax.drafters.trained import HeadsConfig
from cllm_jax.errors import ConfigError
from tests.drafters.examples import GREEDY, MODEL, sequences_of


def test_a_group_of_masks_follows_the_pending_token_and_every_guess():
    drafter, sequences = Space(28, 2), sequences_of([[1, 2], [3, 4]], 20)
    state = Masked(jnp.array([[5, 6], [7, 8]]), jnp.array([True, False]))
    draft, _ = drafter.draft(state, sequences, GREEDY)
    assert draft.tokens_BN.tolist() == [[2, 5, 6, *[28] * 6], [4, 7, 8, *[28] * 6]]
    assert draft.parent_BN.tolist() == [[-1, 0, 1, 0, 3, 1, 5, 2, 7]] * 2
    # No mask is ever accepted, and nothing is before the first forward.
    assert draft.valid_BN.tolist() == [[True] * 3 + [False] * 6, [False] * 9]
    assert draft.depth == 4


def test_the_next_guesses_are_those_of_the_masks_after_the_last_accepted_node():
    drafter, known_B = Space(28, 2), jnp.ones(3, bool)
    y_BN = jnp.arange(9)[None] + jnp.array([[100], [200], [300]])
    path_BP = jnp.broadcast_to(jnp.arange(5)[None], (3, 5))
    verdict = Verdict(y_BN, None, None, path_BP, count_B=jnp.array([1, 2, 3]))
    state = drafter.update(Masked(None, known_B), None, verdict, None, GREEDY)
    assert state.guess_BM.tolist() == [[103, 104], [205, 206], [307, 308]]


def test_the_mask_is_the_padding_token_else_the_first_one():
    def trained_for(**ids):
        config = dataclasses.replace(MODEL.config, **ids)
        return Space.of_size(HeadsConfig(ahead=2), dataclasses.replace(MODEL, config=config))

    assert trained_for(pad_id=4, bos_id=5) == Space(4, 2)
    assert trained_for(pad_id=None, bos_id=5) == Space(5, 2)
    with pytest.raises(ConfigError, match='neither pad_token_id nor bos_token_id'):
        trained_for(pad_id=None, bos_id=None)
    with pytest.raises(ConfigError, match=r'pad_token_id, else .*: mask token id 29: outside'):
        trained_for(pad_id=29)
    with pytest.raises(ConfigError, match='here: mask token id 29: outside the vocabulary'):
        Space(29).check_model(MODEL, 'here')
