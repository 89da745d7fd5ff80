"""An adapter is trained as the whole model would be along its factors, and kept as PEFT does."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.errors import CllmError, ConfigError
from cllm_jax.hf.load import load
from cllm_jax.hf.write import write_model
from cllm_jax.model.llama import Llama, forward
from cllm_jax.runtime.mesh import MeshConfig, make_mesh
from cllm_jax.training.lora import (
    Adapter,
    LoraConfig,
    adapted,
    first_factors,
    joined,
    merged,
    new_factors,
)
from cllm_jax.training.memory import memory_per_device
from cllm_jax.training.objectives import objective_of
from cllm_jax.training.packing import make_batch
from cllm_jax.training.step import LossWeights, batch_totals, text_loss
from cllm_jax.training.trainer import train
from tests.tiny_model import same_bits
from tests.tiny_training import CONFIG, MODEL, params_of, samples, tiny_run

TOKENS_BT = jnp.asarray(np.random.default_rng(0).integers(3, 90, (2, 12)), jnp.int32)
LORA = LoraConfig(rank=3, alpha=5.0)


def random_factors(config=LORA, params=None):
    factors = new_factors(config, params or params_of(), jax.random.key(1))
    leaves, tree = jax.tree.flatten(factors)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    drawn = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def test_factors_beside_their_matrices_compute_what_merged_ones_do():
    model, factors = Llama(CONFIG), random_factors()
    beside = forward(model, joined(LORA, params_of(), factors), TOKENS_BT)
    whole = forward(model, merged(LORA, params_of(), factors), TOKENS_BT)
    assert jnp.abs(whole - forward(model, params_of(), TOKENS_BT)).max() > 0.1
    np.testing.assert_allclose(beside, whole, atol=2e-4)


def test_new_factors_change_nothing():
    factors = first_factors(LORA, params_of(), 0)
    assert same_bits(merged(LORA, params_of(), factors), params_of())
    assert all(
        (x != 0).any() for layer in factors.values() for n, x in layer.items() if n.endswith('_a')
    )


def test_the_gradient_of_factors_is_that_of_their_matrix():
    """With W + s A B: dA = s dW B^T and dB = s A^T dW."""
    params, factors = params_of(), random_factors()
    loss = partial(text_loss, Llama(CONFIG), LossWeights())
    batch = make_batch(samples(), 4, 0, 0, tiny_run()[3].noise)
    totals = batch_totals(batch)
    whole = merged(LORA, params, factors)
    of_matrix = jax.grad(lambda p: loss(p, (), batch, totals)[0])(whole)
    of_loss = adapted(loss, LORA)
    of_factors = jax.grad(lambda f: of_loss(f, params, batch, totals)[0])(factors)
    for layer, own in factors.items():
        for name in LORA.matrices:
            a, b = own[f'{name}_a'], own[f'{name}_b']
            dw = of_matrix[layer][name].reshape(len(a), -1)
            for half, wanted in (('a', dw @ b.T), ('b', a.T @ dw)):
                found = of_factors[layer][f'{name}_{half}']
                np.testing.assert_allclose(found, LORA.scale * wanted, rtol=2e-2, atol=2e-4)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_an_adapter_and_its_base_are_the_model_of_the_run(mixed_dtypes, tmp_path, dtype):
    write_model(tmp_path / 'base', MODEL, dtype='float32')
    base = load(str(tmp_path / 'base'), dtype)
    _, rows, source, settings = tiny_run(lora=LoraConfig(rank=2, targets='qv,down'), dtype=dtype)
    learner = objective_of(settings).learner(settings, base, rows)
    assert {x.dtype for x in jax.tree.leaves(learner.params)} == {jnp.dtype('float32')}
    train(tmp_path / 'run', learner, rows, source, settings)
    kept = load(str(tmp_path / 'run'), dtype)
    changed = jax.tree.map(lambda x, y: bool((x != y).any()), kept.params, base.params)
    names = {name for layer in changed.values() if isinstance(layer, dict) for name in layer}
    found = {name for layer in ('layers_0',) for name in names if changed[layer][name]}
    assert found == {'q', 'v', 'down'} and not changed['embed']
    again = load(str(tmp_path / 'base'), dtype, adapter=str(tmp_path / 'run'))
    itself = load(str(tmp_path / 'run/adapter'), dtype)
    assert 'LoRA rank 2' in again.title and 'LoRA rank 2' in itself.title
    assert same_bits(again.params, itself.params)
    apart = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), again.params, kept.params)
    assert max(jax.tree.leaves(apart)) <= (1e-6 if dtype == 'float32' else 1e-2)


def test_an_interrupted_adapter_ends_like_an_uninterrupted_one(mixed_dtypes, tmp_path):
    run = tiny_run(lora=LoraConfig(rank=2))
    train(tmp_path / 'whole', *run)

    def crash(record):
        if record['step'] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / 'parts', *run, report=crash)
    train(tmp_path / 'parts', *run)
    files = 'model/model.safetensors', 'adapter/adapter_model.safetensors'
    for file in files:
        parts, whole = (tmp_path / name / file for name in ('parts', 'whole'))
        assert parts.read_bytes() == whole.read_bytes()


def test_an_adapter_is_not_written_over_something_else(tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(CllmError, match=r'holds notes\.txt'):
        Adapter(random_factors(), LORA, 'base').write(tmp_path)
    with pytest.raises(CllmError, match='is a file'):
        Adapter(random_factors(), LORA, 'base').write(tmp_path / 'notes.txt')
    assert (tmp_path / 'notes.txt').read_text() == 'mine'


@pytest.mark.parametrize('targets', ['', 'x', 'qkvo,mlps', 'q,,v'])
def test_unknown_matrices_are_refused(targets):
    with pytest.raises(ConfigError, match=r'lora\.targets .* is unknown; name letters'):
        LoraConfig(rank=4, targets=targets)


def test_targets_are_named_in_short_or_whole():
    assert LoraConfig(targets='qv,mlp').matrices == ('q', 'v', 'gate', 'up', 'down')
    assert LoraConfig(targets='o,gate').matrices == ('o', 'gate')
    assert LoraConfig(rank=8).scale == 2.0


def test_a_plan_counts_the_optimiser_of_the_adapter_alone():
    settings, mesh = tiny_run()[3], make_mesh(MeshConfig(data=8))
    settings = dataclasses.replace(settings, batch=8)
    whole = memory_per_device(settings, CONFIG, mesh)
    with_adapter = dataclasses.replace(settings, lora=LORA)
    small = memory_per_device(with_adapter, CONFIG, mesh)
    factors = sum(4 * x.size for x in jax.tree.leaves(random_factors()))
    assert small['weights'] == small['gradients'] == factors
    assert small['weights before training'] == whole['weights']
    assert 0 <= small['optimiser state'] - 2 * factors < 100
