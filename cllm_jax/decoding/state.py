"""What the decoding loop carries, and how rows of it are taken, replaced and given more room."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from cllm_jax.decoding.drafter import Sequences
from cllm_jax.model.cache import Cache


@struct.dataclass
class Trace:
    """What each of a row's forwards verified: the draft, and the position of its first node."""

    tokens_BIN: jax.Array
    position_BI: jax.Array
    valid_BIN: jax.Array
    parent_BIN: jax.Array | None = None
    """None for chains."""


@struct.dataclass
class DecodeState:
    """Everything the loop carries. A row's forward 0 is its prefill; I is the longest answer."""

    cache: Cache
    sequences: Sequences
    drafter: Any
    """What the drafter carries (`Drafter.init`)."""
    limit_B: jax.Array
    """Sequence length, prompt included, at which a row is full."""
    finished_B: jax.Array
    forwards_B: jax.Array
    """Calls of the model while the row was unfinished, prefill included."""
    emitted_BI: jax.Array
    """Tokens committed by each of the row's forwards; 0 after the last."""
    iteration: jax.Array
    trace: Trace | None

    @property
    def rows(self) -> int:
        return len(self.finished_B)

    @property
    def longest(self) -> int:
        """Slots that any row may need: those of the token buffer."""
        return self.sequences.tokens_BS.shape[1]

    def fits(self, nodes: int) -> jax.Array:
        """Whether the cache has room for the next draft of every unfinished row, bool scalar."""
        end_B = jnp.where(self.finished_B, 0, self.sequences.length_B + nodes)
        return end_B.max() <= self.cache.slots


@partial(jax.jit, static_argnames='slots')
def grow(state: DecodeState, slots: int) -> DecodeState:
    """The same state with a cache of `slots` slots."""
    room = ((0, 0), (0, slots - state.cache.slots), (0, 0))
    return state.replace(cache=jax.tree.map(lambda x_RSH: jnp.pad(x_RSH, room), state.cache))


def part_of(state: DecodeState, rows_R: jax.Array) -> DecodeState:
    """A batch of these rows alone."""

    def take(x):
        return _by_head(x, state.rows)[:, rows_R].reshape(-1, *x.shape[1:]) if x.ndim else x

    return jax.tree.map(take, state)


@partial(jax.jit, donate_argnames='state')
def replace_rows(state: DecodeState, rows_R: jax.Array, fresh: DecodeState) -> DecodeState:
    """Put the rows of `fresh`, a prefill of R prompts, in the place of `rows` of a batch.

    Rows outside of the batch are left out: padding. The cache of `fresh` may be the shorter one.
    `state` is donated.
    """

    def place(old, new):
        if old.ndim == 0:
            return old
        there = (slice(None), rows_R, *(slice(size) for size in new.shape[1:]))
        new_KBX = _by_head(new, len(rows_R))
        return _by_head(old, state.rows).at[there].set(new_KBX, mode='drop').reshape(old.shape)

    return jax.tree.map(place, state, fresh)


def _by_head(x: jax.Array, rows: int) -> jax.Array:
    """`[K, B, ...]`: a cache has a row per head and prompt, heads first; others one per prompt."""
    return x.reshape(-1, rows, *x.shape[1:])
