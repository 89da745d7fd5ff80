"""Which parameters are updated how."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.drafters.trained import HeadsConfig
from cllm_jax.runs.recipe import from_mapping, to_json
from cllm_jax.training.config import TrainConfig
from cllm_jax.training.drafter_objective import LearnDrafter
from cllm_jax.training.objectives import OBJECTIVES, checked
from cllm_jax.training.optimizer import USUAL, OptimizerConfig, decayed, make_optimizer
from tests.tiny import BIASES, shapes, tiny_config
from tests.tiny_training import params_of


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_what_no_setting_names_follows_what_is_trained(kind):
    """And is noted in a run, which goes on with it; what is named stays, be it nothing."""
    models = {
        'new': 'new',
        '': 'pretrained',
        'owner/name': 'pretrained',
        'runs/x/target': 'pretrained',
    }
    joint = HeadsConfig(joint=True)
    for name, objective in OBJECTIVES.items():
        for model, trained in models.items():
            alone = isinstance(objective, LearnDrafter)
            for heads in (HeadsConfig(), joint) if alone else (HeadsConfig(),):
                expected = 'new' if alone and heads is not joint else trained
                one = OptimizerConfig(kind=kind)
                settings = TrainConfig(objective=name, model=model, heads=heads, optimizer=one)
                found = checked(settings).optimizer
                assert (found.learning_rate, found.warmup) == USUAL[expected, kind], (name, model)
                noted = from_mapping(OptimizerConfig, to_json(found), 'noted')
                again = dataclasses.replace(settings, optimizer=noted)
                assert checked(again).optimizer == noted == found
                named = OptimizerConfig(kind=kind, learning_rate=0.0, warmup=0.0)
                settings = dataclasses.replace(settings, optimizer=named)
                assert checked(settings).optimizer == named
    assert all(USUAL['pretrained', k][0] <= USUAL['new', k][0] / 50 for k in ('adamw', 'muon'))


def test_the_documentation_has_the_table_of_usual_values():
    text = (Path(__file__).parents[2] / 'docs/training.md').read_text()
    rows = re.findall(
        r'^\| (new|pretrained|adapter)\b.*?\| ([\d.e-]+) \| ([\d.e-]*) ?\| ([\d.]+) \|', text, re.M
    )
    told = {}
    for trained, adamw, muon, warmup in rows:
        told[trained, 'adamw'] = float(adamw), float(warmup)
        if muon:
            told[trained, 'muon'] = float(muon), float(warmup)
    assert told == USUAL


def test_vectors_do_not_decay(mixed_dtypes):
    params = {'q': jnp.ones((2, 3)), 'q_bias': jnp.ones((2, 3)), 'norm': jnp.ones(2)}
    config = OptimizerConfig(weight_decay=0.1, warmup=0.0, learning_rate=1.0)
    optimizer = make_optimizer(config, 10)
    still = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(still, optimizer.init(params), params)
    assert {name: float(update.sum()) for name, update in updates.items()} == pytest.approx(
        {'q': -0.6, 'q_bias': 0.0, 'norm': 0.0}
    )


@pytest.mark.parametrize('name', BIASES)
def test_no_bias_or_norm_of_a_model_decays_and_every_matrix_does(name):
    params = shapes(tiny_config(**BIASES[name]))
    matrices = {'embed', 'head', 'q', 'k', 'v', 'o', 'gate', 'up', 'down'}
    for path, decays in jax.tree_util.tree_leaves_with_path(decayed(params)):
        assert decays == (path[-1].key in matrices), path


def test_muon_orthogonalises_matrices_and_nothing_else(mixed_dtypes):
    """A matrix's update has equal singular values, of AdamW's size, whatever its axes."""
    config = OptimizerConfig(kind='muon', learning_rate=1.0, warmup=0.0, clip=1e9)
    optimizer, params = make_optimizer(config, 10), params_of()
    keys = iter(jax.random.split(jax.random.key(3), 99))
    grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    inputs = {'q': 1, 'k': 1, 'v': 1, 'o': 2, 'gate': 1, 'up': 1, 'down': 1}
    for layer in (updates['layers_0'], updates['layers_1']):
        for name, update in layer.items():
            if name in inputs:
                matrix = update.reshape(math.prod(update.shape[: inputs[name]]), -1)
                size = 0.2 * max(matrix.shape) ** 0.5
                singular = np.linalg.svd(matrix, compute_uv=False)
                # Four iterations leave the very smallest ones behind.
                assert 0.5 * size < np.quantile(singular, 0.2) < singular.max() < 1.3 * size
            else:
                assert np.ptp(np.abs(update)) < 1e-3  # the first step of Adam is a sign
    assert np.ptp(np.abs(updates['embed'])) < 1e-3
