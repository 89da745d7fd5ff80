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
from cllm_jax.decoding.tree import causal_mask
from cllm_jax.drafters.trained import (
    AnswerBatch,
    HeadsConfig,
    TargetTables,
    TrainedDrafter,
    normal,
    perturbed,
)
from cllm_jax.errors import at_least
from cllm_jax.hf.load import Model
from cllm_jax.model.attention import rope_tables
from cllm_jax.model.cache import Cache, init_cache
from cllm_jax.model.config import LlamaConfig
from cllm_jax.model.llama import Block
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

    `width` 1 is a chain. `config` is the target's; the layer has its sizes.
    """

    config: LlamaConfig = setting()
    backend: Backend = setting(ANY)
    """The target's, too."""
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
    def of_size(cls, sizes: HeadsConfig, model: Model) -> 'Eagle':
        return cls(model.config, model.backend, sizes.ahead, sizes.beams, sizes.nodes)

    @property
    def nodes(self) -> int:
        seen = self.width + (self.depth - 1) * self.width**2
        return min(self.capacity, 1 + seen)

    @property
    def _scratch(self) -> int:
        """Rows of the cache that the nodes of a tree take."""
        return (self.depth - 1) * self.width

    def init(self, sequences: Sequences) -> Features:
        batch, slots = sequences.tokens_BS.shape
        one = dataclasses.replace(self.config, layers=1)
        cache = init_cache(one, batch, slots + self._scratch, jnp.float32)
        return Features(cache, jnp.zeros((batch, self.config.dim)), jnp.zeros(batch, bool))

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
            feature_BWD, cache = self._extend(
                feature_BWD, token_BW, sees_BWX, length_B, level, cache
            )
            child_BWW, step_BWW = self._best(feature_BWD, sequences, sampling, level + 1)
            total_BX = (front_BW[:, :, None] + step_BWW).reshape(batch, -1)
            child_BX = child_BWW.reshape(batch, -1)
            earlier = sum(scores_BX.shape[1] for scores_BX in scores)
            tokens.append(child_BX)
            scores.append(total_BX)
            parents.append(jnp.repeat(entry_BW, width, axis=1))
            front_BW, best_BW = jax.lax.top_k(total_BX, width)
            entry_BW, from_BW = earlier + best_BW, best_BW // width
            token_BW = jnp.take_along_axis(child_BX, best_BW, axis=1)
            feature_BWD = jnp.take_along_axis(feature_BWD, from_BW[:, :, None], axis=1)
            sees_BWX = jnp.take_along_axis(sees_BWX, from_BW[:, :, None], axis=1)
        draft = self._rerank(sequences, tokens, scores, parents, state.known_B)
        return draft, state.replace(cache=cache)

    def update(self, state: Features, draft: Draft, verdict: Verdict, sequences, sampling):
        length_B = sequences.length_B
        if verdict.prompt_BTD is None:
            hidden_BXD = jnp.take_along_axis(
                verdict.hidden_BND, verdict.path_BP[:, :, None], axis=1
            )
            tokens_BX = jnp.take_along_axis(verdict.y_BN, verdict.path_BP, axis=1)
            start_B, last_B = length_B, jnp.maximum(verdict.count_B - 1, 0)
        else:  # the whole prompt, and the first token of the answer, its draft being empty
            hidden_BXD, start_B, last_B = verdict.prompt_BTD, jnp.zeros_like(length_B), length_B
            tokens_BX = sequences.tokens_BS[:, 1 : hidden_BXD.shape[1] + 1]
            first_B1 = verdict.y_BN[:, :1]
            tokens_BX = put(tokens_BX, length_B, first_B1, jnp.ones_like(first_B1, bool))
        steps_X = jnp.arange(tokens_BX.shape[1], dtype=jnp.int32)
        positions_BX = start_B[:, None] + steps_X[None]
        mask_BXS = causal_mask(positions_BX, state.cache.slots)
        feature_BXD, cache = self.layer(
            hidden_BXD, tokens_BX, positions_BX, mask_BXS, state.cache, start_B
        )
        feature_BD = jnp.take_along_axis(feature_BXD, last_B[:, None, None], axis=1)[:, 0]
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
        own, config = self.own, self.config
        e_BXD = self.tables.embed_VD[tokens_BX].astype(jnp.float32)
        both_BXE = jnp.concatenate([feature_BXD.astype(jnp.float32), e_BXD], axis=-1)
        sin, cos = rope_tables(
            positions_BX, config.head_dim, config.rope_theta, config.rope_scaling
        )
        kv = None if cache is None else (cache.k_RSH[0], cache.v_RSH[0])
        x_BXD, kv = Block(config, backend=self.backend).apply(
            {'params': own['layer']}, linear(both_BXE, own['join']), sin, cos, mask_BXS, kv, start_B
        )
        return x_BXD, None if cache is None else Cache((kv[0],), (kv[1],))

    def logits(self, feature_BXD: jax.Array) -> jax.Array:
        """The target's own scores for features, float32 `[B, X, V]`."""
        return product('bxd,vd->bxv', feature_BXD, self.tables.head_VD.astype(jnp.float32))

    def new_weights(self, key: jax.Array, tables: TargetTables) -> dict:
        """Random weights; `join` begins by passing the feature on."""
        width, keys = self.config.dim, jax.random.split(key)
        x_11D = jnp.zeros((1, 1, width))
        angles = jnp.zeros((1, 1, 1, self.config.head_dim // 2))
        mask_111 = jnp.ones((1, 1, 1), bool)
        boxed = Block(self.config).init(keys[0], x_11D, angles, angles, mask_111)
        join = normal(keys[1], (width, width), width)
        return {
            'layer': nn.unbox(boxed)['params'],
            'join': jnp.concatenate([jnp.eye(width), join]),
        }

    def _extend(self, feature_BWD, token_BW, sees_BWX, length_B, level, cache):
        """The features after the nodes of one level, whose rows follow the committed ones."""
        start_B = length_B + (level - 1) * self.width
        positions_BW = jnp.broadcast_to((length_B + level - 1)[:, None], token_BW.shape)
        row_BS = jnp.arange(cache.slots, dtype=jnp.int32)[None] - length_B[:, None]
        inside_BS = (row_BS >= 0) & (row_BS < self._scratch)
        at_B1S = jnp.clip(row_BS, 0, self._scratch - 1)[:, None]
        own_BWS = jnp.take_along_axis(sees_BWX, at_B1S, axis=2) & inside_BS[:, None]
        mask_BWS = (row_BS < 0)[:, None] | own_BWS
        return self.layer(feature_BWD, token_BW, positions_BW, mask_BWS, cache, start_B)

    def _best(self, feature_BXD, sequences, sampling, ahead: int):
        """The likeliest tokens so far `ahead` of each feature, and their log-probabilities."""
        ahead_X = jnp.full(feature_BXD.shape[1], ahead, jnp.int32)
        logits_BXV = self.logits(feature_BXD)
        logits_BXV = perturbed(logits_BXV, sequences, ahead_X, sampling)
        score_BXW, token_BXW = jax.lax.top_k(jax.nn.log_softmax(logits_BXV, axis=-1), self.width)
        return token_BXW, score_BXW

    def _rerank(self, sequences, tokens, scores, parents, known_B) -> Draft:
        """The likeliest of all nodes; one never ranks before the one it follows."""
        columns = (jnp.concatenate(c, axis=1) for c in (tokens, scores, parents))
        token_BX, score_BX, parent_BX = columns
        best_BN = jnp.sort(jax.lax.top_k(score_BX, self.nodes - 1)[1], axis=1)
        token_BN, parent_BN = (
            jnp.take_along_axis(x_BX, best_BN, axis=1) for x_BX in (token_BX, parent_BX)
        )
        earlier_BNN = best_BN[:, None] < parent_BN[:, :, None]
        parent_BN = jnp.where(parent_BN < 0, 0, 1 + earlier_BNN.sum(axis=2, dtype=jnp.int32))
        pending_B1 = sequences.window(1)
        token_BN = jnp.concatenate([pending_B1, token_BN], axis=1)
        parent_BN = jnp.pad(parent_BN, ((0, 0), (1, 0)), constant_values=-1)
        valid_BN = jnp.broadcast_to(known_B[:, None], token_BN.shape)
        return Draft(token_BN, valid_BN, parent_BN, self.depth)

    def loss(self, answers: AnswerBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`SmoothL1(feature) + 0.1 CE(what the model says after either)`, means over tokens."""
        total = jnp.maximum(answers.later_A[1], 1e-9)
        hidden_BTD, weight_BA = answers.hidden_BTD, answers.later(1)[1]
        feature_BTD, _ = self.layer(
            hidden_BTD[:, :-1],
            answers.tokens_BT[:, 1:],
            answers.positions_BT[:, :-1],
            answers.mask_BTT[:, :-1, :-1],
        )
        rows_BA1 = jnp.minimum(answers.rows_BA[:, :, None], hidden_BTD.shape[1] - 2)
        guess_BAD = jnp.take_along_axis(feature_BTD, rows_BA1, axis=1)
        true_BAD = jax.lax.stop_gradient(jnp.take_along_axis(hidden_BTD, rows_BA1 + 1, axis=1))
        apart_BA = optax.huber_loss(guess_BAD, true_BAD).mean(axis=-1)
        feature = (apart_BA * weight_BA).sum() / total
        said_BAV = jax.nn.softmax(self.logits(true_BAD), axis=-1)
        logits_BAV = self.logits(guess_BAD)
        token_BA = optax.softmax_cross_entropy(logits_BAV, said_BAV)
        token = (token_BA * weight_BA).sum() / total
        metrics = {'feature_loss': feature, 'token_loss': token}
        metrics['accuracy_1'] = answers.scored(logits_BAV, 1)[1]
        return feature + TOKEN_WEIGHT * token, metrics
