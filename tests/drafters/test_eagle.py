"""EAGLE: its tree is what its layer says, with a cache as without one, and it learns."""

import jax
import jax.numpy as jnp
import pytest

from cllm_jax.decoding.drafter import Verdict
from cllm_jax.drafters.eagle import Eagle
from cllm_jax.drafters.trained import AnswerBatch
from cllm_jax.errors import ConfigError
from tests.drafters.examples import DRAFTERS, GREEDY, MODEL, sequences_of, with_random_weights
from tests.tiny import ragged_prompts


@pytest.mark.parametrize('name', ['eagle', 'eagle, chain'])
def test_a_tree_holds_what_the_layer_says_of_the_whole_text(name):
    """Every node is among the best guesses of the layer, without a cache, after the path to it."""
    drafter, rows = with_random_weights(DRAFTERS[name]), 8
    layer = {key: 4 * w if key in ('v', 'o') else w for key, w in drafter.own['layer'].items()}
    drafter = drafter.replace(own=drafter.own | {'layer': layer})  # what is seen must count
    prompts = ragged_prompts(0, [4] * rows)
    prompted, after = sequences_of(prompts, 40), sequences_of([[*p, 7] for p in prompts], 40)
    hidden_BTD = jax.random.normal(jax.random.key(5), (rows, 4, MODEL.config.dim))
    y_BN = jnp.full((rows, drafter.nodes), 7)  # the target's choice after the prompt
    verdict = Verdict(y_BN, None, None, None, jnp.ones(rows, jnp.int32), prompt_BTD=hidden_BTD)
    state = jax.jit(drafter.update, static_argnums=(1, 4))(
        drafter.init(prompted), None, verdict, prompted, GREEDY
    )
    draft, _ = jax.jit(drafter.draft, static_argnums=2)(state, after, GREEDY)
    assert draft.valid_BN.all() and draft.tokens_BN[:, 0].tolist() == [7] * rows
    most = 3 + drafter.depth
    steps_1T = jnp.arange(most, dtype=jnp.int32)[None]
    mask_1TT = steps_1T[:, None] <= steps_1T[:, :, None]
    layer = jax.jit(lambda *args: drafter.layer(*args, steps_1T, mask_1TT)[0])

    def guesses_after(row, path):
        """The best tokens after the text and a path."""
        text = jnp.asarray([*prompts[row][1:], 7, *path, *[0] * most], jnp.int32)[None, :most]
        features = jnp.pad(hidden_BTD[row : row + 1], ((0, 0), (0, most - 4), (0, 0)))
        for at in range(4, 4 + len(path)):
            features = features.at[:, at].set(layer(features, text)[:, at - 1])
        logits_1TV = drafter.logits(layer(features, text))
        return jax.lax.top_k(logits_1TV[0, 3 + len(path)], drafter.width)[1].tolist()

    for row in range(rows):
        paths, nodes = [()], (x[row, 1:].tolist() for x in (draft.tokens_BN, draft.parent_BN))
        for token, parent in zip(*nodes, strict=True):
            assert token in guesses_after(row, paths[parent])
            paths.append((*paths[parent], token))
        assert len(set(paths)) == drafter.nodes, 'every path is tried once'
        assert max(map(len, paths)) <= draft.depth == drafter.depth
        if drafter.width == 1:
            assert list(map(len, paths)) == list(range(drafter.depth + 1))


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
