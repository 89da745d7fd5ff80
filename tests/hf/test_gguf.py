"""A GGUF file is the model of the Hugging Face directory from which it could have been made."""

import dataclasses
import sys

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

import cllm_jax as cllm
from cllm_jax.decoding.request import Request
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.evaluation.window import _facts
from cllm_jax.hf.load import files_fingerprint, load, mixed, peek, resolve, same_files
from cllm_jax.hf.model import fingerprint, with_tokenizer
from cllm_jax.hf.weights import named, read_model
from cllm_jax.hf.write import write_model
from cllm_jax.model.config import RopeScaling
from cllm_jax.runtime.mesh import MeshConfig, make_mesh
from tests.gguf_files import GQA, KIND, bytes_of_kind, stored_tensors, write_gguf
from tests.tiny_model import TINY, model_of, refusal, same_bits, write_single

BLOCKS = dataclasses.replace(GQA, layers=1, dim=256, head_dim=64, mlp_dim=256)
"""Rows that can be divided into blocks of 256."""
CONFIGS = {
    'grouped queries': GQA,
    'tied': dataclasses.replace(GQA, tied=True, pad_id=0, bos_id=2, eos_ids=(3, 4, 5)),
    'wide heads': dataclasses.replace(TINY, head_dim=8, norm_eps=1e-6, rope_theta=1e6),
    'qwen2': dataclasses.replace(GQA, family='qwen2', qkv_bias=True),
    'qwen3': dataclasses.replace(TINY, family='qwen3', qk_norm=True, tied=True),
    'biased': dataclasses.replace(GQA, qkv_bias=True, o_bias=True, mlp_bias=True),
    'linear': dataclasses.replace(TINY, rope_scaling=RopeScaling('linear', 4.0)),
}
LLAMA3 = RopeScaling('llama3', 8.0)


def directory_of(place, model, kind=KIND.F32):
    """The Hugging Face directory of what a file with this kind of tensors means."""
    write_model(place, model, dtype='float32')
    stored = stored_tensors(model, kind)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[model.config.family.upper()], 2)
    tensors = {n: stored[names.get_name(n, ('.weight', '.bias'))][1] for n in named(model.params)}
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, place / 'model.safetensors')
    return place


@pytest.mark.parametrize('name', CONFIGS)
def test_a_file_is_the_model_of_its_directory(name, tmp_path):
    """Its config, and every bit, in every precision."""
    model = model_of(CONFIGS[name])
    path = write_gguf(tmp_path / 'm.gguf', model)
    place = directory_of(tmp_path / 'm', model)
    assert peek(str(path)) == peek(str(place)) == model.config
    for dtype in ('float32', 'bfloat16', 'float16', 'mixed'):
        one, other = load(str(path), dtype), load(str(place), dtype)
        assert one.config == other.config and one.precision == other.precision == dtype
        assert same_bits(one.params, other.params)
    assert same_bits(load(str(path), 'float32').params, model.params)
    assert fingerprint(one) == fingerprint(other)


SIMPLE = ('F16', 'BF16', 'Q4_0', 'Q4_1', 'Q5_0', 'Q8_0')
SUPER = ('Q2_K', 'Q3_K', 'Q4_K', 'Q5_K', 'Q6_K', 'IQ4_XS')


@pytest.mark.parametrize('kind', [*SIMPLE, *SUPER])
def test_quantised_weights_are_what_the_package_makes_of_them(kind, tmp_path):
    model = model_of(BLOCKS if kind in SUPER else GQA)
    path = write_gguf(tmp_path / 'm.gguf', model, KIND[kind])
    _, wanted = read_model(directory_of(tmp_path / 'm', model, KIND[kind]))
    read = load(str(path), 'float32').params
    assert same_bits(read, wanted)
    assert not same_bits(read, model.params)
    assert same_bits(load(str(path), 'mixed').params, mixed(wanted))


def test_a_file_decodes_as_its_directory(tmp_path):
    model = model_of(GQA, seed=1)
    path = write_gguf(tmp_path / 'm.gguf', model, KIND.Q8_0)
    place = directory_of(tmp_path / 'm', model, KIND.Q8_0)
    prompts = [[2, 3, 5, 7, 11], [13]]
    answers = [
        cllm.decode(load(str(p), 'float32'), prompts, cllm.AutoRegressive(), max_tokens=12).tokens
        for p in (path, place)
    ]
    assert answers[0] == answers[1] and len(set(answers[0][0])) > 2


def test_devices_share_the_weights_of_a_file(tmp_path):
    path = write_gguf(tmp_path / 'm.gguf', kind=KIND.Q8_0)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    spread, whole = (load(str(path), 'float32', m).params for m in (mesh, None))
    assert len(spread['layers_0']['q'].sharding.device_set) == 8
    assert not spread['layers_0']['q'].sharding.is_fully_replicated
    assert same_bits(spread, whole)


def factors(rule, head_dim, theta):
    """By wavelength, one after the other, as the model card of LLaMA 3.1 tells it."""
    found = []
    for i in range(head_dim // 2):
        wave = 2 * np.pi * theta ** (2 * i / head_dim)
        if wave < rule.original_positions / rule.high_freq_factor:
            found.append(1.0)
        elif wave > rule.original_positions / rule.low_freq_factor:
            found.append(rule.factor)
        else:
            smooth = (rule.original_positions / wave - rule.low_freq_factor) / (
                rule.high_freq_factor - rule.low_freq_factor
            )
            found.append(1 / ((1 - smooth) / rule.factor + smooth))
    return np.array(found, np.float32)


def test_the_frequencies_of_llama_3_are_known_by_their_factors(tmp_path):
    config = dataclasses.replace(GQA, dim=64, heads=2, head_dim=64, kv_heads=1, rope_theta=5e5)
    for rule, wanted in (
        (LLAMA3, LLAMA3),
        (dataclasses.replace(LLAMA3, factor=32.0), dataclasses.replace(LLAMA3, factor=32.0)),
        (dataclasses.replace(LLAMA3, factor=1.0), None),
    ):
        tensors = {'rope_freqs.weight': factors(rule, 64, 5e5)}
        path = write_gguf(tmp_path / 'm.gguf', model_of(config), tensors=tensors)
        assert load(str(path)).config == dataclasses.replace(config, rope_scaling=wanted)
    near = factors(LLAMA3, 64, 5e5)
    near[near == 8.0] *= np.linspace(0.99, 1, (near == 8.0).sum(), dtype=np.float32)
    other = factors(dataclasses.replace(LLAMA3, original_positions=4096), 64, 5e5)
    for stored in (near, other):
        path = write_gguf(path, model_of(config), tensors={'rope_freqs.weight': stored})
        assert 'rope_freqs.weight' in refusal(load, str(path), of=ConfigError)
    tensors = {'rope_freqs.weight': np.ones(5, np.float32)}
    path = write_gguf(tmp_path / 'm.gguf', model_of(config), tensors=tensors)
    assert '(5,)' in refusal(load, str(path), of=ConfigError)


def test_what_is_found_by_other_names(tmp_path):
    """Sizes that older files leave out, and a frequency factor as they call it."""
    config = dataclasses.replace(TINY, kv_heads=2)
    changes = dict.fromkeys(('head_count_kv', 'key_length'))
    changes = {f'llama.attention.{name}': None for name in changes}
    changes |= {'llama.rope.freq_base': None, 'llama.vocab_size': 16, 'llama.expert_count': 0}
    changes |= {'llama.rope.scale_linear': 2.0, 'llama.rope.dimension_count': 4}
    path = write_gguf(tmp_path / 'm.gguf', model_of(config), **changes)
    wanted = dataclasses.replace(config, rope_scaling=RopeScaling('linear', 2.0))
    assert load(str(path)).config == wanted
    changes['llama.rope.scaling.type'] = 'none'
    assert peek(str(write_gguf(path, model_of(config), **changes))) == config


REFUSED = {
    'general.architecture': ('gemma', 'supported architectures are llama'),
    'general.type': ('adapter', 'whole model'),
    'split.count': (3, 'merge the parts'),
    'llama.expert_count': (8, 'absent'),
    'llama.attention.sliding_window': (4096, 'absent'),
    'llama.new_in_2030': (1.5, 'absent'),
    'llama.attention.causal': (False, 'true'),
    'llama.attention.value_length': (8, 'width of a head, 16'),
    'llama.rope.dimension_count': (8, 'width of a head, 16'),
    'llama.rope.scaling.type': ('yarn', 'none, linear'),
    'llama.attention.head_count_kv': ([2, 1], 'all layers'),
    'llama.attention.head_count': (5, 'multiple'),
    'llama.rope.freq_base': (0.0, 'positive'),
    'tokenizer.ggml.eos_token_id': (48, 'vocabulary'),
}


@pytest.mark.parametrize('key', REFUSED)
def test_what_is_not_computed_is_refused_by_its_key(key, tmp_path):
    value, rule = REFUSED[key]
    path = write_gguf(tmp_path / 'm.gguf', **{key: value})
    for call in (load, peek):
        message = refusal(call, str(path), of=ConfigError)
        assert message.startswith(f'{path}: ') and message.count(str(path)) == 1
        assert rule in message
        if rule not in ('multiple', 'positive', 'vocabulary'):
            assert f'{key} = ' in message


@pytest.mark.parametrize('key', ['block_count', 'attention.layer_norm_rms_epsilon'])
def test_metadata_that_are_missing_or_of_the_wrong_kind_are_refused(key, tmp_path):
    for value, told in ((None, 'no '), ('2', ''), (True, ''), ([1.5], '')):
        path = write_gguf(tmp_path / 'm.gguf', **{f'llama.{key}': value})
        kind = ConfigError if value == [1.5] and key == 'block_count' else DataError
        assert f'{told}llama.{key}' in refusal(load, str(path), of=kind)


def test_missing_extra_and_ill_shaped_tensors_of_a_file_are_named(tmp_path):
    q, embed = 'blk.1.attn_q.weight', 'token_embd.weight'

    def said(**tensors):
        return refusal(load, str(write_gguf(tmp_path / 'm.gguf', tensors=tensors)), of=DataError)

    assert f'missing tensors: {q}; fetch' in said(**{q: None})
    assert f'missing tensors: {embed}; fetch' in said(**{embed: None})
    ones = np.ones((32, 64), np.float32)
    assert 'has not: blk.2.attn_q.weight;' in said(**{'blk.2.attn_q.weight': ones})
    assert f'{q} is (32, 64) and not (64, 64)' in said(**{q: ones})
    assert 'has not: blk.0.attn_k.bias;' in said(**{'blk.0.attn_k.bias': ones[:, 0].copy()})


@pytest.mark.parametrize('kind', ['I8', 'I32', 'F64', 'Q8_K'])
def test_kinds_that_the_package_cannot_dequantise_are_refused_by_name(kind, tmp_path):
    name, config = 'blk.0.attn_q.weight', BLOCKS
    if kind == 'Q8_K':
        shape = gguf.quant_shape_to_byte_shape((256, 256), KIND.Q8_K)
        tensor = np.zeros(shape, np.uint8), KIND.Q8_K
    else:
        types = {'I8': np.int8, 'I32': np.int32, 'F64': np.float64}
        tensor = np.ones((256, 256), types[kind])
    path = write_gguf(tmp_path / 'm.gguf', model_of(config), tensors={name: tensor})
    assert f'{kind} tensors: {name};' in refusal(load, str(path), of=DataError)


def test_files_that_are_cut_or_no_gguf_are_named(tmp_path):
    whole = write_gguf(tmp_path / 'whole.gguf').read_bytes()
    path = tmp_path / 'm.gguf'
    for size in (7, 9, 25, 60, 200, 700, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        message = refusal(load, str(path), of=DataError)
        assert str(path) in message and 'GGUF' in message
    for content, told in (
        (b'', 'an empty file'),
        (b'version https://git-lfs.github.com/spec/v1', 'git lfs pull'),
        (b'<!DOCTYPE html><html>', 'HTML'),
        (b'PK\3\4' + whole[4:], 'does not begin with GGUF'),
        (b'GGUF\x09\0\0\0' + whole[8:], 'version 9'),
    ):
        path.write_bytes(content)
        assert told in refusal(load, str(path), of=DataError)
    write_gguf(path, endian=gguf.GGUFEndian.BIG)
    assert 'big-endian' in refusal(load, str(path), of=DataError)


def patched(path, at: int, value: np.generic) -> str:
    data = bytearray(path.read_bytes())
    data[at : at + value.nbytes] = value.tobytes()
    path.with_name('bad.gguf').write_bytes(data)
    return str(path.with_name('bad.gguf'))


def test_a_damaged_place_or_kind_of_a_tensor_is_refused(tmp_path):
    """It would give other weights, without a word."""
    path = write_gguf(tmp_path / 'm.gguf', model_of(GQA), KIND.BF16)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == 'blk.0.attn_q.weight')
    name_len, name, count, dims, kind, _ = tensor.field.parts
    at_kind = tensor.field.offset + sum(p.nbytes for p in (name_len, name, count, dims))
    at_place = at_kind + kind.nbytes
    for place in (0, 1, 32, 2**64 - 32, 2**62):
        bad = patched(path, at_place, np.uint64(place))
        with pytest.raises(DataError, match=r'bad\.gguf'):
            load(bad)
    for other in (KIND.F32, KIND.Q4_0, KIND.Q8_0):
        bad = patched(path, at_kind, np.uint32(other))
        with pytest.raises(DataError, match=r'bad\.gguf'):
            load(bad)
    assert load(patched(path, at_kind, np.uint32(KIND.BF16))).config == load(str(path)).config


@pytest.mark.parametrize('kind', [0, 5, 8, 9, 10])
def test_a_list_that_claims_more_than_the_file_has_is_refused_at_once(kind, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / 'm.gguf', 'llama')
    writer.add_array('tokenizer.ggml.tokens', ['a', 'b'])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    data = bytearray((tmp_path / 'm.gguf').read_bytes())
    at = data.index(b'tokens') + len('tokens') + 4
    data[at : at + 12] = np.uint32(kind).tobytes() + np.uint64(2**40).tobytes()
    (tmp_path / 'm.gguf').write_bytes(data)
    with pytest.raises(DataError, match=r'm\.gguf'):
        peek(str(tmp_path / 'm.gguf'))


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / 'm.gguf')
    monkeypatch.setitem(sys.modules, 'gguf', None)
    for call in (load, peek):
        assert "pip install 'cllm_jax[gguf]'" in refusal(call, str(path), of=ConfigError)
    assert load(str(write_single(tmp_path / 'm'))).config == TINY


def test_a_file_is_known_by_its_name_or_its_first_bytes(tmp_path, no_network):
    for name in ('m.GGUF', 'sha256-0123'):
        place = write_gguf(tmp_path / 'a.gguf').rename(tmp_path / name)
        assert resolve(str(place)) == place
        model = load(str(place))
        assert (model.source, model.directory) == (str(place), place)
        assert model.tokenizer is None and model.lacks == ''
        assert 'use the Hugging Face directory' in refusal(with_tokenizer, model, of=ConfigError)
    assert 'no such file' in refusal(load, 'models/m.gguf', of=ConfigError)
    write_gguf(tmp_path / 'here.gguf')
    message = refusal(load, str(tmp_path), of=ConfigError)
    assert message.endswith('has no config.json; name one of its GGUF files: here.gguf')
    (tmp_path / 'notes.txt').write_text('GGU')
    assert 'a GGUF file' in refusal(load, str(tmp_path / 'notes.txt'), of=ConfigError)


def test_fingerprints_tell_files_apart(tmp_path):
    paths = [write_gguf(tmp_path / f'{i}.gguf', model_of(GQA, seed=i % 2)) for i in range(3)]
    one, other, again = map(files_fingerprint, paths)
    assert one == again != other
    assert same_files(one[:16], paths[2]) and not same_files(one[:16], paths[1])


def test_windows_are_remembered_of_one_file(tmp_path):
    """What was seen of a file is not told of another one of that name."""
    request = Request(Jacobi(4), 8)
    seen = []
    for config in (TINY, GQA):
        path = write_gguf(tmp_path / 'm.gguf', model_of(config))
        seen.append(_facts(load(str(path)), request))
    assert seen[0]['weights'][0][0] == 'm.gguf' and seen[0] != seen[1]


def test_a_file_becomes_a_directory(tmp_path):
    path = write_gguf(tmp_path / 'm.gguf', kind=KIND.Q4_0)
    model = load(str(path), 'float32')
    write_model(tmp_path / 'out', model, dtype='float32', sums=True)
    back = load(str(tmp_path / 'out'), 'float32')
    assert back.config == model.config and same_bits(back.params, model.params)


def test_random_blocks_mean_finite_numbers():
    """Of the kinds to which the package cannot quantise: else the comparison would say nothing."""
    for kind in SUPER:
        meant = gguf.dequantize(
            bytes_of_kind(np.zeros((2, 256), np.float32), KIND[kind]), KIND[kind]
        )
        assert np.isfinite(meant).all() and np.unique(meant).size > 9, kind
