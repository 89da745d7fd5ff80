"""Writing a model directory: whole or not at all, and never over anything else."""

import dataclasses
import stat
from pathlib import Path

import jax
import numpy as np
import pytest

from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf import weights as hf_module
from cllm_jax.hf.load import read_tokenizer
from cllm_jax.hf.weights import read_model, write_model
from cllm_jax.runs import atomic
from cllm_jax.runs.atomic import recover_replacement
from tests.tiny_model import TINY, params_of, tiny_tokenizer

PARAMS, OTHER = params_of(TINY, 0), params_of(TINY, 1)


def same(a, b) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


def test_writing_replaces_a_model_and_nothing_else(tmp_path):
    target = tmp_path / 'm'
    write_model(target, TINY, PARAMS, shard_bytes=5_000)
    write_model(target, TINY, PARAMS)
    assert sorted(p.name for p in target.iterdir()) == ['config.json', 'model.safetensors']
    modes = {stat.S_IMODE(p.stat().st_mode) for p in target.iterdir()}
    (tmp_path / 'plain').touch()
    assert modes == {stat.S_IMODE((tmp_path / 'plain').stat().st_mode)}
    for name in ('thesis.tex', 'sub/x.json'):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text('mine')
        with pytest.raises(DataError, match=f'holds {name.split("/")[0]}.*another directory'):
            write_model(target, TINY, PARAMS)
        assert (target / name).read_text() == 'mine'
        (target / name).unlink()
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'package.json').write_text('mine')
    for path in (other, other / 'package.json'):
        with pytest.raises(DataError, match='choose another directory'):
            write_model(path, TINY, PARAMS)
    assert (other / 'package.json').read_text() == 'mine'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['m', 'other', 'plain']


def test_writing_through_a_link_keeps_the_link(tmp_path):
    write_model(tmp_path / 'real', TINY, PARAMS)
    (tmp_path / 'link').symlink_to('real')
    write_model(tmp_path / 'link', TINY, OTHER, dtype='float32')
    assert (tmp_path / 'link').is_symlink()
    assert same(read_model(tmp_path / 'real')[1], OTHER)


def test_a_tokenizer_is_written_too_and_may_be_replaced(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {'default': '{{ messages }}', 'tool': 'x'}  # one file each
    for _ in range(2):
        write_model(tmp_path / 'm', TINY, PARAMS, tokenizer)
    assert (tmp_path / 'm' / 'additional_chat_templates' / 'tool.jinja').is_file()
    back = read_tokenizer(tmp_path / 'm')
    assert back.chat_template == tokenizer.chat_template
    assert back.get_vocab() == tokenizer.get_vocab() and back.eos_token_id == 1


@pytest.mark.parametrize('step', ['save_file', 'make_readable', 'replace_directory'])
def test_a_failed_write_keeps_the_old_model(tmp_path, monkeypatch, step):
    write_model(tmp_path / 'm', TINY, PARAMS, dtype='float32')

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(hf_module, step, full)
    with pytest.raises(DataError, match=r'not written.*No space left'):
        write_model(tmp_path / 'm', TINY, OTHER, dtype='float32')
    assert [p.name for p in tmp_path.iterdir()] == ['m']
    assert same(read_model(tmp_path / 'm')[1], PARAMS)


@pytest.mark.parametrize('moment', ['before', 'between', 'after'])
def test_a_killed_write_leaves_a_model_and_the_next_one_nothing_else(tmp_path, monkeypatch, moment):
    place = tmp_path / 'm'
    write_model(place, TINY, PARAMS, dtype='float32')
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
        # Killed, nothing cleans up.
        patched.setattr(hf_module, 'recover_replacement', lambda directory: None)
        if moment == 'after':
            patched.setattr(atomic.shutil, 'rmtree', kill)
        with pytest.raises(KeyboardInterrupt):
            write_model(place, TINY, OTHER, dtype='float32')
    assert len(list(tmp_path.iterdir())) == 2
    assert place.is_dir() == (moment != 'between')
    recover_replacement(place)
    assert [p.name for p in tmp_path.iterdir()] == ['m']
    assert same(read_model(place)[1], OTHER if moment == 'after' else PARAMS)


def test_writing_refuses_what_could_not_be_read_back(tmp_path):
    for wrong, pattern in [
        (dataclasses.replace(TINY, layers=3), 'do not belong'),
        (dataclasses.replace(TINY, bos_id=-1), 'correct its family'),
    ]:
        with pytest.raises(ConfigError, match=pattern):
            write_model(tmp_path / 'm', wrong, PARAMS)
    biased = dataclasses.replace(TINY, qkv_bias=True)
    with pytest.raises(ConfigError, match='correct its family'):
        write_model(tmp_path / 'm', biased, params_of(biased))
    with pytest.raises(ConfigError, match=r'int8.*bfloat16'):
        write_model(tmp_path / 'm', TINY, PARAMS, dtype='int8')
    assert not list(tmp_path.iterdir())


def test_a_model_card_is_written_again_with_its_model(tmp_path):
    for card in ('# first', '# second'):
        write_model(tmp_path, TINY, PARAMS, card=card)
        assert (tmp_path / 'README.md').read_text() == card
    with pytest.raises(DataError, match=r'holds README\.md'):
        write_model(tmp_path, TINY, PARAMS)
    assert (tmp_path / 'README.md').read_text() == '# second'
