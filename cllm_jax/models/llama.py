"""The LLaMA-family transformer in Flax Linen: parameters, cache and mask in; hidden states out.

Legend of the shape suffixes used in the whole package:
  B batch            T new tokens        S cache slots     L layers      D model width
  N query heads      K kv heads          H head width      F mlp width   V vocabulary
In decoding also: n block size, N nodes of a draft tree (where no heads are near), I iterations.

Weights are stored as (outputs..., inputs), Hugging Face's own memory order, so import and export
are reshapes. Nothing is hidden in mutable collections: the same call serves training (no cache),
prefill, and the verification of a draft.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from cllm_jax.models.attention import attend, rope_tables, rotate
from cllm_jax.models.cache import Cache, write
from cllm_jax.models.config import LlamaConfig
from cllm_jax.models.linear import linear


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * gain.reshape((1,) * (x.ndim - 1) + gain.shape)


class Block(nn.Module):
    """Attention and gated MLP, each behind an RMS norm and around a residual."""

    config: LlamaConfig
    dtype: jnp.dtype = jnp.float32
    compute: jnp.dtype | None = None

    def _linear(self, x: jax.Array, weight: jax.Array, out: int) -> jax.Array:
        """`[B, T, inputs] -> [B, T, outputs]`; the first `out` axes of the weight are outputs."""
        shape = weight.shape[:out]
        return linear(x, weight.reshape(math.prod(shape), -1), self.compute).reshape(
            *x.shape[:2], *shape
        )

    def _weight(self, name: str, axes: tuple[str, ...], *shape: int) -> jax.Array:
        scale = self.config.dim**-0.5
        if axes[0] == 'embed':  # writes to the residual stream, which 2 L such products add up in
            scale *= (2 * self.config.layers) ** -0.5
        init = nn.with_logical_partitioning(nn.initializers.normal(scale), axes)
        return self.param(name, init, shape, self.dtype)

    def _vector(self, name: str, init: nn.initializers.Initializer, axes, *shape) -> jax.Array:
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.dtype)

    def _qkv(self, x_BTD, sin, cos):
        c, ones, zeros = self.config, nn.initializers.ones, nn.initializers.zeros
        out = {}
        for name, heads, axis in (
            ('q', c.heads, 'heads'),
            ('k', c.kv_heads, 'kv_heads'),
            ('v', c.kv_heads, 'kv_heads'),
        ):
            w = self._weight(name, (axis, 'head', 'embed'), heads, c.head_dim, c.dim)
            y = self._linear(x_BTD, w, 2)
            if c.qkv_bias:
                bias = self._vector(f'{name}_bias', zeros, (axis, 'head'), heads, c.head_dim)
                y = y + bias[None, None]
            if c.qk_norm and name != 'v':
                y = rms_norm(
                    y, self._vector(f'{name}_norm', ones, ('head',), c.head_dim), c.norm_eps
                )
            out[name] = y
        return rotate(out['q'], sin, cos), rotate(out['k'], sin, cos), out['v']

    @nn.compact
    def __call__(self, carry, layer, sin, cos, mask_BTS, start_B):
        c = self.config
        x_BTD, cache = carry
        ones = nn.initializers.ones
        h_BTD = rms_norm(x_BTD, self._vector('attn_norm', ones, ('embed',), c.dim), c.norm_eps)
        q_BTNH, k_BTKH, v_BTKH = self._qkv(h_BTD, sin, cos)
        if cache is None:
            k_BSKH, v_BSKH = k_BTKH, v_BTKH
        else:
            cache = Cache(
                write(cache.k_BLSKH, k_BTKH, layer, start_B),
                write(cache.v_BLSKH, v_BTKH, layer, start_B),
            )
            k_BSKH = jax.lax.dynamic_index_in_dim(cache.k_BLSKH, layer, 1, keepdims=False)
            v_BSKH = jax.lax.dynamic_index_in_dim(cache.v_BLSKH, layer, 1, keepdims=False)
        o_BTNH = attend(q_BTNH, k_BSKH, v_BSKH, mask_BTS)
        o = self._weight('o', ('embed', 'heads', 'head'), c.dim, c.heads, c.head_dim)
        x_BTD = x_BTD + self._linear(o_BTNH.reshape(*x_BTD.shape[:2], -1), o, 1)

        h_BTD = rms_norm(x_BTD, self._vector('mlp_norm', ones, ('embed',), c.dim), c.norm_eps)
        gate = self._weight('gate', ('mlp', 'embed'), c.mlp_dim, c.dim)
        up = self._weight('up', ('mlp', 'embed'), c.mlp_dim, c.dim)
        down = self._weight('down', ('embed', 'mlp'), c.dim, c.mlp_dim)
        h_BTF = nn.silu(self._linear(h_BTD, gate, 1)) * self._linear(h_BTD, up, 1)
        return (x_BTD + self._linear(h_BTF, down, 1), cache), None


class Llama(nn.Module):
    """`apply({'params': p}, tokens, positions, mask, cache, start) -> (hidden_BTD, cache)`.

    A frozen value like its config: two equal modules share one compilation.
    """

    config: LlamaConfig
    dtype: jnp.dtype = jnp.float32
    compute: jnp.dtype | None = None
    """Round the operands of matrix products to this dtype (mixed precision)."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""
    unroll: int = 1
    """Layers per iteration of the layer loop; `config.layers` removes the loop."""

    def setup(self):
        c, normal = self.config, nn.initializers.normal(0.02)
        table = nn.with_logical_partitioning(normal, ('vocab', 'embed'))
        self.embed = self.param('embed', table, (c.vocab_size, c.dim), self.dtype)
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        self.blocks = nn.scan(
            block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.layers,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )(c, self.dtype, self.compute)
        ones = nn.with_logical_partitioning(nn.initializers.ones, ('embed',))
        self.norm = self.param('norm', ones, (c.dim,), self.dtype)
        if not c.tied:
            self.head = self.param('head', table, (c.vocab_size, c.dim), self.dtype)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        mask_BTS: jax.Array | None = None,
        cache: Cache | None = None,
        start_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states after the final norm, and the cache with the new rows written.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: int32 rotary positions; 0..T-1 if absent.
          mask_BTS: True where a query may look; S is T without a cache, else the cache slots,
            the new tokens among them. Plain causal (positions absent) if absent.
          cache: keys and values so far, or None to attend among the new tokens only.
          start_B: slot at which each row's new keys go; needed with a cache.
        """
        c, (batch, length) = self.config, tokens_BT.shape
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
        if mask_BTS is None:
            mask_BTS = jnp.broadcast_to(
                jnp.tril(jnp.ones((length, length), bool))[None], (batch, length, length)
            )
        sin, cos = rope_tables(positions_BT, c.head_dim, c.rope_theta, c.rope_scaling)
        x_BTD = self.embed[tokens_BT]
        layers = jnp.arange(c.layers)
        (x_BTD, cache), _ = self.blocks((x_BTD, cache), layers, sin, cos, mask_BTS, start_B)
        return rms_norm(x_BTD, self.norm, c.norm_eps), cache

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Vocabulary scores of the given hidden states, float32 `[B, T, V]`."""
        table_VD = self.embed if self.config.tied else self.head
        hidden_BTD = hidden_BTD.astype(jnp.float32)
        compute = self.dtype if self.compute is None else self.compute
        return linear(hidden_BTD, table_VD, compute)


def init_params(model: Llama, key: jax.Array) -> dict:
    """Fresh parameters as a plain nested dict; the partitioning boxes are stripped at once."""
    tokens = jnp.zeros((1, 1), jnp.int32)

    def both(module, tokens_BT):
        return module.logits(module(tokens_BT)[0])

    return nn.unbox(model.init(key, tokens, method=both))['params']


def forward(model: Llama, params: dict, tokens_BT: jax.Array) -> jax.Array:
    """Plain causal forward over whole sequences: float32 logits `[B, T, V]`."""
    hidden_BTD, _ = model.apply({'params': params}, tokens_BT)
    return model.apply({'params': params}, hidden_BTD, method='logits')
