"""Medusa (arXiv 2401.10774): heads that guess the tokens behind the next one, all at once.

Head k sees the target's last hidden state and guesses the token k places behind the one that the
target itself chooses there. The guesses of the heads are tried in a sparse tree that is known when
the program is compiled: the nodes that most often turn out right.
"""

import dataclasses
import heapq
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from cllm_jax.decoding.drafter import Draft
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.trained import (
    HeadWeights,
    LastHidden,
    follow,
    perturbed,
    unknown,
)
from cllm_jax.errors import ConfigError, at_least

RANKS = 8
"""Guesses per head among which a tree is chosen."""


def tree_of(right_KR: np.ndarray, nodes: int) -> tuple[tuple[int, ...], ...]:
    """The `nodes` most promising nodes: each is a path of ranks, one per head.

    Args:
      right_KR: how often guess r of head k is right, 0..1.
      nodes: nodes besides the pending token.
    """
    best = [(-float(right_KR[0, r]), (r,)) for r in range(right_KR.shape[1])]
    heapq.heapify(best)
    chosen: list[tuple[int, ...]] = []
    while best and len(chosen) < nodes:
        score, path = heapq.heappop(best)
        chosen.append(path)
        if len(path) < len(right_KR):
            for r, share in enumerate(right_KR[len(path)]):
                heapq.heappush(best, (score * float(share), (*path, r)))
    return tuple(sorted(chosen, key=lambda path: (len(path), path)))


def usual(heads: int) -> np.ndarray:
    """A guess at how often guesses are right, for a tree before anything is measured."""
    ranks = 0.6 * 0.3 ** np.arange(RANKS)
    return ranks[None] * 0.85 ** np.arange(heads)[:, None]


@dataclasses.dataclass(frozen=True)
class Medusa:
    """`heads` guesses ahead, verified as the tree of `choices` (see `tree_of`)."""

    heads: int = 4
    choices: tuple[tuple[int, ...], ...] = tree_of(usual(4), 15)
    own_tables: bool = True
    """Each head has an output table of its own, as in the paper, or all use the target's."""
    sampling: Sampling = Sampling()
    typical_acceptance: ClassVar[bool] = True

    def __post_init__(self):
        at_least(self, heads=1)
        if not self.choices:
            raise ConfigError('choices: empty; a tree has at least one guess')
        known = {(), *self.choices}
        for path in self.choices:
            good = path[:-1] in known and 1 <= len(path) <= self.heads
            if not good or not all(0 <= r < RANKS for r in path):
                raise ConfigError(
                    f'choices: {path} is no node of a tree with {self.heads} heads and {RANKS} '
                    'ranks; every path begins with another one'
                )
        if len(known) != len(self.choices) + 1:
            raise ConfigError('choices: a path appears twice; leave one of them out')

    @property
    def nodes(self) -> int:
        return 1 + len(self.choices)

    def init(self, weights: HeadWeights, sequences) -> LastHidden:
        return unknown(weights, sequences)

    def draft(self, weights: HeadWeights, state: LastHidden, sequences):
        pending_B1 = sequences.window(1)
        logits_BKV = self.logits(weights, state.hidden_BD[:, None])[:, 0]
        ahead_K = jnp.arange(1, self.heads + 1, dtype=jnp.int32)
        logits_BKV = perturbed(logits_BKV, sequences, ahead_K, self.sampling)
        _, best_BKR = jax.lax.top_k(logits_BKV, 1 + max(path[-1] for path in self.choices))
        order = sorted(self.choices, key=lambda path: (len(path), path))
        number = {path: i for i, path in enumerate(((), *order))}
        parent_N = np.array([-1, *(number[path[:-1]] for path in order)], np.int32)
        heads = np.array([len(path) - 1 for path in order], np.int32)
        ranks = np.array([path[-1] for path in order], np.int32)
        tokens_BN = jnp.concatenate([pending_B1, best_BKR[:, heads, ranks]], axis=1)
        valid_BN = jnp.broadcast_to(state.known_B[:, None], tokens_BN.shape)
        parent_BN = jnp.broadcast_to(jnp.asarray(parent_N)[None], tokens_BN.shape)
        return Draft(tokens_BN, valid_BN, parent_BN, max(map(len, order))), state

    def update(self, weights, state, draft, verdict, sequences):
        return follow(state, verdict)

    def logits(self, weights: HeadWeights, hidden_BTD: jax.Array) -> jax.Array:
        """What each head says after each hidden state, float32 `[B, T, K, V]`.

        Head k: `table(SiLU(mix h + bias) + h)`, section 2.1.1.
        """
        own = weights.own
        mixed = jnp.einsum('btd,kde->btke', hidden_BTD, own['mix']) + own['bias'][None, None]
        z_BTKD = jax.nn.silu(mixed) + hidden_BTD[:, :, None]
        if self.own_tables:
            return jnp.einsum('btkd,kvd->btkv', z_BTKD, own['out'])
        return jnp.einsum('btkd,vd->btkv', z_BTKD, weights.head_VD.astype(jnp.float32))

    def new_weights(self, key: jax.Array, embed_VD: jax.Array, head_VD: jax.Array) -> dict:
        """Heads that begin by saying what the target says about the next token (`mix` is 0)."""
        width = embed_VD.shape[1]
        own = {'mix': jnp.zeros((self.heads, width, width)), 'bias': jnp.zeros((self.heads, width))}
        if self.own_tables:
            table = head_VD.astype(jnp.float32)
            own['out'] = jnp.broadcast_to(table[None], (self.heads, *table.shape))
        return own
