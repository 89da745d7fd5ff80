"""The table of objectives, by the names that settings give them, and whether settings suit one."""

import dataclasses
from operator import attrgetter

from cllm_jax.drafters.registry import TRAINED
from cllm_jax.drafters.trained import TrainedDrafter
from cllm_jax.errors import ConfigError
from cllm_jax.training.config import TrainConfig, quick
from cllm_jax.training.drafter_objective import LearnDrafter
from cllm_jax.training.objective import (
    LearnConsistency,
    LearnMasks,
    LearnSpans,
    LearnTexts,
    Objective,
)
from cllm_jax.training.optimizer import with_usual

TO_FIXED_POINTS = tuple(f'loss.{name}_weight' for name in ('global', 'local', 'forced', 'frozen'))
OF_STATES = (*TO_FIXED_POINTS, 'loss.state_weight')
OF_TRAJECTORIES = ('noise.measured', 'noise.corruption')


def _drafting(name: str, drafter: type[TrainedDrafter]) -> Objective:
    if drafter.trains_model:
        changed = ('noise.fresh', *OF_TRAJECTORIES, 'noise.mask', 'heads.joint', 'held_out.block')
        return LearnMasks(name, (*changed, *TO_FIXED_POINTS), drafting=drafter)
    return LearnDrafter(name, ('noise', 'held_out.block', 'lora', *OF_STATES), drafting=drafter)


OBJECTIVES: dict[str, Objective] = {
    'ar': LearnTexts(
        'ar',
        ('noise', 'cleaning', 'heads', *OF_STATES),
        reads_trajectories=False,
        dataset='data',
    ),
    'consistency': LearnConsistency('consistency', ('heads',), keeps_states=True),
    'spans': LearnSpans(
        'spans', ('cleaning', 'heads', *OF_TRAJECTORIES, *TO_FIXED_POINTS), reads_trajectories=False
    ),
    **{name: _drafting(name, drafter) for name, drafter in TRAINED.items()},
}
"""By the name that settings give them."""


def objective_of(settings: TrainConfig) -> Objective:
    """The objective that settings name."""
    return OBJECTIVES[settings.objective]


def checked(settings: TrainConfig) -> TrainConfig:
    """The settings with the losses that the objective has, and a learning rate.

    The tiny version of them if `quick`.

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
    trained = 'new'
    if settings.model != 'new' and objective.trains_model(settings):
        trained = 'adapter' if settings.lora.rank else 'pretrained'
    settings = dataclasses.replace(
        settings,
        loss=objective.loss_weights(settings),
        optimizer=with_usual(settings.optimizer, trained),
    )
    if settings.quick:
        settings = quick(settings)
    batch, accumulate = settings.batch, settings.optimizer.accumulate
    if accumulate < 1 or batch % accumulate:
        raise ConfigError(
            f'accumulate {accumulate}: must divide the batch of {batch}; try {min(batch, 2)}'
        )
    return settings
