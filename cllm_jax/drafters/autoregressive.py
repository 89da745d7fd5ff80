"""Autoregressive decoding: the loop with nothing but the pending token to verify."""

import dataclasses

import jax.numpy as jnp

from cllm_jax.decoding.drafter import Draft


@dataclasses.dataclass(frozen=True)
class AutoRegressive:
    """One token per forward. The baseline of every speed-up, in the same compiled loop."""

    @property
    def nodes(self) -> int:
        return 1

    def init(self, weights, sequences):
        return ()

    def draft(self, weights, state, sequences):
        tokens_B1 = sequences.window(1)
        return Draft(tokens_B1, jnp.ones_like(tokens_B1, bool)), state

    def update(self, weights, state, draft, verdict, sequences):
        return state
