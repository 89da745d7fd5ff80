"""SPACE (arXiv 2402.11809): mask tokens guess what comes next, in the forward that verifies.

The model itself is fine-tuned to read a row of mask tokens as "what will stand behind here?". Every
forward verifies the guesses so far, with a group of masks behind each: whichever guess turns out to
be the last right one, the masks behind it have already drafted what follows.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cllm_jax.decoding.drafter import Draft
from cllm_jax.drafters.trained import last_of
from cllm_jax.errors import ConfigError, at_least


@struct.dataclass
class Masked:
    """What the masks behind the last accepted token said."""

    guess_BM: jax.Array
    known_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Space:
    """`masks` guesses per forward, of a model trained with `mask_id` (`objective: space`)."""

    mask_id: int
    masks: int = 3

    def __post_init__(self):
        at_least(self, masks=1)
        if self.mask_id < 0:
            raise ConfigError(f'mask_id {self.mask_id}: must be a token id')

    @property
    def nodes(self) -> int:
        return (self.masks + 1) ** 2

    def init(self, weights, sequences):
        rows = len(sequences.length_B)
        return Masked(jnp.zeros((rows, self.masks), jnp.int32), jnp.zeros(rows, bool))

    def draft(self, weights, state, sequences):
        chain_BN = jnp.concatenate([sequences.window(1), state.guess_BM], axis=1)
        rows, others = len(chain_BN), self.nodes - self.masks - 1
        masks_BN = jnp.full((rows, others), self.mask_id, jnp.int32)
        tokens_BN = jnp.concatenate([chain_BN, masks_BN], axis=1)
        here_1N = jnp.arange(self.nodes)[None]
        valid_BN = state.known_B[:, None] & (here_1N <= self.masks)
        parent_BN = jnp.broadcast_to(jnp.asarray(self._parents())[None], tokens_BN.shape)
        return Draft(tokens_BN, valid_BN, parent_BN, 2 * self.masks), state

    def update(self, weights, state, draft, verdict, sequences):
        # The first mask behind the last accepted node stands where the new pending token is.
        first_B1 = self.masks + 1 + last_of(verdict) * self.masks
        at_BM = first_B1 + jnp.arange(self.masks, dtype=jnp.int32)[None]
        guess_BM = jnp.take_along_axis(verdict.y_BN, at_BM, axis=1)
        return Masked(guess_BM, jnp.ones_like(state.known_B))

    def _parents(self) -> np.ndarray:
        """A chain of guesses, and behind each node of it a chain of masks."""
        count = self.masks
        groups = np.arange(self.nodes - count - 1).reshape(count + 1, count) + count
        groups[:, 0] = np.arange(count + 1)
        return np.concatenate([np.arange(count + 1) - 1, groups.ravel()]).astype(np.int32)
