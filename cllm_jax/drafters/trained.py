"""What trained drafters share: the target's tables, its last hidden state, and ranked guesses."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from cllm_jax.decoding.drafter import Sequences, Verdict
from cllm_jax.decoding.sampling import Sampling, gumbel
from cllm_jax.hf.load import Model


@struct.dataclass
class HeadWeights:
    """The weights of a trained drafter, and what it borrows from the target."""

    own: Any
    embed_VD: jax.Array
    head_VD: jax.Array
    """The target's output table; the embedding where they are tied."""


@struct.dataclass
class LastHidden:
    """The target's hidden state at the last cached token, where the pending one was chosen."""

    hidden_BD: jax.Array
    known_B: jax.Array
    """False before the first forward."""


def borrow(model: Model, own: Any) -> HeadWeights:
    """A drafter's weights beside the tables of `model`."""
    params = model.params
    return HeadWeights(own, params['embed'], params.get('head', params['embed']))


def unknown(weights: HeadWeights, sequences: Sequences) -> LastHidden:
    """The state before the first forward."""
    rows, width = len(sequences.length_B), weights.embed_VD.shape[1]
    return LastHidden(jnp.zeros((rows, width)), jnp.zeros(rows, bool))


def last_of(verdict: Verdict) -> jax.Array:
    """The node behind which the new pending token was chosen, int32 `[B, 1]`."""
    at_B1 = jnp.maximum(verdict.count_B - 1, 0)[:, None]
    return jnp.take_along_axis(verdict.path_BP, at_B1, axis=1)


def follow(state: LastHidden, verdict: Verdict) -> LastHidden:
    """The state after a verification; that of a finished row is of no use any more."""
    at_B11 = last_of(verdict)[:, :, None]
    hidden_BD = jnp.take_along_axis(verdict.hidden_BND, at_B11, axis=1)[:, 0]
    return LastHidden(hidden_BD.astype(jnp.float32), jnp.ones_like(state.known_B))


def perturbed(
    logits_BTV: jax.Array, sequences: Sequences, ahead_T: jax.Array, sampling: Sampling
) -> jax.Array:
    """A drafter's logits for the tokens `ahead` of the pending one, as the target will choose.

    With the noise of their positions the best guess is the one that the target is most likely to
    choose (`decoding/sampling.py`). At temperature 0 they stay as they are.
    """
    if sampling.temperature == 0:
        return logits_BTV
    positions_BT = sequences.length_B[:, None] + ahead_T[None]
    noise_BTV = gumbel(sequences.keys_B, positions_BT, logits_BTV.shape[-1])
    return logits_BTV / sampling.temperature + noise_BTV


def normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Random weights with the usual spread, `fan_in ** -0.5`."""
    return jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5
