"""Attention of packed training rows (`training/packing.py`), without the pairs that never meet.

A row is L tokens of clean text followed by C states of n tokens. A state sees clean text and
itself: L + n keys for a query instead of L + C n. Suffixes, in addition to those of `llama.py`:
W = C n state tokens, X = query heads of a group x n.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from cllm_jax.model.attention import NEVER, attend, key_gradient
from cllm_jax.model.precision import product
from cllm_jax.runtime.backend import ANY, Backend


@struct.dataclass
class PackedMask:
    """True where a query may look: text at text, states at text, states at themselves."""

    text_BLL: jax.Array
    states_BWL: jax.Array
    own_BCnn: jax.Array


def attend_packed(
    q_BTNH: jax.Array,
    k_KBTH: jax.Array,
    v_KBTH: jax.Array,
    mask: PackedMask,
    compute: jnp.dtype | None = None,
    backend: Backend = ANY,
) -> jax.Array:
    """What `attend` returns with the same mask in one piece."""
    (batch, states, n, _), length = mask.own_BCnn.shape, mask.text_BLL.shape[1]
    groups, width = k_KBTH.shape[0], q_BTNH.shape[-1]
    text = [x[:, :, :length] for x in (k_KBTH, v_KBTH)]
    own = [x[:, :, length:].reshape(groups, batch, states, n, width) for x in (k_KBTH, v_KBTH)]
    o_BLNH = attend(q_BTNH[:, :length], *text, mask.text_BLL, compute, backend)
    q_BCnKGH = (q_BTNH[:, length:] * width**-0.5).reshape(batch, states, n, groups, -1, width)
    q_KBCXH = q_BCnKGH.transpose(3, 0, 1, 4, 2, 5).reshape(groups, batch, states, -1, width)
    o_KBCXH = _attend_states(compute or q_BTNH.dtype, backend, q_KBCXH, text, own, mask)
    o_KBCGnH = o_KBCXH.astype(q_BTNH.dtype).reshape(groups, batch, states, -1, n, width)
    o_BWNH = o_KBCGnH.transpose(1, 2, 4, 0, 3, 5).reshape(batch, states * n, -1, width)
    return jnp.concatenate([o_BLNH, o_BWNH], axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend_states(compute, backend, q_KBCXH, text, own, mask):
    return _attend_states_forward(compute, backend, q_KBCXH, text, own, mask)[0]


def _attend_states_forward(compute, backend, q_KBCXH, text, own, mask):
    """`text` and `own` are keys and values, `[K, B, L, H]` and `[K, B, C, n, H]`."""
    (batch, states, n, _), length = mask.own_BCnn.shape, mask.text_BLL.shape[1]
    (k_text, v_text), (k_own, v_own) = text, own
    q_KBYH = _flat(q_KBCXH)  # Y = C x X
    s_text = product('...XH,...SH->...XS', q_KBYH, k_text, compute)
    s_own = product('...XH,...SH->...XS', q_KBCXH, k_own, compute)
    shape = (*q_KBCXH.shape[:3], -1, n)
    at_text = mask.states_BWL.reshape(1, batch, states, 1, n, length)
    by_text = jnp.where(at_text, s_text.reshape(*shape, length), NEVER)
    by_own = jnp.where(mask.own_BCnn[None, :, :, None], s_own.reshape(*shape, n), NEVER)
    top = jnp.maximum(by_text.max(-1, keepdims=True), by_own.max(-1, keepdims=True))
    e_text, e_own = jnp.exp(by_text - top), jnp.exp(by_own - top)
    scale = 1 / (e_text.sum(-1, keepdims=True) + e_own.sum(-1, keepdims=True))
    p_text = (e_text * scale).astype(compute).reshape(s_text.shape)
    p_own = (e_own * scale).astype(compute).reshape(s_own.shape)
    o_KBYH = product('...XS,...SH->...XH', p_text, v_text, compute)
    o_KBCXH = product('...XS,...SH->...XH', p_own, v_own, compute) + o_KBYH.reshape(q_KBCXH.shape)
    return o_KBCXH, (q_KBCXH, text, own, p_text, p_own, o_KBCXH)


def _attend_states_backward(compute, backend, saved, do_KBCXH):
    # As in `attention.py`: the row sums of dp * p are those of do * o.
    q_KBCXH, text, own, p_text, p_own, o_KBCXH = saved
    (k_text, v_text), (k_own, v_own) = text, own
    sums = (do_KBCXH * o_KBCXH).sum(-1, keepdims=True)
    q_KBYH, do_KBYH, sums_text = _flat(q_KBCXH), _flat(do_KBCXH), _flat(sums)
    dp_text = product('...XH,...SH->...XS', do_KBYH, v_text, compute)
    dp_own = product('...XH,...SH->...XS', do_KBCXH, v_own, compute)
    ds_text = (p_text.astype(jnp.float32) * (dp_text - sums_text)).astype(compute)
    ds_own = (p_own.astype(jnp.float32) * (dp_own - sums)).astype(compute)
    dq_KBYH = product('...XS,...SH->...XH', ds_text, k_text, compute)
    dq_KBCXH = product('...XS,...SH->...XH', ds_own, k_own, compute)
    dq_KBCXH = dq_KBCXH + dq_KBYH.reshape(q_KBCXH.shape)
    how = (compute, backend)
    d_text = [key_gradient(ds_text, q_KBYH, *how), key_gradient(p_text, do_KBYH, *how)]
    d_own = [key_gradient(ds_own, q_KBCXH, *how), key_gradient(p_own, do_KBCXH, *how)]
    grads = jax.tree.map(lambda d, x: d.astype(x.dtype), (dq_KBCXH, d_text, d_own), saved[:3])
    return (*grads, None)


_attend_states.defvjp(_attend_states_forward, _attend_states_backward)


def _flat(x_KBCXH):
    return x_KBCXH.reshape(*x_KBCXH.shape[:2], -1, x_KBCXH.shape[-1])
