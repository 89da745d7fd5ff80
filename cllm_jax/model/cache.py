"""The KV cache: plain arrays. Whoever decodes keeps the length and builds the mask.

Slots after the length hold rejected guesses, which are overwritten.
"""

import jax
import jax.numpy as jnp
from flax import struct

from cllm_jax.model.config import LlamaConfig
from cllm_jax.model.precision import rounded


@struct.dataclass
class Cache:
    """Keys and values, one `[R, S, H]` array per layer, as attention multiplies them.

    R = K x B, heads first: one batch axis for the products, in which a head's rows lie together.
    XLA's CPU backend copies whatever is sliced, transposed or reshaped between the loop's carry and
    a product, in every forward: one array for all layers, tokens before heads, or batch and heads
    as two axes each cost more than the products. `Backend.cache_dtype` says what a bfloat16 cache
    holds.
    """

    k_RSH: tuple[jax.Array, ...]
    v_RSH: tuple[jax.Array, ...]

    @property
    def slots(self) -> int:
        return self.k_RSH[0].shape[1]


def init_cache(config: LlamaConfig, batch: int, slots: int, dtype: jnp.dtype) -> Cache:
    """An empty cache of arrays of `dtype`, none of which share a buffer: each can be donated."""
    shape = (config.kv_heads * batch, slots, config.head_dim)
    return Cache(*(tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)) for _ in 'kv'))


def _as_kept(x: jax.Array, dtype: jnp.dtype, kept: jnp.dtype) -> jax.Array:
    """Values rounded to `dtype`, as a cache of `kept` holds them."""
    if kept == jnp.uint16:
        return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    if jnp.finfo(kept).bits > jnp.finfo(dtype).bits:
        x = rounded(x, dtype)
    return x.astype(kept)


def with_room(cache: Cache, used: int, room: int, values: jnp.dtype, dtype: jnp.dtype) -> Cache:
    """The first `used` slots, followed by `room` empty ones, as arrays of `dtype`."""

    def one(cache_RSH: jax.Array) -> jax.Array:
        used_RSH = _as_kept(read(cache_RSH[:, :used]), values, dtype)
        return jnp.pad(used_RSH, ((0, 0), (0, room), (0, 0)))

    return jax.tree.map(one, cache)


@jax.named_scope('cache')
def write(
    cache_RSH: jax.Array, new_KBTH: jax.Array, start_B: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Put the T new rows of a layer, rounded to `dtype`, at slots `start .. start + T <= S`.

    A single start is that of all sequences.
    """
    new_RTH = new_KBTH.reshape(len(cache_RSH), *new_KBTH.shape[2:])
    return _write(cache_RSH, _as_kept(new_RTH, dtype, cache_RSH.dtype), start_B)


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
        return jax.lax.dynamic_update_slice_in_dim(cache_RSH, new_RTH, start_B[0], 1)

    def row(cache_SH, new_TH, start):
        return jax.lax.dynamic_update_slice_in_dim(cache_SH, new_TH, start, 0)

    start_R = jnp.tile(start_B, len(cache_RSH) // len(start_B))
    return jax.vmap(row)(cache_RSH, new_RTH, start_R)
