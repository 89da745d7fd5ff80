"""Lookahead decoding (arXiv 2402.02057): Jacobi iteration that collects n-grams and tries them.

A window of W columns and ngram - 1 levels holds what the model said in the last forwards about the
next W positions. Every forward adds a level, and each column is then an n-gram that the model
itself has written; it goes to a pool under its first token. In the same forward the n-grams whose
first token is the pending one are verified. Nothing is trained.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cllm_jax.decoding.drafter import Draft, Drafter, setting
from cllm_jax.drafters.jacobi import Guesses, Jacobi, initial_guesses
from cllm_jax.errors import ConfigError, at_least

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

    With `block` above 1 a Jacobi window of that size is verified too, as a CLLM wants it:
    the draft then has all that `Jacobi(block)` has, and the n-grams.
    """

    window: int = setting(7)
    ngram: int = setting(5)
    guesses: int = setting(7)
    block: int = setting(1)
    title = 'lookahead'

    def __post_init__(self):
        at_least(self, window=1, ngram=3, guesses=1)
        if self.guesses > KEPT * self.window:
            raise ConfigError(
                f'guesses {self.guesses}: must be at most {KEPT * self.window}, the n-grams that a '
                f'window of {self.window} columns keeps'
            )
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
        comb = state.window_BMW.reshape(rows, -1)[:, 1:]
        match_BP = state.pool_BPn[:, :, 0] == pending_B1
        ages_1P = jnp.arange(match_BP.shape[1], dtype=jnp.int32)[None]
        _, newest_BG = jax.lax.top_k(
            jnp.where(match_BP, -ages_1P, -match_BP.shape[1]), self.guesses
        )
        tried_BGn = jnp.take_along_axis(state.pool_BPn, newest_BG[:, :, None], axis=1)
        known_BG = tried_BGn[:, :, 0] == pending_B1
        tokens = [chain.tokens_BN, comb, jnp.maximum(tried_BGn[:, :, 1:], 0).reshape(rows, -1)]
        valid = [
            chain.valid_BN,
            jnp.zeros_like(comb, bool),
            jnp.repeat(known_BG, self.ngram - 1, axis=1),
        ]
        tokens_BN, valid_BN = jnp.concatenate(tokens, axis=1), jnp.concatenate(valid, axis=1)
        depth = max(self.block - 1, self.window + self.ngram - 3, self.ngram - 1)
        draft = Draft.tree(tokens_BN, valid_BN, self._parents(), depth)
        return draft, state.replace(jacobi=jacobi)

    def update(self, state, draft, verdict, sequences, sampling):
        levels, width = self.ngram - 1, self.window
        comb = slice(self.block, self.block + levels * width - 1)
        comb_BC = jnp.concatenate([draft.tokens_BN[:, :1], draft.tokens_BN[:, comb]], axis=1)
        window_BMW = comb_BC.reshape(-1, levels, width)
        said_BW = verdict.y_BN[:, comb.stop - width : comb.stop]
        grams_BnW = jnp.concatenate([window_BMW, said_BW[:, None]], axis=1)
        new_BWn = grams_BnW.swapaxes(1, 2)
        again_BP = (state.pool_BPn[:, :, None] == new_BWn[:, None]).all(-1).any(-1)
        pool_BPn = jnp.where(again_BP[:, :, None], -1, state.pool_BPn)
        pool_BPn = jnp.concatenate([new_BWn, pool_BPn[:, :-width]], axis=1)
        # The next position j is today's j + count; what stands beyond the window stays a guess.
        at_BW = jnp.arange(width, dtype=jnp.int32)[None] + jnp.maximum(verdict.count_B, 1)[:, None]
        at_BW = jnp.where(at_BW <= width, at_BW - 1, jnp.arange(width, dtype=jnp.int32)[None])
        window_BMW = jnp.take_along_axis(grams_BnW[:, 1:], at_BW[:, None], axis=2)
        first = verdict.replace(y_BN=verdict.y_BN[:, : self.block])
        jacobi = Jacobi(self.block).update(state.jacobi, draft, first, sequences, sampling)
        return Ngrams(window_BMW, pool_BPn, jacobi)

    def _parents(self) -> np.ndarray:
        """A Jacobi chain, a comb whose first level is a chain, and a chain for every guess."""
        levels, width = self.ngram - 1, self.window
        parents = list(range(-1, self.block - 1))
        above = [0]
        for _ in range(1, width):
            parents.append(above[-1])
            above.append(len(parents) - 1)
        for _ in range(1, levels):
            parents += above
            above = list(range(len(parents) - width, len(parents)))
        for _ in range(self.guesses):
            start = len(parents)
            parents += [0, *range(start, start + levels - 1)]
        return np.asarray(parents, np.int32)
