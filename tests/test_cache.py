"""The KV cache: what is written is read back, rounded once, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.models.cache import compact, init_cache, read, write
from cllm_jax.models.config import LlamaConfig

CONFIG = LlamaConfig(vocab_size=8, dim=12, layers=2, heads=2, kv_heads=2, head_dim=6, mlp_dim=8)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def filled(rng, dtype, batch):
    """A cache of 10 slots with random contents, and those as `[layer][K, B, S, H]`."""
    cache = init_cache(CONFIG, batch, 10, dtype)
    new = [rng.normal(size=(2, batch, 10, 6)).astype(np.float32) for _ in range(4)]
    arrays, shape = jax.tree.flatten(cache)
    start_B = jnp.zeros(batch, jnp.int32)
    arrays = [write(a, jnp.asarray(x), start_B) for a, x in zip(arrays, new, strict=True)]
    return jax.tree.unflatten(shape, arrays), [np.array(jnp.asarray(x, dtype)) for x in new]


def contents(cache, batch):
    return [np.asarray(read(a)).reshape(2, batch, 10, 6) for a in jax.tree.leaves(cache)]


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('dtype', DTYPES)
def test_rows_are_written_where_they_belong_and_nowhere_else(dtype, batch):
    rng = np.random.default_rng(0)
    cache, expected = filled(rng, dtype, batch)
    array, expected = cache.k_RSH[0], expected[0]
    new = rng.normal(size=(2, batch, 4, 6)).astype(np.float32)
    start = np.array([5, 0, 6][:batch], np.int32)
    array = write(array, jnp.asarray(new), jnp.asarray(start))
    for row, at in enumerate(start):
        expected[:, row, at : at + 4] = np.asarray(jnp.asarray(new[:, row], dtype))
    assert read(array).dtype == dtype
    assert (np.asarray(read(array)).reshape(2, batch, 10, 6) == expected).all()


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('dtype', DTYPES)
def test_an_accepted_path_moves_together(dtype, batch):
    cache, expected = filled(np.random.default_rng(0), dtype, batch)
    start, path = np.array([2, 4, 0][:batch]), np.array([[0, 3, 5], [0, 1, 2], [0, 2, 9]][:batch])
    moved = contents(
        compact(cache, jnp.asarray(start, jnp.int32), jnp.asarray(path, jnp.int32)), batch
    )
    for found, before in zip(moved, expected, strict=True):
        after = before.copy()
        for row in range(batch):
            after[:, row, start[row] : start[row] + 3] = before[:, row, start[row] + path[row]]
        assert (found == after).all()
