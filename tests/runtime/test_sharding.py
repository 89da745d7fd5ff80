"""Eight devices compute what one computes, and every array lives where it should."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from cllm_jax.decoding.engine import decode_all
from cllm_jax.decoding.request import Request
from cllm_jax.decoding.result import Trajectory
from cllm_jax.decoding.sampling import Sampling
from cllm_jax.drafters.autoregressive import AutoRegressive
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.errors import ConfigError
from cllm_jax.hf.load import load
from cllm_jax.hf.model import Model
from cllm_jax.hf.write import write_model
from cllm_jax.model.llama import Llama, param_axes
from cllm_jax.runtime import processes as distributed
from cllm_jax.runtime.mesh import MeshConfig, make_mesh, shape
from cllm_jax.runtime.sharding import (
    check_batch,
    param_shardings,
    place_batch,
    replicated,
    rows_here,
)
from cllm_jax.training.config import TrainConfig
from cllm_jax.training.held_out import HeldOut
from cllm_jax.training.memory import (
    abstract_state,
    bytes_here,
    compiled_step,
    memory_per_device,
)
from cllm_jax.training.noise import Noise
from cllm_jax.training.optimizer import OptimizerConfig, make_optimizer
from cllm_jax.training.packing import make_batch
from cllm_jax.training.step import LossWeights, make_step, new_state, state_places, text_loss
from tests.tiny import BIASES, ragged_prompts, random_model, tiny_config

CONFIG = tiny_config(vocab=32, dim=32, heads=8, kv_heads=4, head_dim=8, mlp_dim=24)
BIASED = dataclasses.replace(CONFIG, **BIASES['llama'])


def label(value) -> str:
    return {CONFIG: 'plain', BIASED: 'biased'}.get(value, str(value))


MESHES = {
    'data 8': MeshConfig(),
    'fsdp 8': MeshConfig(data=1, fsdp=8),
    'data 2 fsdp 2 tensor 2': MeshConfig(data=2, fsdp=2, tensor=2),
}

SETTINGS = TrainConfig(batch=16, max_length=160, held_out=HeldOut(max_tokens=60, block=8))


@pytest.fixture(autouse=True)
def mixed_dtypes():
    """optax itself relies on implicit promotion, which the tests otherwise forbid."""
    with jax.numpy_dtype_promotion('standard'):
        yield


def samples(count: int = 24) -> list[Trajectory]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        answer = rng.integers(2, 32, 9).astype(np.int32)
        states = rng.integers(2, 32, (4, 4)).astype(np.int32)
        start = np.array([0, 2, 4, 5], np.int32)
        prompt = rng.integers(2, 32, 5).astype(np.int32)
        found.append(Trajectory(states, start, prompt, answer))
    return found


def placed(config, params, mesh):
    return param_shardings(param_axes(config), params, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'kind', 'config'),
    [
        ('data 8', 'adamw', CONFIG),
        ('fsdp 8', 'adamw', CONFIG),
        ('data 2 fsdp 2 tensor 2', 'muon', BIASED),
    ],
    ids=label,
)
def test_a_step_is_that_of_one_device(name, kind, config):
    """Parameters agree after three steps; the state comes back to its place, so it compiles once"""
    mesh, params = make_mesh(MESHES[name]), random_model(config=config).params
    # Adam takes the sign of a gradient that is all but 0, which another order of sums can turn.
    rate = {'adamw': 2e-3, 'muon': 1e-2}[kind]
    optimizer = make_optimizer(OptimizerConfig(kind=kind, learning_rate=rate, warmup=0.0), 10)
    everywhere = state_places(optimizer, param_axes(config), params, mesh)
    weights = LossWeights(ar_weight=1.0, global_weight=1.0)
    alone, spread = (new_state(optimizer, params, s) for s in (None, everywhere))
    one = make_step(partial(text_loss, Llama(config), weights), optimizer)
    many = make_step(
        partial(text_loss, Llama(config, mesh=mesh), weights), optimizer, 2, everywhere
    )
    for step in range(3):
        batch = make_batch(samples(), 16, 0, step, Noise(windows=2))
        alone, expected = one(alone, batch)
        spread, metrics = many(spread, place_batch(batch, mesh))
        assert float(metrics['loss']) == pytest.approx(float(expected['loss']), rel=1e-5)
    for a, b in zip(jax.tree.leaves(alone.params), jax.tree.leaves(spread.params), strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-5
    assert many._cache_size() == 1
    found = jax.tree.map(lambda x: x.sharding, spread)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, found, everywhere))


def test_a_device_keeps_its_share_and_sends_no_activations():
    """In bytes of the compiled step: a batch for 8 devices takes each what its part takes one, and
    what they tell each other is weights and gradients: sums if each has all weights, else weights
    for the forward and the backward pass too.
    """
    part = dataclasses.replace(SETTINGS, batch=2)
    alone = compiled_step(part, CONFIG, make_mesh(MeshConfig(), jax.devices()[:1]))
    assert not alone.collectives
    weights = 4 * CONFIG.parameters
    for mesh, kinds, times in (
        (MeshConfig(data=8), {'all-reduce'}, 1),
        (MeshConfig(fsdp=8), {'all-reduce', 'all-gather'}, 3),
    ):
        spread = compiled_step(SETTINGS, CONFIG, make_mesh(mesh))
        assert spread.sizes['temporary'] < 1.3 * alone.sizes['temporary']
        assert spread.collectives.keys() == kinds
        sent = sum(count for _, count in spread.collectives.values())
        assert weights <= sent < times * weights + 4096


@pytest.mark.parametrize('config', [CONFIG, BIASED], ids=label)
def test_planned_bytes_are_those_of_a_real_state(config):
    mesh, params = make_mesh(MESHES['data 2 fsdp 2 tensor 2']), random_model(config=config).params
    optimizer = make_optimizer(SETTINGS.optimizer, 10)
    places = state_places(optimizer, param_axes(config), params, mesh)
    state = new_state(optimizer, params, places)
    here = jax.devices()[0]
    parts = [
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == here
    ]
    planned = memory_per_device(SETTINGS, config, mesh)
    assert bytes_here(abstract_state(SETTINGS, config, mesh)) == sum(parts)
    assert planned['weights'] + planned['optimiser state'] + state.step.nbytes == sum(parts)


@pytest.mark.parametrize(('kind', 'moments'), [('adamw', 2), ('muon', 1)])
def test_moments_live_where_their_parameters_do(kind, moments):
    mesh, params = make_mesh(MeshConfig(data=2, fsdp=4)), random_model(config=CONFIG).params
    optimizer = make_optimizer(OptimizerConfig(kind=kind), 10)
    found = state_places(optimizer, param_axes(CONFIG), params, mesh)
    assert found.params == placed(CONFIG, params, mesh)
    of_q = [
        place.spec
        for path, place in jax.tree_util.tree_leaves_with_path(found.opt_state)
        if 'layers_1' in str(path) and "'q'" in str(path)
    ]
    assert of_q == [P('fsdp', 'tensor', None)] * moments
    assert found.step == replicated(mesh)
    state = jax.eval_shape(lambda p: new_state(optimizer, p), params)
    assert jax.tree.structure(state) == jax.tree.structure(found)


def test_a_process_takes_the_rows_of_its_devices():
    assert rows_here(16, make_mesh(MESHES['data 2 fsdp 2 tensor 2'])) == list(range(16))
    some = make_mesh(MeshConfig(), jax.devices()[2:4])
    assert rows_here(4, some) == [0, 1, 2, 3]


@pytest.mark.parametrize(('config', 'temperature'), [(BIASED, 0.0), (CONFIG, 0.8)], ids=label)
def test_decoding_over_four_devices_returns_the_same_tokens(config, temperature):
    model = random_model(config=config)
    mesh = make_mesh(MeshConfig(data=1, tensor=4), jax.devices()[:4])
    params = jax.device_put(model.params, placed(config, model.params, mesh))
    prompts = ragged_prompts(1, (3, 17, 8), 32)
    for drafter in (AutoRegressive(), Jacobi(4)):
        request = Request(drafter, 12, Sampling(temperature))
        alone = decode_all(model, request, prompts)
        spread = decode_all(Model(config, params, None, 'spread'), request, prompts)
        assert spread.tokens == alone.tokens and spread.accepted == alone.accepted


@pytest.mark.parametrize('config', [CONFIG, BIASED], ids=label)
def test_weights_are_read_straight_into_their_shards(tmp_path, config):
    """The same bits as reading all at once, in the places the rules say."""
    write_model(tmp_path / 'm', random_model(config=config), dtype='float32')
    plain = load(str(tmp_path / 'm'), 'float32')
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    spread = load(str(tmp_path / 'm'), 'float32', mesh)
    places = placed(config, plain.params, mesh)
    assert jax.tree.map(lambda x: x.sharding, spread.params) == places
    same = jax.tree.map(
        lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), plain.params, spread.params
    )
    assert jax.tree.all(same)
    q, down = (spread.params['layers_1'][name] for name in ('q', 'down'))
    assert q.addressable_shards[0].data.shape == (16, 2, 8)
    assert down.addressable_shards[0].data.shape == (6, 16)


def test_meshes_that_do_not_fit_are_refused():
    assert shape(MeshConfig(data=-1, fsdp=2, tensor=2), 8) == {'data': 2, 'fsdp': 2, 'tensor': 2}
    refused = {
        MeshConfig(data=3): 'multiply to 8',
        MeshConfig(data=-1, fsdp=3): 'multiply to 8',
        MeshConfig(data=4): 'multiply to 8',
        MeshConfig(data=-1, fsdp=-1): 'one of them may be -1',
        MeshConfig(data=0): 'must be positive',
    }
    for config, words in refused.items():
        with pytest.raises(ConfigError, match=words):
            shape(config, 8)
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    with pytest.raises(ConfigError, match=r'tensor 8: does not divide the 4 of .* kv_heads'):
        placed(CONFIG, random_model(config=CONFIG).params, mesh)
    with pytest.raises(ConfigError, match=r'batch 12: .* try 16'):
        check_batch(12, make_mesh(MeshConfig()))


def test_every_parameter_has_a_name_for_every_axis():
    params = random_model(config=CONFIG).params
    named = jax.tree.map(
        lambda spec, leaf: len(spec) == leaf.ndim and None not in spec,
        param_axes(CONFIG),
        params,
        is_leaf=lambda x: isinstance(x, P),
    )
    assert jax.tree.all(named)
    assert jnp.isfinite(params['norm']).all()


def test_libtpu_without_a_tpu_is_no_job(monkeypatch):
    def nothing_found():
        raise ValueError('coordinator_address should be defined.')

    monkeypatch.setattr(distributed, 'find_spec', lambda name: name == 'libtpu')
    monkeypatch.setattr(jax.distributed, 'initialize', nothing_found)
    distributed.initialize()
