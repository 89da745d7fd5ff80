"""What a drafter is, what it proposes, and what it learns of the target's verdict.

A draft is a chain or a tree of N nodes. Node 0 is the pending token: already committed, not yet in
the KV cache. In a chain node i+1 follows node i; in a tree each node says which one it follows. The
target's own choice after node i is `y[i]`; a node is accepted when all it follows are and its token
equals the `y` of the one before it. The committed tokens are the target's choices along the longest
accepted path: a drafter changes how many forwards an answer takes, never the answer.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cllm_jax.decoding.sampling import Sampling


@struct.dataclass
class Draft:
    """N proposed tokens per row; `valid_BN` is False for nodes that must not be accepted."""

    tokens_BN: jax.Array
    valid_BN: jax.Array
    parent_BN: jax.Array | None = None
    """For a tree: the node that each follows, of a smaller number; -1 for node 0."""
    depth: int = struct.field(pytree_node=False, default=0)
    """For a tree: the most steps from node 0 to any other."""

    @classmethod
    def chain(cls, tokens_BN: jax.Array) -> 'Draft':
        """A chain of which every token may be accepted."""
        return cls(tokens_BN, jnp.ones_like(tokens_BN, bool))

    @classmethod
    def tree(cls, tokens_BN: jax.Array, valid_BN: jax.Array, parent_N: np.ndarray) -> 'Draft':
        """A tree of the same form in every row."""
        depth_N = [0]
        for parent in parent_N[1:]:
            depth_N.append(depth_N[parent] + 1)
        parent_BN = jnp.broadcast_to(jnp.asarray(parent_N)[None], tokens_BN.shape)
        return cls(tokens_BN, jnp.broadcast_to(valid_BN, tokens_BN.shape), parent_BN, max(depth_N))


@struct.dataclass
class Verdict:
    """What the target said about a draft. P is N for a chain, else `depth + 1`."""

    y_BN: jax.Array
    """The target's choice after each node, from the scores `logits` there."""
    logits_BNV: jax.Array
    hidden_BND: jax.Array
    """Its last hidden state (after the final norm) at each node."""
    path_BP: jax.Array
    """The nodes of the accepted path, the pending token first."""
    count_B: jax.Array
    """Tokens committed: as many of the path's nodes entered the cache. 0 for a finished row."""
    prompt_BTD: jax.Array | None = None
    """After the prefill alone, for drafters that set `reads_prompt`: the hidden states of the whole
    prompt, whose last token is the pending one, and of the draft after it."""


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


def setting(default: Any = dataclasses.MISSING) -> Any:
    """A static field of a drafter."""
    return struct.field(pytree_node=False, default=default)


class Drafter(ABC):
    """Proposes tokens; the loop decides. Every drafter is a `flax.struct.dataclass` of this type.

    Its weights, if it has any, are leaves of the pytree; its settings are static (`setting`), so
    that equal settings share a compilation. The state that `init` returns is carried from one
    iteration to the next: arrays with a row per prompt first, or a `Cache`. Everything here runs
    inside `jax.jit`: no Python control flow on values.
    """

    nodes: int
    """N, the tokens verified per forward; a field or a property."""
    title: ClassVar[str] = ''
    """What tables call it; the name of its class if empty."""
    reads_prompt: ClassVar[bool] = False
    """Whether `update` wants the hidden states of the whole prompt (`Verdict.prompt_BTD`)."""
    typical: ClassVar[bool] = False
    """Whether typical acceptance, which is lossy, is defined for it (`Sampling.typical`)."""

    def init(self, sequences: Sequences) -> Any:
        """State before the first forward, when the last token of the prompt is pending."""
        return ()

    @abstractmethod
    def draft(self, state: Any, sequences: Sequences, sampling: Sampling) -> tuple[Draft, Any]:
        """Propose N nodes, of which node 0 is the pending token; and the state.

        A drafter that ranks by its own logits adds the target's noise (`sampling`) of their
        positions, so that it is accepted as far as both choose alike.
        """

    def update(
        self, state: Any, draft: Draft, verdict: Verdict, sequences: Sequences, sampling: Sampling
    ) -> Any:
        """Learn from the verification; `sequences` is as it was when `draft` was made."""
        return state


def windows(buffer_BS: jax.Array, start_B: jax.Array, width: int) -> jax.Array:
    """`buffer[b, start[b] : start[b] + width]` for every row; start + width must fit."""
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (width,)))(buffer_BS, start_B)


def put(
    buffer_BS: jax.Array, start_B: jax.Array, values_BN: jax.Array, keep_BN: jax.Array
) -> jax.Array:
    """Write `values` from `start[b]` on where `keep`; other slots stay. start + N must fit."""
    new_BN = jnp.where(keep_BN, values_BN, windows(buffer_BS, start_B, values_BN.shape[1]))
    write = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
    return write(buffer_BS, new_BN, start_B)
