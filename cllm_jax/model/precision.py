"""The products of the model, and in which precision they are computed.

float32 means float32: accelerators multiply float32 operands in bfloat16 (TPU) or TF32 (recent
GPUs) unless the precision is asked for, so every float32 product here asks for the highest.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cllm_jax.runtime.backend import ANY, Backend


def linear(
    x: jax.Array,
    weight: jax.Array,
    compute: jnp.dtype | None = None,
    axes: str = 'IO',
    backend: Backend = ANY,
    on_the_left: bool = False,
) -> jax.Array:
    """`x` `[..., I]` times `weight`, summed in float32; result `[..., O]` in the dtype of x.

    Args:
      weight: `[I, O]`, or `[O, I]` with `axes` 'OI' (transposed first it breaks XLA's CPU backend,
        which folds that into the product and then lacks bfloat16).
      compute: dtype of the operands (see `product`); None for x's own.
      on_the_left: compute it as `weight` `[O, I]` times x transposed (`Backend.weights_left`).
    """
    low, rows = jnp.dtype(compute or x.dtype), math.prod(x.shape[:-1])
    if low == jnp.bfloat16 and rows < backend.fast_rows:
        filled = filled_up(x.reshape(rows, -1), 0, backend.fast_rows)
        filled = linear(filled, weight, low, axes, on_the_left=on_the_left)
        return filled[:rows].reshape(*x.shape[:-1], -1)
    if on_the_left:
        # Transposed in memory, or XLA multiplies in float32 by a loop of its own.
        x_IR = _swap(x.astype(low).reshape(rows, -1))
        y_OR = jnp.matmul(weight, x_IR, **_in_float32(weight, x_IR))
        return _swap(y_OR.astype(x.dtype)).reshape(*x.shape[:-1], -1)
    return product(f'...I,{axes}->...O', x, weight, low).astype(x.dtype)


def filled_up(x: jax.Array, axis: int, size: int) -> jax.Array:
    """`x` with at least `size` entries along an axis: copies of the last one follow."""
    more = size - x.shape[axis]
    if more <= 0:
        return x
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)], mode='edge')


def product(spec: str, a: jax.Array, b: jax.Array, compute: jnp.dtype = jnp.float32) -> jax.Array:
    """`einsum(spec, a, b)` in float32, of operands rounded to `compute`, in the backward pass too.

    With operands in float32 and `compute` bfloat16 this is mixed precision. Chips with bfloat16
    matrix units gain by it, CPUs with AMX among them (docs/log.md).
    """
    if a.dtype == b.dtype == compute:
        return _einsum(spec, a, b)
    return _rounded_product(spec, compute, a, b)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, **_in_float32(a, b))


def _in_float32(a: jax.Array, b: jax.Array) -> dict[str, Any]:
    """To sum a product in float32, at the highest precision if the operands are float32."""
    highest = a.dtype == b.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if highest else None
    return {'preferred_element_type': jnp.float32, 'precision': precision}


def rounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` rounded to `dtype`, in its own; a compiler may leave out `astype` there and back."""
    if jnp.finfo(dtype).bits >= jnp.finfo(x.dtype).bits:
        return x
    return jax.lax.reduce_precision(x, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)


def transposed(x: jax.Array, backend: Backend) -> jax.Array:
    """`x` with its last two axes swapped, in memory too where the backend asks for it."""
    return _swapped_in_memory(x) if backend.transposes_in_memory else x.swapaxes(-1, -2)


def _swap(x: jax.Array) -> jax.Array:
    rows = Layout(major_to_minor=tuple(range(x.ndim)))
    return with_layout_constraint(with_layout_constraint(x, rows).swapaxes(-1, -2), rows)


def _on_each_device(mesh, args, result):
    *batch, i, j = (*args[0].sharding.spec, *(None,) * args[0].ndim)[: args[0].ndim]
    swapped = NamedSharding(mesh, P(*batch, j, i))
    return mesh, _swap, swapped, (args[0].sharding,)


# A layout alone would be imposed on the whole array, gathered on every device.
_swapped_in_memory = custom_partitioning(_swap)
_swapped_in_memory.def_partition(partition=_on_each_device, sharding_rule='... i j -> ... j i')


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rounded_product(spec, compute, a, b):
    return _rounded_forward(spec, compute, a, b)[0]


def _rounded_forward(spec, compute, a, b):
    # JAX's own rule would multiply the float32 cotangent with the rounded operand: a float32
    # product, which is what this avoids.
    low_a, low_b = a.astype(compute), b.astype(compute)
    like_a, like_b = jnp.zeros((), a.dtype), jnp.zeros((), b.dtype)
    return _einsum(spec, low_a, low_b), (low_a, low_b, like_a, like_b)


def _rounded_backward(spec, compute, saved, dy):
    low_a, low_b, like_a, like_b = saved
    (axes_a, axes_b), axes_y = spec.split('->')[0].split(','), spec.split('->')[1]
    low_dy = dy.astype(compute)
    da = _einsum(f'{axes_y},{axes_b}->{axes_a}', low_dy, low_b)
    db = _einsum(f'{axes_y},{axes_a}->{axes_b}', low_dy, low_a)
    return da.astype(like_a.dtype), db.astype(like_b.dtype)


_rounded_product.defvjp(_rounded_forward, _rounded_backward)
