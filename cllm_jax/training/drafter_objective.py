"""Training of a drafter on its model's answers; drafters bring their own losses (`drafters/`)."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from cllm_jax.drafters.trained import AnswerBatch, TrainedDrafter, tables_of
from cllm_jax.model.llama import Llama, param_axes
from cllm_jax.runtime.keys import prng_key
from cllm_jax.training.held_out import Trained
from cllm_jax.training.losses import cross_entropy
from cllm_jax.training.objective import Learner, Objective, module_of
from cllm_jax.training.packing import Batch, make_batch
from cllm_jax.training.step import batch_totals, hidden_states, visible

CALIBRATION = 64
"""Samples by which a drafter chooses its settings (Medusa its tree)."""


class LearnDrafter(Objective):
    """A drafter of a model learns the model's answers; with `heads.joint` the model learns too."""

    def trains_model(self, settings):
        return settings.heads.joint

    def unread(self, settings):
        yield from super().unread(settings)
        if not settings.heads.joint:
            for name in ('loss.ar_weight', 'heads.joint_weight'):
                yield name, 'without heads.joint: the model is not trained'

    def learner(self, settings, model, samples, mesh=None):
        drafter, joint = self.drafter(settings, model), settings.heads.joint
        module, tables = module_of(settings, model, mesh), tables_of(model.params)
        own = jax.jit(drafter.new_weights)(prng_key(settings.seed), tables)
        axes = jax.tree.map(lambda leaf: PartitionSpec(*[None] * leaf.ndim), own)
        calibration = make_batch(samples, min(len(samples), CALIBRATION), settings.seed, 0, None)

        def trained(params: Any) -> Trained:
            own, now = (params['drafter'], params['model']) if joint else (params, model.params)
            made = drafter.with_weights(own, now)
            if type(made).calibrated is not TrainedDrafter.calibrated:  # else not worth a forward
                later_A = batch_totals(calibration)['later_A']
                answers = jax.jit(answers_of, static_argnums=0)
                made = made.calibrated(answers(module, now, calibration, later_A))
            return Trained(dataclasses.replace(model, params=now), made, new_model=joint)

        weights, params, frozen = None, own, model.params
        if joint:
            weights, frozen = (settings.loss.ar_weight, settings.heads.joint_weight), ()
            params = {'model': model.params, 'drafter': own}
            axes = {'model': param_axes(model.config), 'drafter': axes}
        loss = partial(drafter_loss, drafter, module, weights)
        return Learner(params, axes, loss, trained, frozen, mesh=mesh)


def answers_of(module: Llama, params: Any, batch: Batch, later_A: jax.Array) -> AnswerBatch:
    """What a drafter learns from: a batch without states, or a part; `later_A` is of the whole."""
    count = batch.ar_weight_BA.shape[1]
    return AnswerBatch(
        hidden_BTD=hidden_states(module, params, batch).astype(jnp.float32),
        tokens_BT=batch.tokens_BT,
        positions_BT=batch.positions_BT,
        mask_BTT=visible(batch),
        rows_BA=batch.rows_BR[:, :count],
        labels_BA=batch.labels_BR[:, :count],
        weight_BA=batch.ar_weight_BA,
        later_A=later_A,
    )


def drafter_loss(drafter: TrainedDrafter, module: Llama, weights, params, frozen, batch, totals):
    """A `Loss` of a drafter of `frozen`; with two weights, of a model and its drafter."""
    own, now = (params['drafter'], params['model']) if weights else (params, frozen)
    answers = answers_of(module, now, batch, totals['later_A'])
    loss, metrics = drafter.with_weights(own, now).loss(answers)
    if weights:
        logits_BAV = module.apply({'params': now}, answers.hidden_BAD, method='logits')
        ar = cross_entropy(logits_BAV, answers.labels_BA, answers.weight_BA, totals['ar'])
        loss, metrics = weights[0] * ar + weights[1] * loss, metrics | {'ar_loss': ar}
    return loss, metrics
