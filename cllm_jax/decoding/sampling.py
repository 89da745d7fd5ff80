"""The target's choice of a token, greedy or sampled, as a function of position.

Noise belongs to a position, not to a forward: `y = argmax(logits / T + gumbel(key, position))`.
By the Gumbel-max trick each choice follows the softmax exactly, and since the noise of a position
is always the same, sampling has a fixed point as greedy decoding has: every drafter returns the
tokens of autoregressive decoding with the same key (compare arXiv 2408.07978).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cllm_jax.errors import ConfigError

COLDEST = 1e-6
"""Below, logits divided by the temperature could overflow float32."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; `temperature` 0 is greedy and needs no noise."""

    temperature: float = 0.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens with at least this probability."""
    typical: float = 0.0
    """LOSSY: also accept drafted tokens that are likely enough, with this epsilon; 0 is exact."""

    def __post_init__(self):
        for name in ('temperature', 'top_p', 'typical'):
            if not isinstance(value := getattr(self, name), int | float | np.number):
                raise ConfigError(f'{name} {value!r}: must be a number')
        if self.temperature and not COLDEST <= self.temperature < float('inf'):
            rule = f'must be 0 (greedy) or at least {COLDEST}'
            raise ConfigError(f'temperature {self.temperature}: {rule}')
        if not isinstance(self.top_k, int | np.integer) or self.top_k < 0:
            raise ConfigError(f'top_k {self.top_k}: must be 0 (off) or the number of tokens kept')
        if not 0 < self.top_p <= 1:
            raise ConfigError(f'top_p {self.top_p}: must be in (0, 1]; 1 keeps every token')
        if not 0 <= self.typical < 1:
            raise ConfigError(f'typical {self.typical}: must be in [0, 1); 0 is exact')
        if self.typical and not self.temperature:
            raise ConfigError(f'typical {self.typical}: is a rule of sampling; set a temperature')


def gumbel(keys_B: jax.Array, positions_BT: jax.Array, vocab: int) -> jax.Array:
    """Gumbel noise `[B, T, V]` that depends only on the row's key and the absolute position."""

    def one(key, position):
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab,), jnp.float32)

    return jax.vmap(jax.vmap(one, (None, 0)))(keys_B, positions_BT)


def truncate(logits_BTV: jax.Array, sampling: Sampling) -> jax.Array:
    """Set the logits outside top-k and top-p to -inf. Ties at the border are kept."""
    vocab = logits_BTV.shape[-1]
    if 0 < sampling.top_k < vocab:
        border = jax.lax.top_k(logits_BTV, sampling.top_k)[0][..., -1:]
        logits_BTV = jnp.where(logits_BTV >= border, logits_BTV, -jnp.inf)
    if sampling.top_p < 1:
        sorted_BTV = jnp.sort(logits_BTV, axis=-1, descending=True)
        p_BTV = jax.nn.softmax(sorted_BTV, axis=-1)
        before_BTV = jnp.cumsum(p_BTV, axis=-1) - p_BTV
        count_BT = (before_BTV < sampling.top_p).sum(axis=-1, keepdims=True, dtype=jnp.int32)
        last_BT = jnp.maximum(count_BT - 1, 0)  # a top_p that is 0 in float32 counts none
        border = jnp.take_along_axis(sorted_BTV, last_BT, axis=-1)
        logits_BTV = jnp.where(logits_BTV >= border, logits_BTV, -jnp.inf)
    return logits_BTV


def choose(
    logits_BTV: jax.Array, keys_B: jax.Array, positions_BT: jax.Array, sampling: Sampling
) -> jax.Array:
    """The token for each absolute position (prompt included), int32 `[B, T]`.

    Args:
      logits_BTV: float32 scores for the tokens at `positions_BT`.
      keys_B: one PRNG key per row.
    """
    if sampling.temperature > 0:
        logits_BTV = truncate(logits_BTV / sampling.temperature, sampling)
        logits_BTV = logits_BTV + gumbel(keys_B, positions_BT, logits_BTV.shape[-1])
    return jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)


def likely_enough(logits_BTV: jax.Array, tokens_BT: jax.Array, sampling: Sampling) -> jax.Array:
    """Typical acceptance of Medusa (arXiv 2401.10774, section 2.3.1), bool `[B, T]`.

    A token is taken, whatever would have been chosen, if its probability is above
    `min(eps, sqrt(eps) exp(-H))`, H being the entropy of the choice. Answers then do not follow the
    model's distribution.
    """
    logp_BTV = jax.nn.log_softmax(truncate(logits_BTV / sampling.temperature, sampling))
    p_BTV = jnp.exp(logp_BTV)
    entropy_BT = -jnp.where(p_BTV > 0, p_BTV * logp_BTV, 0.0).sum(axis=-1)
    border_BT = jnp.minimum(sampling.typical, sampling.typical**0.5 * jnp.exp(-entropy_BT))
    return jnp.take_along_axis(p_BTV, tokens_BT[..., None], axis=-1)[..., 0] > border_BT
