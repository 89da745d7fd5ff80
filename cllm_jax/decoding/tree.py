"""What a draft's nodes see, and which of them the target accepts: for chains and for trees.

A chain needs none of the machinery of a tree and pays nothing for it; which of the two a draft is
is known when the loop is traced (`Draft.parent_BN` is None for a chain).
"""

import math

import jax
import jax.numpy as jnp
from flax import struct

from cllm_jax.decoding.draft import Draft


@struct.dataclass
class Layout:
    """Where the nodes of a draft stand. P is the number of nodes on the longest path."""

    depth_BN: jax.Array
    """Steps from the pending token, which has 0: rotary position and noise of a node."""
    sees_BNN: jax.Array | None
    """Whether node i (axis 1) sees node j: itself and what it follows. None for a chain."""


def layout(draft: Draft) -> Layout:
    """Depths and ancestors, from the parents alone."""
    batch, nodes = draft.tokens_BN.shape
    if draft.parent_BN is None:
        steps_1N = jnp.arange(nodes, dtype=jnp.int32)[None]
        return Layout(jnp.broadcast_to(steps_1N, (batch, nodes)), None)
    here_N = jnp.arange(nodes, dtype=jnp.int32)
    sees_BNN = draft.parent_BN[:, :, None] == here_N[None, None]
    sees_BNN |= jnp.eye(nodes, dtype=bool)[None]
    for _ in range(math.ceil(math.log2(max(draft.depth, 1)))):
        step_BNN = sees_BNN.astype(jnp.float32)
        sees_BNN = jnp.einsum('bij,bjk->bik', step_BNN, step_BNN) > 0
    depth_BN = sees_BNN.sum(axis=2, dtype=jnp.int32) - 1
    return Layout(depth_BN, sees_BNN)


def mask(where: Layout, length_B: jax.Array, slots: int) -> jax.Array:
    """What each node sees of the cache, bool `[B, N, S]`; node i is in slot `length + i`."""
    slots_S = jnp.arange(slots, dtype=jnp.int32)
    if where.sees_BNN is None:
        return slots_S[None, None] <= (length_B[:, None] + where.depth_BN)[:, :, None]
    nodes = where.depth_BN.shape[1]
    node_BS = slots_S[None] - length_B[:, None]
    inside_BS = (node_BS >= 0) & (node_BS < nodes)
    at_B1S = jnp.clip(node_BS, 0, nodes - 1)[:, None]
    own_BNS = jnp.take_along_axis(where.sees_BNN, at_B1S, axis=2) & inside_BS[:, None]
    return (node_BS < 0)[:, None] | own_BNS


def accept(
    draft: Draft, where: Layout, y_BN: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The longest path whose every token is what the target chose after the node before it.

    Args:
      y_BN: the target's choice after each node.

    Returns:
      How many nodes after the pending one are accepted, int32 `[B]`; the target's choices along the
      path, `[B, P]`, of which the first accepted + 1 count; and the path's nodes, `[B, P]`, None
      for a chain, where node i is the i-th.
    """
    if draft.parent_BN is None:
        match_BN = (draft.tokens_BN[:, 1:] == y_BN[:, :-1]) & draft.valid_BN[:, 1:]
        count_B = jnp.cumprod(match_BN.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
        return count_B, y_BN, None
    before_BN = jnp.take_along_axis(y_BN, jnp.maximum(draft.parent_BN, 0), axis=1)
    right_BN = draft.valid_BN & (draft.tokens_BN == before_BN) & (where.depth_BN > 0)
    right_BN = right_BN.at[:, 0].set(True)
    whole_BN = ~(where.sees_BNN & ~right_BN[:, None]).any(axis=2)
    best_B = jnp.argmax(jnp.where(whole_BN, where.depth_BN, -1), axis=1)
    on_path_BN = jnp.take_along_axis(where.sees_BNN, best_B[:, None, None], axis=1)[:, 0]
    # Ancestors have smaller numbers, so a stable sort lists the path from the pending token on.
    path_BP = jnp.argsort(~on_path_BN, axis=1, stable=True)[:, : draft.depth + 1].astype(jnp.int32)
    count_B = on_path_BN.sum(axis=1, dtype=jnp.int32) - 1
    return count_B, jnp.take_along_axis(y_BN, path_BP, axis=1), path_BP
