"""Jacobi decoding that also tries second choices: a chain of guesses with branches.

A forward over guesses gives a distribution for every place, of which plain Jacobi keeps the best
token. Where a guess of a CLLM turns out wrong, the right token was most often its second choice
(docs/ablations.md), so the places where that is likeliest get a branch: the second choice, and the
window's own guesses after it, verified in the same forward. Nothing more is trained.
"""

import jax
import jax.numpy as jnp
from flax import struct

from cllm_jax.decoding.drafter import Draft, Drafter, Sequences, Verdict, put, setting, windows
from cllm_jax.decoding.tree import chains
from cllm_jax.drafters.jacobi import Jacobi, initial_guesses
from cllm_jax.drafters.trained import last_of, perturbed
from cllm_jax.errors import ConfigError, at_least
from cllm_jax.model.llama import take_rows

UNKNOWN = -1e4
"""Log-probability of what no forward has computed yet."""


@struct.dataclass
class Choices:
    """The two best tokens for every slot so far, and their log-probabilities."""

    best_BS: jax.Array
    second_BS: jax.Array
    best_logp_BS: jax.Array
    second_logp_BS: jax.Array


@struct.dataclass
class JacobiTree(Drafter):
    """A sliding window of `block` tokens, and `branches` branches of `reach` tokens each."""

    block: int = setting(16)
    branches: int = setting(4)
    reach: int = setting(2)
    title = 'Jacobi tree'

    def __post_init__(self):
        Jacobi(self.block)  # checks it
        if not 1 <= self.branches < self.block:
            raise ConfigError(
                f'branches {self.branches}: must be 1 to block - 1, which is {self.block - 1}'
            )
        at_least(self, reach=1)

    @property
    def nodes(self) -> int:
        return self.block + self.branches * self.reach

    def init(self, sequences: Sequences) -> Choices:
        guess_BS = initial_guesses(sequences)
        unknown = (jnp.full(guess_BS.shape, UNKNOWN, jnp.float32) for _ in range(2))
        return Choices(guess_BS, jnp.zeros_like(guess_BS), *unknown)

    def draft(self, state: Choices, sequences: Sequences, sampling):
        best_Bn, second_Bn, best_logp_Bn, second_logp_Bn = (
            windows(x_BS, sequences.length_B, self.block) for x_BS in jax.tree.leaves(state)
        )
        chain_Bn = jnp.concatenate([sequences.window(1), best_Bn[:, 1:]], axis=1)
        # A branch at place d is right if all before d is right and the second choice is.
        before_Bn = jnp.cumsum(best_logp_Bn[:, 1:], axis=1) - best_logp_Bn[:, 1:]
        logp_BG, place_BG = jax.lax.top_k(before_Bn + second_logp_Bn[:, 1:], self.branches)
        place_BG = place_BG + 1
        ahead_R = jnp.arange(self.reach, dtype=jnp.int32)
        place_BGR = place_BG[:, :, None] + ahead_R[None, None]
        rows = len(chain_Bn)
        at_BX = jnp.minimum(place_BGR, self.block - 1).reshape(rows, -1)
        branch_BGR = take_rows(chain_Bn, at_BX).reshape(place_BGR.shape)
        branch_BGR = branch_BGR.at[:, :, 0].set(take_rows(second_Bn, place_BG))
        valid_BGR = (place_BGR < self.block) & (logp_BG > UNKNOWN / 2)[:, :, None]
        branches = chains(self.block, [0] * self.branches, self.reach).reshape(self.branches, -1)
        parent_BGR = jnp.broadcast_to(jnp.asarray(branches)[None], place_BGR.shape)
        parent_BGR = parent_BGR.at[:, :, 0].set(place_BG - 1)
        window_Bn = jnp.broadcast_to(chains(0, [-1], self.block)[None], chain_Bn.shape)
        of_chain = (chain_Bn, jnp.ones_like(chain_Bn, bool), window_Bn)
        columns = [
            jnp.concatenate([x_Bn, x_BGR.reshape(rows, -1)], axis=1)
            for x_Bn, x_BGR in zip(of_chain, (branch_BGR, valid_BGR, parent_BGR), strict=True)
        ]
        return Draft(*columns, self.block + self.reach - 2), state

    def update(self, state: Choices, draft: Draft, verdict: Verdict, sequences, sampling):
        node_Bn = self._carriers(draft, verdict)
        ahead_n = jnp.arange(1, self.block + 1, dtype=jnp.int32)
        logits_BnV = take_rows(verdict.logits_BNV, node_Bn)
        logits_BnV = perturbed(logits_BnV, sequences, ahead_n, sampling)
        best_Bn = take_rows(verdict.y_BN, node_Bn)
        ids_V = jnp.arange(logits_BnV.shape[2], dtype=jnp.int32)
        is_best_BnV = ids_V[None, None] == best_Bn[:, :, None]
        rest_BnV = jnp.where(is_best_BnV, -jnp.inf, logits_BnV)
        second_Bn = jax.lax.argmax(rest_BnV, 2, jnp.int32)
        total_Bn = jax.nn.logsumexp(logits_BnV, axis=2)
        logp = (x_BnV.max(axis=2) - total_Bn for x_BnV in (logits_BnV, rest_BnV))
        at_B, everywhere = sequences.length_B + 1, jnp.ones_like(best_Bn, bool)
        found = Choices(best_Bn, second_Bn, *logp)
        return jax.tree.map(lambda old, new: put(old, at_B, new, everywhere), state, found)

    def _carriers(self, draft: Draft, verdict: Verdict) -> jax.Array:
        """For each place of the window its node in the branch that was accepted, else in the chain:
        the one that saw most of what was right before it."""
        steps_1n = jnp.arange(self.block, dtype=jnp.int32)[None]
        last_B1 = last_of(verdict)
        branch_B1 = jnp.maximum(last_B1 - self.block, 0) // self.reach
        first_B1 = self.block + branch_B1 * self.reach
        after_Bn = steps_1n - (take_rows(draft.parent_BN, first_B1) + 1)
        accepted_Bn = (last_B1 >= self.block) & (after_Bn >= 0) & (after_Bn < self.reach)
        return jnp.where(accepted_Bn, first_B1 + after_Bn, steps_1n)
