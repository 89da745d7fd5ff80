"""One optimisation step: packed forward, losses, gradient, AdamW or Muon."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from optax.contrib import MuonDimensionNumbers, muon

from cllm_jax.errors import ConfigError, at_least, shares
from cllm_jax.model.llama import Llama
from cllm_jax.model.packed_attention import PackedMask
from cllm_jax.runtime.sharding import param_shardings, state_shardings
from cllm_jax.training.losses import cross_entropy, divergence
from cllm_jax.training.packing import Batch


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """L = global * GC + local * LC + state * SAR + ar * AR; objective ar has AR alone."""

    ar_weight: float = 1.0
    """Weight of the autoregressive loss on the clean answer."""
    global_weight: float = 1.0
    """Weight of global consistency: any state -> the fixed point."""
    local_weight: float = 0.0
    """Weight of local consistency: a state -> its successor."""
    state_weight: float = 0.0
    """Weight of cross-entropy of the state tokens on the answer (SPACE's semi-autoregression)."""

    def __post_init__(self):
        at_least(self, ar_weight=0, global_weight=0, local_weight=0, state_weight=0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with linear warm-up and cosine decay."""

    kind: Literal['adamw', 'muon'] = 'adamw'
    """Muon orthogonalises the updates of matrices; norms and embeddings stay with AdamW."""
    learning_rate: float = 1.0e-3
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises."""
    final: float = 0.1
    """Learning rate at the end, as a share of its peak."""
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    """Largest global gradient norm."""
    accumulate: int = 1
    """Micro-batches per step; divides the batch."""

    def __post_init__(self):
        at_least(self, learning_rate=0, weight_decay=0)
        shares(self, 'warmup', 'final')
        for name in ('beta1', 'beta2'):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f'{name} {getattr(self, name)}: must be from 0 to below 1')
        if not self.clip > 0:
            raise ConfigError(f'clip {self.clip}: must be above 0; 1e9 clips nothing')


@struct.dataclass
class TrainState:
    """What a checkpoint holds. `step` counts finished steps."""

    params: Any
    opt_state: Any
    step: jax.Array


def matrices(params: Any) -> Any:
    """Which axes of each parameter are a matrix's inputs and outputs; None for what is none."""
    axes = {name: MuonDimensionNumbers(0, (1, 2)) for name in 'qkv'}
    axes |= {name: MuonDimensionNumbers(0, 1) for name in ('gate', 'up', 'down')}
    axes['o'] = MuonDimensionNumbers((0, 1), 2)
    return jax.tree_util.tree_map_with_path(lambda path, _: axes.get(path[-1].key), params)


def decayed(params: Any) -> Any:
    """Which parameters decay: not the vectors, of which biases have heads as a second axis."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: p.ndim > 1 and not str(path[-1].key).endswith('bias'), params
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipped AdamW or Muon; an update with NaN or Inf is skipped and counted in the state.

    Muon (arXiv 2502.16982) is scaled to AdamW's update size, so one learning rate serves both the
    matrices and the rest.
    """
    peak, warmup = config.learning_rate, int(config.warmup * steps)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else peak, peak, warmup, max(steps, warmup + 1), peak * config.final
    )
    if config.kind == 'muon':
        rule = muon(
            schedule,
            ns_steps=4,
            preconditioning='aol',
            consistent_rms=0.2,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_weight_decay=0.0,
            muon_weight_dimension_numbers=matrices,
        )
    else:
        rule = optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=decayed,
        )
    return optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(config.clip), rule),
        max_consecutive_errors=1 << 30,
    )


def visible(batch: Batch) -> jax.Array | PackedMask:
    """The attention mask of packed rows (see `batches.py`); bool `[B, T, T]` without states."""
    noisy = batch.offset_BW.shape[1]

    def split(x_BT):
        return x_BT[:, : x_BT.shape[1] - noisy], x_BT[:, x_BT.shape[1] - noisy :]

    def own(segment_q, position_q, segment_k, position_k):
        same = segment_q[..., :, None] == segment_k[..., None, :]
        return same & (position_k[..., None, :] <= position_q[..., :, None])

    clean, state = zip(split(batch.segment_BT), split(batch.positions_BT), strict=True)
    if not noisy:
        return own(*clean, *clean)
    context_BW = split(batch.context_BT)[1]
    blocks = [x_BW.reshape(len(x_BW), -1, batch.block) for x_BW in state]
    return PackedMask(
        own(*clean, *clean),
        (clean[0] == 0)[:, None, :] & (clean[1][:, None, :] < context_BW[:, :, None]),
        own(*blocks, *blocks),
    )


def losses(
    model: Llama, weights: LossWeights, params: Any, batch: Batch, totals: dict[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted loss and metrics of a batch, or of a part scaled by the totals of the whole."""
    hidden_BTD, _ = model.apply(
        {'params': params}, batch.tokens_BT, batch.positions_BT, visible(batch)
    )
    hidden_BRD = jnp.take_along_axis(hidden_BTD, batch.rows_BR[:, :, None], axis=1)
    logits_BRV = model.apply({'params': params}, hidden_BRD, method='logits')
    answers = batch.ar_weight_BA.shape[1]
    clean_BAV, student_BWV = logits_BRV[:, :answers], logits_BRV[:, answers:]
    right_BR = (jnp.argmax(logits_BRV, axis=-1) == batch.labels_BR).astype(jnp.float32)

    ar = cross_entropy(clean_BAV, batch.labels_BR[:, :answers], batch.ar_weight_BA, totals['ar'])
    metrics = {
        'ar_loss': ar,
        'ar_accuracy': (right_BR[:, :answers] * batch.ar_weight_BA).sum() / totals['ar'],
    }
    loss = weights.ar_weight * ar
    if weights.global_weight:
        teacher_BWV = jnp.take_along_axis(clean_BAV, batch.teacher_BW[:, :, None], axis=1)
        kl = divergence(student_BWV, teacher_BWV, batch.global_weight_BW, totals['global'])
        metrics['global_loss'] = kl
        loss = loss + weights.global_weight * kl
    if weights.local_weight:
        teacher_BWV = jnp.take_along_axis(logits_BRV, batch.successor_BW[:, :, None], axis=1)
        kl = divergence(student_BWV, teacher_BWV, batch.local_weight_BW, totals['local'])
        metrics['local_loss'] = kl
        loss = loss + weights.local_weight * kl
    if weights.state_weight:
        labels_BW = batch.labels_BR[:, answers:]
        ce = cross_entropy(student_BWV, labels_BW, batch.global_weight_BW, totals['global'])
        metrics['state_loss'] = ce
        loss = loss + weights.state_weight * ce
    if weights.global_weight or weights.local_weight or weights.state_weight:
        live_BW = (batch.offset_BW >= 0).astype(jnp.float32)
        metrics['agreement'] = (right_BR[:, answers:] * live_BW).sum() / totals['live']
        for k in (0, 3, 7):
            at_BW = (batch.offset_BW == k).astype(jnp.float32)
            metrics[f'agreement_{k}'] = (right_BR[:, answers:] * at_BW).sum() / totals[f'at_{k}']
    return loss, metrics | {'loss': loss}


def batch_totals(batch: Batch) -> dict[str, jax.Array]:
    """Total weights of a whole batch, the denominators of `losses`."""
    sums = {
        'ar': batch.ar_weight_BA.sum(),
        'global': batch.global_weight_BW.sum(),
        'local': batch.local_weight_BW.sum(),
        'live': (batch.offset_BW >= 0).sum().astype(jnp.float32),
    }
    sums |= {f'at_{k}': (batch.offset_BW == k).sum().astype(jnp.float32) for k in (0, 3, 7)}
    sums['later_A'] = jnp.cumsum(batch.ar_weight_BA.sum(0)[::-1])[::-1]
    """Weight of all answer tokens from each place on, for drafters that guess ahead."""
    return {k: jnp.maximum(v, 1e-9) for k, v in sums.items()}


def new_state(
    optimizer: optax.GradientTransformation, params: Any, shardings: TrainState | None = None
) -> TrainState:
    """The state before the first step. `params` are copied, since a step donates its state."""

    def first(params):
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    if shardings is not None:  # what each process has for itself must be the same in all of them
        local = all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params))
        params = jax.device_get(params) if local else params
        return jax.jit(first, out_shardings=shardings)(params)
    return jax.jit(first)(jax.tree.map(jnp.copy, params))


def state_places(
    optimizer: optax.GradientTransformation, axes: Any, params: Any, mesh: Mesh
) -> TrainState:
    """Where the training state of parameters (or their shapes) with these axis names lives."""
    places = param_shardings(axes, params, mesh)
    abstract = jax.eval_shape(partial(new_state, optimizer), params)
    return state_shardings(abstract, params, places, mesh)


Loss = Callable[[Any, Any, Batch, dict], tuple[jax.Array, dict[str, jax.Array]]]
"""`(params, frozen, batch, totals) -> (loss, metrics)`; of the first the gradient is taken."""


def text_loss(model: Llama, weights: LossWeights) -> Loss:
    """`losses` of a model all of which is trained."""
    return lambda params, frozen, batch, totals: losses(model, weights, params, batch, totals)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    shardings: TrainState | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled step `(state, batch, frozen) -> (state, metrics)`; its state is donated.

    Args:
      loss, optimizer: what is minimised, and how. What the loss needs but does not train is passed
        as `frozen`, () by default.
      accumulate: parts in which a batch is computed, one after the other.
      shardings: where the state lives, so that it comes back to the same place and the next step
        needs no other compilation.
    """
    step = partial(_step, loss, optimizer, accumulate)
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=None if shardings is None else (shardings, None),
    )


def _step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulate: int,
    state: TrainState,
    batch: Batch,
    frozen: Any = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step.

    Returns the new state and float32 scalar metrics: the loss and its terms, what else the loss
    reports (for `losses`: `ar_accuracy`, and `agreement`, argmax of state tokens against the fixed
    point, overall and at offsets 0, 3, 7 behind the first wrong token), the gradient norm, and
    `skipped`, how many updates in a row were not finite.
    """
    totals = batch_totals(batch)
    gradient = jax.value_and_grad(loss, has_aux=True)
    if accumulate == 1:
        (_, metrics), grads = gradient(state.params, frozen, batch, totals)
    else:
        # Every part takes rows of every device, so that none has to move.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        one = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradient, state.params, frozen, one, totals)

        def add(sums, part):
            (_, metrics), grads = gradient(state.params, frozen, part, totals)
            return jax.tree.map(jnp.add, sums, (metrics, grads)), None

        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0][1], shapes[1]))
        (metrics, grads), _ = jax.lax.scan(add, zeros, parts)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics |= {
        'gradient_norm': optax.tree.norm(grads),
        'skipped': opt_state.notfinite_count.astype(jnp.float32),
    }
    return TrainState(params, opt_state, state.step + 1), metrics


def check_accumulation(batch: int, accumulate: int) -> None:
    """Raise ConfigError unless the batch divides into the micro-batches."""
    if accumulate < 1 or batch % accumulate:
        raise ConfigError(
            f'accumulate {accumulate}: must divide the batch of {batch}; try {min(batch, 2)}'
        )
