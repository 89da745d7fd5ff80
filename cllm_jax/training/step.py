"""One optimisation step: packed forward, losses, gradient, update."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from cllm_jax.errors import at_least
from cllm_jax.model.llama import Llama, take_rows
from cllm_jax.model.packed_attention import PackedMask
from cllm_jax.runtime.sharding import param_shardings, replicated
from cllm_jax.training.losses import cross_entropy, divergence
from cllm_jax.training.packing import Batch


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """The loss is the sum of these, each times its weight; objective ar has the first alone."""

    ar_weight: float = 1.0
    """Weight of the autoregressive loss on the clean answer."""
    global_weight: float = 1.0
    """Weight of global consistency: any state -> the fixed point."""
    local_weight: float = 0.0
    """Weight of local consistency: a state -> its successor."""
    state_weight: float = 0.0
    """Weight of cross-entropy of the state tokens on the answer (SPACE's semi-autoregression)."""
    forced_weight: float = 0.0
    """Weight of cross-entropy of the state tokens on what the model says after its own guesses in
    place of the state's, which is what verification will ask (student forcing, arXiv 2602.06019,
    with the model itself for a teacher). Costs a forward."""
    frozen_weight: float = 0.0
    """Weight of the divergence of state tokens from the clean rows of the model before training, as
    global consistency has it from its own. Costs a forward and another copy of the weights."""

    def __post_init__(self):
        at_least(self, **{field.name: 0 for field in dataclasses.fields(self)})

    @property
    def of_states(self) -> bool:
        """Whether anything is learnt from states."""
        return any(getattr(self, f.name) for f in dataclasses.fields(self)[1:])


Loss = Callable[[Any, Any, Batch, dict], tuple[jax.Array, dict[str, jax.Array]]]
"""`(params, frozen, batch, totals) -> (loss, metrics)` of a batch, or of a part of the batch that
has these totals. The gradient is taken of `params`; `frozen` is what else the loss reads."""


@struct.dataclass
class TrainState:
    """What a checkpoint holds. `step` counts finished steps."""

    params: Any
    opt_state: Any
    step: jax.Array


def visible(batch: Batch) -> jax.Array | PackedMask:
    """The attention mask of packed rows (see `packing.py`); bool `[B, T, T]` without states."""
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


def hidden_states(model: Llama, params: Any, batch: Batch) -> jax.Array:
    """The model's hidden states after its final norm, for every token of a packed batch."""
    tokens_BT, positions_BT = batch.tokens_BT, batch.positions_BT
    return model.apply({'params': params}, tokens_BT, positions_BT, visible(batch))[0]


def text_loss(
    model: Llama, weights: LossWeights, params: Any, frozen: Any, batch: Batch, totals: dict
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted loss and metrics of a batch, for a model all of which is trained.

    Given its first two arguments this is a `Loss`. `frozen` is the parameters before training where
    `frozen_weight` asks for them.
    """
    hidden_BTD = hidden_states(model, params, batch)
    hidden_BRD = take_rows(hidden_BTD, batch.rows_BR)
    logits_BRV = model.apply({'params': params}, hidden_BRD, method='logits')
    answers = batch.ar_weight_BA.shape[1]
    clean_BAV, student_BWV = logits_BRV[:, :answers], logits_BRV[:, answers:]
    labels_BA, labels_BW = batch.labels_BR[:, :answers], batch.labels_BR[:, answers:]
    right_BR = (jnp.argmax(logits_BRV, axis=-1) == batch.labels_BR).astype(jnp.float32)

    ar = cross_entropy(clean_BAV, labels_BA, batch.ar_weight_BA, totals['ar'])
    accuracy = (right_BR[:, :answers] * batch.ar_weight_BA).sum() / totals['ar']
    loss, metrics = weights.ar_weight * ar, {'ar_loss': ar, 'ar_accuracy': accuracy}
    for name, weight, source_BXV, teacher_BW, weight_BW in (
        ('global', weights.global_weight, clean_BAV, batch.teacher_BW, batch.global_weight_BW),
        ('local', weights.local_weight, logits_BRV, batch.successor_BW, batch.local_weight_BW),
    ):
        if weight:
            teacher_BWV = take_rows(source_BXV, teacher_BW)
            kl = divergence(student_BWV, teacher_BWV, weight_BW, totals[name])
            metrics[f'{name}_loss'], loss = kl, loss + weight * kl
    where = batch.global_weight_BW, totals['global']
    if weights.frozen_weight:
        said_BAV = _clean_logits(model, frozen, batch)
        kl = divergence(student_BWV, take_rows(said_BAV, batch.teacher_BW), *where)
        metrics['frozen_loss'], loss = kl, loss + weights.frozen_weight * kl
    if weights.state_weight:
        ce = cross_entropy(student_BWV, labels_BW, *where)
        metrics['state_loss'], loss = ce, loss + weights.state_weight * ce
    if weights.forced_weight:
        after_BW = said_after_guesses(model, params, batch, jnp.argmax(student_BWV, axis=-1))
        ce = cross_entropy(student_BWV, after_BW, *where)
        metrics['forced_loss'], loss = ce, loss + weights.forced_weight * ce
    if weights.of_states:
        for name, at_BW in _after_first_wrong(batch).items():
            metrics[name] = (right_BR[:, answers:] * at_BW).sum() / totals[name]
    return loss, metrics


def _clean_logits(model: Llama, params: Any, batch: Batch) -> jax.Array:
    """Logits of the clean rows, which see no state: those of a batch without states."""
    length = batch.tokens_BT.shape[1] - batch.offset_BW.shape[1]
    clean = batch.replace(
        tokens_BT=batch.tokens_BT[:, :length],
        positions_BT=batch.positions_BT[:, :length],
        segment_BT=batch.segment_BT[:, :length],
        offset_BW=batch.offset_BW[:, :0],
    )
    rows_BA = batch.rows_BR[:, : batch.ar_weight_BA.shape[1]]
    hidden_BAD = take_rows(hidden_states(model, params, clean), rows_BA)
    return model.apply({'params': params}, hidden_BAD, method='logits')


def said_after_guesses(model: Llama, params: Any, batch: Batch, guesses_BW: jax.Array) -> jax.Array:
    """The model's choice after each token of the states, int, once guesses stand in their place.

    A guess takes the place of the token after the one that made it, from the first wrong one on, as
    in the next forward of decoding.
    """
    noisy, params = batch.offset_BW.shape[1], jax.lax.stop_gradient(params)
    state_BW, clean_BT = batch.tokens_BT[:, -noisy:], batch.tokens_BT[:, :-noisy]
    # The first token of a state is right, so that no guess comes from the state before.
    next_BW = jnp.where(batch.offset_BW >= 0, jnp.roll(guesses_BW, 1, axis=1), state_BW)
    again = batch.replace(tokens_BT=jnp.concatenate([clean_BT, next_BW], axis=1))
    hidden_BTD = hidden_states(model, params, again)[:, -noisy:]
    return jnp.argmax(model.apply({'params': params}, hidden_BTD, method='logits'), axis=-1)


def _after_first_wrong(batch: Batch) -> dict[str, jax.Array]:
    """1 for the state tokens from the first wrong one on: for all, and for those at an offset."""
    chosen = {'agreement': batch.offset_BW >= 0}
    chosen |= {f'agreement_{k}': batch.offset_BW == k for k in (0, 3, 7)}
    return {name: at_BW.astype(jnp.float32) for name, at_BW in chosen.items()}


def batch_totals(batch: Batch) -> dict[str, jax.Array]:
    """Total weights of a whole batch, the denominators of its losses."""
    sums = {
        'ar': batch.ar_weight_BA.sum(),
        'global': batch.global_weight_BW.sum(),
        'local': batch.local_weight_BW.sum(),
        # Of all answer tokens from each place on, for drafters that guess ahead.
        'later_A': jnp.cumsum(batch.ar_weight_BA.sum(0)[::-1])[::-1],
    }
    sums |= {name: at_BW.sum() for name, at_BW in _after_first_wrong(batch).items()}
    return {name: jnp.maximum(total, 1e-9) for name, total in sums.items()}


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
    """Where the training state of parameters (or their shapes) with these axis names lives.

    What mirrors a parameter lives where the parameter does: `jit(optimizer.init)` alone would put a
    copy of every moment on every device. The rest is replicated.
    """
    places, everywhere = param_shardings(axes, params, mesh), replicated(mesh)
    moments = optax.tree_map_params(
        optimizer,
        lambda leaf, place: leaf if isinstance(leaf, optax.MaskedNode) else place,
        jax.eval_shape(optimizer.init, params),
        places,
        transform_non_params=lambda _: everywhere,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )
    return TrainState(places, moments, everywhere)


def make_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    accumulate: int = 1,
    shardings: TrainState | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The compiled step `(state, batch, frozen) -> (state, metrics)`; its state is donated.

    Metrics are float32 scalars: the loss, its terms and what else it reports (`text_loss`:
    `ar_accuracy`, and `agreement`, argmax of state tokens against the fixed point, overall and at
    offsets 0, 3, 7 after the first wrong token), the gradient norm, and `skipped`, how many updates
    in a row were left out because the loss or the gradient was not finite. `frozen`, () by default,
    is what the loss reads but does not train.

    Args:
      accumulate: parts in which a batch is computed, one after the other.
      shardings: where the state lives, so that it comes back to the same place and the next step
        needs no other compilation.
    """
    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(state, batch, frozen=()):
        totals = batch_totals(batch)

        def of_part(part):
            (loss, metrics), grads = gradient(state.params, frozen, part, totals)
            return metrics | {'loss': loss}, grads

        def add(sums, part):
            return jax.tree.map(jnp.add, sums, of_part(part)), None

        if accumulate == 1:
            metrics, grads = of_part(batch)
        else:
            # Every micro-batch takes rows of every device, so that none has to move.
            shape = (batch.tokens_BT.shape[0] // accumulate, accumulate)
            micro_batches = jax.tree.map(
                lambda x: x.reshape(*shape, *x.shape[1:]).swapaxes(0, 1), batch
            )
            one = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], micro_batches))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), one)
            (metrics, grads), _ = jax.lax.scan(add, zeros, micro_batches)
        norm = optax.tree.norm(grads)
        # What is not finite in the loss need not be in the gradient, and a norm may overflow.
        sound = jnp.isfinite(metrics['loss']) & jnp.isfinite(norm)
        grads = jax.tree.map(lambda grad: jnp.where(sound, grad, jnp.nan), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        skipped = opt_state.notfinite_count.astype(jnp.float32)
        metrics |= {'gradient_norm': norm, 'skipped': skipped}
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), metrics

    places = shardings and (shardings, None)
    return jax.jit(step, donate_argnums=0, out_shardings=places)
