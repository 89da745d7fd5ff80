"""What trained drafters share: weights, the target's tables and last hidden state, what they learn.

A trained drafter is one file: how it drafts, its weights (`new_weights`), its loss, which sizes it
reads (`of_size`) and its title. `training/objective.py` trains any of them.
"""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import optax
from flax import struct

from cllm_jax.decoding.drafter import Drafter, Sequences, Verdict
from cllm_jax.decoding.sampling import Sampling, gumbel
from cllm_jax.errors import ConfigError, at_least
from cllm_jax.hf.model import Model
from cllm_jax.model.llama import take_rows


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """Sizes of a drafter that is trained; each method reads those it has."""

    nodes: int = 16
    """Medusa, ReDrafter, EAGLE: tokens verified per forward, the pending one included."""
    ahead: int = 4
    """Tokens guessed ahead: Medusa's heads, the length of ReDrafter's beams and the depth of
    EAGLE's tree, SPACE's masks."""
    beams: int = 4
    """ReDrafter: beams; EAGLE: nodes extended per level."""
    layers: int = 2
    """ReDrafter: residual layers."""
    own_table: bool = True
    """Medusa, ReDrafter: an output table of its own (of each head), instead of the model's."""
    joint: bool = False
    """Medusa, ReDrafter, EAGLE: train the model too (Medusa-2)."""
    joint_weight: float = 0.2
    """Weight of the drafter's loss next to the model's, if joint."""

    def __post_init__(self):
        at_least(self, nodes=2, ahead=1, beams=1, layers=0, joint_weight=0)


@struct.dataclass
class TargetTables:
    """What a drafter borrows from the target."""

    embed_VD: jax.Array
    head_VD: jax.Array
    """The target's output table; the embedding where they are tied."""


def tables_of(params: Any) -> TargetTables:
    """The tables of a model's parameters."""
    return TargetTables(params['embed'], params.get('head', params['embed']))


@struct.dataclass
class AnswerBatch:
    """What a drafter learns from: answers, and the target's float32 last hidden states.

    The rows are packed clean text (`training/packing.py`). Answer token a of a row is chosen after
    the hidden state at `rows_BA[a]`.
    """

    hidden_BTD: jax.Array
    tokens_BT: jax.Array
    positions_BT: jax.Array
    mask_BTT: jax.Array
    rows_BA: jax.Array
    labels_BA: jax.Array
    weight_BA: jax.Array
    later_A: jax.Array
    """Total weight of all labels from each place on, over the whole batch."""

    @property
    def hidden_BAD(self) -> jax.Array:
        """The hidden states after which answer tokens are chosen."""
        return take_rows(self.hidden_BTD, self.rows_BA)

    def later(self, by: int) -> tuple[jax.Array, jax.Array]:
        """The labels `by` places later, and their weights: 0 where the answer ended earlier."""
        by = min(by, self.labels_BA.shape[1])
        pad = ((0, 0), (0, by))
        return jnp.pad(self.labels_BA[:, by:], pad), jnp.pad(self.weight_BA[:, by:], pad)

    def scored(self, logits_BAV: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
        """Mean cross-entropy for the labels `by` places later, and share of right first guesses."""
        (labels_BA, weight_BA), total = self.later(by), jnp.maximum(self.later_A[by], 1e-9)
        right_BA = (jnp.argmax(logits_BAV, axis=-1) == labels_BA).astype(jnp.float32)
        loss_BA = optax.softmax_cross_entropy_with_integer_labels(logits_BAV, labels_BA)
        return (loss_BA * weight_BA).sum() / total, (right_BA * weight_BA).sum() / total


class TrainedDrafter(Drafter):
    """A drafter with weights of its own, or one that needs a model trained for it (SPACE).

    Its fields `own` (a tree of named arrays) and `tables` are None until `with_weights`.
    """

    kind: ClassVar[str]
    """Its name in the registry, in recipes and in `drafter.json`."""
    trains_model: ClassVar[bool] = False
    """Whether it is the model itself that learns to draft."""

    @classmethod
    def of_size(cls, sizes: HeadsConfig, model: Model) -> Self:
        """The drafter to train for a model, without weights; ConfigError for impossible sizes."""
        raise ConfigError(f'drafter {cls.kind}: train does not know its sizes; define of_size')

    def check_model(self, model: Model, where: str) -> None:
        """Raise ConfigError, naming `where` it is from, for a model that it cannot draft for."""

    def new_weights(self, key: jax.Array, tables: TargetTables) -> Any:
        """Weights to begin with."""
        return {}

    def with_weights(self, own: Any, params: Any) -> Self:
        """The same drafter with weights, for a model with these parameters."""
        return self.replace(own=own, tables=tables_of(params))

    def init(self, sequences: Sequences) -> Any:
        """By default what a head reads, the target's last hidden state (`LastHidden`)."""
        return LastHidden.unknown(self.tables, sequences)

    def update(self, state, draft, verdict, sequences, sampling):
        return state.after(verdict)

    def loss(self, answers: AnswerBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of its weights, a float32 scalar, and metrics."""
        raise ConfigError(f'drafter {self.kind}: has no loss of its own; train its model')

    def calibrated(self, answers: AnswerBatch) -> Self:
        """The drafter with whatever settings it chooses by how well it does on some answers."""
        return self


@struct.dataclass
class LastHidden:
    """The target's hidden state at the last cached token, where the pending one was chosen."""

    hidden_BD: jax.Array
    known_B: jax.Array
    """False before the first forward."""

    @classmethod
    def unknown(cls, tables: TargetTables, sequences: Sequences) -> Self:
        """The state before the first forward."""
        rows, width = len(sequences.length_B), tables.embed_VD.shape[1]
        return cls(jnp.zeros((rows, width), jnp.float32), jnp.zeros(rows, bool))

    def after(self, verdict: Verdict) -> Self:
        """The state after a verification; that of a finished row is never used."""
        hidden_BD = take_rows(verdict.hidden_BND, last_of(verdict))[:, 0]
        return LastHidden(hidden_BD.astype(jnp.float32), jnp.ones_like(self.known_B))


def last_of(verdict: Verdict) -> jax.Array:
    """The node after which the new pending token was chosen, int32 `[B, 1]`."""
    return take_rows(verdict.path_BP, jnp.maximum(verdict.count_B - 1, 0)[:, None])


def perturbed(
    logits_BTV: jax.Array, sequences: Sequences, ahead_T: jax.Array, sampling: Sampling
) -> jax.Array:
    """A drafter's logits for the tokens `ahead` of the pending one, as the target will choose.

    With the noise of their positions the best guess is the one that the target is most likely to
    choose (`decoding/sampling.py`). At temperature 0 they stay as they are.
    """
    if sampling.greedy:
        return logits_BTV
    positions_BT = sequences.length_B[:, None] + ahead_T[None]
    noise_BTV = gumbel(sequences.keys_B, positions_BT, logits_BTV.shape[-1])
    return logits_BTV / sampling.temperature + noise_BTV


def normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Random weights with the usual spread, `fan_in ** -0.5`."""
    return jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5
