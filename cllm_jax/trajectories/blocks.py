"""The Jacobi trajectories of all blocks of an answer at once, when the answer is known.

The block schedule waits: a block begins with a token that the model says only when the block before
it has converged. An answer that has been found already, at a fraction of the cost, says where every
block begins and what it converges to. So all blocks start from their random guesses together, each
after the true tokens, and one forward verifies a window of each. The states and the forwards of
each block are those of decoding with `Jacobi(n, 'block')`; in low precision a guess may differ
where two scores are next to equal, the fixed point never does.

What has converged is in the cache, what the model says after it is known, and what it says after
the last guess belongs to the next block. So a forward computes only the guesses between them, those
of the slowest block, in a few sizes: half of what decoding would compute.

M is blocks, and W tokens of a block's window.
"""

import dataclasses
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from cllm_jax.decoding.drafter import Sequences
from cllm_jax.decoding.sampling import Sampling, choose
from cllm_jax.drafters.jacobi import initial_guesses
from cllm_jax.model.cache import Cache, with_room
from cllm_jax.model.llama import Llama, take_rows

SIZES = 7
"""Sizes of the window; each is a copy of the loop to compile."""


@struct.dataclass
class Blocks:
    """What stays the same while the blocks of some answers are followed."""

    model: Llama = struct.field(pytree_node=False)
    params: Any
    keys_B: jax.Array
    begin_BM: jax.Array
    """Position of each block's first token."""
    end_BM: jax.Array
    """Offset at which it is done; what is 0 or less is after the answer."""
    truth_BMn: jax.Array
    """Its fixed point."""
    answers: int = struct.field(pytree_node=False)
    """Slots of the cache that hold the answers; windows are after them."""

    @property
    def block(self) -> int:
        return self.truth_BMn.shape[2]


@struct.dataclass
class BlocksState:
    """What the loop carries."""

    cache: Cache
    """The answers' own keys and values, followed by room for the windows."""
    guess_BMn: jax.Array
    at_BM: jax.Array
    """A block's first `at + 1` tokens are right; the next forward says one more, or more."""
    forwards_BM: jax.Array
    state_IBMn: jax.Array
    """The guesses before each forward."""


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Static sizes of `follow`: tokens per block, and blocks that are followed together."""

    block: int
    blocks: int
    slots: int
    """Slots of the cache that are needed: those of the longest answer."""


def follow(
    model: Llama,
    params: Any,
    sequences: Sequences,
    cache: Cache,
    first: jax.Array,
    sizes: BlockSizes,
) -> tuple[jax.Array, jax.Array]:
    """The states of blocks `first .. first + blocks` of each answer, and how many there are.

    Args:
      sequences: prompts and answers; the last token of an answer is the pending one.
      cache: their keys and values.
      first: int32. An answer may end before the last block.

    Returns:
      `state_IBMn`, the blocks before each forward (I = n, the most that a block can take), and
      `forwards_BM`, of which the first so many hold something. The fixed point is not among them.
    """
    block, answers = sizes.block, min(sizes.slots, cache.slots)
    tokens_BS, offset_11n = sequences.tokens_BS, _steps(block)
    number_1M = (first + jnp.arange(sizes.blocks, dtype=jnp.int32))[None]
    begin_BM = sequences.prompt_len_B[:, None] + number_1M * block
    at_BX = _flat(jnp.minimum(begin_BM[..., None] + offset_11n, tokens_BS.shape[1] - 1))
    truth_BMn, guess_BMn = (
        take_rows(source_BS, at_BX).reshape(*begin_BM.shape, block)
        for source_BS in (tokens_BS, initial_guesses(sequences))
    )
    # A block's last forward also says the first token of the next one.
    end_BM = jnp.minimum(block, sequences.length_B[:, None] - begin_BM)
    fixed = Blocks(model, params, sequences.keys_B, begin_BM, end_BM, truth_BMn, answers)
    longest, dtype = max(block - 2, 0), model.products
    room, kept = sizes.blocks * longest, model.backend.cache_dtype(model.products)
    state = BlocksState(
        cache=with_room(cache, answers, room, dtype, kept),
        guess_BMn=jnp.where(offset_11n == 0, truth_BMn, guess_BMn),
        at_BM=jnp.zeros_like(begin_BM),
        forwards_BM=jnp.zeros_like(begin_BM),
        state_IBMn=jnp.zeros((block, *guess_BMn.shape), jnp.int32),
    )
    widths = sorted({-(-longest * i // SIZES) for i in range(SIZES + 1)}, reverse=True)
    for width, smaller in pairwise([*widths, -1]):
        longer = partial(_some_are_longer, fixed, smaller)
        state = jax.lax.while_loop(longer, partial(_iterate, fixed, width), state)
    return state.state_IBMn, state.forwards_BM


def _some_are_longer(fixed: Blocks, width: int, state: BlocksState) -> jax.Array:
    """Whether a window of more than `width` tokens is left."""
    left_BM = jnp.maximum(fixed.block - 2 - state.at_BM, 0)
    return ((state.at_BM < fixed.end_BM) & (left_BM > width)).any()


def _iterate(fixed: Blocks, width: int, state: BlocksState) -> BlocksState:
    """One forward of all blocks, with windows of `width` tokens."""
    offset_11n, truth_BMn = _steps(fixed.block), fixed.truth_BMn
    at_BM1, live_BM = state.at_BM[..., None], state.at_BM < fixed.end_BM
    right_BMn = (state.guess_BMn == truth_BMn) | (offset_11n <= at_BM1)
    right_BM = jnp.cumprod(right_BMn.astype(jnp.int32), axis=2).sum(2, dtype=jnp.int32)
    at_BM = jnp.where(live_BM, jnp.minimum(right_BM, fixed.end_BM), state.at_BM)
    said_BMn, cache = truth_BMn, state.cache
    if width:
        y_BMW, cache = _say(fixed, width, state)
        since_BMn = jnp.clip(offset_11n - at_BM1 - 2, 0, width - 1)
        said_BMn = jnp.take_along_axis(y_BMW, since_BMn, axis=2)
        said_BMn = jnp.where(offset_11n <= at_BM[..., None], truth_BMn, said_BMn)
    new_BMn = (offset_11n > at_BM1) & live_BM[..., None]
    return BlocksState(
        cache=cache,
        guess_BMn=jnp.where(new_BMn, said_BMn, state.guess_BMn),
        at_BM=at_BM,
        forwards_BM=state.forwards_BM + live_BM.astype(jnp.int32),
        # A block that is not done has taken part in every forward.
        state_IBMn=state.state_IBMn.at[state.forwards_BM.max()].set(state.guess_BMn),
    )


def _say(fixed: Blocks, width: int, state: BlocksState) -> tuple[jax.Array, Cache]:
    """What the model chooses after the first `width` wrong guesses of each block."""
    params, answers = {'params': fixed.params}, fixed.answers
    offset_BMW = state.at_BM[..., None] + 1 + _steps(width)
    at_BMW = jnp.minimum(offset_BMW, fixed.block - 1)
    window_BMW = jnp.take_along_axis(state.guess_BMn, at_BMW, axis=2)
    position_BMW = fixed.begin_BM[..., None] + offset_BMW
    mask_BTS = _mask(position_BMW[..., 0], width, answers, state.cache.slots)
    rows = (_flat(window_BMW), _flat(position_BMW), mask_BTS, state.cache)
    hidden_BTD, cache = fixed.model.apply(params, *rows, jnp.full(1, answers, jnp.int32))
    logits_BTV = fixed.model.apply(params, hidden_BTD, method='logits')
    y_BT = choose(logits_BTV, fixed.keys_B, _flat(position_BMW) + 1, Sampling())
    return y_BT.reshape(window_BMW.shape), cache


def _flat(x_BMW: jax.Array) -> jax.Array:
    """The windows of a row one after the other."""
    return x_BMW.reshape(len(x_BMW), -1)


def _steps(count: int) -> jax.Array:
    return jnp.arange(count, dtype=jnp.int32)[None, None]


def _mask(begin_BM: jax.Array, width: int, answers: int, slots: int) -> jax.Array:
    """What each token of the windows sees, bool `[B, M W, S]`: the slots before its window's
    first token, and that window up to itself; windows are after the slots of the `answers`."""
    earlier_BMS = _steps(slots) < jnp.minimum(begin_BM, answers)[..., None]
    windows_M = answers + jnp.arange(begin_BM.shape[1], dtype=jnp.int32) * width
    step_M1S = _steps(slots) - windows_M[:, None, None]
    own_MWS = (step_M1S >= 0) & (step_M1S <= _steps(width).swapaxes(1, 2))
    mask_BMWS = earlier_BMS[:, :, None] | own_MWS[None]
    return mask_BMWS.reshape(len(begin_BM), -1, slots)
