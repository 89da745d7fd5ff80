"""What each objective trains, and what it makes of it."""

import dataclasses
from operator import attrgetter
from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest

from cllm_jax.decoding.result import Trajectory
from cllm_jax.drafters.registry import TRAINED
from cllm_jax.drafters.trained import HeadsConfig, TrainedDrafter
from cllm_jax.errors import ConfigError
from cllm_jax.training.config import TrainConfig
from cllm_jax.training.objectives import OBJECTIVES, checked, objective_of
from cllm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cllm_jax.training.packing import make_batch
from cllm_jax.training.step import LossWeights, batch_totals, make_step, new_state
from tests.tiny_training import MODEL, samples


def loss_of(learner, batch) -> dict:
    """The loss and the metrics of a batch, before any step."""
    totals = batch_totals(batch)
    loss, metrics = jax.jit(learner.loss)(learner.params, learner.frozen, batch, totals)
    return metrics | {'loss': loss}


def test_every_name_in_settings_is_an_objective():
    """And every setting that an objective ignores is one, so that it can be refused."""
    names = get_args(get_type_hints(TrainConfig)['objective'])
    assert sorted(names) == sorted(OBJECTIVES)
    for objective in OBJECTIVES.values():
        for setting in objective.ignored:
            attrgetter(setting)(TrainConfig())


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match='accumulate 3'):
        checked(TrainConfig(batch=4, optimizer=OptimizerConfig(accumulate=3)))


@pytest.mark.parametrize('name', sorted(OBJECTIVES))
@pytest.mark.parametrize('joint', [False, True])
def test_what_an_objective_trains_and_keeps(mixed_dtypes, name, joint):
    """A drafter of a frozen model is kept alone; whoever changes the model keeps it too."""
    sizes = HeadsConfig(nodes=4, ahead=2, beams=2, joint=joint)
    settings = TrainConfig(objective=name, heads=sizes)
    objective = objective_of(settings)
    learner = objective.learner(settings, MODEL, samples())
    trained = learner.trained(learner.params)
    alone = name in ('medusa', 'redrafter', 'eagle') and not joint
    assert objective.trains_model(settings) == trained.new_model == (not alone)
    assert (learner.frozen is MODEL.params) == alone
    assert isinstance(trained.drafter, TrainedDrafter) == (name in TRAINED)
    assert (learner.noise is None) == (name not in ('consistency', 'spans', 'space'))
    assert learner.faster == (name != 'ar')
    assert trained.model.params['norm'] is MODEL.params['norm']


@pytest.mark.parametrize(
    ('name', 'joint'),
    [
        *((name, False) for name in sorted(OBJECTIVES) if name != 'eagle'),
        ('eagle', True),  # alone it learns hidden states, no label
        ('medusa', True),
    ],
)
def test_a_loss_that_is_not_finite_is_a_step_left_out(mixed_dtypes, name, joint):
    """Labels outside the table make the loss NaN, and have no gradient."""
    sizes = HeadsConfig(nodes=4, ahead=2, beams=2, joint=joint)
    settings = TrainConfig(objective=name, heads=sizes)
    settings = dataclasses.replace(settings, loss=OBJECTIVES[name].loss_weights(settings))
    data = samples()
    learner = objective_of(settings).learner(settings, MODEL, data)
    optimizer = make_optimizer(OptimizerConfig(warmup=0.0), 10)
    step = make_step(learner.loss, optimizer)
    batch = make_batch(data, 4, 0, 0, learner.noise)
    state, metrics = step(new_state(optimizer, learner.params), batch, learner.frozen)
    assert np.isfinite(metrics['loss']) and metrics['skipped'] == 0
    before = jax.device_get(state.params)
    foreign = batch.replace(labels_BR=np.full_like(batch.labels_BR, MODEL.config.vocab_size))
    state, metrics = step(state, foreign, learner.frozen)
    assert not np.isfinite(metrics['loss']) and metrics['skipped'] == 1
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(state.params)))


def test_the_mask_of_space_stands_for_every_guess():
    settings = TrainConfig(objective='space', heads=HeadsConfig(ahead=3))
    objective = objective_of(settings)
    noise, block = objective.noise(settings, MODEL), objective.block(settings)
    none = np.zeros((0, block), np.int32)
    texts = [Trajectory(none, none[:, 0], s.prompt, s.answer) for s in samples()]
    batch = make_batch(texts, 4, 0, 0, noise)
    windows = batch.tokens_BT[:, -batch.offset_BW.shape[1] :].reshape(4, -1, block)
    assert (windows[:, :, 1:] == MODEL.config.pad_id).all()


def test_a_joint_training_weighs_the_loss_of_the_model():
    batch, sizes = make_batch(samples(), 4, 0, 0, None), HeadsConfig(nodes=4, ahead=2, joint=True)
    found = []
    for weight in (1.0, 3.0):
        settings = TrainConfig(objective='medusa', heads=sizes, loss=LossWeights(weight))
        learner = objective_of(settings).learner(settings, MODEL, samples())
        found.append(loss_of(learner, batch))
    once, thrice = found
    assert np.isclose(thrice['loss'] - once['loss'], 2 * once['ar_loss'], rtol=1e-4)


def test_heads_may_guess_further_than_answers_reach():
    batch = make_batch(samples(), 4, 0, 0, None)
    ahead = batch.ar_weight_BA.shape[1] + 2
    sizes = HeadsConfig(nodes=4, ahead=ahead, own_table=False)
    settings = TrainConfig(objective='medusa', heads=sizes)
    metrics = loss_of(objective_of(settings).learner(settings, MODEL, samples()), batch)
    assert np.isfinite(metrics['loss']) and metrics[f'accuracy_{ahead}'] == 0


def test_consistency_with_the_model_before_training(mixed_dtypes):
    """At first that is the model itself, so that the loss is the one of global consistency."""
    weights = LossWeights(0.0, 1.0, frozen_weight=1.0)
    learner = OBJECTIVES['consistency'].learner(TrainConfig(loss=weights), MODEL, samples())
    batch, optimizer = (
        make_batch(samples(), 8, 0, 0, learner.noise),
        make_optimizer(OptimizerConfig(warmup=0.0, learning_rate=1e-2), 10),
    )
    step, state = make_step(learner.loss, optimizer), new_state(optimizer, learner.params)
    state, first = step(state, batch, learner.frozen)
    assert np.isclose(first['frozen_loss'], first['global_loss'], rtol=1e-5)
    for _ in range(4):
        state, last = step(state, batch, learner.frozen)
    assert last['frozen_loss'] < first['frozen_loss']
    assert not np.isclose(last['frozen_loss'], last['global_loss'], rtol=1e-3)
