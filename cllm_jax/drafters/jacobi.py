"""Jacobi decoding (CLLM, arXiv 2403.00835): the model's last predictions are the next draft.

The state is one guess per position of the sequence. It starts as random tokens of the prompt; each
forward replaces the guesses it computed by the model's choices. A window of guesses is verified at
a time, and its fixed point is the autoregressive answer.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from cllm_jax.decoding.draft import Draft, Sequences, put, windows
from cllm_jax.errors import ConfigError

MAX_BLOCK = 1024
GUESSES = 2**32 - 1
"""Folded into a row's key for its guesses; sampling noise folds in positions, which are smaller."""


@dataclasses.dataclass(frozen=True)
class Jacobi:
    """Verify `block` tokens per forward: the pending one and block - 1 guesses.

    `sliding` keeps the window full: it always starts at the pending token. `block` is the paper's
    schedule: the answer is cut into blocks of n tokens, and no guess beyond the current block is
    used or kept until that block has reached its fixed point. Trajectories in the paper's sense
    are those of `block`.
    """

    block: int = 16
    mode: Literal['sliding', 'block'] = 'sliding'

    def __post_init__(self):
        if not 1 <= self.block <= MAX_BLOCK:
            raise ConfigError(f'block {self.block}: must be 1 (autoregressive) to {MAX_BLOCK}')
        if self.mode not in ('sliding', 'block'):
            raise ConfigError(f"mode {self.mode!r}: must be 'sliding' or 'block'")

    @property
    def nodes(self) -> int:
        return self.block

    def init(self, weights, sequences):
        return initial_guesses(sequences)

    def draft(self, weights, state, sequences):
        guess_BS = state
        pending_B1 = sequences.window(1)
        guess_BN = windows(guess_BS, sequences.length_B, self.block)
        tokens_BN = jnp.concatenate([pending_B1, guess_BN[:, 1:]], axis=1)
        return Draft(tokens_BN, self._inside(sequences, 0)), state

    def update(self, weights, state, draft, verdict, sequences):
        return put(state, sequences.length_B + 1, verdict.y_BN, self._inside(sequences, 1))

    def _inside(self, sequences: Sequences, shift: int) -> jax.Array:
        """Which of the positions pending + shift + (0..n-1) the current window may touch."""
        steps_N = jnp.arange(self.block, dtype=jnp.int32) + shift
        offset_B = sequences.length_B - sequences.prompt_len_B
        room_B = jnp.full_like(offset_B, self.block + shift)
        if self.mode == 'block':
            room_B = self.block - offset_B % self.block
        return steps_N[None] < room_B[:, None]


def initial_guesses(sequences: Sequences) -> jax.Array:
    """A random token of the row's prompt for every slot, int32 `[B, S]`.

    A guess is a function of the row's key, its prompt and the position alone: neither the other
    rows of the batch nor its padding change how many forwards an answer takes.
    """
    slots_S = jnp.arange(sequences.tokens_BS.shape[1], dtype=jnp.int32)

    def row(key, tokens_S, prompt_len):
        key = jax.random.fold_in(key, GUESSES)
        bits_S = jax.vmap(lambda slot: jax.random.bits(jax.random.fold_in(key, slot)))(slots_S)
        return tokens_S[bits_S % prompt_len.astype(jnp.uint32)]

    return jax.vmap(row)(sequences.keys_B, sequences.tokens_BS, sequences.prompt_len_B)
