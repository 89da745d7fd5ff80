"""What a run trains: one class for each kind of objective, and the table of their names.

An objective says which settings it reads, what its samples and batches look like, and makes of a
model what the run trains (`Learner`). Trained drafters bring their own losses (`drafters/`).
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from cllm_jax.decoding.drafter import Drafter
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.drafters.registry import TRAINED
from cllm_jax.drafters.trained import AnswerBatch, TrainedDrafter, tables_of
from cllm_jax.errors import ConfigError
from cllm_jax.hf.load import DTYPES
from cllm_jax.hf.model import Model
from cllm_jax.model.llama import Llama, param_axes
from cllm_jax.runtime.keys import prng_key
from cllm_jax.training.config import TrainConfig, quick
from cllm_jax.training.held_out import Trained
from cllm_jax.training.losses import cross_entropy
from cllm_jax.training.packing import Batch, Noise, Samples, make_batch
from cllm_jax.training.step import (
    Loss,
    LossWeights,
    batch_totals,
    hidden_states,
    text_loss,
    visible,
)

CALIBRATION = 64
"""Samples by which a drafter chooses its settings (Medusa its tree)."""
OF_CONSISTENCY = ('loss.global_weight', 'loss.local_weight')
OF_STATES = (*OF_CONSISTENCY, 'loss.state_weight')


@dataclasses.dataclass(frozen=True)
class Learner:
    """What a run trains, and what it needs for that."""

    params: Any
    """What is trained, as it is at first."""
    axes: Any
    """Names of its axes (`runtime/sharding.py`)."""
    loss: Loss
    trained: Callable[[Any], Trained]
    """What parameters make."""
    frozen: Any = ()
    """What the loss reads but does not train."""
    noise: Noise | None = None
    """Which states a batch has; None for none."""
    faster: bool = True
    """Whether tokens per forward are what is wanted, at the same quality; else quality alone."""
    mesh: Mesh | None = None
    """Devices to train on; None for one."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A kind of run. What is here suits one that trains all of a model."""

    name: str
    ignored: tuple[str, ...]
    """Settings, and groups of them, that it does not read."""
    reads_trajectories: bool = True
    """Whether it learns from a collection; else from a dataset."""
    keeps_states: bool = False
    """Whether it learns from the states of a collection; else from its answers alone."""
    drafting: type[TrainedDrafter] | None = None
    """The drafter that is trained, or that a model is trained for."""

    def trains_model(self, settings: TrainConfig) -> bool:
        """Whether the model changes."""
        return True

    def unread(self, settings: TrainConfig) -> Iterator[tuple[str, str]]:
        """Settings that nothing would read, and why."""
        for name in self.ignored:
            yield name, f'with objective {self.name}, which ignores it'
        if self.reads_trajectories and not settings.texts:
            yield 'examples', 'without texts, whose rows they would be'
        if settings.model != 'new':
            yield 'new', f'with model {settings.model or "(default)"}, which is not new'

    def refused(self, settings: TrainConfig) -> Iterator[tuple[Any, str]]:
        """Whether settings are wrong together, and what then is said."""
        named, model = settings.tokenizer, settings.model
        yield (
            named and model != 'new',
            f'tokenizer {named} with model {model or "(default)"}, which has its own: only a new '
            'model takes that of another; leave it out, or set model: new',
        )

    def loss_weights(self, settings: TrainConfig) -> LossWeights:
        """The weights of the losses, 0 for those that it does not have."""
        return LossWeights(settings.loss.ar_weight, global_weight=0.0)

    def noise(self, settings: TrainConfig, model: Model) -> Noise | None:
        """Which states a batch has; None for none."""
        return None

    def block(self, settings: TrainConfig) -> int:
        """Tokens of a state that is made by chance."""
        return settings.heads.ahead + 1 if self.drafting else settings.held_out.block

    def drafter(self, settings: TrainConfig, model: Model) -> Drafter:
        """What held-out tests decode with, before it has weights."""
        if self.drafting:
            return self.drafting.of_size(settings.heads, model)
        return Jacobi(settings.held_out.block)

    def learner(
        self, settings: TrainConfig, model: Model, samples: Samples, mesh: Mesh | None = None
    ) -> Learner:
        """What the run trains, starting from a model."""
        drafter = self.drafter(settings, model)
        return Learner(
            params=model.params,
            axes=param_axes(model.config),
            loss=partial(text_loss, module_of(settings, model, mesh), settings.loss),
            trained=lambda params: Trained(dataclasses.replace(model, params=params), drafter),
            noise=self.noise(settings, model),
            faster=self.reads_trajectories,
            mesh=mesh,
        )


class LearnTexts(Objective):
    """A model learns the answers of a dataset."""

    def refused(self, settings):
        yield from super().refused(settings)
        ar, texts = settings.loss.ar_weight, settings.texts
        yield not ar, 'objective ar with loss.ar_weight 0: it has no other loss; set a weight'
        yield texts, f'texts {texts} with objective ar, which learns data alone; leave texts out'


class LearnConsistency(Objective):
    """A model learns to jump from any state of a trajectory to its fixed point."""

    def refused(self, settings):
        yield from super().refused(settings)
        loss, noise = settings.loss, settings.noise
        yield (
            not (loss.global_weight or loss.local_weight),
            'objective consistency with loss.global_weight and loss.local_weight 0: '
            'set one of them, or use objective ar',
        )
        yield (
            loss.local_weight and not noise.pairs,
            f'loss.local_weight {loss.local_weight} without noise.pairs: a state is taught by its '
            'successor; add noise.pairs',
        )
        yield (
            settings.texts and noise.pairs,
            'texts with noise.pairs: states made by chance have no successor; '
            'leave one of them out',
        )
        yield (
            noise.pairs and (noise.fresh or noise.corruption or noise.mask >= 0),
            'noise.fresh, noise.corruption or noise.mask with noise.pairs: a state that is changed '
            'has no successor; leave them out, or noise.pairs',
        )

    def loss_weights(self, settings):
        return settings.loss

    def noise(self, settings, model):
        return settings.noise


class LearnMasks(Objective):
    """A model learns to draft by reading mask tokens (SPACE)."""

    def refused(self, settings):
        yield from super().refused(settings)
        reason = f'noise.pairs with objective {self.name}: masks have no successor; leave it out'
        yield settings.noise.pairs, reason

    def loss_weights(self, settings):
        state = settings.loss.state_weight or 1.0
        return dataclasses.replace(super().loss_weights(settings), state_weight=state)

    def noise(self, settings, model):
        mask = self.drafter(settings, model).mask_id
        return dataclasses.replace(settings.noise, fresh=1.0, mask=mask)


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


def _drafting(name: str, drafter: type[TrainedDrafter]) -> Objective:
    if drafter.trains_model:
        changed = ('noise.fresh', 'noise.corruption', 'noise.mask', 'heads.joint')
        return LearnMasks(name, (*changed, 'held_out.block', *OF_CONSISTENCY), drafting=drafter)
    return LearnDrafter(name, ('noise', 'held_out.block', *OF_STATES), drafting=drafter)


OBJECTIVES: dict[str, Objective] = {
    'ar': LearnTexts('ar', ('noise', 'cleaning', 'heads', *OF_STATES), reads_trajectories=False),
    'consistency': LearnConsistency('consistency', ('heads',), keeps_states=True),
    **{name: _drafting(name, drafter) for name, drafter in TRAINED.items()},
}
"""By the name that settings give them."""


def objective_of(settings: TrainConfig) -> Objective:
    """The objective that settings name."""
    return OBJECTIVES[settings.objective]


def checked(settings: TrainConfig) -> TrainConfig:
    """The settings with the losses that the objective has; the tiny version of them if `quick`.

    Raises:
      ConfigError: a setting says something and would do nothing, or settings are wrong together.
    """
    objective, default = objective_of(settings), TrainConfig()
    for name, why in objective.unread(settings):
        said = attrgetter(name)
        if said(settings) != said(default):
            remedy = 'write model: new' if name == 'new' else 'leave it out'
            raise ConfigError(f'{name} {why}; {remedy}')
    for wrong, message in objective.refused(settings):
        if wrong:
            raise ConfigError(message)
    settings = dataclasses.replace(settings, loss=objective.loss_weights(settings))
    if settings.quick:
        settings = quick(settings)
    batch, accumulate = settings.batch, settings.optimizer.accumulate
    if accumulate < 1 or batch % accumulate:
        raise ConfigError(
            f'accumulate {accumulate}: must divide the batch of {batch}; try {min(batch, 2)}'
        )
    return settings


def module_of(settings: TrainConfig, model: Model, mesh: Mesh | None) -> Llama:
    """The module of a model as a training step computes it."""
    dtype, compute = model.params['norm'].dtype, DTYPES[settings.compute]
    return Llama(model.config, dtype, compute, settings.remat, mesh, model.backend)


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
