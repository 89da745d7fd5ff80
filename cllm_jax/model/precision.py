"""The products of the model, and in which precision they are computed."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


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


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` in its own dtype, with values that `dtype` has.

    A conversion there and back says the same, but a compiler may leave that out.
    """
    if jnp.finfo(dtype).bits >= jnp.finfo(x.dtype).bits:
        return x
    return jax.lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)


def transposed(x: jax.Array) -> jax.Array:
    """`x` with its last two axes swapped, on CPUs in memory too.

    XLA's CPU backend would fold the swap into the product before or after, and then has no bfloat16
    kernel for it: it converts the operands to float32, which takes three times as long, or fails.
    """
    return jax.lax.platform_dependent(x, cpu=_rewritten, default=lambda x: x.swapaxes(-1, -2))


def _swap_in_memory(x: jax.Array) -> jax.Array:
    rows = Layout(major_to_minor=tuple(range(x.ndim)))
    return with_layout_constraint(with_layout_constraint(x, rows).swapaxes(-1, -2), rows)


def _on_each_device(mesh, args, result):
    *batch, i, j = (*args[0].sharding.spec, *(None,) * args[0].ndim)[: args[0].ndim]
    swapped = NamedSharding(mesh, P(*batch, j, i))
    return mesh, _swap_in_memory, swapped, (args[0].sharding,)


# A layout alone would be imposed on the whole array, gathered on every device.
_rewritten = custom_partitioning(_swap_in_memory)
_rewritten.def_partition(partition=_on_each_device, sharding_rule='... i j -> ... j i')


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
