"""The KV cache: what is written is read back, rounded once, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.model.attention import attend
from cllm_jax.model.cache import compact, init_cache, read, with_room, write
from cllm_jax.model.config import LlamaConfig
from cllm_jax.runtime.backend import CPU

CONFIG = LlamaConfig(vocab_size=8, dim=12, layers=2, heads=2, kv_heads=2, head_dim=6, mlp_dim=8)
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def filled(rng, dtype, batch, one_query=False):
    """A cache of 10 slots with random contents, and those as `[layer][K, B, S, H]`."""
    cache = init_cache(CONFIG, batch, 10, CPU.cache_dtype(dtype, one_query))
    new = [rng.normal(size=(2, batch, 10, 6)).astype(np.float32) for _ in range(4)]
    arrays, shape = jax.tree.flatten(cache)
    start_B = jnp.zeros(batch, jnp.int32)
    arrays = [write(a, jnp.asarray(x), start_B, dtype) for a, x in zip(arrays, new, strict=True)]
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
    array = write(array, jnp.asarray(new), jnp.asarray(start), dtype)
    for row, at in enumerate(start):
        expected[:, row, at : at + 4] = np.asarray(jnp.asarray(new[:, row], dtype))
    assert read(array).dtype == dtype
    assert (np.asarray(read(array)).reshape(2, batch, 10, 6) == expected).all()


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_cache_for_one_query_holds_the_same_values_and_can_go_on_for_more(dtype):
    cache, expected = filled(np.random.default_rng(0), dtype, 3, one_query=True)
    for found, values in zip(contents(cache, 3), expected, strict=True):
        assert (found == values).all()
    usual, _ = filled(np.random.default_rng(0), dtype, 3)
    longer = with_room(cache, 7, 5, dtype, CPU.cache_dtype(dtype))
    for found, array in zip(jax.tree.leaves(longer), jax.tree.leaves(usual), strict=True):
        assert found.dtype == array.dtype
        assert found.shape == (6, 12, 6)
        assert (found[:, :7] == array[:, :7]).all()
        assert not found[:, 7:].any()


def test_attention_over_rounded_keys_is_that_over_narrow_ones():
    rng = np.random.default_rng(0)
    q_BTNH, *kv = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(3, 1, 4, 6)] + 2 * [(2, 3, 10, 6)]
    )
    mask_BTS = jnp.asarray(np.arange(10) < np.array([[[10]], [[4]], [[1]]]))
    narrow = [x.astype(jnp.bfloat16) for x in kv]
    wide = [x.astype(jnp.float32) for x in narrow]
    expected = attend(q_BTNH, *narrow, mask_BTS, jnp.bfloat16, rounded_kv=True)
    found = attend(q_BTNH, *wide, mask_BTS, jnp.bfloat16, rounded_kv=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert (attend(q_BTNH, *kv, mask_BTS, jnp.bfloat16) == expected).all()


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
