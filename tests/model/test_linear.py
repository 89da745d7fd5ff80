"""Products in mixed precision."""

import jax
import jax.numpy as jnp
import pytest

from cllm_jax.model.precision import linear


@pytest.mark.parametrize('axes', ['IO', 'OI'])
def test_mixed_precision_gradient_is_close(axes):
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    w = jax.random.normal(jax.random.key(1), (16, 7) if axes == 'IO' else (7, 16))

    def value(compute):
        return lambda x, w: (linear(x, w, compute, axes) ** 2).mean()

    exact = jax.grad(value(None), (0, 1))(x, w)
    mixed = jax.grad(value(jnp.dtype('bfloat16')), (0, 1))(x, w)
    for a, b in zip(exact, mixed, strict=True):
        assert a.dtype == b.dtype == jnp.float32
        assert 0 < float(jnp.abs(a - b).max()) < 0.03 * float(jnp.abs(a).max())
