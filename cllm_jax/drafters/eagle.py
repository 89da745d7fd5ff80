"""EAGLE (arXiv 2401.15077, and the dynamic tree of EAGLE-2, 2406.16858).

One decoder layer continues the target's *features* (last hidden states) instead of its tokens: from
the feature of a token and the token after it, it predicts the next feature, which the target's own
output table turns into guesses. It has a KV cache of its own. The tree grows where the guesses are
likely: every level extends the best nodes so far, and the most likely of all are verified.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from cllm_jax.decoding.drafter import Draft, Sequences, Verdict, put, setting
from cllm_jax.decoding.tree import after_cache, causal_mask
from cllm_jax.drafters.trained import TargetTables, TrainedDrafter, normal, perturbed
from cllm_jax.errors import at_least
from cllm_jax.model.attention import rope_tables
from cllm_jax.model.cache import Cache, init_cache
from cllm_jax.model.config import LlamaConfig
from cllm_jax.model.llama import Block, take_rows
from cllm_jax.model.precision import linear, product
from cllm_jax.runtime.backend import ANY, Backend

TOKEN_WEIGHT = 0.1
"""Weight of the token loss relative to the feature loss (arXiv 2401.15077, section 4.2)."""


@struct.dataclass
class Features:
    """The layer's cache, and its prediction of the pending token's feature."""

    cache: Cache
    feature_BD: jax.Array
    known_B: jax.Array


@struct.dataclass
class Eagle(TrainedDrafter):
    """A tree of `capacity` nodes from `depth` levels, of each of which `width` nodes are extended.

    `width` 1 is a chain. `config` and `backend` are the target's; the layer has its sizes.
    """

    config: LlamaConfig = setting()
    backend: Backend = setting(ANY)
    depth: int = setting(4)
    width: int = setting(4)
    capacity: int = setting(16)
    own: Any = None
    tables: TargetTables | None = None
    title = 'EAGLE'
    kind = 'eagle'
    reads_prompt = True

    def __post_init__(self):
        at_least(self, depth=1, width=1, capacity=2)

    @classmethod
    def of_size(cls, sizes, model):
        return cls(model.module.config, model.backend, sizes.ahead, sizes.beams, sizes.nodes)

    @property
    def nodes(self) -> int:
        return min(self.capacity, 1 + self.width + (self.depth - 1) * self.width**2)

    @property
    def _scratch(self) -> int:
        """Rows of the cache that the nodes of a tree take."""
        return (self.depth - 1) * self.width

    def init(self, sequences: Sequences) -> Features:
        batch, slots = sequences.tokens_BS.shape
        one = dataclasses.replace(self.config, layers=1)
        cache = init_cache(one, batch, slots + self._scratch, jnp.float32)
        feature_BD = jnp.zeros((batch, self.config.dim), jnp.float32)
        return Features(cache, feature_BD, jnp.zeros(batch, bool))

    def draft(self, state: Features, sequences: Sequences, sampling):
        length_B, width = sequences.length_B, self.width
        batch = len(length_B)
        here_1W = jnp.arange(width, dtype=jnp.int32)[None]
        # What has been thought of so far: tokens, total log-probability, and the entry before.
        token_BW, score_BW = self._best(state.feature_BD[:, None], sequences, sampling, 1)
        tokens, scores = [token_BW[:, 0]], [score_BW[:, 0]]
        parents = [jnp.full((batch, width), -1, jnp.int32)]
        # The nodes that are extended: their entries, scores, features and ancestors among the rows.
        entry_BW, front_BW = jnp.broadcast_to(here_1W, (batch, width)), scores[0]
        token_BW, feature_BWD = tokens[0], jnp.repeat(state.feature_BD[:, None], width, axis=1)
        sees_BWX = jnp.zeros((batch, width, self._scratch), bool)
        cache = state.cache
        for level in range(1, self.depth):
            rows_W = (level - 1) * width + jnp.arange(width, dtype=jnp.int32)
            own_WX = rows_W[:, None] == jnp.arange(self._scratch, dtype=jnp.int32)[None]
            sees_BWX = sees_BWX | own_WX[None]
            # The rows of the nodes follow the committed ones.
            positions_BW = jnp.broadcast_to((length_B + level - 1)[:, None], token_BW.shape)
            mask_BWS = after_cache(sees_BWX, length_B, cache.slots)
            rows = (token_BW, positions_BW, mask_BWS, cache, length_B + (level - 1) * width)
            feature_BWD, cache = self.layer(feature_BWD, *rows)
            child_BWW, step_BWW = self._best(feature_BWD, sequences, sampling, level + 1)
            total_BX = (front_BW[:, :, None] + step_BWW).reshape(batch, -1)
            child_BX = child_BWW.reshape(batch, -1)
            earlier = sum(scores_BX.shape[1] for scores_BX in scores)
            tokens.append(child_BX)
            scores.append(total_BX)
            parents.append(jnp.repeat(entry_BW, width, axis=1))
            front_BW, best_BW = jax.lax.top_k(total_BX, width)
            entry_BW, from_BW = earlier + best_BW, best_BW // width
            token_BW = take_rows(child_BX, best_BW)
            feature_BWD, sees_BWX = (take_rows(x, from_BW) for x in (feature_BWD, sees_BWX))
        draft = self._rerank(sequences, (tokens, scores, parents), state.known_B)
        return draft, state.replace(cache=cache)

    def update(self, state: Features, draft: Draft, verdict: Verdict, sequences, sampling):
        length_B = sequences.length_B
        if verdict.prompt_BTD is None:
            hidden_BXD = take_rows(verdict.hidden_BND, verdict.path_BP)
            tokens_BX = take_rows(verdict.y_BN, verdict.path_BP)
            start_B, last_B = length_B, jnp.maximum(verdict.count_B - 1, 0)
        else:  # the whole prompt, and the first token of the answer, its draft being empty
            hidden_BXD, start_B, last_B = verdict.prompt_BTD, jnp.zeros_like(length_B), length_B
            tokens_BX = sequences.tokens_BS[:, 1 : hidden_BXD.shape[1] + 1]
            first_B1 = verdict.y_BN[:, :1]
            tokens_BX = put(tokens_BX, length_B, first_B1, jnp.ones_like(first_B1, bool))
        positions_BX = start_B[:, None] + jnp.arange(tokens_BX.shape[1], dtype=jnp.int32)[None]
        mask_BXS = causal_mask(positions_BX, state.cache.slots)
        rows = (tokens_BX, positions_BX, mask_BXS, state.cache, start_B)
        feature_BXD, cache = self.layer(hidden_BXD, *rows)
        feature_BD = take_rows(feature_BXD, last_B[:, None])[:, 0]
        return Features(cache, feature_BD, jnp.ones_like(state.known_B))

    def layer(
        self,
        feature_BXD: jax.Array,
        tokens_BX: jax.Array,
        positions_BX: jax.Array,
        mask_BXS: jax.Array,
        cache: Cache | None = None,
        start_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """The next features, from features and the tokens after them; and the layer's cache."""
        own, c = self.own, self.config
        e_BXD = self.tables.embed_VD[tokens_BX].astype(jnp.float32)
        both_BXE = jnp.concatenate([feature_BXD.astype(jnp.float32), e_BXD], axis=-1)
        angles = rope_tables(positions_BX, c.head_dim, c.rope_theta, c.rope_scaling)
        into = cache and ((cache.k_RSH[0], cache.v_RSH[0]), start_B, feature_BXD.shape[1])
        # What is only drafted need not round like anything.
        layer, params = Block(c, backend=self.backend.exactly('off')), {'params': own['layer']}
        x_BXD, kv = layer.apply(params, linear(both_BXE, own['join']), *angles, mask_BXS, into)
        return x_BXD, None if cache is None else Cache((kv[0],), (kv[1],))

    def logits(self, feature_BXD: jax.Array) -> jax.Array:
        """The target's own scores for features, float32 `[B, X, V]`."""
        return product('bxd,vd->bxv', feature_BXD, self.tables.head_VD.astype(jnp.float32))

    def new_weights(self, key, tables):
        """Random weights; `join` begins by passing the feature on."""
        width, keys = self.config.dim, jax.random.split(key)
        x_11D, mask_111 = jnp.zeros((1, 1, width), jnp.float32), jnp.ones((1, 1, 1), bool)
        angles = jnp.zeros((1, 1, 1, self.config.head_dim // 2), jnp.float32)
        boxed = Block(self.config).init(keys[0], x_11D, angles, angles, mask_111)
        join = normal(keys[1], (width, width), width)
        join = jnp.concatenate([jnp.eye(width, dtype=jnp.float32), join])
        return {'layer': nn.unbox(boxed)['params'], 'join': join}

    def _best(self, feature_BXD, sequences, sampling, ahead: int):
        """The likeliest tokens so far `ahead` of each feature, and their log-probabilities."""
        ahead_X = jnp.full(feature_BXD.shape[1], ahead, jnp.int32)
        logits_BXV = perturbed(self.logits(feature_BXD), sequences, ahead_X, sampling)
        score_BXW, token_BXW = jax.lax.top_k(jax.nn.log_softmax(logits_BXV, axis=-1), self.width)
        return token_BXW, score_BXW

    def _rerank(self, sequences, columns, known_B) -> Draft:
        """The likeliest of all nodes; one never ranks before the one it follows."""
        token_BX, score_BX, parent_BX = (jnp.concatenate(x, axis=1) for x in columns)
        best_BN = jnp.sort(jax.lax.top_k(score_BX, self.nodes - 1)[1], axis=1)
        token_BN, parent_BN = take_rows(token_BX, best_BN), take_rows(parent_BX, best_BN)
        earlier_BNN = best_BN[:, None] < parent_BN[:, :, None]
        parent_BN = jnp.where(parent_BN < 0, 0, 1 + earlier_BNN.sum(axis=2, dtype=jnp.int32))
        token_BN = jnp.concatenate([sequences.window(1), token_BN], axis=1)
        parent_BN = jnp.pad(parent_BN, ((0, 0), (1, 0)), constant_values=-1)
        valid_BN = jnp.broadcast_to(known_B[:, None], token_BN.shape)
        return Draft(token_BN, valid_BN, parent_BN, self.depth)

    def loss(self, answers):
        """`SmoothL1(feature) + 0.1 CE(what the model says after either)`, means over tokens."""
        total = jnp.maximum(answers.later_A[1], 1e-9)
        hidden_BTD, weight_BA = answers.hidden_BTD, answers.later(1)[1]
        rest = answers.tokens_BT[:, 1:], answers.positions_BT[:, :-1], answers.mask_BTT[:, :-1, :-1]
        feature_BTD, _ = self.layer(hidden_BTD[:, :-1], *rest)
        rows_BA = jnp.minimum(answers.rows_BA, hidden_BTD.shape[1] - 2)
        guess_BAD = take_rows(feature_BTD, rows_BA)
        true_BAD = jax.lax.stop_gradient(take_rows(hidden_BTD, rows_BA + 1))
        apart_BA = optax.huber_loss(guess_BAD, true_BAD).mean(axis=-1)
        feature = (apart_BA * weight_BA).sum() / total
        said_BAV = jax.nn.softmax(self.logits(true_BAD), axis=-1)
        logits_BAV = self.logits(guess_BAD)
        token_BA = optax.softmax_cross_entropy(logits_BAV, said_BAV)
        token, accuracy = (token_BA * weight_BA).sum() / total, answers.scored(logits_BAV, 1)[1]
        metrics = {'feature_loss': feature, 'token_loss': token, 'accuracy_1': accuracy}
        return feature + TOKEN_WEIGHT * token, metrics
