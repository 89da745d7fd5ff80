"""Which config.json is not loaded, and how it is said; what is written is read back."""

import itertools
import json
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm_jax.errors import CllmError, ConfigError, DataError
from cllm_jax.hf.config import config_json, parse_config, read_config
from cllm_jax.hf.weights import read_model, tensor_shapes
from cllm_jax.model.config import LlamaConfig, RopeScaling
from tests.tiny_model import edit_config, refusal


def drop(directory, *keys):
    path = directory / 'config.json'
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in raw.items() if k not in keys}))


# config.json: architectures

UNSUPPORTED = {
    'unknown model': ({'model_type': 'mamba'}, "model_type = 'mamba'"),
    'no model': ({'model_type': None}, 'model_type = None'),
    'model list': ({'model_type': ['llama']}, "model_type = ['llama']"),
    'code': ({'auto_map': {'AutoConfig': 'evil.Evil'}}, 'auto_map'),
    'quantised': ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    'activation': ({'hidden_act': 'gelu'}, "hidden_act = 'gelu'"),
    'qwen2 mlp bias': ({'model_type': 'qwen2', 'mlp_bias': True}, 'mlp_bias'),
    'qwen3 mlp bias': ({'model_type': 'qwen3', 'mlp_bias': True}, 'mlp_bias'),
    'mistral bias': (
        {'model_type': 'mistral', 'sliding_window': None, 'attention_bias': True},
        'attention_bias',
    ),
    'mistral mlp bias': (
        {'model_type': 'mistral', 'sliding_window': None, 'mlp_bias': True},
        'mlp_bias',
    ),
    'window': ({'model_type': 'mistral', 'sliding_window': 4096}, 'sliding_window = 4096'),
    'unused window': (
        # transformers' Mistral has no such switch and would apply the window
        {'model_type': 'mistral', 'sliding_window': 64, 'use_sliding_window': False},
        'sliding_window = 64',
    ),
    'qwen2 window': (
        {'model_type': 'qwen2', 'use_sliding_window': True, 'sliding_window': 32},
        'sliding_window = 32',
    ),
    'qwen3 window': (
        {'model_type': 'qwen3', 'use_sliding_window': True, 'sliding_window': 32},
        'sliding_window = 32',
    ),
    'layer types': (
        {'model_type': 'qwen3', 'layer_types': ['full_attention', 'sliding_attention']},
        "layer_types = ['sliding_attention']",
    ),
    'yarn': ({'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0}}, "rope_type = 'yarn'"),
    'old yarn': ({'rope_scaling': {'type': 'yarn', 'factor': 4.0}}, "rope_type = 'yarn'"),
    'dynamic': ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "rope_type = 'dynamic'"),
    'longrope': (
        {'rope_scaling': {'rope_type': 'longrope', 'short_factor': [1.0], 'long_factor': [2.0]}},
        "rope_type = 'longrope'",
    ),
    'new rope': ({'rope_scaling': {'rope_type': 'spiral'}}, "rope_type = 'spiral'"),
    'partial': ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor = 0.5'),
    'rope by layer': (
        {'rope_parameters': {'full_attention': {'rope_type': 'linear', 'factor': 2.0}}},
        'full_attention',
    ),
    'null factor': ({'rope_scaling': {'type': 'linear', 'factor': None}}, 'rope factor'),
    'negative factor': ({'rope_scaling': {'type': 'linear', 'factor': -2.0}}, 'factor=-2.0'),
    'theta text': ({'rope_theta': 'x', 'rope_parameters': None}, 'rope_theta'),
    'theta null': ({'rope_theta': None, 'rope_parameters': None}, 'rope_theta'),
    'theta zero': ({'rope_theta': 0, 'rope_parameters': None}, 'rope_theta'),
    'eps': ({'rms_norm_eps': -1.0}, 'norm_eps'),
    'heads': ({'num_attention_heads': 2, 'num_key_value_heads': 3}, '2 query heads over 3'),
    'end token': ({'eos_token_id': 16}, 'eos_token_id 16: outside the vocabulary 0..15'),
    'end tokens': ({'eos_token_id': [1, 151645]}, 'eos_token_id 151645: outside the vocabulary'),
}


@pytest.mark.parametrize('name', UNSUPPORTED)
def test_unsupported_architectures_are_refused_by_name(single, name):
    changes, offender = UNSUPPORTED[name]
    edit_config(single, **changes)
    drop(single, *{'rope_scaling', 'rope_parameters'} - changes.keys() if 'rope' in name else ())
    message = refusal(read_model, single, of=ConfigError)
    assert offender in message and str(single / 'config.json') in message


def test_an_absent_window_is_mistrals_default(single):
    edit_config(single, model_type='mistral')
    assert read_config(single).family == 'mistral'
    drop(single, 'sliding_window')
    assert 'sliding_window = 4096' in refusal(read_model, single, of=ConfigError)


def test_every_family_has_the_biases_that_transformers_gives_it(single):
    torch = pytest.importorskip('torch')
    from transformers import AutoConfig, AutoModelForCausalLM

    for family, switches in itertools.product(
        ('llama', 'qwen2', 'qwen3', 'mistral'), itertools.product((False, True), repeat=2)
    ):
        keys = dict(zip(('attention_bias', 'mlp_bias'), switches, strict=True))
        edit_config(single, model_type=family, sliding_window=None, **keys)
        try:
            config = read_config(single)
        except ConfigError:
            assert family != 'llama'
            continue
        with torch.device('meta'):
            theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(single))
        wanted = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
        assert tensor_shapes(config) == wanted, (family, keys)
        assert config.parameters == sum(math.prod(shape) for shape in wanted.values())


# config.json: values

WRONG = {
    'hidden_size': ['x', -1, 0, None, 8.0, True, [8], 1 << 60],
    'vocab_size': ['16', None, 0, 10**400],
    'num_hidden_layers': [0, None, 10**9],
    'num_attention_heads': [0, -2, None],
    'num_key_value_heads': [0, 'x'],
    'head_dim': [0, -4, 5],
    'intermediate_size': [None, {}],
    'max_position_embeddings': [None, 0],
    'rms_norm_eps': ['x', None],
    'tie_word_embeddings': ['yes', None, 1],
    'attention_bias': ['yes', None, 1],
    'mlp_bias': ['false', None, 0],
    'eos_token_id': ['</s>', [1, None], {}],
    'bos_token_id': [[1], 'x'],
    'rope_parameters': ['x', [1]],
    'layer_types': [3],
}


@pytest.mark.parametrize('key', WRONG)
def test_values_of_the_wrong_kind_are_refused_by_key(single, key):
    family = 'qwen2' if key == 'layer_types' else 'llama'
    for value in WRONG[key]:
        edit_config(single, model_type=family, **{key: value})
        if key == 'rope_parameters':
            drop(single, 'rope_scaling')
        assert key in refusal(read_model, single, of=DataError)


def test_a_width_the_heads_do_not_divide_is_refused(single):
    edit_config(single, num_attention_heads=3, num_key_value_heads=1)
    assert 'multiple of the number of attention heads' in refusal(read_model, single)


CONFIG_FILES = {
    'not json': (b'{"model_type": "llama",', 'not valid JSON'),
    'not utf-8': (b'\xff\xfe{}', 'not valid JSON'),
    'list': (b'[]', 'a JSON list'),
    'null': (b'null', 'a JSON NoneType'),
    'empty': (b'', 'not valid JSON'),
    'deep': (b'[' * 200_000, 'not valid JSON'),
    'deep value': (b'{"model_type": ' + b'[' * 900 + b']' * 900 + b'}', 'model_type'),
    'digits': (b'{"hidden_size": ' + b'9' * 10_000 + b'}', 'not valid JSON'),
    'big': (b'{"a": "' + b'x' * (1 << 20) + b'"}', 'at most 1 MiB'),
}


@pytest.mark.parametrize('name', CONFIG_FILES)
@pytest.mark.parametrize('file', ['config.json', 'generation_config.json'])
def test_unreadable_configs_are_refused(single, name, file):
    content, reason = CONFIG_FILES[name]
    (single / file).write_bytes(content)
    if name == 'deep value' and file == 'generation_config.json':
        assert read_config(single).eos_ids == (1,)
        return
    message = refusal(read_model, single)
    assert file in message and reason in message


def test_missing_config_and_odd_stop_ids_are_refused(single):
    (single / 'generation_config.json').write_text('{"eos_token_id": [1, "x"]}')
    message = refusal(read_model, single, of=DataError)
    assert 'generation_config.json' in message and 'eos_token_id' in message
    (single / 'generation_config.json').write_text('{"eos_token_id": [1, 16]}')
    assert 'eos_token_id 16: outside' in refusal(read_model, single, of=ConfigError)
    (single / 'generation_config.json').unlink()
    (single / 'config.json').unlink()
    assert 'config.json: no such file' in refusal(read_model, single, of=DataError)
    os.mkfifo(single / 'config.json')  # reading it would block for ever
    assert 'config.json' in refusal(read_model, single, of=DataError)


# Fuzz

BASE = {
    'model_type': 'llama',
    'vocab_size': 16,
    'hidden_size': 8,
    'num_hidden_layers': 1,
    'num_attention_heads': 2,
    'num_key_value_heads': 1,
    'intermediate_size': 8,
}
KEYS = [
    *BASE,
    *('head_dim', 'hidden_act', 'rms_norm_eps', 'rope_theta', 'rope_scaling', 'rope_parameters'),
    *('tie_word_embeddings', 'sliding_window', 'use_sliding_window', 'layer_types', 'dtype'),
    *('bos_token_id', 'eos_token_id', 'pad_token_id', 'max_position_embeddings', 'id2label'),
    *('architectures', 'partial_rotary_factor', 'attention_bias', 'auto_map', 'self', '__class__'),
]
words = st.sampled_from(['llama', 'qwen2', 'qwen3', 'mistral', 'silu', 'linear', 'llama3', 'yarn'])
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), words
)
rope_keys = st.sampled_from(
    ['type', 'rope_type', 'factor', 'rope_theta', 'low_freq_factor', 'high_freq_factor']
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(rope_keys | st.text(max_size=3), inner)
    ),
    max_leaves=6,
)


@given(changes=st.dictionaries(st.sampled_from(KEYS), values, max_size=4))
def test_any_config_is_read_or_refused_in_one_line(tmp_path_factory, changes):
    directory = tmp_path_factory.getbasetemp() / 'fuzz'
    directory.mkdir(exist_ok=True)
    (directory / 'config.json').write_text(json.dumps(BASE | changes))
    try:
        config = read_config(directory)
    except CllmError as e:
        assert str(e).isprintable() and 'config.json' in str(e)
    else:
        hash(config)


# What is read and written

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
    attention, mlp = draw(st.booleans()), draw(st.booleans())
    kv_heads, group, width = draw(st.integers(1, 8)), draw(st.integers(1, 8)), draw(sizes)
    vocab = draw(sizes)
    return LlamaConfig(
        vocab_size=vocab,
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
        qkv_bias=family == 'qwen2' or (attention and family != 'mistral'),
        o_bias=attention and family in ('llama', 'qwen3'),
        mlp_bias=mlp and family == 'llama',
        qk_norm=family == 'qwen3',
        max_positions=draw(st.integers(8193, 1 << 20)),
        bos_id=draw(ids),
        eos_ids=tuple(draw(st.lists(st.integers(0, vocab - 1), max_size=3, unique=True))),
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
