"""LoRA adapters are merged as PEFT does it, or refused by name; none is passed over in silence."""

import dataclasses
import json
import math
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from cllm_jax.errors import CllmError, ConfigError, DataError
from cllm_jax.hf.adapter import SETTINGS, TENSORS
from cllm_jax.hf.load import files_fingerprint, load, mixed, open_tokenizer, peek
from cllm_jax.hf.model import fingerprint
from cllm_jax.hf.weights import read_model, tensor_shapes
from cllm_jax.hf.write import write_model
from cllm_jax.runs.checksums import write_sums
from cllm_jax.runtime.mesh import MeshConfig, make_mesh
from tests.tiny_model import COMMIT, TINY, model_of, refusal, same_bits, tiny_tokenizer, to_cache

CONFIG = dataclasses.replace(TINY, head_dim=6, mlp_dim=10, qkv_bias=True, family='qwen2')
"""Every matrix has its own shape."""
NAMES = {name.removesuffix('.weight'): s for name, s in tensor_shapes(CONFIG).items()}
SUFFIXES = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')


def tensor(module: str, half: str) -> str:
    return f'base_model.model.{module}.lora_{half}.weight'


def modules(*ends: str) -> list[str]:
    return [m for m in NAMES if m.endswith(ends) and m != 'model.embed_tokens']


def factors(chosen, rank_of, seed: int = 0, dtype='float32') -> dict[str, np.ndarray]:
    """Random factors of modules."""
    rng, found = np.random.default_rng(seed), {}
    for module in chosen:
        (outputs, inputs), rank = NAMES[module], rank_of(module)
        found[tensor(module, 'A')] = rng.normal(0, 0.3, (rank, inputs))
        found[tensor(module, 'B')] = rng.normal(0, 0.3, (outputs, rank))
    return {name: array.astype(jnp.dtype(dtype)) for name, array in found.items()}


def write_adapter(directory, base, tensors, **settings):
    """An adapter as PEFT saves it."""
    directory.mkdir(parents=True, exist_ok=True)
    ends = sorted({name.split('.')[-3] for name in tensors})
    about = {
        'peft_type': 'LORA',
        'base_model_name_or_path': str(base),
        'r': 4,
        'lora_alpha': 6,
        'target_modules': ends,
        'bias': 'none',
        'task_type': 'CAUSAL_LM',
        'inference_mode': True,
        'lora_dropout': 0.1,
        'init_lora_weights': True,
        'loftq_config': {},
        'megatron_core': 'megatron.core',
        'modules_to_save': None,
        'use_dora': False,
    } | settings
    (directory / SETTINGS).write_text(json.dumps(about))
    save_file(tensors, directory / TENSORS, metadata={'format': 'pt'})
    return directory


def edit(directory, **changes):
    path = directory / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def base(tmp_path):
    write_model(tmp_path / 'base', model_of(CONFIG), dtype='float32')
    return tmp_path / 'base'


@pytest.fixture
def adapter(tmp_path, base):
    """Of q and v, rank 4, alpha 6."""
    tensors = factors(modules('q_proj', 'v_proj'), lambda _: 4)
    return write_adapter(tmp_path / 'adapter', base, tensors)


def merged_by_hand(directory, base, adapter, scale_of):
    """A whole model: the weights of the base and what is added, in float64."""
    shutil.copytree(base, directory)
    [path] = directory.glob('*.safetensors')
    weights, found = load_file(path), load_file(adapter / TENSORS)
    for module in {name.split('.lora_')[0].removeprefix('base_model.model.') for name in found}:
        a, b = (found[tensor(module, half)].astype(np.float64) for half in 'AB')
        old = weights[f'{module}.weight']
        new = old.astype(np.float64) + scale_of(module) * (b @ a)
        assert np.abs(new - old).max() > 1e-2, 'the adapter must matter'
        weights[f'{module}.weight'] = new.astype(np.float32)
    save_file(weights, path)
    return read_model(directory)[1]


def one(value):
    return lambda module: value


PATTERNS = {
    'rank_pattern': {'q_proj': 2, 'layers.1.mlp.up_proj': 6, '^model.layers.0.self_attn.k_proj': 5},
    'alpha_pattern': {
        'down_proj': 3,
        r'layers\.1\.self_attn\.o_proj': 1,
        'ayers.0.mlp.up_proj': 99,
    },
}


def pattern_rank(module: str) -> int:
    ranks = {'model.layers.1.mlp.up_proj': 6, 'model.layers.0.self_attn.k_proj': 5}
    return 2 if module.endswith('q_proj') else ranks.get(module, 4)


def pattern_alpha(module: str) -> float:
    return 3 if module.endswith('down_proj') else 1 if module.endswith('1.self_attn.o_proj') else 6


KINDS = {
    'q and v': (modules('q_proj', 'v_proj'), one(4), one(6 / 4), {}),
    'every matrix': (modules(*SUFFIXES), one(4), one(6 / 4), {}),
    'the head': (modules('lm_head'), one(4), one(1.5), {}),
    'another alpha': (modules('down_proj'), one(3), one(0.5 / 3), {'r': 3, 'lora_alpha': 0.5}),
    'rank 1': (modules('k_proj'), one(1), one(6), {'r': 1}),
    'rsLoRA': (modules(*SUFFIXES), one(9), one(6 / 3), {'r': 9, 'use_rslora': True}),
    'patterns': (
        modules(*SUFFIXES),
        pattern_rank,
        lambda m: pattern_alpha(m) / pattern_rank(m),
        PATTERNS,
    ),
    'patterns, rsLoRA': (
        modules(*SUFFIXES),
        pattern_rank,
        lambda m: pattern_alpha(m) / math.sqrt(pattern_rank(m)),
        PATTERNS | {'use_rslora': True},
    ),
    # PEFT itself sets it to false, for these are not GPT-2's transposed matrices.
    'fan_in_fan_out': (modules('up_proj'), one(4), one(1.5), {'fan_in_fan_out': True}),
    'one layer': (modules('1.self_attn.q_proj'), one(4), one(1.5), {'layers_to_transform': 1}),
    'layers': (modules('0.mlp.up_proj'), one(4), one(1.5), {'layers_to_transform': [0]}),
    'an expression': (
        modules('0.mlp.up_proj', 'q_proj'),
        one(4),
        one(1.5),
        {'target_modules': r'.*\.(q_proj|0.mlp.up_proj)'},
    ),
    'by whole names': (
        modules('0.mlp.up_proj', 'k_proj'),
        one(4),
        one(1.5),
        {'target_modules': ['model.layers.0.mlp.up_proj', 'self_attn.k_proj']},
    ),
    'all but': (
        modules('1.mlp.up_proj', '1.self_attn.k_proj'),
        one(4),
        one(1.5),
        {'exclude_modules': ['layers.0.mlp.up_proj', 'model.layers.0.self_attn.k_proj']},
    ),
    'older settings': (
        modules('q_proj'),
        one(4),
        one(1.5),
        {'enable_lora': None, 'merge_weights': False, 'init_lora_weights': 'gaussian'},
    ),
}


@pytest.mark.parametrize('name', KINDS)
def test_an_adapter_is_merged_as_peft_does(tmp_path, base, name):
    chosen, rank_of, scale_of, settings = KINDS[name]
    directory = write_adapter(tmp_path / 'a', base, factors(chosen, rank_of), **settings)
    expected = merged_by_hand(tmp_path / 'whole', base, directory, scale_of)
    found = load(str(directory), 'float32')
    assert found.config == CONFIG
    assert jax.tree.structure(found.params) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (found.params, expected)), strict=True):
        assert np.allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('stored', ['float32', 'bfloat16', 'float16', 'float64'])
def test_what_is_merged_in_float32_is_rounded_once(tmp_path, base, stored):
    tensors = factors(modules(*SUFFIXES), one(4), dtype=stored)
    directory = write_adapter(tmp_path / 'a', base, tensors)
    exact = load(str(directory), 'float32').params
    for dtype in ('bfloat16', 'float16'):
        rounded = jax.tree.map(lambda x, d=dtype: x.astype(d), exact)
        assert same_bits(load(str(directory), dtype).params, rounded)
    assert same_bits(load(str(directory), 'mixed').params, mixed(exact))
    plain = read_model(base, jnp.bfloat16)[1]
    write_model(tmp_path / 'low', model_of(CONFIG), dtype='bfloat16')
    edit(directory, base_model_name_or_path=str(tmp_path / 'low'))
    low = load(str(directory), 'float32').params
    q, k = low['layers_0']['q'], low['layers_0']['attn_norm']
    assert not np.array_equal(q, q.astype(jnp.bfloat16)), 'the sum is not rounded to the base'
    assert np.array_equal(k, plain['layers_0']['attn_norm'].astype(jnp.float32))


def test_devices_that_share_the_weights_hold_the_same_bits(tmp_path, mesh_base):
    directory = write_adapter(tmp_path / 'a', *mesh_base)
    whole = load(str(directory), 'float32').params
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    spread = load(str(directory), 'float32', mesh).params
    assert len(spread['layers_0']['q'].sharding.device_set) == 8
    assert same_bits(whole, spread)


@pytest.fixture
def mesh_base(tmp_path):
    """A base that eight devices can share, and factors of its queries and its MLP."""
    config = dataclasses.replace(CONFIG, dim=32, heads=8, kv_heads=4, head_dim=8, mlp_dim=24)
    write_model(tmp_path / 'base', model_of(config), dtype='float32')
    rng, found = np.random.default_rng(0), {}
    for name, shape in tensor_shapes(config).items():
        module = name.removesuffix('.weight')
        if module.endswith(('q_proj', 'down_proj')) and len(shape) == 2:
            found[tensor(module, 'A')] = rng.normal(size=(4, shape[1])).astype('f4')
            found[tensor(module, 'B')] = rng.normal(size=(shape[0], 4)).astype('f4')
    return tmp_path / 'base', found


def test_a_weight_that_an_adapter_makes_too_large_is_refused(adapter):
    tensors = load_file(adapter / TENSORS)
    tensors[tensor('model.layers.0.self_attn.q_proj', 'A')][:] = 1e6
    save_file(tensors, adapter / TENSORS)
    message = refusal(load, str(adapter), 'float16', of=ConfigError)
    assert 'layers.0.self_attn.q_proj.weight' in message and '65504' in message


# Where the base is


def test_a_base_is_found_from_here_or_from_the_adapter(tmp_path, base, adapter, monkeypatch):
    expected = fingerprint(load(str(adapter), 'float32'))
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    for name in (str(base), f'{base}/', '../base'):
        edit(adapter, base_model_name_or_path=name)
        assert fingerprint(load(str(adapter), 'float32')) == expected
    monkeypatch.chdir(tmp_path)
    for name in ('base', './base', 'elsewhere/../base'):
        edit(adapter, base_model_name_or_path=name)
        assert fingerprint(load(str(adapter), 'float32')) == expected
        assert load('adapter', 'float32').adapter == f'LoRA rank 4 merged into {name}'
    shutil.copytree(base, adapter / 'base')
    edit(adapter, base_model_name_or_path='base')
    message = refusal(load, str(adapter), of=ConfigError)
    assert 'base_model_name_or_path' in message and 'write the whole path' in message


def test_a_base_may_be_a_run_in_shards_and_beside_other_files(tmp_path, base, adapter):
    expected = fingerprint(load(str(adapter), 'float32'))
    model = model_of(CONFIG)
    write_model(tmp_path / 'run' / 'model', model, dtype='float32', shard_bytes=600, sums=True)
    edit(adapter, base_model_name_or_path=str(tmp_path / 'run'))
    (adapter / 'model').mkdir()
    assert fingerprint(load(str(adapter), 'float32')) == expected
    (adapter / 'config.json').write_text('{"model_type": "llama"}')  # some trainers save it
    for extra in ('training_args.bin', 'optimizer.pt', 'README.md'):
        (adapter / extra).write_bytes(b'x')
    assert fingerprint(load(str(adapter), 'float32')) == expected


BASES = {
    'nowhere': 'no such directory',
    './nowhere': 'no such directory',
    '/no/such/place': 'no such directory',
    'a/b/c': 'no such directory',
    '': 'no such directory',
    'a\0b': 'no such directory',
    'x' * 5000: 'no such directory',
    '~nobody-here/x': 'no such directory',
    'owner/name': 'nothing is fetched',
}


@pytest.mark.parametrize('name', BASES, ids=range(len(BASES)))
def test_a_base_that_is_not_here_is_refused_without_asking_the_network(
    adapter, name, no_network, monkeypatch
):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    edit(adapter, base_model_name_or_path=name)
    for call in (load, peek):
        message = refusal(call, str(adapter), of=ConfigError)
        assert f'{SETTINGS}: base_model_name_or_path' in message and BASES[name] in message


@pytest.mark.parametrize('revision', [None, 'main', COMMIT])
def test_a_hub_id_that_was_fetched_before_is_a_base(
    tmp_path, base, adapter, revision, no_network, monkeypatch
):
    expected = fingerprint(load(str(adapter), 'float32'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    to_cache(base, tmp_path / 'hub')
    edit(adapter, base_model_name_or_path='a/b', revision=revision)
    model = load(str(adapter), 'float32')
    assert fingerprint(model) == expected and model.adapter == 'LoRA rank 4 merged into a/b'
    edit(adapter, revision='another')
    assert 'nothing is fetched' in refusal(load, str(adapter), of=ConfigError)


def test_only_the_hub_id_that_a_user_names_is_asked_for(base, adapter, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options.get('local_files_only', False)))
        return str(adapter if name == 'mine/adapter' else base)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    expected = fingerprint(load(str(adapter), 'float32'))
    edit(adapter, base_model_name_or_path='owner/base')
    for call in (lambda name: fingerprint(load(name, 'float32')) == expected, peek):
        assert call('mine/adapter')
        assert set(asked) == {('mine/adapter', False), ('owner/base', True)}
        asked.clear()


def test_an_adapter_of_an_adapter_is_refused(tmp_path, base, adapter):
    second = shutil.copytree(adapter, tmp_path / 'second')
    edit(second, base_model_name_or_path=str(adapter))
    assert 'has an adapter too' in refusal(load, str(second), of=ConfigError)
    edit(second, base_model_name_or_path='.')  # where it lies itself
    assert 'no such file' in refusal(load, str(second), of=DataError)


@pytest.mark.parametrize('named', ['itself', '.', 'nobody/nothing', ''])
def test_an_adapter_that_lies_with_a_model_is_merged_into_it(tmp_path, base, adapter, named):
    """Unless it names other weights that are here."""
    expected = load(str(adapter), 'float32')
    whole = shutil.copytree(base, tmp_path / 'whole')
    for name in (SETTINGS, TENSORS):
        shutil.copy(adapter / name, whole)
    names = {'itself': str(whole)}
    edit(whole, base_model_name_or_path=names.get(named, named))
    model = load(str(whole), 'float32')
    assert same_bits(model.params, expected.params)
    assert (
        model.source == str(whole) and model.title == f'{whole} (LoRA rank 4 merged into {whole})'
    )
    (whole / SETTINGS).unlink()
    assert f'without {SETTINGS}' in refusal(load, str(whole), of=DataError)
    shutil.copy(adapter / SETTINGS, whole)
    edit(whole, base_model_name_or_path='')
    (whole / TENSORS).unlink()
    assert f'no {TENSORS}' in refusal(load, str(whole), of=DataError)


def test_an_adapter_of_other_weights_than_it_lies_with_is_refused(tmp_path, base, adapter):
    """Perhaps it was merged into them already: once more would be another model."""
    for name in ('model.safetensors', 'config.json'):
        shutil.copy(base / name, adapter)
    for name in (str(base), '../base'):
        edit(adapter, base_model_name_or_path=name)
        fault = refusal(load, str(adapter), of=ConfigError)
        assert str(base) in fault and 'delete the adapter if it was merged' in fault


def test_factors_that_are_not_finite_are_refused(adapter):
    found = load_file(adapter / TENSORS)
    for value in (np.nan, np.inf, 3e38):
        name = next(iter(found))
        save_file(found | {name: np.full_like(found[name], value)}, adapter / TENSORS)
        assert 'not finite' in refusal(load, str(adapter), of=DataError)


def test_models_say_what_was_merged(tmp_path, base, adapter):
    plain = load(str(base))
    assert (plain.adapter, plain.title) == ('', str(base))
    assert load(str(adapter)).title == f'{adapter} (LoRA rank 4 merged into {base})'
    tensors = factors(modules('q_proj', 'k_proj'), lambda m: 16 if 'k_proj' in m else 4)
    ranks = write_adapter(tmp_path / 'ranks', base, tensors, rank_pattern={'k_proj': 16})
    assert load(str(ranks)).adapter == f'LoRA rank 4 to 16 merged into {base}'


def test_the_tokenizer_is_the_adapters_own_or_that_of_its_base(base, adapter):
    assert load(str(adapter)).tokenizer is None
    tiny_tokenizer().save_pretrained(base)
    assert load(str(adapter)).tokenizer('a b')['input_ids'] == [2, 3]
    other = tiny_tokenizer()
    other.add_special_tokens({'eos_token': 'n'})
    other.save_pretrained(adapter)
    assert load(str(adapter)).tokenizer.eos_token == 'n'
    edit(adapter, base_model_name_or_path='nowhere')
    assert open_tokenizer(adapter).eos_token == 'n'


def test_a_config_is_known_without_the_weights(adapter, base):
    (adapter / TENSORS).unlink()
    (base / 'model.safetensors').unlink()
    assert peek(str(adapter)) == CONFIG


# What tells two models apart


def test_fingerprints_of_files_tell_adapters_and_their_bases_apart(tmp_path, base, adapter):
    same = files_fingerprint(adapter)
    assert files_fingerprint(shutil.copytree(adapter, tmp_path / 'copy')) == same
    seen = {same, files_fingerprint(base)}
    for changes in ({'lora_alpha': 7}, {'use_rslora': True}):
        other = shutil.copytree(adapter, tmp_path / str(len(seen)))
        edit(other, **changes)
        seen.add(files_fingerprint(other))
    other = write_adapter(
        tmp_path / 'other', base, factors(modules('q_proj', 'v_proj'), one(4), seed=1)
    )
    assert (other / TENSORS).stat().st_size == (adapter / TENSORS).stat().st_size
    seen.add(files_fingerprint(other))
    write_model(base, model_of(CONFIG, seed=3), dtype='float32', sums=True)
    seen.add(files_fingerprint(adapter))
    whole = shutil.copytree(base, tmp_path / 'whole')
    seen.add(files_fingerprint(whole))
    for directory in (adapter, other):
        for name in (SETTINGS, TENSORS):
            shutil.copy(directory / name, whole)
        edit(whole, base_model_name_or_path=str(whole))
        seen.add(files_fingerprint(whole))
    assert len(seen) == 9


def test_sums_of_an_adapter_are_checked(adapter):
    write_sums(adapter)
    load(str(adapter))
    data = bytearray((adapter / TENSORS).read_bytes())
    data[-1] ^= 1
    (adapter / TENSORS).write_bytes(data)
    message = refusal(load, str(adapter), of=DataError)
    assert TENSORS in message and 'not the bytes that were written' in message


# Settings that are refused

UNSUPPORTED = {
    'peft_type': ['IA3', 'LOHA', 'PROMPT_TUNING', 'ADALORA', 'lora', None, 3, ['LORA']],
    'bias': ['all', 'lora_only', True],
    'use_dora': [True],
    'lora_bias': [True],
    'modules_to_save': [['embed_tokens', 'lm_head']],
    'trainable_token_indices': [[1, 2], {'embed_tokens': [1]}],
    'layer_replication': [[[0, 2], [1, 2]]],
    'target_parameters': [['mlp.experts']],
    'megatron_config': [{'a': 1}],
    'use_qalora': [True],
    'alora_invocation_tokens': [[5]],
    'what_comes_next_year': [True, 'yes', {'a': 1}],
    'init_lora_weights': ['pissa', 'pissa_niter_4', 'olora', 'loftq', 'corda', 'lora_ga', 'new'],
    'rank_pattern': [{'.*q_proj': 4}, {'(a+)+': 4}, {'q_proj|k_proj': 4}, {'': 4}, {'[q]': 4}],
    'alpha_pattern': [{r'\d.q_proj': 4}, {'q{1,9}': 4}, {'q_proj ': 4}, {'\n': 3}],
}


@pytest.mark.parametrize('key', UNSUPPORTED)
def test_what_is_not_lora_is_refused_by_its_setting(base, adapter, key):
    for value in UNSUPPORTED[key]:
        edit(adapter, **{key: value})
        message = refusal(load, str(adapter), of=ConfigError)
        assert f'{SETTINGS}: {key} = ' in message and 'merge_and_unload' in message


WRONG = {
    'r': [0, -1, 1.5, '8', True, None, 10**9, [8]],
    'lora_alpha': [0, -3, 'x', None, float('nan'), float('inf'), True, {}],
    'use_rslora': ['yes', 1],
    'base_model_name_or_path': [3, ['base'], {}],
    'revision': [3, ['main']],
    'rank_pattern': [['q_proj'], 'q_proj', 3, {'q_proj': 0}, {'q_proj': '4'}, {'q_proj': 2.5}],
    'alpha_pattern': [[1], 'x', {'q_proj': -1}, {'q_proj': None}, {'q_proj': [1]}],
}


@pytest.mark.parametrize('key', WRONG)
def test_settings_of_the_wrong_kind_are_refused_by_key(adapter, key):
    for value in WRONG[key]:
        edit(adapter, **{key: value})
        message = refusal(load, str(adapter), of=DataError)
        assert f'{SETTINGS}: {key}' in message


@pytest.mark.parametrize('value', [3, {'a': 1}, [[1]], [None], True, 'x'])
def test_odd_choices_of_modules_are_one_line_at_most(adapter, value):
    for key in ('target_modules', 'exclude_modules', 'layers_to_transform', 'layers_pattern'):
        before = (adapter / SETTINGS).read_text()
        edit(adapter, **{key: value})
        try:
            load(str(adapter))
        except CllmError as e:
            assert str(e).isprintable()
        (adapter / SETTINGS).write_text(before)


# Tensors that are refused

Q0, V1 = 'model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.v_proj'


def change(adapter, **tensors):
    stored = load_file(adapter / TENSORS)
    for name, array in tensors.items():
        stored.pop(name, None)
        if array is not None:
            stored[name] = array
    save_file(stored, adapter / TENSORS)


@pytest.mark.parametrize(
    'name',
    [
        f'base_model.model.{Q0}.lora_magnitude_vector',
        'base_model.model.lm_head.weight',
        'base_model.model.lm_head.base_layer.weight',
        'base_model.model.model.embed_tokens.lora_embedding_A',
        f'base_model.model.{Q0}.lora_B.bias',
        f'base_model.model.{Q0}.bias',
        f'{Q0}.lora_A.weight',
        f'base_model.model.{Q0}.lora_A.default.weight',
        f'base_model.model.{Q0}.lora_C.weight',
        'evil\nname',
    ],
)
def test_tensors_that_are_no_factors_are_refused_by_name(adapter, name):
    change(adapter, **{name: np.ones((4, 8), 'f4')})
    message = refusal(load, str(adapter), of=DataError)
    assert TENSORS in message and name.replace('\n', ' ') in message


@pytest.mark.parametrize('settings', [{}, {'target_modules': r'.*(q|v)_proj'}])
@pytest.mark.parametrize(('module', 'half'), [(Q0, 'A'), (Q0, 'B'), (V1, 'A'), (V1, 'B')])
def test_half_of_a_factorisation_is_refused(adapter, settings, module, half):
    edit(adapter, **settings)
    change(adapter, **{tensor(module, half): None})
    assert tensor(module, half) in refusal(load, str(adapter), of=DataError)


def test_modules_that_are_missing_or_too_many_are_refused(adapter):
    stored = load_file(adapter / TENSORS)
    change(adapter, **{tensor(V1, 'A'): None, tensor(V1, 'B'): None})
    message = refusal(load, str(adapter), of=DataError)
    assert f'missing tensors: {tensor(V1, "A")}, {tensor(V1, "B")};' in message
    save_file(stored, adapter / TENSORS)
    edit(adapter, target_modules=['q_proj'])
    message = refusal(load, str(adapter), of=DataError)
    assert f'does not name: model.layers.0.self_attn.v_proj, {V1};' in message
    edit(adapter, target_modules=['q_proj', 'v_proj'], layers_to_transform=[0])
    assert 'does not name: model.layers.1' in refusal(load, str(adapter), of=DataError)
    save_file({}, adapter / TENSORS)
    for targets in ([], 'x', ['nothing']):
        edit(adapter, target_modules=targets)
        assert 'no tensors' in refusal(load, str(adapter), of=DataError)


@pytest.mark.parametrize(
    'module', ['model.layers.7.self_attn.q_proj', 'model.norm', 'x', 'model.embed_tokens']
)
def test_modules_that_the_base_has_not_are_refused(adapter, module):
    halves = {
        tensor(module, 'A'): np.ones((4, 8), 'f4'),
        tensor(module, 'B'): np.ones((8, 4), 'f4'),
    }
    change(adapter, **halves)
    message = refusal(load, str(adapter), of=DataError)
    assert f'no linear layers of the base: {module};' in message


def test_a_head_that_is_tied_to_the_embedding_has_no_factors(tmp_path):
    tied = dataclasses.replace(CONFIG, tied=True)
    write_model(tmp_path / 'base', model_of(tied), dtype='float32')
    made = write_adapter(tmp_path / 'a', tmp_path / 'base', factors(['lm_head'], one(4)))
    assert 'of the base: lm_head;' in refusal(load, str(made), of=DataError)


def test_factors_of_another_shape_are_refused_with_both(tmp_path, base, adapter):
    for half, wrong, right in (
        ('A', (4, 9), (4, 8)),
        ('B', (8, 4), (12, 4)),
        ('A', (3, 8), (4, 8)),
        ('B', (12,), (12, 4)),
        ('A', (), (4, 8)),
        ('A', (0, 8), (4, 8)),
    ):
        stored = load_file(adapter / TENSORS)
        change(adapter, **{tensor(Q0, half): np.ones(wrong, 'f4')})
        message = refusal(load, str(adapter), of=DataError)
        assert f'{tensor(Q0, half)} is {wrong} and not {right}' in message
        save_file(stored, adapter / TENSORS)
    edit(adapter, r=3)
    assert ' is (4, 8) and not (3, 8)' in refusal(load, str(adapter), of=DataError)
    wide = dataclasses.replace(CONFIG, head_dim=8)
    write_model(tmp_path / 'wide', model_of(wide), dtype='float32')
    edit(adapter, r=4, base_model_name_or_path=str(tmp_path / 'wide'))
    assert ' is (12, 4) and not (16, 4)' in refusal(load, str(adapter), of=DataError)


@pytest.mark.parametrize('dtype', ['int8', 'uint8', 'int32', 'bool', 'float8_e4m3fn'])
def test_factors_that_hold_no_plain_numbers_are_refused(adapter, dtype):
    change(adapter, **{tensor(Q0, 'A'): np.ones((4, 8)).astype(jnp.dtype(dtype))})
    assert tensor(Q0, 'A') in refusal(load, str(adapter), of=DataError)


def test_pickled_adapters_are_never_opened(adapter, base):
    (adapter / TENSORS).rename(adapter / 'adapter_model.bin')
    (adapter / 'adapter_model.bin').write_bytes(b'cos\nsystem\n(S"exit 1"\ntR.')
    message = refusal(load, str(adapter), of=DataError)
    assert 'adapter_model.bin' in message and 'never opened' in message
    (adapter / 'adapter_model.bin').rename(base / 'adapter_model.bin')
    assert 'adapter_model.bin without' in refusal(load, str(base), of=DataError)


@given(data=st.binary(max_size=40), where=st.integers(0, 1 << 12), cut=st.booleans())
def test_any_bytes_of_an_adapter_are_read_or_refused(tmp_path_factory, data, where, cut):
    parent = tmp_path_factory.getbasetemp() / 'fuzzed adapters'
    if not parent.exists():
        write_model(parent / 'base', model_of(CONFIG), dtype='float32')
    tensors = factors(modules('q_proj'), one(4))
    for name in (SETTINGS, TENSORS):
        path = write_adapter(parent / 'a', parent / 'base', tensors) / name
        old = path.read_bytes()
        at = where % len(old)
        path.write_bytes(old[:at] + data + (b'' if cut else old[at + len(data) :]))
        try:
            load(str(parent / 'a'), 'float32')
        except CllmError as e:
            assert str(e).isprintable()
