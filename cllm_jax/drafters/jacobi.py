"""Jacobi decoding (CLLM, arXiv 2403.00835): the model's last predictions are the next draft.

The state is one guess per position of the sequence. It starts as random tokens of the prompt; each
forward replaces the guesses it computed by the model's choices. A window of guesses is verified at
a time, and its fixed point is the autoregressive answer.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cllm_jax.decoding.drafter import Draft, Drafter, Sequences, Verdict, put, setting, windows
from cllm_jax.decoding.tree import chains
from cllm_jax.drafters.prompt_lookup import PromptLookup
from cllm_jax.errors import ConfigError
from cllm_jax.model.llama import take_rows

MAX_BLOCK = 1024
AUTO = 'auto'
"""A window that is still to be chosen (`evaluation/window.py`)."""
GUESSES = 2**32 - 1
"""Folded into a row's key for its guesses; sampling noise folds in positions, which are smaller."""
CHAIN = 8
"""Most tokens of a chain that is verified together with the window."""


@struct.dataclass
class Guesses:
    """One guess for every slot, and what the model said in the last forwards."""

    guess_BS: jax.Array
    said_BGn: jax.Array | None
    """The newest first; -1 where there was no forward yet. None without recycling."""


@struct.dataclass
class Jacobi(Drafter):
    """Verify `block` tokens per forward: the pending one and block - 1 guesses.

    `sliding` keeps the window full: it always starts at the pending token. `block` is the paper's
    schedule: the answer is cut into blocks of n tokens, and no guess beyond the current block is
    used or kept until that block has reached its fixed point. Trajectories in the paper's sense
    are those of `block`.

    `recycle` tries dropped guesses again (rejection recycling, Jacobi Forcing, arXiv 2512.14681):
    guesses are often right and only in the wrong place. Each of the last `recycle` forwards before
    the newest gives a chain, what the model had said there after its first mention of the pending
    token, and all are verified in the same forward as the window.

    With `block='auto'` the window is chosen that is expected to decode fastest, AR among them.

    `lookup` tries one more chain, what followed the last time in the prompt or the answer: a model
    guesses that something will be quoted sooner than which of its tokens comes at which place.
    """

    block: int | Literal['auto'] = setting(16)
    mode: Literal['sliding', 'block'] = setting('sliding')
    recycle: int = setting(0)
    lookup: bool = setting(False)
    title = 'Jacobi'

    def __post_init__(self):
        is_number = isinstance(self.block, int | np.integer)
        if self.block != AUTO and not (is_number and 1 <= self.block <= MAX_BLOCK):
            rule = f"must be 1 (autoregressive) to {MAX_BLOCK}, or 'auto'"
            raise ConfigError(f'block {self.block}: {rule}')
        if self.mode not in ('sliding', 'block'):
            raise ConfigError(f"mode {self.mode!r}: must be 'sliding' or 'block'")
        if self.recycle < 0 or (self.recycle and self.block == 1):
            rule = 'must be 0 or more chains, and there are guesses to recycle from block 2 on'
            raise ConfigError(f'recycle {self.recycle} with block {self.block}: {rule}')
        if self.lookup and self.block == 1:
            raise ConfigError('lookup with block 1: it needs a block of at least 2')

    @property
    def nodes(self) -> int:
        if self.block == AUTO:
            raise ConfigError("block 'auto': only decoding and evaluation choose it; give a number")
        return self.block + self._chains * self._length

    @property
    def _chains(self) -> int:
        return self.recycle + self.lookup

    @property
    def _length(self) -> int:
        return min(CHAIN, self.block - 1)

    def init(self, sequences):
        guess_BS, said = initial_guesses(sequences), None
        if self.recycle:
            said = jnp.full((len(guess_BS), self.recycle + 1, self.block), -1, jnp.int32)
        return Guesses(guess_BS, said)

    def draft(self, state, sequences, sampling):
        pending_B1 = sequences.window(1)
        guess_BN = windows(state.guess_BS, sequences.length_B, self.block)
        tokens_BN = jnp.concatenate([pending_B1, guess_BN[:, 1:]], axis=1)
        inside_BN = self._inside(sequences, 0)
        if not self._chains:
            return Draft(tokens_BN, inside_BN), state
        rows, length, found = len(tokens_BN), self._length, []
        if self.recycle:
            found.append(_after(state.said_BGn[:, 1:], pending_B1, length))
        if self.lookup:
            quote, _ = PromptLookup(length + 1).draft((), sequences, sampling)
            found.append(jnp.where(quote.valid_BN, quote.tokens_BN, -1)[:, None, 1:])
        chain_BGL = jnp.concatenate(found, axis=1)
        valid_BGL = (chain_BGL >= 0) & inside_BN[:, None, 1 : length + 1]
        tokens_BN = jnp.concatenate([tokens_BN, jnp.maximum(chain_BGL, 0).reshape(rows, -1)], 1)
        valid_BN = jnp.concatenate([inside_BN, valid_BGL.reshape(rows, -1)], axis=1)
        after = chains(0, [-1], self.block), chains(self.block, [0] * self._chains, length)
        return Draft.tree(tokens_BN, valid_BN, np.concatenate(after)), state

    def update(self, state, draft, verdict, sequences, sampling):
        said, y_Bn = state.said_BGn, verdict.y_BN
        if self._chains:
            y_Bn = take_rows(y_Bn, self._branch(verdict))
        if self.recycle:
            said = jnp.concatenate([y_Bn[:, None], said[:, :-1]], axis=1)
        guess_BS = put(state.guess_BS, sequences.length_B + 1, y_Bn, self._inside(sequences, 1))
        return Guesses(guess_BS, said)

    def _branch(self, verdict: Verdict) -> jax.Array:
        """The nodes whose choices are the new guesses: the accepted chain's, then the window's."""
        steps_1n = jnp.arange(self.block, dtype=jnp.int32)[None]
        first_B1 = verdict.path_BP[:, 1:2]
        taken_B1 = (verdict.count_B[:, None] > 1) & (first_B1 >= self.block)
        on_chain_Bn = taken_B1 & (steps_1n > 0) & (steps_1n <= self._length)
        return jnp.where(on_chain_Bn, first_B1 + steps_1n - 1, steps_1n)

    def _inside(self, sequences: Sequences, shift: int) -> jax.Array:
        """Which of the positions pending + shift + (0..n-1) the current window may touch."""
        steps_N = jnp.arange(self.block, dtype=jnp.int32) + shift
        offset_B = sequences.length_B - sequences.prompt_len_B
        room_B = jnp.full_like(offset_B, self.block + shift)
        if self.mode == 'block':
            room_B = self.block - offset_B % self.block
        return steps_N[None] < room_B[:, None]


def _after(said_BGn: jax.Array, token_B1: jax.Array, length: int) -> jax.Array:
    """The `length` tokens after the first mention of a token in each text, -1 where none is."""
    width = said_BGn.shape[2]
    found_BGn = said_BGn == token_B1[:, None]
    begin_BG1 = jnp.where(found_BGn.any(-1), jax.lax.argmax(found_BGn, 2, jnp.int32), width)[
        ..., None
    ]
    at_BGL = begin_BG1 + 1 + jnp.arange(length, dtype=begin_BG1.dtype)[None, None]
    tokens_BGL = jnp.take_along_axis(said_BGn, jnp.minimum(at_BGL, width - 1), axis=2)
    return jnp.where(at_BGL < width, tokens_BGL, -1)


def initial_guesses(sequences: Sequences) -> jax.Array:
    """A random token of the row's prompt for every slot, int32 `[B, S]`.

    A guess is a function of the row's key, its prompt and the position alone: neither other rows
    nor padding change how many forwards an answer takes.
    """
    slots_S = jnp.arange(sequences.tokens_BS.shape[1], dtype=jnp.int32)

    def row(key, tokens_S, prompt_len):
        key = jax.random.fold_in(key, GUESSES)
        key_S = jax.vmap(lambda slot: jax.random.fold_in(key, slot))(slots_S)
        bits_S = jax.vmap(lambda key: jax.random.bits(key, (), jnp.uint32))(key_S)
        return tokens_S[bits_S % prompt_len.astype(jnp.uint32)]

    return jax.vmap(row)(sequences.keys_B, sequences.tokens_BS, sequences.prompt_len_B)
