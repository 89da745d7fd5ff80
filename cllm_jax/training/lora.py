"""LoRA (arXiv 2106.09685): of a matrix W only the factors of `W + A B alpha / rank` are trained.

While they are trained they stand next to their matrix among the parameters (`q_a`, `q_b`), and the
model multiplies with them one after the other (`Block._linear`). Tests, and the model that is kept,
have them merged, as PEFT merges them.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cllm_jax.errors import ConfigError, at_least
from cllm_jax.hf.adapter_write import write_adapter
from cllm_jax.runtime.keys import prng_key
from cllm_jax.training.step import Loss

GROUPS = {'mlp': ('gate', 'up', 'down')}
MATRICES = (*'qkvo', *GROUPS['mlp'])


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """An adapter that is trained in place of the model."""

    rank: int = 0
    """Rank of the adapter; 0 trains the whole model."""
    alpha: float | None = None
    """What the factors add is scaled by alpha / rank; twice the rank if not given."""
    targets: str = 'qkvo,mlp'
    """Matrices that have factors: letters of qkvo, and mlp or its gate, up, down, by commas."""

    def __post_init__(self):
        at_least(self, rank=0)
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ConfigError(f'lora.alpha {self.alpha}: must be above 0')
        self.matrices  # noqa: B018  (checks them)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of the matrices that have factors; ConfigError for an unknown one."""
        asked: set[str] = set()
        for name in self.targets.split(','):
            asked |= {name} if name in MATRICES else set(GROUPS.get(name, name or '?'))
        if unknown := sorted(asked - set(MATRICES)):
            rule = 'name letters of qkvo, and mlp, gate, up or down, by commas: qkvo,mlp'
            raise ConfigError(f'lora.targets {self.targets!r}: {unknown[0]!r} is unknown; {rule}')
        return tuple(name for name in MATRICES if name in asked)

    @property
    def scaled(self) -> float:
        """The alpha that is meant."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        return self.scaled / self.rank


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Factors that were trained, to be written for PEFT."""

    factors: Any
    config: LoraConfig
    base: str
    """What the model is called that they change."""

    def write(self, directory: Path) -> None:
        """Write them as PEFT reads them; raises DataError if they cannot be written."""
        write_adapter(directory, self.factors, self.config.rank, self.config.scaled, self.base)


def new_factors(config: LoraConfig, params: Any, key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Factors that change nothing yet: A at random as PEFT draws it, B zero; float32.

    Args:
      params: the model's, or their shapes.
    """
    factors = {}
    for layer in filter(lambda name: name.startswith('layers_'), params):
        factors[layer] = {}
        for name in config.matrices:
            key, own = jax.random.split(key)
            inputs, outputs = _sizes(name, params[layer][name].shape)
            bound = inputs**-0.5
            shape = inputs, config.rank
            a = jax.random.uniform(own, shape, minval=-bound, maxval=bound)
            factors[layer] |= {f'{name}_a': a, f'{name}_b': jnp.zeros((config.rank, outputs))}
    return factors


def _sizes(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """How many inputs and outputs a matrix has, whose axes may be several for each."""
    cut = len(shape) - 1 if name == 'o' else 1
    return math.prod(shape[:cut]), math.prod(shape[cut:])


def factor_axes(factors: Any) -> Any:
    """Every device has all of them: they are small."""
    return jax.tree.map(lambda leaf: PartitionSpec(*[None] * leaf.ndim), factors)


def joined(config: LoraConfig, params: Any, factors: Mapping) -> dict:
    """The parameters with the factors next to their matrices, as the model computes with them."""

    def as_used(name: str, factor: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return (factor * config.scale if name.endswith('_b') else factor).astype(dtype)

    both = dict(params)
    for layer, own in factors.items():
        matrices = params[layer]
        both[layer] = matrices | {n: as_used(n, f, matrices[n[:-2]].dtype) for n, f in own.items()}
    return both


@partial(jax.jit, static_argnums=0)
def merged(config: LoraConfig, params: Any, factors: Mapping) -> dict:
    """The parameters of the whole model that the factors make, added up in float32."""
    whole = dict(params)
    for layer, own in factors.items():
        whole[layer] = dict(params[layer])
        for name in config.matrices:
            w = params[layer][name]
            product = jnp.matmul(own[f'{name}_a'], own[f'{name}_b'], precision='highest')
            delta = config.scale * product.reshape(w.shape)
            whole[layer][name] = (w.astype(jnp.float32) + delta).astype(w.dtype)
    return whole


def adapted(loss: Loss, config: LoraConfig) -> Loss:
    """The loss of a model as one of its factors; what it reads without training is the model."""

    def of_factors(factors, frozen, batch, totals):
        return loss(joined(config, frozen, factors), frozen, batch, totals)

    return of_factors


def first_factors(config: LoraConfig, params: Any, seed: int) -> Any:
    """The factors with which a run begins."""
    return jax.jit(lambda key: new_factors(config, params, key))(prng_key(seed))
