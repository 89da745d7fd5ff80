"""The KV cache: plain arrays that travel through `while_loop`, `shard_map` and donation.

Which slots count is not stored here. Whoever decodes keeps the length and builds the mask; slots
beyond the length hold rejected guesses and are simply overwritten.
"""

import jax
import jax.numpy as jnp
from flax import struct

from cllm_jax.models.config import LlamaConfig


@struct.dataclass
class Cache:
    """Keys and values, one `[B, K, S, H]` array per layer, as attention multiplies them.

    One array for all layers would be sliced, which means copied, in every layer of every forward.
    """

    k_BKSH: tuple[jax.Array, ...]
    v_BKSH: tuple[jax.Array, ...]

    @property
    def slots(self) -> int:
        return self.k_BKSH[0].shape[2]


def init_cache(config: LlamaConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache. Separate buffers throughout, since one buffer cannot be donated twice."""
    shape = (batch, config.kv_heads, slots, config.head_dim)
    return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)) for _ in 'kv'))


def write(cache_BKSH: jax.Array, new_BKTH: jax.Array, start_B: jax.Array) -> jax.Array:
    """Put the T new rows of one layer at slots `start .. start + T` of each sequence.

    `dynamic_update_slice` clamps: the caller guarantees `start + T <= S`.
    """
    if len(start_B) == 1:  # mapped over rows it is a scatter, for which XLA's CPU backend copies
        return jax.lax.dynamic_update_slice(cache_BKSH, new_BKTH, (0, 0, start_B[0], 0))

    def row(cache_KSH, new_KTH, start):
        return jax.lax.dynamic_update_slice(cache_KSH, new_KTH, (0, start, 0))

    return jax.vmap(row)(cache_BKSH, new_BKTH, start_B)
