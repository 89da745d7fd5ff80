"""ReDrafter: beams packed into a tree, and the loss, against Apple's own vectors."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cllm_jax.drafters.redrafter import ReDrafter, pack
from cllm_jax.drafters.trained import AnswerBatch

APPLE = np.array(
    [
        [[91, 92, 93, 95], [91, 92, 94, 96], [91, 92, 93, 97]],
        [[93, 94, 95, 92], [93, 95, 96, 93], [93, 94, 97, 96]],
    ],
    np.int32,
)


def test_beams_are_packed_as_apple_packs_them():
    """The vectors of apple/ml-recurrent-drafter, tree_attention_test.py."""
    tokens_BN, parent_BN, live_BN, unpack_BMC = jax.device_get(pack(APPLE, 12))
    packed = [[91, 92, 93, 95, 94, 96, 97], [93, 94, 95, 92, 95, 96, 93, 97, 96]]
    unpack = [
        [[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 2, 6]],
        [[0, 1, 2, 3], [0, 4, 5, 6], [0, 1, 7, 8]],
    ]
    depths = [[0, 1, 2, 3, 2, 3, 3], [0, 1, 2, 3, 1, 2, 3, 2, 3]]
    assert unpack_BMC.tolist() == unpack
    for b in range(2):
        assert tokens_BN[b, live_BN[b]].tolist() == packed[b]
        depth = [0]
        for parent in parent_BN[b, 1 : len(packed[b])]:
            depth.append(depth[parent] + 1)
        assert depth == depths[b]


@given(st.integers(0, 2**32), st.sampled_from((4, 7, 12, 30)))  # each is compiled
def test_packed_beams_unpack_to_themselves(seed, capacity):
    rng = np.random.default_rng(seed)
    beams_BMC = np.concatenate([np.zeros((3, 6, 1), int), rng.integers(0, 3, (3, 6, 4))], 2)
    tokens_BN, parent_BN, live_BN, unpack_BMC = (
        np.asarray(x) for x in PACK(beams_BMC.astype(np.int32), capacity)
    )
    for tokens, parent, live, unpack, beams in zip(
        tokens_BN, parent_BN, live_BN, unpack_BMC, beams_BMC, strict=True
    ):
        kept = unpack < capacity
        assert (tokens[unpack[kept]] == beams[kept]).all()
        assert (parent < np.arange(capacity)).all() and parent[0] == -1
        prefixes = {tuple(beam[: i + 1]) for beam in beams for i in range(5)}
        assert live.sum() == len(set(unpack[kept])) == min(capacity, len(prefixes))
        for row, k in zip(unpack, kept, strict=True):
            assert all(parent[row[i]] == row[i - 1] for i in range(1, 5) if k[i])


PACK = jax.jit(pack, static_argnums=1)


class Saying:
    """A drafter that says what it is told to."""

    length = 3

    def __init__(self, logits):
        self.said, self.read = iter(logits), []

    def cell(self, tokens_BA, state_BAD):
        self.read.append(tokens_BA.tolist())
        return state_BAD

    def logits(self, hidden_BAD, state_BAD):
        return next(self.said)


def test_the_loss_of_redrafter_is_apples():
    """The value of apple/ml-recurrent-drafter, train/loss_test.py: 1.6388."""
    said = [
        [[-4.2755, -4.0159, -5.4326], [-7.3534, -5.2731, -4.7144], [-6.3034, -5.6929, -4.1427]],
        [[-5.6221, -2.1564, -5.9357], [-2.7976, -5.3193, -4.0888], [-4.9951, -4.7358, -6.5123]],
    ]
    labels_BA, weight_BA = jnp.array([[1, 2, 1]]), jnp.ones((1, 3))  # of the tokens 0 1 2 1
    here_BA, nothing = jnp.arange(3)[None], jnp.zeros((1, 3), jnp.int32)
    answers = AnswerBatch(
        hidden_BTD=jnp.zeros((1, 3, 1)),
        tokens_BT=nothing,
        positions_BT=nothing,
        mask_BTT=nothing[..., None],
        rows_BA=here_BA,
        labels_BA=labels_BA,
        weight_BA=weight_BA,
        later_A=jnp.array([3.0, 2.0, 1.0]),
    )
    drafter = Saying(jnp.array([[step] for step in said]))
    loss, _ = ReDrafter.loss(drafter, answers)
    assert drafter.read == [[[1, 2, 1]], [[2, 1, 0]]]
    assert abs(float(loss) - 1.6388) < 1e-4
