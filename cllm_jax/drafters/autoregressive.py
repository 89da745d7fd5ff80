"""Autoregressive decoding: the loop with nothing but the pending token to verify."""

import jax.numpy as jnp
from flax import struct

from cllm_jax.decoding.drafter import Draft, Drafter


@struct.dataclass
class AutoRegressive(Drafter):
    """One token per forward. The baseline of every speed-up, in the same compiled loop."""

    title = 'AR'

    @property
    def nodes(self) -> int:
        return 1

    def draft(self, state, sequences, sampling):
        tokens_B1 = sequences.window(1)
        return Draft(tokens_B1, jnp.ones_like(tokens_B1, bool)), state
