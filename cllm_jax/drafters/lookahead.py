"""Lookahead decoding (arXiv 2402.02057): Jacobi iteration that collects n-grams and tries them.

A window of W columns and ngram - 1 levels holds what the model said in the last forwards about the
next W positions. Every forward adds a level, and each column is then an n-gram that the model
itself has written; it goes to a pool. In the same forward the n-grams whose first token is the
pending one are verified. Nothing is trained.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cllm_jax.decoding.drafter import Draft, Drafter, setting
from cllm_jax.decoding.tree import chains
from cllm_jax.drafters.jacobi import Guesses, Jacobi, initial_guesses
from cllm_jax.errors import ConfigError, at_least
from cllm_jax.model.llama import take_rows

KEPT = 64
"""Forwards whose n-grams stay in the pool."""


@struct.dataclass
class Ngrams:
    """The window, the pool and the Jacobi guesses. n is the n of n-grams, M is n - 1, W columns."""

    window_BMW: jax.Array
    """Oldest level first; column 0 of that level stands for the pending token."""
    pool_BPn: jax.Array
    """The newest n-grams first, -1 where there is none; none that came up again later."""
    jacobi: Guesses


@struct.dataclass
class Lookahead(Drafter):
    """Verify up to `guesses` n-grams per forward and extend a window of `window` columns.

    With `block` above 1 a Jacobi window of that size is verified too, as a CLLM wants it.
    """

    window: int = setting(7)
    ngram: int = setting(5)
    guesses: int = setting(7)
    block: int = setting(1)
    title = 'lookahead'

    def __post_init__(self):
        at_least(self, window=1, ngram=3, guesses=1)
        if self.guesses > KEPT * self.window:
            most = f'{KEPT * self.window}, the n-grams that a window of {self.window} columns keeps'
            raise ConfigError(f'guesses {self.guesses}: must be at most {most}')
        Jacobi(self.block)  # checks it

    @property
    def nodes(self) -> int:
        return len(self._parents())

    def init(self, sequences):
        rows, levels = len(sequences.length_B), self.ngram - 1
        guess_BS = initial_guesses(sequences)
        window_BMW = guess_BS[:, : levels * self.window].reshape(rows, levels, self.window)
        pool_BPn = jnp.full((rows, KEPT * self.window, self.ngram), -1, jnp.int32)
        return Ngrams(window_BMW, pool_BPn, Guesses(guess_BS, None))

    def draft(self, state, sequences, sampling):
        pending_B1 = sequences.window(1)
        rows = len(pending_B1)
        chain, jacobi = Jacobi(self.block).draft(state.jacobi, sequences, sampling)
        comb_BC = state.window_BMW.reshape(rows, -1)[:, 1:]
        match_BP = state.pool_BPn[:, :, 0] == pending_B1
        ages_1P = jnp.arange(match_BP.shape[1], dtype=jnp.int32)[None]
        rank_BP = jnp.where(match_BP, -ages_1P, -match_BP.shape[1])
        tried_BGn = take_rows(state.pool_BPn, jax.lax.top_k(rank_BP, self.guesses)[1])
        known_BX = jnp.repeat(tried_BGn[:, :, 0] == pending_B1, self.ngram - 1, axis=1)
        tokens_BX = jnp.maximum(tried_BGn[:, :, 1:], 0).reshape(rows, -1)
        tokens_BN = jnp.concatenate([chain.tokens_BN, comb_BC, tokens_BX], axis=1)
        never_BC = jnp.zeros_like(comb_BC, bool)
        valid_BN = jnp.concatenate([chain.valid_BN, never_BC, known_BX], axis=1)
        return Draft.tree(tokens_BN, valid_BN, self._parents()), state.replace(jacobi=jacobi)

    def update(self, state, draft, verdict, sequences, sampling):
        levels, width = self.ngram - 1, self.window
        comb = slice(self.block, self.block + levels * width - 1)
        comb_BC = jnp.concatenate([draft.tokens_BN[:, :1], draft.tokens_BN[:, comb]], axis=1)
        window_BMW = comb_BC.reshape(-1, levels, width)
        said_B1W = verdict.y_BN[:, None, comb.stop - width : comb.stop]
        grams_BnW = jnp.concatenate([window_BMW, said_B1W], axis=1)
        new_BWn = grams_BnW.swapaxes(1, 2)
        again_BP = (state.pool_BPn[:, :, None] == new_BWn[:, None]).all(-1).any(-1)
        pool_BPn = jnp.where(again_BP[:, :, None], -1, state.pool_BPn)
        pool_BPn = jnp.concatenate([new_BWn, pool_BPn[:, :-width]], axis=1)
        # The next position j is today's j + count; what stands beyond the window stays a guess.
        here_1W = jnp.arange(width, dtype=jnp.int32)[None]
        at_BW = here_1W + jnp.maximum(verdict.count_B, 1)[:, None]
        at_BW = jnp.where(at_BW <= width, at_BW - 1, here_1W)
        window_BMW = jnp.take_along_axis(grams_BnW[:, 1:], at_BW[:, None], axis=2)
        first = verdict.replace(y_BN=verdict.y_BN[:, : self.block])
        jacobi = Jacobi(self.block).update(state.jacobi, draft, first, sequences, sampling)
        return Ngrams(window_BMW, pool_BPn, jacobi)

    def _parents(self) -> np.ndarray:
        """A Jacobi chain, a comb whose first level is a chain, and a chain for every guess."""
        levels, width = self.ngram - 1, self.window
        size = levels * width
        comb_MW = np.arange(self.block - 1, self.block - 1 + size).reshape(levels, width)
        comb_MW[0, 0] = 0
        comb = np.concatenate([comb_MW[0, :-1], comb_MW[:-1].ravel()])
        guesses = chains(self.block + size - 1, [0] * self.guesses, levels)
        return np.concatenate([chains(0, [-1], self.block), comb, guesses]).astype(np.int32)
