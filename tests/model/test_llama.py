"""The model computes the logits of `transformers`, at once and in chunks with a cache."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.hf.weights import read_model
from cllm_jax.model.cache import init_cache
from cllm_jax.model.config import RopeScaling
from cllm_jax.model.layout import with_outputs_first
from cllm_jax.model.llama import Llama, forward
from tests.make_golden import CASES, golden, random_tokens, saved_by_torch, torch_logits

NAMES = tuple(CASES)
# Many small programs, each run once: compiling quickly matters more than running quickly.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
OPTIONS = QUICK if jax.default_backend() == 'cpu' else None
forward = jax.jit(forward, static_argnums=0, compiler_options=OPTIONS)


def off(a, b) -> float:
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


@pytest.mark.parametrize('name', NAMES)
def test_logits_equal_the_golden_logits(name):
    config, params, tokens, logits = golden(name)
    assert off(forward(Llama(config), params, tokens), logits) < 1e-4


@pytest.mark.parametrize('name', NAMES)
def test_matrices_may_stand_on_the_left(name):
    config, params, tokens, logits = golden(name)
    turned, left = with_outputs_first(params, jnp.float32), Llama(config, outputs_first=True)
    assert turned['layers_0']['down'].shape == (config.dim, config.mlp_dim)
    assert off(forward(left, turned, tokens), logits) < 1e-4


VARIANTS = {
    'llama': [('norm_eps', 1e-6), ('rope_theta', 1e4)],
    'llama3': [
        ('rope_scaling', None),
        ('rope_scaling', RopeScaling('llama3', 8.0, 2.0, 4.0, 64)),
        ('rope_scaling', RopeScaling('linear', 8.0)),
    ],
    'linear': [('rope_scaling', RopeScaling('linear', 2.0))],
    'qwen2': [('qkv_bias', False)],
    'qwen3': [('qk_norm', False)],
    'biased': [('qkv_bias', False), ('o_bias', False), ('mlp_bias', False)],
    'attention_bias': [('o_bias', False)],
    'qwen3_bias': [('qkv_bias', False), ('o_bias', False)],
}


@pytest.mark.parametrize('name', VARIANTS)
def test_golden_inputs_tell_the_architectures_apart(name):
    """What the parity test would miss if a switch had no effect on these inputs."""
    config, params, tokens, logits = golden(name)
    for field, value in VARIANTS[name]:
        other = dataclasses.replace(config, **{field: value})
        assert off(forward(Llama(other), params, tokens), logits) > 1e-2, (field, value)


@pytest.mark.parametrize('name', NAMES)
def test_logits_of_a_torch_checkpoint_equal(name):
    pytest.importorskip('torch')
    model, saved = saved_by_torch(name)
    directory, tokens = Path(saved.name), random_tokens(7)
    assert len(list(directory.glob('*.safetensors'))) > 1
    config, params = read_model(directory)
    assert off(forward(Llama(config), params, tokens), torch_logits(model, tokens)) < 1e-4


@pytest.mark.parametrize('name', ['llama3', 'gqa', 'qwen3', 'biased'])
def test_cached_chunks_equal_the_full_forward(name):
    """Each row advances by its own step; padding of the shorter one is overwritten later."""
    config, params, tokens, _ = golden(name)
    model, (batch, length), width = Llama(config), tokens.shape, 6
    slots = length + width

    @functools.partial(jax.jit, compiler_options=OPTIONS)
    def step(cache, chunk_BT, start_B):
        positions_BT = start_B[:, None] + jnp.arange(width)[None]
        mask_BTS = jnp.arange(slots)[None, None] <= positions_BT[:, :, None]
        args = (chunk_BT, positions_BT, mask_BTS, cache, start_B)
        hidden, cache = model.apply({'params': params}, *args)
        return model.apply({'params': params}, hidden, method='logits'), cache

    full = np.asarray(forward(model, params, tokens))
    for seed in range(4):
        rng = np.random.default_rng(seed)
        cache = init_cache(config, batch, slots, jnp.float32)
        start = np.zeros(batch, np.int32)
        cuts = set()
        while (start < length).any():
            count = np.minimum(rng.integers(1, width + 1, batch), length - start)
            chunk = rng.integers(0, config.vocab_size, (batch, width), np.int32)  # junk after count
            for row in range(batch):
                chunk[row, : count[row]] = tokens[row, start[row] : start[row] + count[row]]
            logits, cache = step(cache, chunk, start)
            for row in range(batch):
                here = slice(start[row], start[row] + count[row])
                if count[row]:
                    assert off(logits[row, : count[row]], full[row, here]) < 1e-5
            start = start + count
            cuts.add(tuple(start))
        assert any(a != b for a, b in cuts)
