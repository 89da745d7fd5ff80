"""Model directories: the same logits as transformers, and every bit kept both ways."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from cllm_jax.errors import ConfigError
from cllm_jax.hf.weights import (
    abstract_params,
    named_tensors,
    read_model,
    tensor_shapes,
    write_model,
)
from cllm_jax.model.cache import init_cache
from cllm_jax.model.config import LlamaConfig, RopeScaling, config_json, parse_config, read_config
from cllm_jax.model.llama import Llama, forward
from tests.make_golden import CASES, GOLDEN, random_tokens, torch_logits, torch_model

NAMES = tuple(CASES)
# Many small programs, each run once: compiling quickly matters more than running quickly.
QUICK = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
OPTIONS = QUICK if jax.default_backend() == 'cpu' else None
forward = jax.jit(forward, static_argnums=0, compiler_options=OPTIONS)


@pytest.fixture(scope='module')
def golden(tmp_path_factory):
    """Each golden model as a directory, its config and parameters, and what transformers says."""
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            data = dict(np.load(GOLDEN / f'{name}.npz'))
            (directory / 'config.json').write_text(str(data['config']))
            tensors = {
                k.removeprefix('tensor/'): v for k, v in data.items() if k.startswith('tensor/')
            }
            save_file(tensors, directory / 'model.safetensors')
            made[name] = (*read_model(directory), data['tokens'], data['logits'])
        return made[name]

    return get


@pytest.fixture(scope='module')
def torch_saved(tmp_path_factory):
    """A `transformers` model by name, and the directory it saved itself to in small shards."""
    pytest.importorskip('torch')
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(f'torch_{name}')
            model = torch_model(name, seed=100 + NAMES.index(name))
            model.save_pretrained(directory, max_shard_size='30KB')
            made[name] = model, directory
        return made[name]

    return get


def off(a, b) -> float:
    return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))))


def same_bits(a, b) -> bool:
    pairs = jax.tree.map(
        lambda x, y: (
            x.dtype == y.dtype
            and x.shape == y.shape
            and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        ),
        a,
        b,
    )
    return jax.tree.all(pairs)


def random_params(config, seed=0):
    """NumPy parameters with no two alike, vectors included."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), abstract_params(config)
    )


# Parity


@pytest.mark.parametrize('name', NAMES)
def test_logits_equal_the_golden_logits(golden, name):
    config, params, tokens, logits = golden(name)
    assert off(forward(Llama(config), params, tokens), logits) < 1e-4


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
}


@pytest.mark.parametrize('name', VARIANTS)
def test_golden_inputs_tell_the_architectures_apart(golden, name):
    """What the parity test would miss if a switch had no effect on these inputs."""
    config, params, tokens, logits = golden(name)
    for field, value in VARIANTS[name]:
        other = dataclasses.replace(config, **{field: value})
        assert off(forward(Llama(other), params, tokens), logits) > 1e-2, (field, value)


@pytest.mark.parametrize('name', NAMES)
def test_logits_of_a_torch_checkpoint_equal(torch_saved, name):
    model, directory = torch_saved(name)
    assert len(list(directory.glob('*.safetensors'))) > 1
    tokens = random_tokens(7)
    config, params = read_model(directory)
    assert off(forward(Llama(config), params, tokens), torch_logits(model, tokens)) < 1e-4


@pytest.mark.parametrize('name', NAMES)
def test_transformers_loads_what_we_write(torch_saved, tmp_path, name):
    torch = pytest.importorskip('torch')
    from transformers import AutoModelForCausalLM

    model, directory = torch_saved(name)
    config, params = read_model(directory)
    shard_bytes = 20_000 if name in ('tied', 'qwen2') else 1 << 30
    write_model(tmp_path / 'm', config, params, dtype='float32', shard_bytes=shard_bytes)
    back, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / 'm',
        output_loading_info=True,
        dtype=torch.float32,
        attn_implementation='eager',
        local_files_only=True,
    )
    assert not any(info.values()), info
    tokens = random_tokens(8)
    assert np.array_equal(torch_logits(back, tokens), torch_logits(model, tokens))
    assert back.generation_config.eos_token_id == model.generation_config.eos_token_id
    for key in ('model_type', 'head_dim', 'rope_parameters', 'tie_word_embeddings'):
        assert getattr(back.config, key, None) == getattr(model.config, key, None) or (
            key == 'head_dim' and back.config.head_dim == config.head_dim
        )


# Bits


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', ['gqa', 'qwen2', 'qwen3'])
def test_write_then_read_keeps_every_bit(golden, tmp_path, name, dtype):
    config = golden(name)[0]
    params = random_params(config)
    params['norm'][:3] = np.nan, -0.0, np.inf
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
    for shard_bytes in (1, 5_000, 1 << 30):  # one tensor each, several, all
        directory = tmp_path / str(shard_bytes)
        write_model(directory, config, params, dtype=dtype, shard_bytes=shard_bytes)
        back_config, back = read_model(directory, jnp.dtype(dtype))
        assert back_config == config
        assert same_bits(back, params)
        files = sorted(directory.glob('*.safetensors'))
        if shard_bytes == 1:
            assert len(files) == len(tensor_shapes(config))
        if shard_bytes == 5_000:
            assert 1 < len(files) < len(tensor_shapes(config))
            index = json.loads((directory / 'model.safetensors.index.json').read_text())
            width = jnp.dtype(dtype).itemsize
            assert index['metadata']['total_size'] == config.parameters * width
            for file in files:
                with safe_open(file, framework='np') as f:
                    tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
                    assert f.metadata() == {'format': 'pt'}  # transformers 4 insists
                assert all(index['weight_map'][k] == file.name for k in tensors)
                assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 5_000


def test_names_and_shapes_are_those_of_the_checkpoint(golden):
    for name in NAMES:
        config, params, *_ = golden(name)
        listed = {k: v.shape for k, v in named_tensors(params)}
        stored = np.load(GOLDEN / f'{name}.npz')
        expected = {
            k.removeprefix('tensor/'): stored[k].shape for k in stored if k.startswith('tensor/')
        }
        assert listed == expected == tensor_shapes(config)
        assert sum(x.size for x in jax.tree.leaves(params)) == config.parameters


def test_reading_casts(golden, tmp_path):
    config, params, *_ = golden('llama')
    write_model(tmp_path / 'm', config, params, dtype='float32')
    for dtype in (jnp.bfloat16, jnp.float16):
        _, cast = read_model(tmp_path / 'm', dtype)
        assert same_bits(cast, jax.tree.map(lambda x, d=dtype: np.asarray(x).astype(d), params))
    huge = params | {'norm': np.full(config.dim, 1e6, np.float32)}
    write_model(tmp_path / 'm', config, huge, dtype='float32')
    with pytest.raises(ConfigError, match=r'model\.norm\.weight.*65504.*bfloat16'):
        read_model(tmp_path / 'm', jnp.float16)


def test_old_directories_load(golden, tmp_path):
    """The constants of LLaMA 1, a head stored beside the embedding it is tied to, NaN weights."""
    config = golden('tied')[0]
    params = random_params(config)
    params['norm'][0] = params['embed'][0, 0] = np.nan
    tensors = dict(named_tensors(params))
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
    tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(4, np.float32)
    save_file(tensors, tmp_path / 'model.safetensors')
    raw = config_json(config, 'float32')
    del raw['rope_parameters'], raw['head_dim'], raw['dtype']
    raw |= {'torch_dtype': 'float32', 'pad_token_id': -1}
    (tmp_path / 'config.json').write_text(json.dumps(raw))
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [7, 2, -1]}')
    back_config, back = read_model(tmp_path)
    assert same_bits(back, params)
    assert back_config == dataclasses.replace(config, pad_id=None, eos_ids=(2, 7))


# Configs

sizes = st.integers(1, 64)
scalings = st.one_of(
    st.none(),
    st.builds(RopeScaling, st.just('linear'), st.floats(1, 64)),
    st.builds(
        RopeScaling,
        st.just('llama3'),
        st.floats(1, 64),
        st.floats(0.5, 1),
        st.floats(2, 8),
        st.integers(1, 8192),
    ),
)
ids = st.none() | st.integers(0, 99)


@st.composite
def configs(draw):
    family = draw(st.sampled_from(('llama', 'mistral', 'qwen2', 'qwen3')))
    kv_heads, group, width = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(sizes)
    return LlamaConfig(
        vocab_size=draw(sizes),
        dim=kv_heads * group * width,
        layers=draw(st.integers(1, 9)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=2 * draw(sizes),
        mlp_dim=draw(sizes),
        rope_theta=draw(st.floats(1, 1e8)),
        rope_scaling=draw(scalings),
        norm_eps=draw(st.floats(1e-9, 1e-2)),
        tied=draw(st.booleans()),
        qkv_bias=family == 'qwen2',
        qk_norm=family == 'qwen3',
        max_positions=draw(st.integers(8193, 1 << 20)),
        bos_id=draw(ids),
        eos_ids=tuple(draw(st.lists(st.integers(0, 99), max_size=3, unique=True))),
        pad_id=draw(ids),
        family=family,
    )


@settings(max_examples=150)
@given(config=configs())
def test_a_config_survives_its_json(tmp_path_factory, config):
    text = json.dumps(config_json(config, 'bfloat16'))
    assert parse_config(tmp_path_factory.getbasetemp(), json.loads(text)) == config


def test_defaults_are_those_of_the_family(tmp_path):
    """A checkpoint may leave keys out; `head_dim` and `num_key_value_heads` may be null."""
    raw = {'model_type': 'llama', 'num_key_value_heads': None, 'head_dim': None}
    (tmp_path / 'config.json').write_text(json.dumps(raw))
    config = read_config(tmp_path)
    assert (config.dim, config.kv_heads, config.head_dim, config.layers) == (4096, 32, 128, 32)
    assert (config.norm_eps, config.bos_id, config.eos_ids, config.pad_id) == (1e-6, 1, (2,), None)
    (tmp_path / 'config.json').write_text('{"model_type": "qwen3"}')
    config = read_config(tmp_path)
    assert (config.qk_norm, config.head_dim, config.bos_id, config.eos_ids) == (True, 128, None, ())


# The cache


@pytest.mark.parametrize('name', ['llama3', 'gqa', 'qwen3'])
def test_cached_chunks_equal_the_full_forward(golden, name):
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
