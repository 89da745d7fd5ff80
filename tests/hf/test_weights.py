"""Weights keep every bit under their names; those of another model are refused by tensor."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf.config import config_json
from cllm_jax.hf.files import SINGLE
from cllm_jax.hf.model import Model
from cllm_jax.hf.weights import hf_tensor, named, read_model, tensor_shapes
from cllm_jax.hf.write import write_model
from tests.make_golden import CASES, golden, golden_tensors
from tests.tiny_model import edit_config, model_of, refusal, same_bits

EMBED, HEAD, NORM = 'model.embed_tokens.weight', 'lm_head.weight', 'model.norm.weight'
Q = 'model.layers.0.self_attn.q_proj.weight'


def test_names_and_shapes_are_those_of_the_checkpoint():
    for name in CASES:
        config, params, *_ = golden(name)
        tensors = {key: hf_tensor(*one) for key, one in named(params).items()}
        stored = golden_tensors(name)
        assert tensors.keys() == stored.keys()
        assert all(np.array_equal(tensors[key], stored[key]) for key in stored)
        assert tensor_shapes(config) == {key: array.shape for key, array in stored.items()}
        assert sum(x.size for x in jax.tree.leaves(params)) == config.parameters


def test_reading_casts(tmp_path):
    config, params, *_ = golden('llama')
    write_model(tmp_path / 'm', Model(config, params, None, 'llama'), dtype='float32')
    for dtype in (jnp.bfloat16, jnp.float16):
        _, cast = read_model(tmp_path / 'm', dtype)
        assert same_bits(cast, jax.tree.map(lambda x, d=dtype: np.asarray(x).astype(d), params))
    huge = params | {'norm': np.full(config.dim, 1e6, np.float32)}
    write_model(tmp_path / 'm', Model(config, huge, None, 'huge'), dtype='float32')
    with pytest.raises(ConfigError, match=r'model\.norm\.weight.*65504.*bfloat16'):
        read_model(tmp_path / 'm', jnp.float16)


def test_old_directories_load(tmp_path):
    """The constants of LLaMA 1, a head that is tied to the embedding and stored, NaN weights."""
    config = golden('tied')[0]
    params = model_of(config).params
    params['norm'][0] = params['embed'][0, 0] = np.nan
    tensors = {key: hf_tensor(*one) for key, one in named(params).items()}
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


def mutate(directory, **tensors):
    """Replace (or with None remove) tensors; `__` in a name stands for a dot."""
    stored = load_file(directory / SINGLE)
    for name, tensor in tensors.items():
        stored.pop(name, None)
        if tensor is not None:
            stored[name] = tensor
    save_file(stored, directory / SINGLE)
    return stored


def test_missing_extra_and_ill_shaped_tensors_are_named(single):
    stored = load_file(single / SINGLE)
    mutate(single, **{Q: None, NORM: None})
    message = refusal(read_model, single, of=DataError)
    assert f'missing tensors: {Q}, {NORM};' in message
    mutate(single, **{Q: stored[Q], NORM: stored[NORM], 'evil\nname': np.ones(3, 'f4')})
    message = refusal(read_model, single, of=DataError)
    assert 'has not: evil name;' in message
    mutate(single, **{'evil\nname': None, Q: stored[Q].T[:3].copy(), NORM: np.ones((8, 1), 'f4')})
    message = refusal(read_model, single, of=DataError)
    assert f'{Q} is (3, 8) and not (8, 8), {NORM} is (8, 1) and not (8,)' in message
    mutate(single, **{Q: stored[Q], NORM: np.array(3.0, 'f4')})
    assert f'{NORM} is () and not (8,)' in refusal(read_model, single, of=DataError)


def test_long_lists_of_names_are_cut_at_ten(single):
    stored = load_file(single / SINGLE)
    save_file({HEAD: stored[HEAD]}, single / SINGLE)
    message = refusal(read_model, single, of=DataError)
    assert message.count('model.') == 10 and f'and {len(stored) - 11} more' in message
    save_file(stored | {f'x{i:02}': np.ones(1, 'f4') for i in range(13)}, single / SINGLE)
    message = refusal(read_model, single, of=DataError)
    assert 'x09 and 3 more' in message and 'x10' not in message
    edit_config(single, hidden_size=4, num_attention_heads=2)
    save_file(stored, single / SINGLE)
    assert message.count(' is (') <= 10 and ' more' in refusal(read_model, single, of=DataError)


@pytest.mark.parametrize('dtype', ['int8', 'uint8', 'int32', 'int64', 'bool', 'complex64', 'fp8'])
def test_tensors_that_hold_no_plain_weights_are_refused(single, dtype):
    kind = ml_dtypes.float8_e4m3fn if dtype == 'fp8' else dtype
    mutate(single, **{NORM: np.ones(8).astype(kind)})
    message = refusal(read_model, single, of=DataError)
    assert NORM in message and 'unquantised' in message


def test_heads_and_ties_must_agree(single):
    stored = mutate(single)
    edit_config(single, tie_word_embeddings=True)
    message = refusal(read_model, single, of=DataError)
    assert HEAD in message and 'tie_word_embeddings to false' in message
    mutate(single, **{HEAD: stored[EMBED][:3].copy()})
    assert f'{HEAD} is (3, 8)' in refusal(read_model, single, of=DataError)
    mutate(single, **{HEAD: stored[EMBED]})
    assert 'head' not in read_model(single)[1]
    edit_config(single, tie_word_embeddings=False)
    mutate(single, **{HEAD: None})
    message = refusal(read_model, single, of=DataError)
    assert HEAD in message and 'tie_word_embeddings to true' in message


def test_nothing_is_allocated_for_a_config_the_weights_do_not_fit(single, monkeypatch):
    """2^24 x 2^24 weights would be a petabyte."""
    edit_config(single, vocab_size=1 << 24, hidden_size=1 << 24, intermediate_size=1 << 24)
    monkeypatch.setattr(np, 'empty', None)
    assert f'{(1 << 24, 1 << 24)}' in refusal(read_model, single, of=DataError)
