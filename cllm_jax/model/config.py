"""The sizes and switches of a LLaMA-family model, and what they may be."""

import dataclasses
import math
import reprlib
from typing import Literal

from cllm_jax.errors import ConfigError

Family = Literal['llama', 'mistral', 'qwen2', 'qwen3']
LARGEST = {'layers': 1 << 10} | dict.fromkeys(
    ('vocab_size', 'dim', 'heads', 'kv_heads', 'head_dim', 'mlp_dim', 'max_positions'), 1 << 24
)
"""The sizes of a model, and how large each may be."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched: `linear`, or the smooth `llama3` rule.

    The last three fields belong to `llama3` (LLaMA 3.1 model card): wavelengths shorter than
    `original_positions / high_freq_factor` stay, those longer than
    `original_positions / low_freq_factor` are divided by `factor`, with a ramp between.
    """

    kind: Literal['linear', 'llama3']
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self):
        low, high = self.low_freq_factor, self.high_freq_factor
        if not all(0 < x < math.inf for x in (self.factor, low, high, self.original_positions)):
            raise ConfigError(f'{self}: every number must be positive and finite; correct it')
        if low >= high:
            rule = 'the first must be smaller; LLaMA 3.1 has 1 and 4'
            raise ConfigError(f'low_freq_factor {low} and high_freq_factor {high}: {rule}')


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and switches of one model. Hashable, so it can be a static argument of `jax.jit`."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    """The output projection is the embedding table."""
    qkv_bias: bool = False
    """Biases on q, k, v (Qwen2)."""
    o_bias: bool = dataclasses.field(default=False, repr=False)
    """A bias on o, besides those on q, k, v (LLaMA and Qwen3 with `attention_bias`)."""
    mlp_bias: bool = dataclasses.field(default=False, repr=False)
    """Biases on gate, up, down (LLaMA). Both are absent from the repr, of which older fingerprints
    of models are made; the parameters tell."""
    qk_norm: bool = False
    """RMS norm on each head of q and k (Qwen3)."""
    max_positions: int = 4096
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    family: Family = 'llama'

    def __post_init__(self):
        for field, most in LARGEST.items():
            size = getattr(self, field)
            if type(size) is not int or not 1 <= size <= most:
                raise ConfigError(
                    f'{field} = {reprlib.repr(size)}; choose a whole number from 1 to {most}'
                )
        if ends := [i for i in self.eos_ids if not 0 <= i < self.vocab_size]:
            rule = f'outside the vocabulary 0..{self.vocab_size - 1}, so no answer ends with it'
            raise ConfigError(f'eos_token_id {ends[0]}: {rule}; correct it, or leave it out')
        for field in ('rope_theta', 'norm_eps'):
            if not 0 < getattr(self, field) < math.inf:
                raise ConfigError(f'{field} = {getattr(self, field)}; choose a positive number')
        if self.heads % self.kv_heads:
            rule = 'the first must be a multiple of the second; choose kv_heads that divides heads'
            raise ConfigError(f'{self.heads} query heads over {self.kv_heads} kv heads: {rule}')
        if self.head_dim % 2:
            rule = 'choose an even number, rotation needs pairs'
            raise ConfigError(f'head_dim {self.head_dim}; {rule}')

    @property
    def parameters(self) -> int:
        """Number of weights, embeddings included."""
        attention = self.dim * self.head_dim * 2 * (self.heads + self.kv_heads)
        bias = self.qkv_bias * self.head_dim * (self.heads + 2 * self.kv_heads)
        bias += self.o_bias * self.dim + self.mlp_bias * (2 * self.mlp_dim + self.dim)
        norms = 2 * self.dim + self.qk_norm * 2 * self.head_dim
        block = attention + bias + 3 * self.dim * self.mlp_dim + norms
        return self.layers * block + (2 - self.tied) * self.vocab_size * self.dim + self.dim

    @property
    def cache_values(self) -> int:
        """Numbers the KV cache holds per token."""
        return 2 * self.layers * self.kv_heads * self.head_dim
