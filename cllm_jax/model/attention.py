"""Attention with an explicit mask: few queries (1..256 in decoding), many keys."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from cllm_jax.model.config import RopeScaling
from cllm_jax.model.precision import filled_up, product, rounded, transposed
from cllm_jax.runtime.backend import ANY, Backend

NEVER = -1e30
"""Score of a masked key: its weight underflows to exactly 0, and no row becomes NaN."""


@jax.named_scope('attention')
def attend(
    q_BTNH: jax.Array,
    k_KBSH: jax.Array,
    v_KBSH: jax.Array,
    mask_BTS: jax.Array,
    compute: jnp.dtype | None = None,
    backend: Backend = ANY,
    rounded_kv: bool = False,
) -> jax.Array:
    """Grouped-query attention; query t of a row sees exactly the keys its mask row allows.

    Keys and values may have K and B as one axis, as the cache does; training keeps them apart, for
    merged axes cannot be divided among devices by B. Scores and softmax are float32. `compute` is
    the dtype of what is multiplied (see `product`), None for the queries' own. With `rounded_kv`
    keys and values have been rounded to it already, and are multiplied in the dtype they come in. A
    query without a visible key (padding) averages all values; its result is never used.
    """
    asked, heads = q_BTNH.shape[1:3]
    least = -(-backend.exact_queries * math.prod(k_KBSH.shape[:-2]) // (heads * len(q_BTNH)))
    q_BTNH, mask_BTS = (filled_up(x, 1, least) for x in (q_BTNH, mask_BTS))
    batch, queries, _, width = q_BTNH.shape
    groups = math.prod(k_KBSH.shape[:-2]) // batch
    q_BTKGH = (q_BTNH * width**-0.5).reshape(batch, queries, groups, -1, width)
    # X = query heads of a group x T
    q_KBXH = q_BTKGH.transpose(2, 0, 3, 1, 4).reshape(*k_KBSH.shape[:-2], -1, width)
    compute = jnp.dtype(compute or q_BTNH.dtype)
    multiplied = k_KBSH.dtype if rounded_kv else compute
    q_KBXH = q_KBXH if multiplied == compute else rounded(q_KBXH, compute).astype(multiplied)
    o_KBXH = _attend(multiplied, compute, backend, q_KBXH, k_KBSH, v_KBSH, mask_BTS)
    o_KBGTH = o_KBXH.astype(q_BTNH.dtype).reshape(groups, batch, -1, queries, width)
    return o_KBGTH.transpose(1, 3, 0, 2, 4).reshape(q_BTNH.shape)[:, :asked]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(compute, precision, backend, q_KBXH, k_KBSH, v_KBSH, mask_BTS):
    return _attend_forward(compute, precision, backend, q_KBXH, k_KBSH, v_KBSH, mask_BTS)[0]


def _attend_forward(compute, precision, backend, q_KBXH, k_KBSH, v_KBSH, mask_BTS):
    batch, queries, slots = mask_BTS.shape
    scores = product('...XH,...SH->...XS', q_KBXH, k_KBSH, compute)
    by_mask = scores.reshape(-1, batch, q_KBXH.shape[-2] // queries, queries, slots)
    by_mask = jnp.where(mask_BTS[None, :, None], by_mask, NEVER)
    p = jax.nn.softmax(by_mask, axis=-1)
    p = p if precision == compute else rounded(p, precision)
    p_KBXS = p.astype(compute).reshape(scores.shape)
    o_KBXH = product('...XS,...SH->...XH', p_KBXS, v_KBSH, compute)
    return o_KBXH, (q_KBXH, k_KBSH, v_KBSH, p_KBXS, o_KBXH)


def _attend_backward(compute, precision, backend, saved, do_KBXH):
    # The softmax's own rule sums dp * p over the keys, which takes XLA's CPU backend a quarter of a
    # step; do * o over the head width is the same number (arXiv 2205.14135, appendix B.2).
    q_KBXH, k_KBSH, v_KBSH, p_KBXS, o_KBXH = saved
    dp_KBXS = product('...XH,...SH->...XS', do_KBXH, v_KBSH, compute)
    sums_KBX1 = (do_KBXH * o_KBXH).sum(-1, keepdims=True)
    ds_KBXS = (p_KBXS.astype(jnp.float32) * (dp_KBXS - sums_KBX1)).astype(compute)
    dq_KBXH = product('...XS,...SH->...XH', ds_KBXS, k_KBSH, compute)
    dk_KBSH = key_gradient(ds_KBXS, q_KBXH, compute, backend)
    dv_KBSH = key_gradient(p_KBXS, do_KBXH, compute, backend)
    grads = zip((dq_KBXH, dk_KBSH, dv_KBSH), (q_KBXH, k_KBSH, v_KBSH), strict=True)
    return (*(d.astype(x.dtype) for d, x in grads), None)


def key_gradient(
    w_KBXS: jax.Array, x_KBXH: jax.Array, compute: jnp.dtype, backend: Backend
) -> jax.Array:
    """Sum over the queries of their weight for a key times what they have, `[..., S, H]`."""
    # Of the possible orders the one that transposes small arrays.
    x_KBHX = transposed(x_KBXH.astype(compute), backend)
    return transposed(product('...HX,...XS->...HS', x_KBHX, w_KBXS, compute), backend)


_attend.defvjp(_attend_forward, _attend_backward)


def rope_tables(
    positions_BT: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
    """Sine and cosine of the rotary angles, float32 `[B, T, 1, head_dim / 2]` each."""
    half = head_dim // 2
    freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None and scaling.kind == 'linear':
        freq = freq / scaling.factor
    if scaling is not None and scaling.kind == 'llama3':
        turns = scaling.original_positions * freq / (2 * jnp.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        freq = freq * (keep + (1 - keep) / scaling.factor)
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * freq[None, None, None, :]
    return jnp.sin(angle), jnp.cos(angle)


@jax.named_scope('rope')
def rotate(x_BTNH: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotary embedding on the two halves of each head."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTNH.dtype)
