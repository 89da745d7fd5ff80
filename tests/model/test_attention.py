"""The gradient of attention."""

import jax
import jax.numpy as jnp
import pytest

from cllm_jax.model.attention import NEVER, attend
from cllm_jax.runtime.backend import CPU


def reference_attention(q, k, v, mask):
    """Every head on its own, by JAX's own rules of differentiation."""
    (batch, _, heads, width), groups = q.shape, len(k) // len(q)
    out = []
    for b in range(batch):
        for head in range(heads):
            row = head // (heads // groups) * batch + b
            scores = jnp.where(mask[b], q[b, :, head] @ k[row].T * width**-0.5, NEVER)
            out.append(jax.nn.softmax(scores, axis=-1) @ v[row])
    return jnp.stack(out).reshape(batch, heads, -1, width).swapaxes(1, 2)


@pytest.mark.parametrize('compute', [None, 'bfloat16'])
def test_the_gradient_of_attention_is_the_derived_one(compute):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (
        jax.random.normal(key, shape)
        for key, shape in zip(keys, [(2, 5, 4, 8), (4, 9, 8), (4, 9, 8)], strict=False)
    )
    mask = jax.random.bernoulli(keys[3], 0.6, (2, 5, 9)).at[:, :, 0].set(True)
    weight = jax.random.normal(keys[4], q.shape)

    def value(q, k, v):
        return (attend(q, k, v, mask, compute and jnp.dtype(compute), CPU) * weight).sum()

    def expected(q, k, v):
        return (reference_attention(q, k, v, mask) * weight).sum()

    found = jax.jit(jax.value_and_grad(value, (0, 1, 2)))(q, k, v)
    derived = jax.jit(jax.value_and_grad(expected, (0, 1, 2)))(q, k, v)
    near = 0.03 if compute else 1e-5
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(derived), strict=True):
        assert float(jnp.abs(a - b).max()) <= near * float(jnp.abs(b).max())
