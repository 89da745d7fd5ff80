"""What a drafter proposes and what it learns of the target's verdict.

A draft is a chain or a tree of N nodes. Node 0 is the pending token: already committed, not yet in
the KV cache. In a chain node i+1 follows node i; in a tree each node says which one it follows. The
target's own choice after node i is `y[i]`; a node is accepted when all it follows are and its token
equals the `y` of the one before it. Whatever is drafted, the committed tokens are the target's
choices along the longest accepted path, so a drafter can change how many forwards an answer takes
and never the answer.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Draft:
    """N proposed tokens per row; `valid_BN` is False for nodes that must not be accepted."""

    tokens_BN: jax.Array
    valid_BN: jax.Array
    parent_BN: jax.Array | None = None
    """For a tree: the node that each follows, of a smaller number; -1 for node 0."""
    depth: int = struct.field(pytree_node=False, default=0)
    """For a tree: the most steps from node 0 to any other."""


@struct.dataclass
class Verdict:
    """What the target said about a draft. P is N for a chain, else `depth + 1`."""

    y_BN: jax.Array
    """The target's choice after each node."""
    logits_BNV: jax.Array
    """Its scores there."""
    hidden_BND: jax.Array
    """The target's last hidden state (behind the final norm) at each node."""
    path_BP: jax.Array
    """The nodes of the accepted path, the pending token first."""
    count_B: jax.Array
    """Tokens committed: as many of the path's nodes entered the cache. 0 for a finished row."""
    prompt_BTD: jax.Array | None = None
    """After the prefill alone, for drafters with a true `reads_prompt`: the hidden states of the
    whole prompt, its last token being the pending one, and of what the draft has behind it."""


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
    prompt_width: int = struct.field(pytree_node=False)
    """Columns that the longest prompt may take."""

    def window(self, width: int) -> jax.Array:
        """Tokens from the pending one on, `[B, width]`; only the first is committed."""
        return windows(self.tokens_BS, self.length_B, width)


class Drafter(Protocol):
    """A frozen dataclass, so that it can be a static argument of `jax.jit`.

    `weights` is the drafter's own pytree (empty for the training-free ones) and `state` whatever
    it carries from one iteration to the next: arrays with a row per prompt first, or a `Cache`.
    """

    @property
    def nodes(self) -> int:
        """N, the static number of tokens verified per forward."""

    def init(self, weights: Any, sequences: Sequences) -> Any:
        """State before the first forward, when the last token of the prompt is pending."""

    def draft(self, weights: Any, state: Any, sequences: Sequences) -> tuple[Draft, Any]:
        """Propose N nodes; node 0 is the pending token."""

    def update(
        self, weights: Any, state: Any, draft: Draft, verdict: Verdict, sequences: Sequences
    ) -> Any:
        """Learn from the verification; `sequences` is as it was when `draft` was made."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A drafter that has weights, with them."""

    drafter: Drafter
    weights: Any


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
