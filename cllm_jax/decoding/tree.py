"""What a draft's nodes see, and which of them the target accepts: for chains and for trees.

A chain pays nothing for the machinery of a tree: which of the two a draft is, is known when the
loop is traced (`Draft.parent_BN` is None for a chain). P is the number of nodes on a longest path.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cllm_jax.decoding.drafter import Draft
from cllm_jax.model.llama import take_rows
from cllm_jax.model.precision import product


@struct.dataclass
class Layout:
    """Where the nodes of a draft stand."""

    depth_BN: jax.Array
    """Steps from the pending token, which has 0: rotary position and noise of a node."""
    sees_BNN: jax.Array | None
    """Whether node i (axis 1) sees node j: itself and what it follows. None for a chain."""


def chains(first: int, after: Sequence[int], length: int) -> np.ndarray:
    """Parents of chains of `length` nodes, numbered from `first`: one after each of some nodes."""
    parents = np.arange(first - 1, first - 1 + len(after) * length, dtype=np.int32)
    parents[::length] = after
    return parents


def layout(draft: Draft) -> Layout:
    """Depths and ancestors, from the parents alone."""
    nodes = draft.tokens_BN.shape[1]
    here_1N = jnp.arange(nodes, dtype=jnp.int32)[None]
    if draft.parent_BN is None:
        return Layout(jnp.broadcast_to(here_1N, draft.tokens_BN.shape), None)
    sees_BNN = draft.parent_BN[:, :, None] == here_1N[None]
    sees_BNN |= jnp.eye(nodes, dtype=bool)[None]
    for _ in range(math.ceil(math.log2(max(draft.depth, 1)))):
        step_BNN = sees_BNN.astype(jnp.float32)
        sees_BNN = product('bij,bjk->bik', step_BNN, step_BNN) > 0
    return Layout(sees_BNN.sum(axis=2, dtype=jnp.int32) - 1, sees_BNN)


def causal_mask(positions_BT: jax.Array, slots: int) -> jax.Array:
    """What tokens at these positions see of a text that begins in slot 0, bool `[B, T, S]`."""
    return jnp.arange(slots, dtype=jnp.int32)[None, None] <= positions_BT[:, :, None]


def mask(where: Layout, length_B: jax.Array, slots: int) -> jax.Array:
    """What each node sees of the cache, bool `[B, N, S]`; node i is in slot `length + i`."""
    if where.sees_BNN is None:
        return causal_mask(length_B[:, None] + where.depth_BN, slots)
    return after_cache(where.sees_BNN, length_B, slots)


def after_cache(sees_BNX: jax.Array, length_B: jax.Array, slots: int) -> jax.Array:
    """The first `length` slots, and of the X after them those a node sees, bool `[B, N, S]`."""
    size = sees_BNX.shape[2]
    at_BS = jnp.arange(slots, dtype=jnp.int32)[None] - length_B[:, None]
    inside_BS = (at_BS >= 0) & (at_BS < size)
    at_B1S = jnp.clip(at_BS, 0, size - 1)[:, None]
    own_BNS = jnp.take_along_axis(sees_BNX, at_B1S, axis=2) & inside_BS[:, None]
    return (at_BS < 0)[:, None] | own_BNS


def at_parent(draft: Draft, values_BNX: jax.Array) -> jax.Array:
    """For each node what `values` has at the node that it follows; node 0 gets its own."""
    if draft.parent_BN is None:
        return jnp.concatenate([values_BNX[:, :1], values_BNX[:, :-1]], axis=1)
    return take_rows(values_BNX, jnp.maximum(draft.parent_BN, 0))


def accept(
    draft: Draft, where: Layout, y_BN: jax.Array, liked_BN: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The longest path whose every token is what the target chose after the node before it.

    Args:
      y_BN: the target's choice after each node.
      liked_BN: nodes that are as good as chosen although they are not (lossy rules); None for none.

    Returns:
      How many nodes after the pending one are accepted, int32 `[B]`; the tokens that follow each
      other along the path, `[B, P]`, of which the first accepted + 1 count; and the path's nodes,
      `[B, P]`.
    """
    right_BN = draft.tokens_BN == at_parent(draft, y_BN)
    if liked_BN is not None:
        right_BN |= liked_BN
    right_BN = (right_BN & draft.valid_BN).at[:, 0].set(True)
    if draft.parent_BN is None:
        path_BP = jnp.broadcast_to(jnp.arange(y_BN.shape[1], dtype=jnp.int32)[None], y_BN.shape)
        chosen_BP = y_BN
        count_B = jnp.cumprod(right_BN[:, 1:].astype(jnp.int32), axis=1).sum(1, dtype=jnp.int32)
    else:
        right_BN = right_BN.at[:, 1:].set(right_BN[:, 1:] & (where.depth_BN[:, 1:] > 0))
        whole_BN = ~(where.sees_BNN & ~right_BN[:, None]).any(axis=2)
        best_B = jax.lax.argmax(jnp.where(whole_BN, where.depth_BN, -1), 1, jnp.int32)
        on_path_BN = take_rows(where.sees_BNN, best_B[:, None])[:, 0]
        # Ancestors have smaller numbers, so a stable sort lists the path from the pending token on.
        order_BN = jnp.argsort(~on_path_BN, axis=1, stable=True)
        path_BP = order_BN[:, : draft.depth + 1].astype(jnp.int32)
        count_B = on_path_BN.sum(axis=1, dtype=jnp.int32) - 1
        chosen_BP = take_rows(y_BN, path_BP)
    if liked_BN is not None:  # else the two are the same
        following_BP = jnp.roll(take_rows(draft.tokens_BN, path_BP), -1, axis=1)
        steps_1P = jnp.arange(path_BP.shape[1], dtype=jnp.int32)[None]
        chosen_BP = jnp.where(steps_1P < count_B[:, None], following_BP, chosen_BP)
    return count_B, chosen_BP, path_BP
