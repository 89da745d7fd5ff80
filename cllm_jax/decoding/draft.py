"""What a drafter proposes and what the target accepts of it.

A draft is a chain of N nodes. Node 0 is the pending token: already committed, not yet in the KV
cache. Node i+1 follows node i. The target's own choice after node i is `y[i]`; node i+1 is accepted
when its whole chain is and its token equals `y[i]`. Whatever is drafted, the committed tokens are
`y[0..a]`, the target's choices, so a drafter can change how many forwards an answer takes and
never the answer.
"""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Draft:
    """N proposed tokens per row; `valid_BN` is False for nodes that must not be accepted."""

    tokens_BN: jax.Array
    valid_BN: jax.Array


@struct.dataclass
class Sequences:
    """The committed tokens of a batch.

    Slots `0 .. length` of a row are committed: `length` tokens are in the KV cache and the one at
    index `length` is pending. Slots beyond hold no information.
    """

    tokens_BS: jax.Array
    length_B: jax.Array
    prompt_len_B: jax.Array
    keys_B: jax.Array
    """One PRNG key per row, for sampling noise and initial guesses."""

    def window(self, width: int) -> jax.Array:
        """Tokens from the pending one on, `[B, width]`; only the first is committed."""
        return windows(self.tokens_BS, self.length_B, width)


class Drafter(Protocol):
    """A frozen dataclass, so that it can be a static argument of `jax.jit`.

    `weights` is the drafter's own pytree (empty for the training-free ones) and `state` whatever
    it carries from one iteration to the next.
    """

    @property
    def nodes(self) -> int:
        """N, the static number of tokens verified per forward."""

    def init(self, weights: Any, sequences: Sequences) -> Any:
        """State before the first forward, when the last token of the prompt is pending."""

    def draft(self, weights: Any, state: Any, sequences: Sequences) -> tuple[Draft, Any]:
        """Propose N nodes; node 0 is the pending token."""

    def update(
        self, weights: Any, state: Any, draft: Draft, y_BN: jax.Array, sequences: Sequences
    ) -> Any:
        """Learn from the verification; `sequences` is as it was when `draft` was made."""


def windows(buffer_BS: jax.Array, start_B: jax.Array, width: int) -> jax.Array:
    """`buffer[b, start[b] : start[b] + width]` for every row; start + width must fit."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (width,)))(buffer_BS, start_B)


def put(
    buffer_BS: jax.Array, start_B: jax.Array, values_BN: jax.Array, keep_BN: jax.Array
) -> jax.Array:
    """Write `values` from `start[b]` on where `keep`; other slots stay. start + N must fit."""
    old_BN = windows(buffer_BS, start_B, values_BN.shape[1])
    new_BN = jnp.where(keep_BN, values_BN, old_BN)
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(
        buffer_BS, new_BN, start_B
    )


def accepted(draft: Draft, y_BN: jax.Array) -> jax.Array:
    """How many drafted nodes after the pending one are accepted, int32 `[B]`, 0..N-1."""
    match_BN = (draft.tokens_BN[:, 1:] == y_BN[:, :-1]) & draft.valid_BN[:, 1:]
    return jnp.cumprod(match_BN.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
