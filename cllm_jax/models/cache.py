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
    """Keys and values, one `[R, S, H]` array per layer, as attention multiplies them.

    R = K x B, heads first: one batch axis for the products, in which a head's rows lie together.
    XLA's CPU backend copies whatever is sliced, transposed or reshaped on the way from the loop's
    carry to a product, in every layer of every forward: one array for all layers, tokens before
    heads, or batch and heads as two axes each cost more than the products themselves.

    On CPUs a bfloat16 cache holds the bits, as uint16: XLA's CPU backend would write a few rows by
    converting all of them to float32 and back.
    """

    k_RSH: tuple[jax.Array, ...]
    v_RSH: tuple[jax.Array, ...]

    @property
    def slots(self) -> int:
        return self.k_RSH[0].shape[1]


def init_cache(config: LlamaConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache. Separate buffers throughout, since one buffer cannot be donated twice."""
    if dtype == jnp.bfloat16 and jax.default_backend() == 'cpu':
        dtype = jnp.uint16
    shape = (config.kv_heads * batch, slots, config.head_dim)
    return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)) for _ in 'kv'))


def heads_first(x_BTKH: jax.Array) -> jax.Array:
    """Keys or values as attention multiplies them, `[K, B, T, H]`."""
    return x_BTKH.transpose(2, 0, 1, 3)


@jax.named_scope('cache')
def write(cache_RSH: jax.Array, new_KBTH: jax.Array, start_B: jax.Array) -> jax.Array:
    """Put the T new rows of one layer at slots `start .. start + T` of each sequence.

    They are rounded to the cache's dtype.
    `dynamic_update_slice` clamps: the caller guarantees `start + T <= S`.
    """
    dtype = jnp.bfloat16 if cache_RSH.dtype == jnp.uint16 else cache_RSH.dtype
    new_RTH = new_KBTH.reshape(len(cache_RSH), *new_KBTH.shape[2:]).astype(dtype)
    return _write(cache_RSH, jax.lax.bitcast_convert_type(new_RTH, cache_RSH.dtype), start_B)


@jax.named_scope('cache')
def read(cache_RSH: jax.Array) -> jax.Array:
    """The keys or values of one layer, in the dtype in which they are multiplied."""
    if cache_RSH.dtype != jnp.uint16:
        return cache_RSH
    return jax.lax.bitcast_convert_type(cache_RSH, jnp.bfloat16)


@jax.named_scope('cache')
def compact(cache: Cache, start_B: jax.Array, path_BP: jax.Array) -> Cache:
    """Move the rows of an accepted path, at `start + path`, together to `start ..`."""

    def one(cache_RSH: jax.Array) -> jax.Array:
        copies = len(cache_RSH) // len(start_B)
        at_RP = jnp.tile(start_B[:, None] + path_BP, (copies, 1))
        new_RPH = jnp.take_along_axis(cache_RSH, at_RP[:, :, None], axis=1)
        return _write(cache_RSH, new_RPH, start_B)

    return jax.tree.map(one, cache)


def _write(cache_RSH: jax.Array, new_RTH: jax.Array, start_B: jax.Array) -> jax.Array:
    if len(start_B) == 1:  # mapped over rows it is a scatter, which copies
        return jax.lax.dynamic_update_slice(cache_RSH, new_RTH, (0, start_B[0], 0))

    def row(cache_SH, new_TH, start):
        return jax.lax.dynamic_update_slice(cache_SH, new_TH, (start, 0))

    start_R = jnp.tile(start_B, len(cache_RSH) // len(start_B))
    return jax.vmap(row)(cache_RSH, new_RTH, start_R)
