"""Attention with an explicit mask: few queries (1..256 in decoding), many keys."""

from functools import partial

import jax
import jax.numpy as jnp

from cllm_jax.models.config import RopeScaling
from cllm_jax.models.linear import product

NEVER = -1e30
"""Score of a masked key: its weight underflows to exactly 0, and no row becomes NaN."""


def attend(
    q_BTNH: jax.Array,
    k_RSH: jax.Array,
    v_RSH: jax.Array,
    mask_BTS: jax.Array,
    compute: jnp.dtype | None = None,
) -> jax.Array:
    """Grouped-query attention; query t of a row sees exactly the keys its mask row allows.

    Keys and values are rows of the cache (`cache.py`). Scores and softmax are float32 whatever the
    inputs; `compute` is the dtype of what is multiplied (see `product`), None for the queries' own.
    A query with no visible key (padding) averages all values; its result is never used.
    """
    (batch, queries, heads, width), rows = q_BTNH.shape, len(k_RSH)
    groups = rows // batch
    q_BTKGH = (q_BTNH * width**-0.5).reshape(batch, queries, groups, -1, width)
    # X = query heads of a group x T
    q_RXH = q_BTKGH.transpose(2, 0, 3, 1, 4).reshape(rows, heads // groups * queries, width)
    o_RXH = _attend(compute or q_BTNH.dtype, q_RXH, k_RSH, v_RSH, mask_BTS).astype(q_BTNH.dtype)
    o_BTKGH = o_RXH.reshape(groups, batch, -1, queries, width).transpose(1, 3, 0, 2, 4)
    return o_BTKGH.reshape(q_BTNH.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(compute, q_RXH, k_RSH, v_RSH, mask_BTS):
    return _attend_forward(compute, q_RXH, k_RSH, v_RSH, mask_BTS)[0]


def _attend_forward(compute, q_RXH, k_RSH, v_RSH, mask_BTS):
    batch, queries, slots = mask_BTS.shape
    scores = product('RXH,RSH->RXS', q_RXH, k_RSH, compute)
    by_mask = scores.reshape(len(k_RSH) // batch, batch, -1, queries, slots)
    by_mask = jnp.where(mask_BTS[None, :, None], by_mask, NEVER)
    p_RXS = jax.nn.softmax(by_mask, axis=-1).astype(compute).reshape(scores.shape)
    o_RXH = product('RXS,RSH->RXH', p_RXS, v_RSH, compute)
    return o_RXH, (q_RXH, k_RSH, v_RSH, p_RXS, o_RXH)


def _attend_backward(compute, saved, do_RXH):
    # The softmax's own rule sums dp * p over the keys, which XLA's CPU backend does so slowly that
    # it took a quarter of a training step; do * o over the head width is the same number
    # (FlashAttention, arXiv 2205.14135, appendix B.2).
    q_RXH, k_RSH, v_RSH, p_RXS, o_RXH = saved
    dp_RXS = product('RXH,RSH->RXS', do_RXH, v_RSH, compute)
    sums_RX1 = (do_RXH * o_RXH).sum(-1, keepdims=True)
    ds_RXS = (p_RXS.astype(jnp.float32) * (dp_RXS - sums_RX1)).astype(compute)
    dq_RXH = product('RXS,RSH->RXH', ds_RXS, k_RSH, compute)
    dk_RSH = product('RSX,RXH->RSH', ds_RXS.swapaxes(1, 2), q_RXH, compute)
    dv_RSH = product('RSX,RXH->RSH', p_RXS.swapaxes(1, 2), do_RXH, compute)
    grads = zip((dq_RXH, dk_RSH, dv_RSH), (q_RXH, k_RSH, v_RSH), strict=True)
    return (*(d.astype(x.dtype) for d, x in grads), None)


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


def rotate(x_BTNH: jax.Array, sin: jax.Array, cos: jax.Array) -> jax.Array:
    """Rotary embedding on the two halves of each head, Hugging Face's weight order."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTNH.dtype)
