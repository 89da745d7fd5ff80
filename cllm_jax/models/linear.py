"""The products of the model, and in which precision they are computed."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def linear(
    x: jax.Array, weight: jax.Array, compute: jnp.dtype | None = None, axes: str = 'IO'
) -> jax.Array:
    """`x` times `weight` over the last axis of x, summed in float32; result `[..., O]` like x.

    Args:
      x: `[..., I]`.
      weight: `[I, O]`, or `[O, I]` with `axes` 'OI' (transposing it first breaks XLA's CPU backend:
        products that it then folds the transposition into do not support bfloat16).
      compute: dtype of the operands (see `product`); None for x's own.
      axes: the order of the weight's axes.
    """
    return product(f'...I,{axes}->...O', x, weight, compute or x.dtype).astype(x.dtype)


def product(spec: str, a: jax.Array, b: jax.Array, compute: jnp.dtype) -> jax.Array:
    """`einsum(spec, a, b)` in float32, of operands rounded to `compute`, in the backward pass too.

    With operands in float32 and `compute` bfloat16 this is mixed precision. Chips with bfloat16
    matrix units gain by it, CPUs with AMX among them: a whole training step of a 2M-parameter model
    is 1.4x to 2x faster there.
    """
    if a.dtype == b.dtype == compute:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
    return _rounded(spec, compute, a, b)


def transposed(x: jax.Array, compute: jnp.dtype) -> jax.Array:
    """`x` with its last two axes swapped, on CPUs in memory too, between products in `compute`.

    XLA's CPU backend would fold the swap into the product before or after. For that it has no
    bfloat16 kernel (it converts the operands to float32, which takes three times as long, or
    fails), so the layout is fixed. A fixed layout, though, is gathered on every device of a mesh;
    in float32 a barrier against the folding will do.
    """
    rows = Layout(major_to_minor=tuple(range(x.ndim)))

    def copied(x):
        if compute == jnp.float32:
            return jax.lax.optimization_barrier(x.swapaxes(-1, -2))
        return with_layout_constraint(with_layout_constraint(x, rows).swapaxes(-1, -2), rows)

    return jax.lax.platform_dependent(x, cpu=copied, default=lambda x: x.swapaxes(-1, -2))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded(spec, compute, a, b):
    return _rounded_forward(spec, compute, a, b)[0]


def _rounded_forward(spec, compute, a, b):
    # JAX's own rule would multiply the float32 cotangent with the rounded operand: a float32
    # product, which is what this avoids.
    low_a, low_b = a.astype(compute), b.astype(compute)
    like_a, like_b = jnp.zeros((), a.dtype), jnp.zeros((), b.dtype)
    y = jnp.einsum(spec, low_a, low_b, preferred_element_type=jnp.float32)
    return y, (low_a, low_b, like_a, like_b)


def _rounded_backward(spec, compute, saved, dy):
    low_a, low_b, like_a, like_b = saved
    (axes_a, axes_b), axes_y = spec.split('->')[0].split(','), spec.split('->')[1]
    low_dy = dy.astype(compute)
    da = jnp.einsum(f'{axes_y},{axes_b}->{axes_a}', low_dy, low_b, preferred_element_type=dy.dtype)
    db = jnp.einsum(f'{axes_y},{axes_a}->{axes_b}', low_dy, low_a, preferred_element_type=dy.dtype)
    return da.astype(like_a.dtype), db.astype(like_b.dtype)


_rounded.defvjp(_rounded_forward, _rounded_backward)
