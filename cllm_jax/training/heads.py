"""Objectives of trained drafters: Medusa, ReDrafter, EAGLE on a frozen model; Medusa-2 and SPACE.

They learn from the same packed batches as a CLLM: the answers are the model's own (the fixed points
of its trajectories), so that cross-entropy on them is distillation, or the references of a dataset.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from cllm_jax.drafters.eagle import Eagle
from cllm_jax.drafters.medusa import RANKS, Medusa, tree_of, usual
from cllm_jax.drafters.redrafter import ReDrafter
from cllm_jax.drafters.space import Space
from cllm_jax.drafters.trained import HeadWeights, borrow
from cllm_jax.errors import ConfigError, at_least
from cllm_jax.hf.load import Model
from cllm_jax.model.llama import Llama, param_axes
from cllm_jax.training.losses import cross_entropy
from cllm_jax.training.objective import Objective, Trained
from cllm_jax.training.packing import Batch
from cllm_jax.training.step import LossWeights, text_loss, visible

Kind = Literal['medusa', 'redrafter', 'eagle', 'space']
DECAY = 0.8
"""Weight of a Medusa head relative to the one before it (arXiv 2401.10774, section 2.2.1)."""
TOKEN_WEIGHT = 0.1
"""Weight of EAGLE's token loss beside its feature loss (arXiv 2401.15077, section 4.2)."""


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
    """Weight of the drafter's loss beside the model's, if joint."""

    def __post_init__(self):
        at_least(self, nodes=2, ahead=1, beams=1, layers=0, joint_weight=0)


def drafter_of(kind: Kind, sizes: HeadsConfig, model: Model) -> Any:
    """The drafter to train.

    Raises:
      ConfigError: sizes that the method cannot have, or no token that could be SPACE's mask.
    """
    if kind == 'medusa':
        tree = tree_of(usual(sizes.ahead), sizes.nodes - 1)
        return Medusa(sizes.ahead, tree, sizes.own_table)
    if kind == 'redrafter':
        return ReDrafter(sizes.beams, sizes.ahead + 1, sizes.nodes, sizes.layers, sizes.own_table)
    if kind == 'eagle':
        return Eagle(model.config, sizes.ahead, sizes.beams, sizes.nodes)
    mask = model.config.pad_id if model.config.pad_id is not None else model.config.bos_id
    if mask is None:
        raise ConfigError(
            f'{model.source}: neither pad_token_id nor bos_token_id, one of which would be the '
            'mask of SPACE; set pad_token_id in its config.json'
        )
    return Space(mask, sizes.ahead)


def of_heads(
    kind: Kind,
    sizes: HeadsConfig,
    model: Model,
    weights: LossWeights,
    calibration: Batch,
    seed: int,
    compute: Any = None,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> Objective:
    """The objective of a trained drafter.

    Args:
      weights: of SPACE, and of the model's own loss in a joint training.
      calibration: a batch by whose answers Medusa's tree is chosen.
      seed: of the new weights.
    """
    drafter = drafter_of(kind, sizes, model)
    module = Llama(model.config, model.params['norm'].dtype, compute, remat, mesh)
    if isinstance(drafter, Space):
        return Objective(
            params=model.params,
            axes=param_axes(model.config),
            loss=text_loss(module, weights),
            trained=lambda params: Trained(
                dataclasses.replace(model, params=params), drafter, own={}
            ),
        )
    tables = borrow(model, None)
    own = jax.jit(drafter.new_weights)(jax.random.key(seed), tables.embed_VD, tables.head_VD)
    axes = jax.tree.map(lambda leaf: PartitionSpec(*[None] * leaf.ndim), own)
    joint = (weights.ar_weight, sizes.joint_weight) if sizes.joint else None
    loss = partial(_loss, drafter, module, joint)
    params, frozen = own, model.params
    if sizes.joint:
        params, frozen = {'model': model.params, 'drafter': own}, ()
        axes = {'model': param_axes(model.config), 'drafter': axes}

    def trained(params: Any) -> Trained:
        now, own = (params['model'], params['drafter']) if sizes.joint else (model.params, params)
        changed = dataclasses.replace(model, params=now)
        weights, chosen = borrow(changed, own), drafter
        if isinstance(drafter, Medusa):
            chosen = calibrated(drafter, module, now, weights, calibration)
        return Trained(changed, chosen, weights, own, new_model=sizes.joint)

    return Objective(params, axes, loss, trained, frozen)


def _loss(drafter, module, joint, params, frozen, batch, totals):
    """Loss and metrics of a drafter; with the weights `joint`, of the model and it together."""
    own, now = (params, frozen) if joint is None else (params['drafter'], params['model'])
    hidden_BTD, _ = module.apply(
        {'params': now}, batch.tokens_BT, batch.positions_BT, visible(batch)
    )
    hidden_BTD = hidden_BTD.astype(jnp.float32)
    weights = HeadWeights(own, now['embed'], now.get('head', now['embed']))
    if isinstance(drafter, Eagle):
        loss, metrics = eagle_loss(drafter, weights, hidden_BTD, batch, totals['later_A'])
    else:
        rule = medusa_loss if isinstance(drafter, Medusa) else redrafter_loss
        loss, metrics = rule(drafter, weights, *_answers(hidden_BTD, batch), totals['later_A'])
    if joint is not None:
        hidden_BAD, labels_BA, weight_BA = _answers(hidden_BTD, batch)
        logits_BAV = module.apply({'params': now}, hidden_BAD, method='logits')
        ar = cross_entropy(logits_BAV, labels_BA, weight_BA, totals['ar'])
        metrics['ar_loss'], loss = ar, joint[0] * ar + joint[1] * loss
    return loss, metrics | {'loss': loss}


def _answers(hidden_BTD: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The hidden states behind which answer tokens are chosen, those tokens, and their weights."""
    answers = batch.ar_weight_BA.shape[1]
    rows_BA1 = batch.rows_BR[:, :answers, None]
    hidden_BAD = jnp.take_along_axis(hidden_BTD, rows_BA1, axis=1)
    return hidden_BAD, batch.labels_BR[:, :answers], batch.ar_weight_BA


def _later(labels_BA: jax.Array, weight_BA: jax.Array, by: int) -> tuple[jax.Array, jax.Array]:
    """The labels `by` places later, with weight 0 where the answer has ended before."""
    by = min(by, labels_BA.shape[1])
    pad = ((0, 0), (0, by))
    return jnp.pad(labels_BA[:, by:], pad), jnp.pad(weight_BA[:, by:], pad)


def _scored(logits_BAV, labels_BA, weight_BA, total) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy, and the share of right first guesses."""
    right_BA = (jnp.argmax(logits_BAV, axis=-1) == labels_BA).astype(jnp.float32)
    share = (right_BA * weight_BA).sum() / jnp.maximum(total, 1e-9)
    return cross_entropy(logits_BAV, labels_BA, weight_BA, total), share


def medusa_loss(
    drafter: Medusa, weights: HeadWeights, hidden_BAD, labels_BA, weight_BA, later_A
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`sum_k 0.8^k CE(head k, the token k places behind the label)`, each CE a mean over tokens.

    Args:
      hidden_BAD, labels_BA, weight_BA: hidden states, the tokens chosen behind them, their weights.
      later_A: total weight of all labels from each place on, over the whole batch.
    """
    logits_BAKV = drafter.logits(weights, hidden_BAD)
    loss, metrics = jnp.float32(0), {}
    for k in range(drafter.heads):
        later = _later(labels_BA, weight_BA, k + 1)
        ce, metrics[f'accuracy_{k + 1}'] = _scored(logits_BAKV[:, :, k], *later, later_A[k + 1])
        loss = loss + DECAY ** (k + 1) * ce
    return loss, metrics


def redrafter_loss(
    drafter: ReDrafter, weights: HeadWeights, hidden_BAD, labels_BA, weight_BA, later_A
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of the mean cross-entropies of `length - 1` steps; see `medusa_loss`."""
    state_BAD, (loss, metrics) = jnp.zeros_like(hidden_BAD), (jnp.float32(0), {})
    read_BA = labels_BA
    for k in range(1, drafter.length):
        state_BAD = drafter.cell(weights, read_BA, state_BAD)
        logits_BAV = drafter.logits(weights, hidden_BAD, state_BAD)
        read_BA, weight = _later(labels_BA, weight_BA, k)
        ce, metrics[f'accuracy_{k}'] = _scored(logits_BAV, read_BA, weight, later_A[k])
        loss = loss + ce
    return loss, metrics


def eagle_loss(
    drafter: Eagle, weights: HeadWeights, hidden_BTD: jax.Array, batch: Batch, later_A: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`SmoothL1(feature) + 0.1 CE(what the model says after either)`, means over tokens."""
    total = jnp.maximum(later_A[1], 1e-9)
    feature_BTD, _ = drafter.layer(
        weights,
        hidden_BTD[:, :-1],
        batch.tokens_BT[:, 1:],
        batch.positions_BT[:, :-1],
        visible(batch)[:, :-1, :-1],
    )
    _, labels_BA, weight_BA = _answers(hidden_BTD, batch)
    labels_BA, weight_BA = _later(labels_BA, weight_BA, 1)
    rows_BA1 = jnp.minimum(batch.rows_BR[:, : labels_BA.shape[1], None], hidden_BTD.shape[1] - 2)
    guess_BAD = jnp.take_along_axis(feature_BTD, rows_BA1, axis=1)
    true_BAD = jax.lax.stop_gradient(jnp.take_along_axis(hidden_BTD, rows_BA1 + 1, axis=1))
    apart_BA = optax.huber_loss(guess_BAD, true_BAD).mean(axis=-1)
    feature = (apart_BA * weight_BA).sum() / total
    said_BAV = jax.nn.softmax(drafter.logits(weights, true_BAD), axis=-1)
    logits_BAV = drafter.logits(weights, guess_BAD)
    token_BA = -(said_BAV * jax.nn.log_softmax(logits_BAV, axis=-1)).sum(axis=-1)
    token = (token_BA * weight_BA).sum() / total
    _, share = _scored(logits_BAV, labels_BA, weight_BA, total)
    return feature + TOKEN_WEIGHT * token, {
        'feature_loss': feature, 'token_loss': token, 'accuracy_1': share,
    }  # fmt: skip


def calibrated(
    drafter: Medusa, module: Llama, params: Any, weights: HeadWeights, batch: Batch
) -> Medusa:
    """The same heads with the tree of as many nodes that the answers of a batch ask for."""
    right_KR = jax.device_get(_hits(drafter, module, params, weights, batch))
    return dataclasses.replace(drafter, choices=tree_of(right_KR, len(drafter.choices)))


@partial(jax.jit, static_argnums=(0, 1))
def _hits(drafter, module, params, weights, batch):
    """How often guess r of head k is right, `[K, R]`."""
    hidden_BTD, _ = module.apply(
        {'params': params}, batch.tokens_BT, batch.positions_BT, visible(batch)
    )
    hidden_BAD, labels_BA, weight_BA = _answers(hidden_BTD.astype(jnp.float32), batch)
    _, best_BAKR = jax.lax.top_k(drafter.logits(weights, hidden_BAD), RANKS)
    rows = []
    for k in range(drafter.heads):
        labels, weight = _later(labels_BA, weight_BA, k + 1)
        hit_BAR = (best_BAKR[:, :, k] == labels[:, :, None]) * weight[:, :, None]
        rows.append(hit_BAR.sum((0, 1)) / jnp.maximum(weight.sum(), 1))
    return jnp.stack(rows)
