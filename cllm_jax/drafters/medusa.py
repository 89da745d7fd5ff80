"""Medusa (arXiv 2401.10774): heads that guess the tokens after the next one, all at once.

Head k sees the target's last hidden state and guesses the token k places after the one that the
target itself chooses there. The guesses of the heads are tried in a sparse tree that is known when
the program is compiled: the nodes that most often turn out right.
"""

import heapq
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cllm_jax.decoding.drafter import Draft, setting
from cllm_jax.drafters.trained import AnswerBatch, TargetTables, TrainedDrafter, perturbed
from cllm_jax.errors import ConfigError, at_least
from cllm_jax.model.precision import product

RANKS = 8
"""Guesses per head among which a tree is chosen."""
DECAY = 0.8
"""Weight of a head's loss relative to the head before it (section 2.2.1)."""


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


@struct.dataclass
class Medusa(TrainedDrafter):
    """`heads` guesses ahead, verified as the tree of `choices` (see `tree_of`)."""

    heads: int = setting(4)
    choices: tuple[tuple[int, ...], ...] = setting(tree_of(usual(4), 15))
    own_tables: bool = setting(True)
    """Each head has an output table of its own, as in the paper, or all use the target's."""
    own: Any = None
    tables: TargetTables | None = None
    title = 'Medusa'
    kind = 'medusa'
    typical = True

    def __post_init__(self):
        at_least(self, heads=1)
        if not self.choices:
            raise ConfigError('choices: empty; a tree has at least one guess')
        known = {(), *self.choices}
        for path in self.choices:
            good = path[:-1] in known and 1 <= len(path) <= self.heads
            if not good or not all(0 <= r < RANKS for r in path):
                tree = f'a tree with {self.heads} heads and {RANKS} ranks, or without its parent'
                raise ConfigError(f'choices: {path} is not a node of {tree}; correct it')
        if len(known) != len(self.choices) + 1:
            raise ConfigError('choices: a path appears twice; leave one of them out')

    @classmethod
    def of_size(cls, sizes, model):
        return cls(sizes.ahead, tree_of(usual(sizes.ahead), sizes.nodes - 1), sizes.own_table)

    @property
    def nodes(self) -> int:
        return 1 + len(self.choices)

    def draft(self, state, sequences, sampling):
        logits_BKV = self.logits(state.hidden_BD[:, None])[:, 0]
        ahead_K = jnp.arange(1, self.heads + 1, dtype=jnp.int32)
        logits_BKV = perturbed(logits_BKV, sequences, ahead_K, sampling)
        _, best_BKR = jax.lax.top_k(logits_BKV, 1 + max(path[-1] for path in self.choices))
        order = sorted(self.choices, key=lambda path: (len(path), path))
        number = {path: i for i, path in enumerate(((), *order))}
        nodes = [(number[path[:-1]], len(path) - 1, path[-1]) for path in order]
        parents, heads, ranks = np.array(nodes, np.int32).T
        tokens_BN = jnp.concatenate([sequences.window(1), best_BKR[:, heads, ranks]], axis=1)
        parent_N = np.concatenate([np.int32([-1]), parents])
        return Draft.tree(tokens_BN, state.known_B[:, None], parent_N), state

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """What each head says after each hidden state, float32 `[B, T, K, V]`.

        Head k: `table(SiLU(mix h + bias) + h)`, section 2.1.1.
        """
        own = self.own
        mixed = product('btd,kde->btke', hidden_BTD, own['mix']) + own['bias'][None, None]
        z_BTKD = jax.nn.silu(mixed) + hidden_BTD[:, :, None]
        if self.own_tables:
            return product('btkd,kvd->btkv', z_BTKD, own['out'])
        return product('btkd,vd->btkv', z_BTKD, self.tables.head_VD.astype(jnp.float32))

    def new_weights(self, key, tables):
        """Heads that begin by saying what the target says about the next token (`mix` is 0)."""
        width = tables.embed_VD.shape[1]
        shapes = {'mix': (self.heads, width, width), 'bias': (self.heads, width)}
        own = {name: jnp.zeros(shape, jnp.float32) for name, shape in shapes.items()}
        if self.own_tables:
            table = tables.head_VD.astype(jnp.float32)
            own['out'] = jnp.broadcast_to(table[None], (self.heads, *table.shape))
        return own

    def loss(self, answers):
        """`sum_k 0.8^k CE(head k, the token k places after the label)`, each CE a token mean."""
        logits_BAKV = self.logits(answers.hidden_BAD)
        loss, metrics = jnp.float32(0), {}
        for k in range(1, self.heads + 1):
            ce, metrics[f'accuracy_{k}'] = answers.scored(logits_BAKV[:, :, k - 1], k)
            loss = loss + DECAY**k * ce
        return loss, metrics

    def calibrated(self, answers):
        """The same heads with the tree of as many nodes that some answers ask for."""
        right_KR = jax.device_get(_shares_right(self, answers))
        return self.replace(choices=tree_of(right_KR, len(self.choices)))


@jax.jit
def _shares_right(drafter: Medusa, answers: AnswerBatch) -> jax.Array:
    """How often guess r of head k is right, `[K, R]`."""
    _, best_BAKR = jax.lax.top_k(drafter.logits(answers.hidden_BAD), RANKS)
    rows = []
    for k in range(drafter.heads):
        labels_BA, weight_BA = answers.later(k + 1)
        is_right_BAR = best_BAKR[:, :, k] == labels_BA[:, :, None]
        hit_BAR = jnp.where(is_right_BAR, weight_BA[:, :, None], 0)
        rows.append(hit_BAR.sum((0, 1)) / jnp.maximum(weight_BA.sum(), 1))
    return jnp.stack(rows)
