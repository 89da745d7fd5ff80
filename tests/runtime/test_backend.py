"""The backend is that of the devices that weights live on, and changes no answer."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cllm_jax.decoding.engine import decode_all, decoder_of, start
from cllm_jax.decoding.loop import programs
from cllm_jax.decoding.request import Request, row_keys
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.hf.load import mixed
from cllm_jax.runtime import backend as choice
from cllm_jax.runtime.backend import ANY, CACHED, CPU, EIGEN, GPU, TPU, backend_for, backend_of
from cllm_jax.runtime.mesh import MeshConfig, make_mesh
from tests.tiny import ragged_prompts, random_model, tiny_config

MODEL = random_model(config=tiny_config(layers=1))
PROMPTS = ragged_prompts(3, (1, 9, 3))


@pytest.mark.parametrize(
    ('platform', 'backend'), [('cpu', CPU), ('gpu', GPU), ('tpu', TPU), ('new', ANY)]
)
def test_a_device_has_the_backend_of_its_platform(platform, backend):
    assert backend_for([SimpleNamespace(platform=platform)]) is backend


@pytest.mark.parametrize(
    ('backend', 'values', 'several', 'single'),
    [
        (CPU, jnp.float32, jnp.float32, jnp.float32),
        (CPU, jnp.bfloat16, jnp.uint16, jnp.float32),
        (TPU, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (GPU, jnp.float16, jnp.float16, jnp.float16),
    ],
)
def test_a_cache_keeps_what_its_backend_reads_fast(backend, values, several, single):
    assert backend.cache_dtype(values) == several
    assert backend.cache_dtype(values, one_query=True) == single
    in_class = backend.exactly('class')
    assert in_class.cache_dtype(values, one_query=True) == several, 'AR reads what drafts read'


def test_large_and_divided_weights_are_left_to_one_thread():
    weights = jnp.ones((4, CACHED // 16))
    assert backend_of(weights).threads == backend_of((weights, np.ones(3))).threads >= 1
    everywhere = NamedSharding(make_mesh(MeshConfig()), PartitionSpec(None, 'data'))
    for other in (jax.device_put(weights, everywhere), (weights, jnp.ones(1)), np.ones(3)):
        assert backend_of(other).threads == 1


def test_what_eigen_would_be_slow_with_is_left_as_it_is():
    def options(weights):
        return backend_of(weights).compiler_options

    assert options(MODEL.params) == EIGEN
    assert options(mixed(MODEL.params)) == ()
    weights = jnp.ones(CACHED // 4)
    assert options(weights) == EIGEN and options((weights, jnp.ones(1))) == ()
    mesh = make_mesh(MeshConfig(), jax.devices()[:2])
    shared = jax.device_put(MODEL.params, NamedSharding(mesh, PartitionSpec()))
    assert options(shared) == ()


def test_small_float32_models_are_multiplied_by_eigen(monkeypatch):
    """The answers are the same, and the compiled loop has nothing of the other library."""
    request = Request(Jacobi(5), 20)

    def fusions_of_the_other_library(model) -> int:
        state = start(model, request, [[1, 2]], row_keys(0, [0]))
        bounds = np.int32(20), np.int32(1)
        run = programs(model.backend).advance
        lowered = run.lower(decoder_of(model, request), *bounds, state)
        return lowered.compile().as_text().count('ynn_fusion')

    fast, fusions = decode_all(MODEL, request, PROMPTS), fusions_of_the_other_library(MODEL)
    monkeypatch.setattr(choice, 'CACHED', 0)
    large = dataclasses.replace(MODEL)
    assert MODEL.backend.compiler_options == EIGEN and not large.backend.compiler_options
    plain = decode_all(large, request, PROMPTS)
    assert (fast.tokens, fast.accepted) == (plain.tokens, plain.accepted)
    if EIGEN:
        assert fusions == 0 < fusions_of_the_other_library(large)
