"""Autoregressive decoding: the loop with nothing but the pending token to verify."""

from flax import struct

from cllm_jax.decoding.drafter import Draft, Drafter


@struct.dataclass
class AutoRegressive(Drafter):
    """One token per forward. The baseline of every speed-up, in the same compiled loop."""

    title, nodes = 'AR', 1

    def draft(self, state, sequences, sampling):
        return Draft.chain(sequences.window(1)), state
