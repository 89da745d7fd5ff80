"""The terms of the loss."""

import jax
import jax.numpy as jnp
import pytest

from cllm_jax.training.losses import divergence


def test_teacher_gets_no_gradient_and_divergence_is_zero_for_equals():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 7))
    other = jax.random.normal(jax.random.key(1), (2, 3, 7))
    ones, total = jnp.ones((2, 3)), jnp.float32(6)
    assert float(divergence(logits, logits, ones, total)) == pytest.approx(0, abs=1e-6)
    assert float(divergence(logits, other, ones, total)) > 0
    to_teacher = jax.grad(lambda t: divergence(logits, t, ones, total))(other)
    assert float(jnp.abs(to_teacher).max()) == 0
    p = jax.nn.softmax(other[0, 0])
    expected = float((p * (jnp.log(p) - jax.nn.log_softmax(logits[0, 0]))).sum())
    one = jnp.zeros((2, 3)).at[0, 0].set(1)
    assert float(divergence(logits, other, one, jnp.float32(1))) == pytest.approx(
        expected, rel=1e-5
    )
