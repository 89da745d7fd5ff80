"""The KV cache: two plain arrays that travel through `while_loop`, `shard_map` and donation.

Which slots count is not stored here. Whoever decodes keeps the length and builds the mask; slots
beyond the length hold rejected guesses and are simply overwritten.
"""

import jax
import jax.numpy as jnp
from flax import struct

from cllm_jax.models.config import LlamaConfig


@struct.dataclass
class Cache:
    """Keys and values of every layer; this axis order needs no collectives for per-row writes."""

    k_BLSKH: jax.Array
    v_BLSKH: jax.Array

    @property
    def slots(self) -> int:
        return self.k_BLSKH.shape[2]


def init_cache(config: LlamaConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache. Two separate buffers, since one buffer cannot be donated twice."""
    shape = (batch, config.layers, slots, config.kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write(cache_BLSKH: jax.Array, new_BTKH: jax.Array, layer: jax.Array, start_B: jax.Array):
    """Put the T new rows of one layer at slots `start .. start + T` of each sequence.

    `dynamic_update_slice` clamps: the caller guarantees `start + T <= S`.
    """

    def row(cache_LSKH, new_TKH, start):
        return jax.lax.dynamic_update_slice(cache_LSKH, new_TKH[None], (layer, start, 0, 0))

    return jax.vmap(row)(cache_BLSKH, new_BTKH, start_B)
