"""The LLaMA-family transformer in Flax Linen: parameters, cache and mask in; hidden states out.

Legend of the shape suffixes used in the whole package:
  B batch            T new tokens        S cache slots     L layers      D model width
  N query heads      K kv heads          H head width      F mlp width   V vocabulary
In decoding also: n block size, N nodes of a draft tree (where no heads are near), I iterations.

Weights are stored as (inputs..., outputs), each layer's separately: XLA's CPU backend multiplies a
few tokens with them up to 1.4x faster than with Hugging Face's (outputs, inputs), and would copy a
slice of a stack in every forward. For AMX the loop has (outputs, inputs), see `layout.py`. One call
serves training (no cache), prefill and verification.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cllm_jax.model.attention import attend, rope_tables, rotate
from cllm_jax.model.cache import Cache, init_cache, read, write
from cllm_jax.model.config import LlamaConfig
from cllm_jax.model.packed_attention import PackedMask, attend_packed
from cllm_jax.model.precision import filled_up, linear
from cllm_jax.runtime.backend import ANY, Backend
from cllm_jax.runtime.keys import prng_key
from cllm_jax.runtime.sharding import RULES, batch_sharding


@jax.named_scope('norm')
def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * gain.reshape((1,) * (x.ndim - 1) + gain.shape)


def take_rows(x_BTX: jax.Array, rows_BN: jax.Array) -> jax.Array:
    """Some rows of axis 1 of each batch row."""
    at_BNX = rows_BN.reshape(rows_BN.shape + (1,) * (x_BTX.ndim - 2))
    return jnp.take_along_axis(x_BTX, at_BNX, axis=1)


def _parameter(module: nn.Module, name: str, init: Any, axes: tuple, *shape: int) -> jax.Array:
    """A parameter of a module, with the names of its axes (`runtime/sharding.py`)."""
    return module.param(name, nn.with_logical_partitioning(init, axes), shape, module.dtype)


class Block(nn.Module):
    """Attention and gated MLP, each after an RMS norm and added to the residual stream."""

    config: LlamaConfig
    dtype: jnp.dtype = jnp.float32
    compute: jnp.dtype | None = None
    backend: Backend = ANY
    outputs_first: bool = False

    def _weight(self, name: str, axes: tuple[str, ...], *shape: int) -> jax.Array:
        scale = self.config.dim**-0.5
        if axes[-1] == 'embed':  # the residual stream is the sum of 2 L such products
            scale *= (2 * self.config.layers) ** -0.5
        return _parameter(self, name, nn.initializers.normal(scale), axes, *shape)

    def _norm(self, name: str, x: jax.Array, axis: str) -> jax.Array:
        gain = _parameter(self, name, nn.initializers.ones, (axis,), x.shape[-1])
        return rms_norm(x, gain, self.config.norm_eps)

    def _biased(self, name: str, y: jax.Array, *axes: str) -> jax.Array:
        shape = y.shape[y.ndim - len(axes) :]
        return y + _parameter(self, f'{name}_bias', nn.initializers.zeros, axes, *shape)[None, None]

    def _linear(self, name: str, x: jax.Array, axes: tuple[str, ...], *shape: int) -> jax.Array:
        """`x` times a matrix whose first axes, or first axis, are the inputs."""
        if self.outputs_first:
            w = self.get_variable('params', name)
            return linear(x, w, self.compute, 'OI', self.backend, on_the_left=True)
        w = self._weight(name, axes, *shape).reshape(x.shape[-1], -1)
        how = (self.compute, 'IO', self.backend)
        y = linear(x, w, *how)
        if not self.has_variable('params', f'{name}_a'):
            return y
        a, b = (self.get_variable('params', f'{name}_{half}') for half in 'ab')  # LoRA's factors
        return y + linear(linear(x, a, *how), b, *how)

    def _mlp(self, name: str, x: jax.Array, axes: tuple[str, str], outputs: int) -> jax.Array:
        y = self._linear(name, x, axes, x.shape[-1], outputs)
        return self._biased(name, y, axes[1]) if self.config.mlp_bias else y

    def _qkv(self, x_BTD, sin, cos, rows_BN):
        c, out = self.config, {}
        for name in ('q', 'k', 'v'):
            heads, axis = (c.heads, 'heads') if name == 'q' else (c.kv_heads, 'kv_heads')
            x = x_BTD if rows_BN is None or name != 'q' else take_rows(x_BTD, rows_BN)
            y = self._linear(name, x, ('embed', axis, 'head'), c.dim, heads, c.head_dim)
            y = y.reshape(*y.shape[:2], heads, c.head_dim)
            if c.qkv_bias:
                y = self._biased(name, y, axis, 'head')
            out[name] = self._norm(f'{name}_norm', y, 'head') if c.qk_norm and name != 'v' else y
        turns = (sin, cos) if rows_BN is None else (take_rows(a, rows_BN) for a in (sin, cos))
        return rotate(out['q'], *turns), rotate(out['k'], sin, cos), out['v']

    @nn.compact
    def __call__(self, x_BTD, sin, cos, mask_BTS, into=None, rows_BN=None):
        c = self.config
        h_BTD = self._norm('attn_norm', x_BTD, 'embed')
        q_BTNH, *kv_BTKH = self._qkv(h_BTD, sin, cos, rows_BN)
        if rows_BN is not None:  # what follows is computed for these alone
            x_BTD, mask_BTS = (take_rows(a, rows_BN) for a in (x_BTD, mask_BTS))
        new = kv = [x_BTKH.transpose(2, 0, 1, 3) for x_BTKH in kv_BTKH]  # heads first, as the cache
        if into is not None:
            kv_RSH, start_B, count = into
            kept = [x_KBTH[:, :, :count] for x_KBTH in new]  # what follows fills up the rows
            dtype = self.compute or self.dtype
            kv = [write(*pair, start_B, dtype) for pair in zip(kv_RSH, kept, strict=True)]
        how = (self.compute, self.backend)
        if isinstance(mask_BTS, PackedMask):
            o_BTNH = attend_packed(q_BTNH, *new, mask_BTS, *how)
        elif into is not None and mask_BTS.shape[2] == kv[0].shape[1]:
            seen = [read(cache_RSH) for cache_RSH in kv]
            o_BTNH = attend(q_BTNH, *seen, mask_BTS, *how, rounded_kv=True)
        else:
            o_BTNH = attend(q_BTNH, *new, mask_BTS, *how)
        o_BTA, axes = o_BTNH.reshape(*x_BTD.shape[:2], -1), ('heads', 'head', 'embed')
        o_BTD = self._linear('o', o_BTA, axes, c.heads, c.head_dim, c.dim)
        x_BTD = x_BTD + (self._biased('o', o_BTD, 'embed') if c.o_bias else o_BTD)

        h_BTD = self._norm('mlp_norm', x_BTD, 'embed')
        wide = h_BTD, ('embed', 'mlp'), c.mlp_dim
        gate_BTF, up_BTF = self._mlp('gate', *wide), self._mlp('up', *wide)
        return x_BTD + self._mlp('down', nn.silu(gate_BTF) * up_BTF, ('mlp', 'embed'), c.dim), kv


class Llama(nn.Module):
    """`apply({'params': p}, tokens, positions, mask, cache, start) -> (hidden_BTD, cache)`."""

    config: LlamaConfig
    dtype: jnp.dtype = jnp.float32
    compute: jnp.dtype | None = None
    """Mixed precision: matrices and cache are stored in this dtype or rounded to it for every
    product, and so are the activations they meet; norms, softmax and residuals stay in `dtype`."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    mesh: Mesh | None = None
    """Devices of a training step: between layers each has whole hidden states of its own rows. Left
    to itself the compiler would rather divide them by width, like the weights, and send them."""
    backend: Backend = ANY
    """Where the weights live (`runtime/backend.py`)."""
    outputs_first: bool = False
    """Whether the parameters are in that form (`layout.with_outputs_first`)."""

    def setup(self):
        c, ones = self.config, nn.initializers.ones
        table = nn.initializers.normal(0.02), ('vocab', 'embed'), c.vocab_size, c.dim
        self.embed = _parameter(self, 'embed', *table)
        block = nn.remat(Block) if self.remat else Block
        how = (self.dtype, self.compute, self.backend, self.outputs_first)
        self.layers = [block(c, *how) for _ in range(c.layers)]
        self.norm = _parameter(self, 'norm', ones, ('embed',), c.dim)
        if not c.tied:
            self.head = _parameter(self, 'head', *table)

    @property
    def products(self) -> jnp.dtype:
        """The dtype to which the operands of every product are rounded, the cache's values too."""
        return self.compute or self.dtype

    def new_cache(self, batch: int, slots: int, one_query: bool = False) -> Cache:
        """An empty cache, to be read by several queries at a time or by one."""
        dtype = self.backend.cache_dtype(self.products, one_query)
        return init_cache(self.config, batch, slots, dtype)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        mask_BTS: jax.Array | PackedMask | None = None,
        cache: Cache | None = None,
        start_B: jax.Array | None = None,
        rows_BN: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the final norm, and the cache with the new rows written.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 rotary positions; 0..T-1 if absent.
          mask_BTS: True where a query may look, causal if absent. S is T without a cache, else the
            cache slots, the new tokens among them, or T where these see only each other.
          cache: keys and values so far, or None to attend among the new tokens only.
          start_B: slot at which each row's new keys go; needed with a cache.
          rows_BN: the tokens whose hidden states are wanted, all if absent. For the others the last
            layer computes only keys and values.
        """
        c, (batch, length) = self.config, tokens_BT.shape
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        if mask_BTS is None:
            causal_TT = jnp.tril(jnp.ones((length, length), bool))
            mask_BTS = jnp.broadcast_to(causal_TT[None], (batch, length, length))
        asked = length if rows_BN is None else rows_BN.shape[1]
        if cache is not None:  # a few rows might round otherwise than more
            given = (tokens_BT, positions_BT, mask_BTS, rows_BN)
            least = -(-self.backend.exact_rows // batch)
            filled = jax.tree.map(lambda x: filled_up(x, 1, least), given)
            tokens_BT, positions_BT, mask_BTS, rows_BN = filled
        if cache is None:
            sin, cos = rope_tables(positions_BT, c.head_dim, c.rope_theta, c.rope_scaling)
        else:  # looked up: the table of all slots is computed once, outside the decoding loop
            slots_S = jnp.arange(cache.slots, dtype=jnp.int32)
            tables = rope_tables(slots_S[None], c.head_dim, c.rope_theta, c.rope_scaling)
            sin, cos = (table[0][positions_BT] for table in tables)
        x_BTD = self._own_rows(self._lookup(tokens_BT, cache is None).astype(self.dtype))
        kv_L = []
        for i, layer in enumerate(self.layers):
            into = cache and ((cache.k_RSH[i], cache.v_RSH[i]), start_B, length)
            rows = rows_BN if i == c.layers - 1 else None
            x_BTD, kv = layer(x_BTD, sin, cos, mask_BTS, into, rows)
            x_BTD = self._own_rows(x_BTD)
            kv_L.append(kv)
        if cache is not None:
            cache = Cache(*(tuple(column) for column in zip(*kv_L, strict=True)))
        return rms_norm(x_BTD, self.norm, c.norm_eps)[:, :asked], cache

    def _own_rows(self, x_BTD: jax.Array) -> jax.Array:
        if self.mesh is None:
            return x_BTD
        return jax.lax.with_sharding_constraint(x_BTD, batch_sharding(self.mesh))

    def _lookup(self, tokens_BT: jax.Array, differentiable: bool) -> jax.Array:
        if self.mesh is not None:
            # Else the gradient of all rows would be gathered where a column of the table lives.
            whole = NamedSharding(self.mesh, P(RULES['vocab']))
            return jax.lax.with_sharding_constraint(self.embed, whole)[tokens_BT]
        as_bits = self.backend.bfloat16_as_bits and self.embed.dtype == jnp.bfloat16
        if differentiable or not as_bits:
            return self.embed[tokens_BT]
        bits_VD = jax.lax.bitcast_convert_type(self.embed, jnp.uint16)
        return jax.lax.bitcast_convert_type(bits_VD[tokens_BT], jnp.bfloat16)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Vocabulary scores of the given hidden states, float32 `[B, T, V]`."""
        table_VD = self.embed if self.config.tied else self.head
        asked, hidden_BTD = hidden_BTD.shape[1], hidden_BTD.astype(jnp.float32)
        filled_BTD = filled_up(hidden_BTD, 1, -(-self.backend.exact_rows // len(hidden_BTD)))
        how = (self.products, 'OI', self.backend, self.outputs_first)
        return linear(filled_BTD, table_VD, *how)[:, :asked]


def _boxed_params(model: Llama, key: jax.Array) -> dict:
    """Fresh parameters, each in a box with the names of its axes."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))['params']


def init_params(model: Llama, key: jax.Array) -> dict:
    """Fresh parameters as a plain nested dict."""
    return nn.unbox(_boxed_params(model, key))


def param_axes(config: LlamaConfig) -> dict:
    """The logical axis names of every parameter, a tree of PartitionSpecs."""
    boxed = jax.eval_shape(partial(_boxed_params, Llama(config)), prng_key(0))
    return nn.get_partition_spec(boxed)


def forward(model: Llama, params: dict, tokens_BT: jax.Array) -> jax.Array:
    """Plain causal forward over whole sequences: float32 logits `[B, T, V]`."""
    hidden_BTD, _ = model.apply({'params': params}, tokens_BT)
    return model.apply({'params': params}, hidden_BTD, method='logits')
