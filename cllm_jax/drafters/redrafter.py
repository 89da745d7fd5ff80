"""ReDrafter (arXiv 2403.09919): a recurrent head, beam search, and a tree packed on device.

The head is one recurrent cell on the embeddings of the tokens drafted so far, together with the
target's last hidden state, which stays the same. Its beams share prefixes; packed into a tree each
prefix is verified once. Acceptance is the loop's; the paper's own rule for sampling is biased,
since beams are not samples.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from cllm_jax.decoding.drafter import Draft, setting
from cllm_jax.drafters.trained import TargetTables, TrainedDrafter, normal, perturbed
from cllm_jax.errors import ConfigError, at_least
from cllm_jax.model.llama import take_rows
from cllm_jax.model.precision import linear, product

NEVER = -5e4
"""Score of a beam that does not exist: below any sum of log-probabilities."""


def pack(beams_BMC: jax.Array, capacity: int) -> tuple[jax.Array, ...]:
    """Beams as a tree in which equal prefixes are one path ("dynamic tree attention", section 3.2).

    Args:
      beams_BMC: int32 token ids of M beams of C tokens, the best beam first.
      capacity: nodes of the tree. Where it is too small the ends of the worst beams are left out.

    Returns:
      tokens_BN; parent_BN, -1 for a first token; live_BN, False for nodes that are not used; and
      unpack_BMC, the node of every token of every beam, `capacity` or more for those left out.
    """
    return jax.vmap(lambda beams_MC: _pack(beams_MC, capacity))(beams_BMC)


def _pack(beams_MC: jax.Array, capacity: int) -> tuple[jax.Array, ...]:
    beams, length = beams_MC.shape
    same_MMC = (beams_MC[:, None] == beams_MC[None]).astype(jnp.int32)
    same_so_far_MMC = jnp.cumprod(same_MMC, axis=2)
    first_MC = jax.lax.argmax(same_so_far_MMC, 1, jnp.int32)  # the first beam with this prefix
    new_MC = first_MC == jnp.arange(beams, dtype=jnp.int32)[:, None]
    number_MC = jnp.cumsum(new_MC.ravel(), dtype=jnp.int32).reshape(beams, length) - 1
    unpack_MC = jnp.take_along_axis(number_MC, first_MC, axis=0)
    before_MC = jnp.pad(unpack_MC[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    where_X = jnp.where(new_MC, unpack_MC, capacity).ravel()

    def place(x_MC, fill):
        nodes_N = jnp.full(capacity, fill, jnp.int32)
        return nodes_N.at[where_X].set(x_MC.ravel().astype(jnp.int32), mode='drop')

    live_N = jnp.arange(capacity, dtype=jnp.int32) < new_MC.sum(dtype=jnp.int32)
    return place(beams_MC, 0), place(before_MC, -1), live_N, unpack_MC


@struct.dataclass
class ReDrafter(TrainedDrafter):
    """`beams` beams of `length` tokens, the pending one included, in a tree of `capacity` nodes."""

    beams: int = setting(4)
    length: int = setting(5)
    capacity: int = setting(16)
    layers: int = setting(2)
    """Residual layers after the cell."""
    own_table: bool = setting(True)
    """An output table of its own, as in the paper, or a projection to the target's."""
    own: Any = None
    tables: TargetTables | None = None
    title = 'ReDrafter'
    kind = 'redrafter'

    def __post_init__(self):
        at_least(self, beams=1, length=2, layers=0)
        if self.capacity < self.length:
            rule = f'the tree must hold one beam of {self.length} tokens'
            raise ConfigError(f'capacity {self.capacity}: {rule}')

    @classmethod
    def of_size(cls, sizes, model):
        return cls(sizes.beams, sizes.ahead + 1, sizes.nodes, sizes.layers, sizes.own_table)

    @property
    def nodes(self) -> int:
        return min(self.capacity, 1 + self.beams * (self.length - 1))

    def draft(self, state, sequences, sampling):
        beams_BMC = self.search(state.hidden_BD, sequences, sampling)
        tokens_BN, parent_BN, live_BN, _ = pack(beams_BMC, self.nodes)
        valid_BN = live_BN & state.known_B[:, None]
        # A node that is not used follows the pending token, and is never accepted.
        here_1N = jnp.arange(self.nodes, dtype=jnp.int32)[None]
        parent_BN = jnp.where((parent_BN < 0) & (here_1N > 0), 0, parent_BN)
        return Draft(tokens_BN, valid_BN, parent_BN, self.length - 1), state

    def search(self, hidden_BD: jax.Array, sequences, sampling) -> jax.Array:
        """Beam search: the pending token and what may follow, int32 `[B, M, C]`, best first."""
        batch, beams = len(hidden_BD), self.beams
        pending_B11 = sequences.window(1)[:, :, None]
        beams_BMC = jnp.broadcast_to(pending_B11, (batch, beams, self.length))
        context_BMD = jnp.broadcast_to(hidden_BD[:, None], (batch, beams, hidden_BD.shape[1]))
        only_1M = jnp.where(jnp.arange(beams, dtype=jnp.int32)[None] == 0, jnp.float32(0), NEVER)

        def step(carry, ahead):
            beams_BMC, state_BMD, score_BM = carry
            last_BM = jax.lax.dynamic_index_in_dim(beams_BMC, ahead - 1, 2, keepdims=False)
            state_BMD = self.cell(last_BM, state_BMD)
            ahead_M = jnp.full(beams, ahead, jnp.int32)
            logits_BMV = self.logits(context_BMD, state_BMD)
            logits_BMV = perturbed(logits_BMV, sequences, ahead_M, sampling)
            score_BMV = jax.nn.log_softmax(logits_BMV, axis=-1) + score_BM[:, :, None]
            # The best M over all are among the best M of each beam.
            top_BMM, token_BMM = jax.lax.top_k(score_BMV, beams)
            score_BM, best_BM = jax.lax.top_k(top_BMM.reshape(batch, -1), beams)
            token_BM = take_rows(token_BMM.reshape(batch, -1), best_BM)
            beams_BMC, state_BMD = (take_rows(x, best_BM // beams) for x in (beams_BMC, state_BMD))
            beams_BMC = jax.lax.dynamic_update_index_in_dim(beams_BMC, token_BM, ahead, 2)
            return (beams_BMC, state_BMD, score_BM), None

        score_BM = jnp.broadcast_to(only_1M, (batch, beams))
        first = (beams_BMC, jnp.zeros_like(context_BMD), score_BM)
        ahead = jnp.arange(1, self.length, dtype=jnp.int32)
        (beams_BMC, _, _), _ = jax.lax.scan(step, first, ahead)
        return beams_BMC

    def cell(self, tokens_BX: jax.Array, state_BXD: jax.Array) -> jax.Array:
        """`s = SiLU(W e(token) + U s + b)`, after one more token."""
        own, e_BXD = self.own, self.tables.embed_VD[tokens_BX].astype(jnp.float32)
        sum_BXD = linear(e_BXD, own['w']) + linear(state_BXD, own['u'])
        return jax.nn.silu(sum_BXD + own['b'][None, None])

    def logits(self, context_BXD: jax.Array, state_BXD: jax.Array) -> jax.Array:
        """Scores of the next token from the context `h` and the cell's state, `[B, X, V]`."""
        own = self.own
        x_BXE = jnp.concatenate([context_BXD, state_BXD], axis=-1)
        for i in range(self.layers):
            layer = own[f'layer_{i}']
            x_BXE = x_BXE + jax.nn.silu(linear(x_BXE, layer['w']) + layer['b'][None, None])
        if self.own_table:
            return product('bxe,ve->bxv', x_BXE, own['out'])
        head_VD = self.tables.head_VD.astype(jnp.float32)
        return product('bxd,vd->bxv', linear(x_BXE, own['project']), head_VD)

    def new_weights(self, key, tables):
        """Random weights."""
        (vocab, width), keys = tables.embed_VD.shape, iter(jax.random.split(key, self.layers + 3))
        own = {name: normal(next(keys), (width, width), width) for name in 'wu'}
        own['b'] = jnp.zeros(width, jnp.float32)
        for i in range(self.layers):
            w = normal(next(keys), (2 * width, 2 * width), 2 * width)
            own[f'layer_{i}'] = {'w': w, 'b': jnp.zeros(2 * width, jnp.float32)}
        if self.own_table:
            return own | {'out': normal(next(keys), (vocab, 2 * width), 2 * width)}
        return own | {'project': normal(next(keys), (2 * width, width), 2 * width)}

    def loss(self, answers):
        """The sum of the mean cross-entropies of `length - 1` steps."""
        hidden_BAD, read_BA = answers.hidden_BAD, answers.labels_BA
        state_BAD, loss, metrics = jnp.zeros_like(hidden_BAD), jnp.float32(0), {}
        for k in range(1, self.length):
            state_BAD = self.cell(read_BA, state_BAD)
            logits_BAV = self.logits(hidden_BAD, state_BAD)
            ce, metrics[f'accuracy_{k}'] = answers.scored(logits_BAV, k)
            loss, read_BA = loss + ce, answers.later(k)[0]
        return loss, metrics
