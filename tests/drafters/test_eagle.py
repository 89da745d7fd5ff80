"""EAGLE: its tree is what its layer says, with a cache as without one, and it learns."""

import jax
import jax.numpy as jnp
import pytest

from cllm_jax.decoding.drafter import Verdict
from cllm_jax.drafters.eagle import Eagle
from cllm_jax.drafters.trained import AnswerBatch
from cllm_jax.errors import ConfigError
from tests.drafters.examples import DRAFTERS, GREEDY, MODEL, sequences_of, with_random_weights


@pytest.mark.parametrize('name', ['eagle', 'eagle, chain'])
def test_a_tree_holds_what_the_layer_says_of_the_whole_text(name):
    """Every node is among the best guesses of the layer, without a cache, after the path to it."""
    drafter, prompt = with_random_weights(DRAFTERS[name]), [5, 1, 4, 2]
    prompted, after = sequences_of([prompt], 40), sequences_of([[*prompt, 7]], 40)
    hidden_BTD = jax.random.normal(jax.random.key(5), (1, 4, MODEL.config.dim))
    y_BN = jnp.full((1, drafter.nodes), 7)  # the target's choice after the prompt
    verdict = Verdict(y_BN, None, None, None, jnp.ones(1, jnp.int32), prompt_BTD=hidden_BTD)
    state = jax.jit(drafter.update, static_argnums=(1, 4))(
        drafter.init(prompted), None, verdict, prompted, GREEDY
    )
    draft, _ = jax.jit(drafter.draft, static_argnums=2)(state, after, GREEDY)
    most = 3 + drafter.depth
    steps_1T = jnp.arange(most, dtype=jnp.int32)[None]
    mask_1TT = steps_1T[:, None] <= steps_1T[:, :, None]
    layer = jax.jit(lambda *args: drafter.layer(*args, steps_1T, mask_1TT)[0])

    def feature_after(path):
        """The layer's guess at the target's feature after the text and a path."""
        text = jnp.asarray([*prompt[1:], 7, *path, *[0] * most], jnp.int32)[None, :most]
        features = jnp.pad(hidden_BTD, ((0, 0), (0, most - 4), (0, 0)))
        for at in range(4, 4 + len(path)):
            features = features.at[:, at].set(layer(features, text)[:, at - 1])
        return layer(features, text)[0, 3 + len(path)]

    paths = [()]
    tokens_N, parent_N = draft.tokens_BN[0].tolist(), draft.parent_BN[0].tolist()
    for token, parent in zip(tokens_N[1:], parent_N[1:], strict=True):
        feature_D = feature_after(paths[parent])
        best = jax.lax.top_k(drafter.logits(feature_D[None, None])[0, 0], drafter.width)[1]
        assert token in best.tolist()
        paths.append((*paths[parent], token))
    assert len(set(paths)) == drafter.nodes, 'every path is tried once'
    assert 2 < max(map(len, paths)) <= draft.depth == drafter.depth
    assert draft.valid_BN.all() and tokens_N[0] == 7
    if drafter.width == 1:
        assert parent_N == list(range(-1, drafter.depth))


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
