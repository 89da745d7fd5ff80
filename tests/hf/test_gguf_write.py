"""A written GGUF file is the model that it was written from, or it is not written."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, processors
from tokenizers import pre_tokenizers as pre

import cllm_jax as cllm
from cllm_jax import export
from cllm_jax.cli.console import size
from cllm_jax.errors import ConfigError, DataError
from cllm_jax.hf import gguf_write
from cllm_jax.hf.gguf_write import write_gguf
from cllm_jax.hf.load import load, open_tokenizer, peek
from cllm_jax.hf.tokenizer import tokenizer_fingerprint
from cllm_jax.hf.write import write_model
from cllm_jax.model.config import RopeScaling
from cllm_jax.runs import atomic
from tests.gguf_files import GQA, KIND, MARKS, OWN, reference, stored_tensors
from tests.hf.test_gguf import CONFIGS, LLAMA3, factors
from tests.kinds import CHATML, tokenizer_of, write
from tests.tiny import byte_tokenizer
from tests.tiny_model import TINY, model_of, refusal, same_bits

LONG = dataclasses.replace(GQA, heads=2, kv_heads=1, head_dim=64, rope_theta=5e5)
WRITTEN = CONFIGS | {
    'llama 3': dataclasses.replace(LONG, rope_scaling=LLAMA3),
    'llama 3.2': dataclasses.replace(LONG, rope_scaling=RopeScaling('llama3', 32.0), tied=True),
}
RULES = ('smollm', 'gpt-2', 'llama-bpe', 'qwen2')


@pytest.mark.parametrize('name', WRITTEN)
def test_what_is_written_is_read_back(name, tmp_path):
    """The config, and every bit: of all weights in f32, and in bf16 of matrices rounded to it."""
    model, path = model_of(WRITTEN[name]), tmp_path / 'm.gguf'
    write_gguf(path, model, 'f32')
    back = load(str(path), 'float32')
    assert back.config == peek(str(path)) == model.config
    assert same_bits(back.params, model.params)
    assert back.tokenizer is None and back.lacks == ''

    def rounded(where, leaf):
        vector = where[-1].key.endswith(('norm', 'bias'))
        return leaf if vector else leaf.astype(jnp.bfloat16).astype('f4')

    write_gguf(path, model, 'bf16')
    wanted = jax.tree_util.tree_map_with_path(rounded, model.params)
    assert same_bits(load(str(path), 'float32').params, wanted)
    assert not same_bits(wanted, model.params)


@pytest.mark.parametrize('name', ['grouped queries', 'qwen2', 'qwen3', 'biased'])
@pytest.mark.parametrize('kind', ['F32', 'BF16'])
def test_tensors_are_those_of_the_converters_names_order_and_kinds(name, kind, tmp_path):
    model, path = model_of(WRITTEN[name]), tmp_path / 'm.gguf'
    write_gguf(path, model, kind.lower())
    wanted = stored_tensors(model, KIND[kind])
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert found.keys() == wanted.keys()
    for tensor_name, (data, _, own) in wanted.items():
        assert found[tensor_name].tensor_type == own
        assert np.array_equal(found[tensor_name].data.view(data.dtype), data), tensor_name


def test_the_factors_of_llama_3_are_those_of_its_model_card(tmp_path):
    write_gguf(tmp_path / 'm.gguf', model_of(WRITTEN['llama 3']), 'bf16')
    [found] = [
        t for t in gguf.GGUFReader(tmp_path / 'm.gguf').tensors if t.name == 'rope_freqs.weight'
    ]
    assert found.tensor_type == KIND.F32
    np.testing.assert_allclose(found.data, factors(LLAMA3, 64, 5e5), rtol=1e-6)


@pytest.mark.parametrize(
    'changes, told',
    [
        ({'rope_scaling': dataclasses.replace(LLAMA3, low_freq_factor=2.0)}, 'rope_freqs.weight'),
        ({'eos_ids': (1, 2, 3, 4)}, 'eos_ids = (1, 2, 3, 4) would be read back as (1, 2, 3)'),
        ({'norm_eps': 1e-5 + 1e-13}, 'norm_eps = '),
        ({'qkv_bias': True}, 'o_bias = False would be read back as True'),
    ],
)
def test_a_config_that_a_file_cannot_tell_is_refused(changes, told, tmp_path):
    model = model_of(dataclasses.replace(LONG, **changes))
    message = refusal(write_gguf, tmp_path / 'm.gguf', model, 'f32', of=ConfigError)
    assert message.startswith('tiny: ') and told in message
    assert not any(tmp_path.iterdir())


def test_a_mistral_is_a_llama(tmp_path):
    model = model_of(dataclasses.replace(GQA, family='mistral'))
    write_gguf(tmp_path / 'm.gguf', model, 'f32')
    back = load(str(tmp_path / 'm.gguf'), 'float32')
    assert back.config == GQA and same_bits(back.params, model.params)


def with_words(tokenizer, **changes):
    """A model with as many rows as a tokenizer has tokens, and two more."""
    ids = {'bos_id': tokenizer.bos_token_id, 'pad_id': tokenizer.pad_token_id}
    ids['eos_ids'] = (tokenizer.eos_token_id,)
    rows = {'vocab_size': len(tokenizer) + 2}
    return model_of(dataclasses.replace(TINY, **(rows | ids | changes)), tokenizer=tokenizer)


def tokenizer_by(directory: Path, inner: Tokenizer, **more):
    named = {'bos_token': MARKS[0], 'eos_token': MARKS[1], 'pad_token': MARKS[3]}
    return open_tokenizer(write(directory, inner, **(named | more)))


def same_ids(one, other) -> bool:
    """Whether two tokenizers make the same ids of texts, and the same texts of ids."""
    ids = [t(['the city 1234', f'{MARKS[2]}user {OWN}'])['input_ids'] for t in (one, other)]
    shown = [t.decode(ids[0][1], skip_special_tokens=True) for t in (one, other)]
    alike = ids[0] == ids[1] and shown[0] == shown[1]
    return alike and tokenizer_fingerprint(one) == tokenizer_fingerprint(other)


@pytest.mark.parametrize('around', [(), (0,), (0, 1), (1,)])
@pytest.mark.parametrize('rule', RULES)
def test_a_tokenizer_is_read_back(rule, around, tmp_path):
    """What it does with texts, what it puts around them, its named tokens, its chat template."""
    inner = reference(rule)
    marks = [MARKS[i] for i in around]
    if marks:
        single = [mark for mark in marks if mark == MARKS[0]] + ['$A']
        single += [mark for mark in marks if mark == MARKS[1]]
        special = [(mark, inner.token_to_id(mark)) for mark in marks]
        inner.post_processor = processors.TemplateProcessing(single, None, special)
    tokenizer = tokenizer_by(tmp_path / 'a', inner, unk_token='!', chat_template=CHATML)
    ends = tokenizer.convert_tokens_to_ids([MARKS[1], '<|im_end|>'])  # the last is the template's
    model, path = with_words(tokenizer, eos_ids=tuple(ends)), tmp_path / 'm.gguf'
    write_gguf(path, model, 'f32')
    back = load(str(path), 'float32')
    assert back.config == model.config and same_bits(back.params, model.params)
    assert same_ids(back.tokenizer, tokenizer)
    assert back.tokenizer.chat_template == CHATML
    for name in ('bos', 'eos', 'pad', 'unk'):
        one, other = (getattr(t, f'{name}_token') for t in (back.tokenizer, tokenizer))
        assert one == other is not None
    write_gguf(tmp_path / 'again.gguf', back, 'f32')
    assert (tmp_path / 'again.gguf').read_bytes() == path.read_bytes()


def test_roles_are_the_tokenizers_or_else_the_configs(tmp_path):
    plain = tokenizer_by(tmp_path / 'a', reference('qwen2'), bos_token=None, pad_token=None)
    end, other = plain.eos_token_id, plain.convert_tokens_to_ids(MARKS[3])
    path = tmp_path / 'm.gguf'
    write_gguf(path, with_words(plain, bos_id=other, eos_ids=(other, end), pad_id=other), 'f32')
    back = load(str(path))
    assert (back.config.bos_id, back.config.pad_id) == (other, other)
    assert back.config.eos_ids == (end, other)
    assert (back.tokenizer.bos_token, back.tokenizer.eos_token) == (MARKS[3], MARKS[1])
    assert plain.bos_token is None, 'the model itself is not changed'
    told = refusal(write_gguf, path, with_words(plain, eos_ids=(other,)), 'f32', of=ConfigError)
    assert f'ends texts with {end}, and the model with ({other},)' in told


def changed(rule, **fields) -> Tokenizer:
    """A tokenizer with other words in its file."""
    raw = json.loads(reference(rule).to_str())
    for name, value in fields.items():
        raw['model' if name in raw['model'] else name] = (
            raw['model'] | {name: value} if name in raw['model'] else value
        )
    return Tokenizer.from_str(json.dumps(raw))


def letter_of(byte: int) -> str:
    """How byte-level tokenizers write a byte that begins no character which is often met."""
    [(pieces, _)] = pre.ByteLevel(False).pre_tokenize_str(chr(0xC0000))
    assert chr(0xC0000).encode()[0] == byte
    return pieces[0]


def odd_tokenizers():
    """What a file cannot have, though some do the same with most texts."""
    bare = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    yield 'none that', changed('gpt-2', pre_tokenizer=bare | {'use_regex': False})
    yield 'none that', changed('gpt-2', pre_tokenizer=bare | {'add_prefix_space': True})
    yield 'none that', changed('llama-bpe', ignore_merges=False)
    yield 'none that', changed('gpt-2', end_of_word_suffix='</w>')
    letters = reference('gpt-2')
    letters.pre_tokenizer = pre.Sequence(
        [pre.Split(Regex('[a-z]'), 'isolated'), pre.ByteLevel(False)]
    )
    yield 'none that', letters
    yield 'something else', changed('qwen2', normalizer=None)
    yield 'something else', changed('gpt-2', normalizer={'type': 'Lowercase'})
    eager = reference('gpt-2')
    eager.add_special_tokens([AddedToken('<|eager|>', lstrip=True)])
    yield 'something else', eager
    words = reference('gpt-2').get_vocab(False)
    words['zqy'] = words.pop(letter_of(0xF3))
    yield 'something else', changed('gpt-2', vocab=words, unk_token='!')


ODD = [*odd_tokenizers()]


@pytest.mark.parametrize('at', range(len(ODD)))
def test_a_tokenizer_that_a_file_cannot_have_is_refused_unless_it_is_left_out(at, tmp_path):
    told, inner = ODD[at]
    model = with_words(tokenizer_by(tmp_path / 'a', inner))
    path = tmp_path / 'm.gguf'
    message = refusal(write_gguf, path, model, 'f32', of=ConfigError)
    assert told in message and '--gguf-without-tokenizer' in message
    assert not path.exists()
    write_gguf(path, model, 'f32', without_tokenizer=True)
    back = load(str(path), 'float32')
    assert back.tokenizer is None and back.lacks == ''
    assert back.config == model.config and same_bits(back.params, model.params)


def test_other_kinds_of_tokenizers_and_small_tables_are_refused(tmp_path):
    for tokenizer in (tokenizer_of('legacy'), byte_tokenizer()):
        model = with_words(tokenizer)
        assert 'none that' in refusal(write_gguf, tmp_path / 'm', model, 'f32', of=ConfigError)
    tokenizer = tokenizer_by(tmp_path / 'a', reference('gpt-2'))
    model = with_words(tokenizer, vocab_size=len(tokenizer) - 1)
    message = refusal(write_gguf, tmp_path / 'm', model, 'f32', of=ConfigError)
    assert f'the id {len(tokenizer) - 1}, and the table {len(tokenizer) - 1} rows' in message


def test_the_shipped_model_is_read_back(tmp_path):
    model = cllm.load('embedded', 'float32')
    write_gguf(tmp_path / 'm.gguf', model, 'f32')
    back = cllm.load(str(tmp_path / 'm.gguf'), 'float32')
    assert back.config == model.config and same_bits(back.params, model.params)
    assert same_ids(back.tokenizer, model.tokenizer)


@pytest.mark.parametrize('fault', [OSError(28, 'No space left on device'), KeyboardInterrupt()])
def test_a_write_that_fails_keeps_the_old_file(fault, tmp_path, monkeypatch):
    path = tmp_path / 'm.gguf'
    write_gguf(path, model_of(GQA), 'f32')
    old = path.read_bytes()
    write_tensor, calls = gguf.GGUFWriter.write_tensor_data, []

    def stop(self, tensor):
        calls.append(tensor)
        if len(calls) == 5:
            raise fault
        write_tensor(self, tensor)

    monkeypatch.setattr(gguf.GGUFWriter, 'write_tensor_data', stop)
    if isinstance(fault, OSError):
        told = refusal(write_gguf, path, model_of(GQA, seed=1), 'f32', of=DataError)
        assert 'm.gguf is not written' in told and 'No space left' in told
    else:
        with pytest.raises(KeyboardInterrupt):
            write_gguf(path, model_of(GQA, seed=1), 'f32')
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ['m.gguf']


def test_a_killed_write_keeps_the_old_file_and_the_next_one_leaves_nothing_else(
    tmp_path, monkeypatch
):
    path, other = tmp_path / 'm.gguf', model_of(GQA, seed=1)
    write_gguf(path, model_of(GQA), 'f32')
    old = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(atomic, '_sync', interrupt)
        patched.setattr(Path, 'unlink', lambda *args, **kwargs: None)  # nothing cleans up
        with pytest.raises(KeyboardInterrupt):
            write_gguf(path, other, 'f32')
    assert path.read_bytes() == old and len(list(tmp_path.iterdir())) == 2
    write_gguf(path, other, 'f32')
    assert [p.name for p in tmp_path.iterdir()] == ['m.gguf']
    assert same_bits(load(str(path), 'float32').params, other.params)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def export_of(monkeypatch, root, *arguments: str) -> Path:
    monkeypatch.setattr(sys, 'argv', ['export', '--root', str(root), '--runs', 'cllm', *arguments])
    export.run()
    return root / 'export' / 'cllm'


def a_run(root: Path, model) -> None:
    """A run with its best weights."""
    run = root / 'cllm'
    write_model(run / 'model', model, dtype='float32')
    (run / 'settings.json').write_text(json.dumps({'held_out': {'prompts': 1, 'seed': 0}}))
    (run / 'metrics.jsonl').write_text('{"step": 1, "held_out_score": 1.0}\n')


def files(place: Path) -> set[str]:
    return {path.name for path in place.glob('*.gguf')}


def test_the_command_writes_files_into_the_directory_of_the_model(tmp_path, monkeypatch, capsys):
    model = with_words(tokenizer_by(tmp_path / 'a', reference('smollm')))
    a_run(tmp_path, model)
    place = export_of(monkeypatch, tmp_path, '--gguf', 'f32', 'bf16')
    assert files(place) == {'model-f32.gguf', 'model-bf16.gguf'}
    back = load(str(place / 'model-f32.gguf'), 'float32')
    assert back.config == model.config and same_bits(back.params, model.params)
    assert tokenizer_fingerprint(back.tokenizer) == tokenizer_fingerprint(model.tokenizer)
    low = [load(str(p), 'float32').params for p in (place / 'model-bf16.gguf', place)]
    assert low[0]['embed'].tobytes() == low[1]['embed'].tobytes()
    (place / 'model-bf16.gguf').rename(tmp_path / 'elsewhere.gguf')
    shutil.copy(place / 'model-f32.gguf', place / 'other.gguf')
    assert same_bits(load(str(place), 'float32').params, low[1]), 'the sums are not of these'
    (place / 'other.gguf').unlink()
    export_of(monkeypatch, tmp_path)
    assert files(place) == set(), 'an old file would be of old weights'
    capsys.readouterr()
    export_of(monkeypatch, tmp_path, '--plan', '--gguf', 'f32', 'bf16', 'f32')
    assert size(model.config.parameters * (2 + 4 + 2)) in capsys.readouterr().out
    assert files(place) == set()


def test_a_refused_or_killed_export_keeps_the_old_one(tmp_path, monkeypatch):
    a_run(tmp_path, with_words(tokenizer_by(tmp_path / 'a', reference('gpt-2'))))
    place = export_of(monkeypatch, tmp_path, '--gguf', 'f32')
    old = (place / 'model-f32.gguf').read_bytes()
    a_run(tmp_path, with_words(tokenizer_by(tmp_path / 'b', ODD[0][1]), layers=1))
    with pytest.raises(ConfigError, match='none that'):
        export_of(monkeypatch, tmp_path, '--gguf', 'f32')
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(gguf_write, 'names_of', interrupt)
        export_of(monkeypatch, tmp_path, '--gguf', 'bf16', '--gguf-without-tokenizer')
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, 'gguf', None)
        with pytest.raises(ConfigError, match=r"pip install 'cllm_jax\[gguf\]'"):
            export_of(monkeypatch, tmp_path, '--gguf', 'f32')
    assert (place / 'model-f32.gguf').read_bytes() == old and files(place) == {'model-f32.gguf'}
    assert peek(str(place)).layers == 2
    assert [p.name for p in place.parent.iterdir()] == ['cllm']
    export_of(monkeypatch, tmp_path, '--gguf', 'bf16', '--gguf-without-tokenizer')
    assert files(place) == {'model-bf16.gguf'} and peek(str(place)).layers == 1
    assert load(str(place / 'model-bf16.gguf')).tokenizer is None


def test_settings_that_would_be_ignored_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match='there is no file to leave it out of'):
        export_of(monkeypatch, tmp_path, '--gguf-without-tokenizer')
    (tmp_path / 'cllm' / 'drafter').mkdir(parents=True)
    with pytest.raises(ConfigError, match='only heads'):
        export_of(monkeypatch, tmp_path, '--gguf', 'f32')


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gguf', None)
    message = refusal(write_gguf, tmp_path / 'm.gguf', model_of(), 'f32', of=ConfigError)
    assert "pip install 'cllm_jax[gguf]'" in message and not any(tmp_path.iterdir())


def test_kinds_and_ids_that_a_file_cannot_have_are_refused(tmp_path):
    model = model_of(GQA)
    with pytest.raises(ConfigError, match=r"kind 'q8_0' is unknown; choose one of f32, bf16"):
        write_gguf(tmp_path / 'm.gguf', model, 'q8_0')
    for name in ('bos_id', 'pad_id'):
        config = dataclasses.replace(GQA, **{name: -1})
        with pytest.raises(ConfigError, match='token id -1 is outside the vocabulary'):
            write_gguf(tmp_path / 'm.gguf', dataclasses.replace(model, config=config), 'f32')
    assert not list(tmp_path.iterdir())
