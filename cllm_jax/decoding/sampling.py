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

COLDEST, HOTTEST = 1e-6, 1e38
"""Below, logits divided by the temperature could overflow float32; above, the temperature."""
LARGEST_K = 2**31 - 1
REAL = int | float | np.integer | np.floating


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; `temperature` 0 is greedy and needs no noise.

    A pytree whose numbers are its leaves: what is computed is static, and there are few kinds of
    it (`greedy`, `truncates`, `lossy`), so that a thousand temperatures share one compilation.
    """

    temperature: float = 0.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens with at least this probability."""
    typical: float = 0.0
    """LOSSY: also accept drafted tokens that are likely enough, with this epsilon; 0 is exact."""

    def __post_init__(self):
        for name in ('temperature', 'top_p', 'typical'):
            if not isinstance(value := getattr(self, name), REAL):
                raise ConfigError(f'{name} {value!r}: must be a number')
            object.__setattr__(self, name, float(value))
        if self.temperature and not COLDEST <= self.temperature < HOTTEST:
            rule = f'must be 0 (greedy), or at least {COLDEST} and below {HOTTEST:g}'
            raise ConfigError(f'temperature {self.temperature}: {rule}')
        if not isinstance(self.top_k, int | np.integer) or self.top_k < 0:
            raise ConfigError(f'top_k {self.top_k}: must be 0 (off) or the number of tokens kept')
        if not 0 < self.top_p <= 1:
            raise ConfigError(f'top_p {self.top_p}: must be in (0, 1]; 1 keeps every token')
        if not 0 <= self.typical < 1:
            raise ConfigError(f'typical {self.typical}: must be in [0, 1); 0 is exact')
        if self.typical and not self.temperature:
            raise ConfigError(f'typical {self.typical}: is a rule of sampling; set a temperature')
        object.__setattr__(self, 'top_k', min(int(self.top_k), LARGEST_K))
        truncates = bool(self.temperature) and (self.top_k > 0 or self.top_p < 1)
        self._fix(not self.temperature, truncates, self.typical > 0)

    def _fix(self, greedy: bool, truncates: bool, lossy: bool) -> None:
        """Note what is computed: known while a program is traced, when the numbers are not."""
        for name, value in (('greedy', greedy), ('truncates', truncates), ('lossy', lossy)):
            object.__setattr__(self, name, value)

    def tree_flatten(self):
        numbers = tuple(getattr(self, field.name) for field in dataclasses.fields(self))
        return numbers, (self.greedy, self.truncates, self.lossy)

    @classmethod
    def tree_unflatten(cls, computed, numbers):
        new = object.__new__(cls)
        for field, number in zip(dataclasses.fields(cls), numbers, strict=True):
            object.__setattr__(new, field.name, number)
        new._fix(*computed)
        return new


def gumbel(keys_B: jax.Array, positions_BT: jax.Array, vocab: int) -> jax.Array:
    """Gumbel noise `[B, T, V]` that depends only on the row's key and the absolute position."""

    def one(key, position):
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab,), jnp.float32)

    return jax.vmap(jax.vmap(one, (None, 0)))(keys_B, positions_BT)


def truncate(logits_BTV: jax.Array, sampling: Sampling) -> jax.Array:
    """Set the logits outside top-k and then top-p to -inf. Ties at the border are kept."""
    one, never = jnp.ones_like(logits_BTV), jnp.float32(jnp.inf)
    top_k, top_p = (jnp.asarray(x, jnp.float32) for x in (sampling.top_k, sampling.top_p))
    logits_BTV = _most_likely(logits_BTV, one, jnp.where(top_k > 0, top_k, never))
    p_BTV = jax.nn.softmax(logits_BTV, axis=-1)
    # A top_p that is 0 in float32 keeps one token, too.
    enough = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny)
    return _most_likely(logits_BTV, p_BTV, jnp.where(top_p < 1, enough, never))


def _most_likely(logits_BTV: jax.Array, weight_BTV: jax.Array, enough: jax.Array) -> jax.Array:
    """The fewest of the largest logits whose weights add up to `enough`, the others -inf.

    All are kept where the weights do not add up to so much, as to infinity. The smallest that is
    kept is found bit by bit, in 32 sums: sorting a large vocabulary takes longer, and a size that
    is known only when the program runs could not be given to `lax.top_k`.
    """
    sign = jnp.uint32(1 << 31)
    bits_BTV = jnp.where(logits_BTV == 0, 0.0, logits_BTV).view(jnp.uint32)
    rank_BTV = jnp.where(bits_BTV >= sign, ~bits_BTV, bits_BTV | sign)  # in the order of the logits

    def try_bit(i, border_BT1):
        higher_BT1 = border_BT1 | (sign >> i.astype(jnp.uint32))
        kept_BTV = jnp.where(rank_BTV >= higher_BT1, weight_BTV, 0.0)
        is_enough_BT1 = kept_BTV.sum(axis=-1, keepdims=True) >= enough
        return jnp.where(is_enough_BT1, higher_BT1, border_BT1)

    border_BT1 = jnp.zeros_like(rank_BTV[..., :1])
    bits = jnp.where(jnp.isfinite(enough), jnp.int32(32), 0)
    border_BT1 = jax.lax.fori_loop(jnp.int32(0), bits, try_bit, border_BT1)
    return jnp.where(rank_BTV >= border_BT1, logits_BTV, -jnp.inf)


def heated(logits_BTV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of the distribution that tokens are drawn from, for a temperature above 0."""
    logits_BTV = logits_BTV / sampling.temperature
    return truncate(logits_BTV, sampling) if sampling.truncates else logits_BTV


def choose(
    logits_BTV: jax.Array, keys_B: jax.Array, positions_BT: jax.Array, sampling: Sampling
) -> jax.Array:
    """The token for each absolute position (prompt included), int32 `[B, T]`; see `scores`."""
    scores_BTV = scores(logits_BTV, keys_B, positions_BT, sampling)
    return jax.lax.argmax(scores_BTV, scores_BTV.ndim - 1, jnp.int32)


def scores(
    logits_BTV: jax.Array, keys_B: jax.Array, positions_BT: jax.Array, sampling: Sampling
) -> jax.Array:
    """Of which the largest is chosen: the logits, for a temperature divided by it, and the noise.

    Args:
      logits_BTV: float32 scores for the tokens at `positions_BT`.
      keys_B: one PRNG key per row.
    """
    if sampling.greedy:
        return logits_BTV
    return heated(logits_BTV, sampling) + gumbel(keys_B, positions_BT, logits_BTV.shape[-1])


def likely_enough(logits_BTV: jax.Array, tokens_BT: jax.Array, sampling: Sampling) -> jax.Array:
    """Typical acceptance of Medusa (arXiv 2401.10774, section 2.3.1), bool `[B, T]`.

    A token is taken, whatever would have been chosen, if its probability is above
    `min(eps, sqrt(eps) exp(-H))`, H being the entropy of the choice. Answers then do not follow the
    model's distribution.
    """
    logp_BTV = jax.nn.log_softmax(heated(logits_BTV, sampling))
    p_BTV = jnp.exp(logp_BTV)
    entropy_BT = -jnp.where(p_BTV > 0, p_BTV * logp_BTV, 0.0).sum(axis=-1)
    border_BT = jnp.minimum(sampling.typical, jnp.sqrt(sampling.typical) * jnp.exp(-entropy_BT))
    return jnp.take_along_axis(p_BTV, tokens_BT[..., None], axis=-1)[..., 0] > border_BT
