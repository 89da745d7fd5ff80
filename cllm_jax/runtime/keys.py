"""PRNG keys: always of one kind, and in the place of what they are used with."""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

KIND = 'threefry2x32'
"""JAX_DEFAULT_PRNG_IMPL may say `rbg`, whose numbers depend on how many rows draw them together: a
row's tokens would depend on its batch."""


def prng_key(seed: int) -> jax.Array:
    """The key of a seed, the same whatever JAX's default."""
    return jax.random.key(seed, impl=KIND)


def keys_for(params: Any, keys_B: jax.Array) -> jax.Array:
    """PRNG keys, the same on every process, where a computation with `params` can use them."""
    first = jax.tree.leaves(params)[0]
    if first.is_fully_addressable:
        return keys_B
    data = np.asarray(jax.random.key_data(keys_B))
    everywhere = NamedSharding(first.sharding.mesh, PartitionSpec())
    placed = jax.make_array_from_callback(data.shape, everywhere, lambda index: data[index])
    return jax.random.wrap_key_data(placed, impl=KIND)
