"""The losses of CLLM training (arXiv 2403.00835, Eq. 4-6), as explicit weighted token means.

Every term is a sum over tokens divided by a given total weight. The caller computes the total over
the whole batch, so accumulating over micro-batches changes nothing.
"""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(
    logits_BTV: jax.Array, labels_BT: jax.Array, weight_BT: jax.Array, total: jax.Array
) -> jax.Array:
    """Autoregressive loss (Eq. 6): mean negative log-likelihood in nats, float32 scalar."""
    loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, labels_BT)
    return (loss_BT * weight_BT).sum() / jnp.maximum(total, 1e-9)


def divergence(
    student_BTV: jax.Array, teacher_BTV: jax.Array, weight_BT: jax.Array, total: jax.Array
) -> jax.Array:
    """Consistency loss: mean forward KL(teacher || student) in nats (Eq. 4 and 5).

    The teacher is the same model on a better context, without gradient.
    """
    teacher_BTV = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_BTV), axis=-1)
    student_BTV = jax.nn.log_softmax(student_BTV, axis=-1)
    kl_BT = optax.losses.kl_divergence_with_log_targets(student_BTV, teacher_BTV)
    return (kl_BT * weight_BT).sum() / jnp.maximum(total, 1e-9)
