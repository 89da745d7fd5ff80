"""Attention with an explicit mask: few queries (1..256 in decoding), many keys."""

import jax
import jax.numpy as jnp

from cllm_jax.models.config import RopeScaling

NEVER = -1e30
"""Score of a masked key: its weight underflows to exactly 0, and no row becomes NaN."""


def attend(q_BTNH: jax.Array, k_RSH: jax.Array, v_RSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Grouped-query attention; query t of a row sees exactly the keys its mask row allows.

    Keys and values are rows of the cache (`cache.py`). Scores and softmax are float32 whatever the
    inputs. A query with no visible key (padding) averages all values; its result is never used.
    """
    (batch, queries, heads, width), (rows, slots) = q_BTNH.shape, k_RSH.shape[:2]
    groups = rows // batch
    q_BTKGH = (q_BTNH * width**-0.5).reshape(batch, queries, groups, -1, width)
    # X = query heads of a group x T
    q_RXH = q_BTKGH.transpose(2, 0, 3, 1, 4).reshape(rows, heads // groups * queries, width)
    scores = jnp.einsum('RXH,RSH->RXS', q_RXH, k_RSH, preferred_element_type=jnp.float32)
    scores = scores.reshape(groups, batch, -1, queries, slots)
    scores = jnp.where(mask_BTS[None, :, None], scores, NEVER)
    p_RXS = jax.nn.softmax(scores, axis=-1).astype(v_RSH.dtype).reshape(rows, -1, slots)
    o_RXH = jnp.einsum('RXS,RSH->RXH', p_RXS, v_RSH)
    o_BTKGH = o_RXH.reshape(groups, batch, -1, queries, width).transpose(1, 3, 0, 2, 4)
    return o_BTKGH.reshape(q_BTNH.shape)


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
