"""Writing a model directory: whole or not at all, and never over anything else."""

import dataclasses
import json
import stat
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf import files, write
from cllm_jax.hf.model import Model
from cllm_jax.hf.tokenizer import read_tokenizer
from cllm_jax.hf.weights import read_model, tensor_shapes
from cllm_jax.hf.write import write_model
from cllm_jax.runs import atomic
from cllm_jax.runs.atomic import recover_replacement
from tests.make_golden import CASES, golden, random_tokens, saved_by_torch, torch_logits
from tests.tiny_model import TINY, model_of, same_bits, tiny_tokenizer

MODEL, OTHER = model_of(), model_of(seed=1)


def test_writing_replaces_a_model_and_nothing_else(tmp_path):
    target = tmp_path / 'm'
    write_model(target, MODEL, shard_bytes=5_000)
    write_model(target, MODEL)
    assert sorted(p.name for p in target.iterdir()) == ['config.json', 'model.safetensors']
    modes = {stat.S_IMODE(p.stat().st_mode) for p in target.iterdir()}
    (tmp_path / 'plain').touch()
    assert modes == {stat.S_IMODE((tmp_path / 'plain').stat().st_mode)}
    for name in ('thesis.tex', 'sub/x.json'):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text('mine')
        with pytest.raises(DataError, match=f'holds {name.split("/")[0]}.*another directory'):
            write_model(target, MODEL)
        assert (target / name).read_text() == 'mine'
        (target / name).unlink()
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'package.json').write_text('mine')
    for path in (other, other / 'package.json'):
        with pytest.raises(DataError, match='choose another directory'):
            write_model(path, MODEL)
    assert (other / 'package.json').read_text() == 'mine'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['m', 'other', 'plain']


def test_writing_through_a_link_keeps_the_link(tmp_path):
    write_model(tmp_path / 'real', MODEL)
    (tmp_path / 'link').symlink_to('real')
    write_model(tmp_path / 'link', OTHER, dtype='float32')
    assert (tmp_path / 'link').is_symlink()
    assert same_bits(read_model(tmp_path / 'real')[1], OTHER.params)


def test_a_tokenizer_is_written_too_and_may_be_replaced(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {'default': '{{ messages }}', 'tool': 'x'}  # one file each
    for _ in range(2):
        write_model(tmp_path / 'm', dataclasses.replace(MODEL, tokenizer=tokenizer))
    assert (tmp_path / 'm' / 'additional_chat_templates' / 'tool.jinja').is_file()
    back = read_tokenizer(tmp_path / 'm')
    assert back.chat_template == tokenizer.chat_template
    assert back.get_vocab() == tokenizer.get_vocab() and back.eos_token_id == 1


@pytest.mark.parametrize('step', ['save_file', 'make_readable', 'replace_directory'])
def test_a_failed_write_keeps_the_old_model(tmp_path, monkeypatch, step):
    write_model(tmp_path / 'm', MODEL, dtype='float32')

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(write if step == 'save_file' else files, step, full)
    with pytest.raises(DataError, match=r'not written.*No space left'):
        write_model(tmp_path / 'm', OTHER, dtype='float32')
    assert [p.name for p in tmp_path.iterdir()] == ['m']
    assert same_bits(read_model(tmp_path / 'm')[1], MODEL.params)


@pytest.mark.parametrize('moment', ['before', 'between', 'after'])
def test_a_killed_write_leaves_a_model_and_the_next_one_nothing_else(tmp_path, monkeypatch, moment):
    place = tmp_path / 'm'
    write_model(place, MODEL, dtype='float32')
    rename, calls = Path.rename, []

    def killed(self, target):
        if Path(target) in (place, place.with_name('.m.old')):
            calls.append(target)
            if len(calls) == {'before': 1, 'between': 2}.get(moment):
                raise KeyboardInterrupt
        return rename(self, target)

    def kill(path, **kwargs):
        if path.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, 'rename', killed)
        # Killed: nothing cleans up.
        patched.setattr(files, 'recover_replacement', lambda directory: None)
        if moment == 'after':
            patched.setattr(atomic.shutil, 'rmtree', kill)
        with pytest.raises(KeyboardInterrupt):
            write_model(place, OTHER, dtype='float32')
    assert len(list(tmp_path.iterdir())) == 2
    assert place.is_dir() == (moment != 'between')
    recover_replacement(place)
    assert [p.name for p in tmp_path.iterdir()] == ['m']
    assert same_bits(read_model(place)[1], (OTHER if moment == 'after' else MODEL).params)


def test_writing_refuses_what_could_not_be_read_back(tmp_path):
    for wrong, pattern in [
        (dataclasses.replace(TINY, layers=3), 'do not belong'),
        (dataclasses.replace(TINY, bos_id=-1), 'correct its family'),
    ]:
        with pytest.raises(ConfigError, match=pattern):
            write_model(tmp_path / 'm', dataclasses.replace(MODEL, config=wrong))
    for biases in (
        {'qkv_bias': True},
        {'o_bias': True},
        {'family': 'qwen2', 'qkv_bias': True, 'o_bias': True},
        {'family': 'qwen3', 'qk_norm': True, 'mlp_bias': True},
        {'family': 'mistral', 'qkv_bias': True, 'o_bias': True},
    ):
        biased = dataclasses.replace(TINY, **biases)
        with pytest.raises(ConfigError, match=r'correct its family|no such biases'):
            write_model(tmp_path / 'm', model_of(biased))
    with pytest.raises(ConfigError, match=r'int8.*bfloat16'):
        write_model(tmp_path / 'm', MODEL, dtype='int8')
    assert not list(tmp_path.iterdir())


def test_a_model_card_is_written_again_with_its_model(tmp_path):
    for card in ('# first', '# second'):
        write_model(tmp_path, MODEL, card=card)
        assert (tmp_path / 'README.md').read_text() == card
    with pytest.raises(DataError, match=r'holds README\.md'):
        write_model(tmp_path, MODEL)
    assert (tmp_path / 'README.md').read_text() == '# second'


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('name', ['gqa', 'qwen2', 'qwen3', 'biased', 'qwen3_bias'])
def test_write_then_read_keeps_every_bit(tmp_path, name, dtype):
    config = golden(name)[0]
    params = model_of(config).params
    params['norm'][:3] = np.nan, -0.0, np.inf
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
    for shard_bytes in (1, 5_000, 1 << 30):  # one tensor each, several, all
        directory = tmp_path / str(shard_bytes)
        model = Model(config, params, None, name)
        write_model(directory, model, dtype=dtype, shard_bytes=shard_bytes)
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


@pytest.mark.parametrize('name', CASES)
def test_transformers_loads_what_we_write(tmp_path, name):
    torch = pytest.importorskip('torch')
    from transformers import AutoModelForCausalLM

    model, saved = saved_by_torch(name)
    config, params = read_model(Path(saved.name))
    shard_bytes = 20_000 if name in ('tied', 'qwen2') else 1 << 30
    ours = Model(config, params, None, name)
    write_model(tmp_path / 'm', ours, dtype='float32', shard_bytes=shard_bytes)
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
