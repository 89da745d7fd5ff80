"""Opening a model by name: where it is looked for, and what is never done."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf import load as load_module
from cllm_jax.hf.files import SINGLE
from cllm_jax.hf.load import load, resolve
from cllm_jax.hf.model import fingerprint
from cllm_jax.hf.write import write_model
from cllm_jax.model.llama import Llama, forward
from tests.kinds import tokenizer_of
from tests.tiny import byte_tokenizer, chat_model
from tests.tiny_model import (
    TINY,
    edit_config,
    model_of,
    refusal,
    tiny_tokenizer,
)

OLD_FINGERPRINT = '8bfecf0368c1d86a3542f9c3a4298c457e84714595f6e90506a39fccbb68cd46'
"""Of `model_of()`, as collections of the first version have noted it."""


def test_a_path_never_touches_the_network(tmp_path, no_network, monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    asked = []
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda *a, **_: asked.append(a))
    write_model(tmp_path / 'owner' / 'name', model_of(tokenizer=tiny_tokenizer()))
    monkeypatch.chdir(tmp_path)
    for name in ('owner/name', str(tmp_path / 'owner' / 'name'), './owner/name/'):
        model = load(name)
        assert model.source == name and model.config == TINY
        assert model.tokenizer('a b n')['input_ids'] == [2, 3, 15]
        assert model.tokenizer.eos_token_id == 1
    for name in ('./no/such', 'no', '/no/such', 'a/b/c', 'owner/name/x', '~nobody-here/x', '-', ''):
        refusal(load, name, of=ConfigError)
    assert not asked


@pytest.mark.parametrize('name', ['nowhere', 'a/b/c', './x/y', 'a\0b', 'x' * 5000, 'x/' * 3000])
def test_names_of_nothing_are_refused(name, no_network):
    message = refusal(load, name, of=ConfigError)
    assert ascii(name)[1:-1][:4] in message


def test_a_file_is_no_model(single):
    message = refusal(load, str(single / SINGLE), of=ConfigError)
    assert SINGLE in message and 'is a file' in message


def test_a_hub_id_offline_is_one_line(no_network):
    message = refusal(load, 'nobody/nothing', of=ConfigError)
    assert 'nobody/nothing' in message and 'download it yourself' in message


def test_a_hub_id_is_fetched_without_pickles_or_code(single, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, **patterns):
        asked.append((name, patterns))
        return str(single)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    assert load('owner/name').config == TINY
    [(name, patterns)] = asked
    repository = ['config.json', SINGLE, 'pytorch_model.bin', 'modeling_x.py', 'original/a.json']
    repository += ['consolidated.safetensors', 'tokenizer.json', 'tokenizer.model']
    kept = huggingface_hub.utils.filter_repo_objects(repository, **patterns)
    assert (name, list(kept)) == (
        'owner/name',
        ['config.json', SINGLE, 'tokenizer.json', 'tokenizer.model'],
    )


def test_embedded_models_are_found_in_the_package(single, tmp_path, monkeypatch):
    assert Path(load_module.__file__).parents[1] / 'embedded' == load_module.SHIPPED
    monkeypatch.setattr(load_module, 'SHIPPED', tmp_path)
    for name, directory in (('embedded', 'cllm'), ('embedded-target', 'target')):
        message = refusal(load, name, of=DataError)
        assert str(tmp_path / directory) in message and 'install cllm_jax again' in message
        shutil.copytree(single, tmp_path / directory)
        assert load(name).config == TINY


def test_a_run_means_its_exported_checkpoint(single, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(single, run / 'model')
    assert resolve(str(run)) == run / 'model'
    assert load(str(run)).config == TINY
    shutil.copy(single / 'config.json', run)
    assert resolve(str(run)) == run
    (tmp_path / 'bare').mkdir()
    assert 'config.json' in refusal(load, str(tmp_path / 'bare'), of=DataError)


def test_tokenizers_absent_and_unreadable(single):
    assert load(str(single)).tokenizer is None
    for content in (b'{', b'', b'[' * 100_000, b'{"model": {"type": "BPE", "vocab": 3}}'):
        (single / 'tokenizer.json').write_bytes(content)
        assert 'unreadable tokenizer' in refusal(load, str(single), of=ConfigError)


def test_dtypes(single):
    assert load(str(single)).params['norm'].dtype == load_module.storage('auto')
    for dtype in load_module.DTYPES:
        model = load(str(single), dtype)
        assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {dtype}
        assert model.module.dtype == dtype
    assert "'int8'" in refusal(load, str(single), 'int8', of=ConfigError)


@pytest.mark.parametrize('biases', [False, True])
def test_mixed_lowers_matrices_and_nothing_else(tmp_path, biases):
    config = dataclasses.replace(TINY, qkv_bias=biases, o_bias=biases, mlp_bias=biases)
    write_model(tmp_path / 'm', model_of(config), dtype='float32')
    full, model = (load(str(tmp_path / 'm'), dtype) for dtype in ('float32', 'mixed'))
    types = jnp.dtype('float32'), jnp.dtype('bfloat16')
    no_ids = dataclasses.replace(config, bos_id=None, eos_ids=(), pad_id=None)
    assert model.module == Llama(no_ids, *types, backend=model.backend)
    lowered = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (leaf.dtype == jnp.bfloat16, path[-1].key), model.params
    )
    for low, name in jax.tree.leaves(lowered, is_leaf=lambda x: isinstance(x, tuple)):
        assert low == (not name.endswith(('norm', 'bias')))
    tokens_BT = jnp.arange(12, dtype=jnp.int32).reshape(2, 6) % TINY.vocab_size
    exact, low = (forward(m.module, m.params, tokens_BT) for m in (full, model))
    assert low.dtype == jnp.float32
    assert 0 < jnp.abs(exact - low).max() < 0.03 * jnp.abs(exact).max()


def test_fingerprints_of_older_collections_stay():
    """Collections name their model by it: what a config learns to say later must not change it."""
    assert fingerprint(model_of()) == OLD_FINGERPRINT


def test_a_fingerprint_sees_every_bit(single, sharded):
    model = load(str(single))
    same = fingerprint(model)
    assert same == fingerprint(load(str(single))) == fingerprint(load(str(sharded)))
    seen = {same, fingerprint(load(str(single), 'bfloat16'))}
    seen.add(fingerprint(dataclasses.replace(model, config=dataclasses.replace(TINY, norm_eps=2))))
    leaves, tree = jax.tree.flatten(model.params)
    for i, leaf in enumerate(leaves):
        bits = np.array(leaf)
        bits.view(np.uint32).flat[-1] ^= 1
        params = jax.tree.unflatten(tree, [*leaves[:i], bits, *leaves[i + 1 :]])
        seen.add(fingerprint(dataclasses.replace(model, params=params)))
    assert len(seen) == 3 + len(leaves)


def test_answers_end_where_the_config_the_generation_config_or_the_template_ends_them(tmp_path):
    """Each of the three, and the template's end token is in what is written of the model."""
    tokenizer = tokenizer_of('Qwen2, ChatML')
    the, x, end = tokenizer.convert_tokens_to_ids(['the', 'x', '<|im_end|>'])
    write_model(tmp_path / 'm', chat_model(eos_ids=(the,)), dtype='float32')
    (tmp_path / 'm' / 'generation_config.json').write_text(f'{{"eos_token_id": [{x}, {the}]}}')
    model = load(str(tmp_path / 'm'), 'float32')
    assert model.config.eos_ids == (the, x, end)
    write_model(tmp_path / 'again', model, dtype='float32')
    assert json.loads((tmp_path / 'again' / 'config.json').read_text())['eos_token_id'] == [
        the, x, end,
    ]  # fmt: skip
    (tmp_path / 'm' / 'generation_config.json').write_text(f'{{"eos_token_id": {end}}}')
    edit_config(tmp_path / 'm', eos_token_id=None)
    assert load(str(tmp_path / 'm')).config.eos_ids == (end,), 'once'
    bare = dataclasses.replace(chat_model(eos_ids=(the,)), tokenizer=byte_tokenizer())
    write_model(tmp_path / 'bare', bare)
    assert load(str(tmp_path / 'bare')).config.eos_ids == (the,)


def test_a_template_s_end_outside_the_table_ends_nothing(tmp_path):
    model = chat_model('legacy, ChatML')
    end = model.config.eos_ids[0]
    params = {**model.params, **{k: model.params[k][:end] for k in ('embed', 'head')}}
    config = dataclasses.replace(model.config, vocab_size=end, eos_ids=())
    write_model(tmp_path / 'm', dataclasses.replace(model, config=config, params=params))
    assert load(str(tmp_path / 'm')).config.eos_ids == ()
