"""Tokenizers are read as their files say, written as they were, and told apart by what they do."""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tokenizers import Tokenizer

from cllm_jax.data.encoding import plain_ids
from cllm_jax.data.tokenizer import train_tokenizer
from cllm_jax.decoding.request import Request, encode
from cllm_jax.decoding.request import check as check_request
from cllm_jax.drafters.jacobi import Jacobi
from cllm_jax.errors import ConfigError
from cllm_jax.hf.load import FORMER_SUMS, SHIPPED, load, same_files
from cllm_jax.hf.model import with_tokenizer
from cllm_jax.hf.tokenizer import (
    CONFIG,
    PIECES,
    PROBES,
    WHOLE,
    noted_or_new,
    read_tokenizer,
    same_tokenizer,
    tokenizer_fingerprint,
    vocabulary_fingerprint,
    write_tokenizer,
)
from cllm_jax.hf.write import write_model
from tests.kinds import KINDS, bytes_of, tokenizer_of, write, write_kind
from tests.tiny import byte_tokenizer, random_model, text_config
from tests.tiny_model import model_of, refusal, tiny_tokenizer, write_single

with_kinds = pytest.mark.parametrize('kind', KINDS)
FIVE_ONLY = {'is_local', 'local_files_only', 'backend'}


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob('*') if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def check_portable(directory: Path) -> dict:
    """What transformers 4 cannot load, or notes that are of no use elsewhere, is not there."""
    config = json.loads((directory / CONFIG).read_text())
    assert config['tokenizer_class'] != 'TokenizersBackend'
    assert not isinstance(config.get('extra_special_tokens'), list)
    assert not FIVE_ONLY & config.keys()
    return config


@with_kinds
def test_a_tokenizer_does_what_its_file_says(kind, tmp_path):
    """Byte-level ones whose class is LlamaTokenizer and `legacy` ones too."""
    tokenizer = read_tokenizer(write_kind(kind, tmp_path))
    alone = Tokenizer.from_file(str(tmp_path / WHOLE))
    texts = [*PROBES, *(f'{t}city {t} city' for t in tokenizer.get_added_vocab())]
    wanted = [alone.encode(text, add_special_tokens=False).ids for text in texts]
    assert plain_ids(tokenizer, texts) == wanted
    decoded = [alone.decode(ids, skip_special_tokens=False) for ids in wanted]
    assert [tokenizer.decode(ids) for ids in wanted] == decoded


def test_the_known_misreadings():
    """DeepSeek-Coder lost its spaces; LLaMA 2 split a word after a special token."""
    deepseek, llama = tokenizer_of('DeepSeek-Coder'), tokenizer_of('legacy')
    text = 'How are you doing?'
    assert deepseek.decode(plain_ids(deepseek, [text])[0]) == text
    assert llama.convert_ids_to_tokens(plain_ids(llama, ['<s>city'])[0]) == ['<s>', '▁city']


@with_kinds
def test_tokenizer_files_are_carried_over_as_they_are(kind, tmp_path):
    """Though the directory that they were read from is gone, or changed since."""
    place = write_kind(kind, tmp_path / 'a')
    (place / 'special_tokens_map.json').write_text('{ }  ')
    (place / 'config.json').unlink()
    files = contents(place)
    tokenizer = read_tokenizer(place)
    (place / WHOLE).write_text('changed')
    write_model(tmp_path / 'b', model_of(tokenizer=tokenizer))
    shutil.rmtree(place)
    write_model(tmp_path / 'c', model_of(tokenizer=read_tokenizer(tmp_path / 'b')))
    for name in 'bc':
        written = contents(tmp_path / name)
        assert {k: written[k] for k in files} == files
        check_portable(tmp_path / name)
    assert tokenizer_fingerprint(read_tokenizer(tmp_path / 'c')) == tokenizer_fingerprint(tokenizer)


def test_every_file_of_a_tokenizer_is_carried_over(tmp_path):
    place = write_kind('LLaMA 3', tmp_path / 'a')
    (place / 'additional_chat_templates').mkdir()
    for name in ('chat_template.jinja', 'additional_chat_templates/tool.jinja', 'merges.txt'):
        (place / name).write_text('{{ messages }}')
    (place / 'not_ours.json').write_text('{}')
    (tmp_path / 'b').mkdir()
    write_tokenizer(tmp_path / 'b', read_tokenizer(place))
    wanted = contents(place)
    del wanted['config.json'], wanted['not_ours.json']
    assert contents(tmp_path / 'b') == wanted


def change_tokens(tokenizer):
    tokenizer.add_tokens(['<new>'], special_tokens=True)


def change_template(tokenizer):
    tokenizer.chat_template = '{{ messages[0] }}'


def change_bos(tokenizer):
    tokenizer.add_bos_token = False


@with_kinds
@pytest.mark.parametrize('change', [change_tokens, change_template, change_bos])
def test_a_changed_tokenizer_is_written_as_it_is_now(kind, change, tmp_path):
    tokenizer = read_tokenizer(write_kind(kind, tmp_path / 'a'))
    change(tokenizer)
    (tmp_path / 'b').mkdir()
    write_tokenizer(tmp_path / 'b', tokenizer)
    back = read_tokenizer(tmp_path / 'b')
    assert tokenizer_fingerprint(back) == tokenizer_fingerprint(tokenizer)
    assert back.chat_template == tokenizer.chat_template
    check_portable(tmp_path / 'b')


def trained_tokenizer():
    return train_tokenizer(['the city of the cities'] * 9, 270)


def rebuilt_tokenizer():
    """As transformers 5 makes it, which is not as the file says."""
    from transformers import AutoTokenizer

    with TemporaryDirectory() as name:
        return AutoTokenizer.from_pretrained(write_kind('legacy', Path(name)))


@pytest.mark.parametrize(
    'make', [byte_tokenizer, tiny_tokenizer, trained_tokenizer, rebuilt_tokenizer]
)
def test_a_new_tokenizer_is_written_for_every_transformers(make, tmp_path):
    (tmp_path / 'b').mkdir()
    write_tokenizer(tmp_path / 'b', make())
    assert check_portable(tmp_path / 'b')['tokenizer_class'] == 'PreTrainedTokenizerFast'
    assert tokenizer_fingerprint(read_tokenizer(tmp_path / 'b')) == tokenizer_fingerprint(make())


def test_what_an_older_version_wrote_is_made_portable(tmp_path):
    config = {'tokenizer_class': 'TokenizersBackend', 'eos_token': '<|end|>'}
    config |= {'extra_special_tokens': ['<|end|>'], 'backend': 'tokenizers'}
    config |= {'additional_special_tokens': ['<|begin|>', '<|end|>']}
    config |= {'is_local': True, 'local_files_only': False}
    inner = bytes_of('<|begin|>', '<|end|>')
    tokenizer = read_tokenizer(write(tmp_path / 'a', inner, **config))
    (tmp_path / 'b').mkdir()
    write_tokenizer(tmp_path / 'b', tokenizer)
    written = check_portable(tmp_path / 'b')
    assert written == {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'eos_token': '<|end|>',
        'additional_special_tokens': ['<|begin|>', '<|end|>'],
    }
    same = (tmp_path / 'a' / WHOLE).read_bytes()
    assert (tmp_path / 'b' / WHOLE).read_bytes() == same
    assert tokenizer_fingerprint(read_tokenizer(tmp_path / 'b')) == tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize('name', FORMER_SUMS)
def test_shipped_tokenizers_are_for_every_transformers(name):
    assert check_portable(SHIPPED / name)['tokenizer_class'] == 'PreTrainedTokenizerFast'


def test_a_run_that_began_with_a_shipped_model_of_an_older_version_goes_on(tmp_path):
    for name, former in FORMER_SUMS.items():
        assert same_files(former[:16], SHIPPED / name)
        shutil.copytree(SHIPPED / name, tmp_path / name)
        assert not same_files(former[:16], tmp_path / name)
        for noted in ('', None, former[:15], '0' * 16, 5):
            assert not same_files(noted, SHIPPED / name)
    assert not same_files(FORMER_SUMS['cllm'][:16], SHIPPED / 'target')


def test_a_fingerprint_tells_what_a_tokenizer_does():
    """Of one vocabulary: other spaces, BOS tokens, special tokens or normalizers."""
    same = [tokenizer_of(kind) for kind in ('legacy', 'first', 'always', 'never')]
    same += [read_changed('legacy', **change) for change in ({'bos_token': '</s>'}, {})]
    assert len({vocabulary_fingerprint(t) for t in same}) == 1
    found = [tokenizer_fingerprint(t) for t in same]
    assert len(set(found)) == 5 and found[0] == found[5]


def read_changed(kind: str, **changes):
    with TemporaryDirectory() as name:
        place = write_kind(kind, Path(name))
        config = json.loads((place / CONFIG).read_text()) | changes
        (place / CONFIG).write_text(json.dumps(config))
        return read_tokenizer(place)


def test_a_fingerprint_is_the_same_everywhere(tmp_path):
    """In another process and after use; these are also what transformers 4.57 and 5.22 give."""
    known = {
        'legacy': '2fb42c9ef6eb7056',
        'DeepSeek-Coder': 'df83c700e8f36bc6',
    }
    for kind, wanted in known.items():
        tokenizer = tokenizer_of(kind)
        tokenizer('the city', max_length=2, truncation=True)
        assert tokenizer_fingerprint(tokenizer)[:16] == wanted


@with_kinds
def test_fingerprints_of_older_versions_are_known(kind):
    tokenizer, other = tokenizer_of(kind), byte_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    older = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
    for noted in (older, older[:16], tokenizer_fingerprint(tokenizer)):
        assert same_tokenizer(noted, tokenizer) and not same_tokenizer(noted, other)
        assert noted_or_new(noted, tokenizer) == noted
        assert noted_or_new(noted, other) == tokenizer_fingerprint(other)
    for noted in (None, '', older[:15], 7, [older]):
        assert not same_tokenizer(noted, tokenizer)


def write_pieces(directory: Path, **config) -> Path:
    """A model with a `tokenizer.model` of sentencepiece, in which every byte has a token."""
    sentencepiece = pytest.importorskip('sentencepiece')
    texts = directory / 'texts'
    texts.write_text('the city of the cities\ndef name(you): return\n' * 9)
    options = {'model_type': 'bpe', 'byte_fallback': True, 'vocab_size': 300, 'minloglevel': 2}
    options |= {'normalization_rule_name': 'identity', 'remove_extra_whitespaces': False}
    sentencepiece.SentencePieceTrainer.train(
        input=str(texts), model_prefix=str(directory / 'tokenizer'), **options
    )
    for name in ('texts', 'tokenizer.vocab'):
        (directory / name).unlink()
    if config:
        (directory / CONFIG).write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    'config', [{}, {'tokenizer_class': 'LlamaTokenizer', 'legacy': False, 'add_bos_token': False}]
)
def test_a_sentencepiece_model_alone_is_a_tokenizer(config, tmp_path):
    place = write_pieces(write_single(tmp_path / 'm'), **config)
    import sentencepiece

    tokenizer, alone = load(str(place)).tokenizer, sentencepiece.SentencePieceProcessor()
    alone.Load(str(place / PIECES))
    for text in ('the city', 'the  city ', 'def x(you):\n    y\n', '你 \U0001f44d'):
        assert plain_ids(tokenizer, [text]) == [alone.EncodeAsIds(text)]
        assert tokenizer.decode(alone.EncodeAsIds(text)) == text
    assert (tokenizer('city')['input_ids'][0] == tokenizer.bos_token_id) == (not config)
    write_model(tmp_path / 'b', model_of(tokenizer=tokenizer))
    assert (tmp_path / 'b' / PIECES).read_bytes() == (place / PIECES).read_bytes()
    assert not (tmp_path / 'b' / WHOLE).exists()


def test_without_sentencepiece_ids_work_and_texts_say_what_to_install(tmp_path, monkeypatch):
    write_model(tmp_path / 'm', random_model(config=text_config(layers=1)))
    (tmp_path / 'm' / PIECES).write_bytes(b'\n\x0e\n\x05<unk>')
    for package in ('sentencepiece', 'google.protobuf'):
        with monkeypatch.context() as patch:
            blocked = [name for name in sys.modules if name.startswith('sentencepiece')]
            for name in (*blocked, package):
                patch.setitem(sys.modules, name, None)
            model = load(str(tmp_path / 'm'))
            assert model.tokenizer is None and encode(model, [3, 4]) == [3, 4]
            calls = {
                'read': lambda: read_tokenizer(tmp_path / 'm'),
                'text': lambda m=model: encode(m, 'the'),
                'learn': lambda m=model: with_tokenizer(m),
                'stop': lambda m=model: check_request(m, Request(Jacobi(4), stop=('x',)), [[3]]),
                'write': lambda m=model: write_model(tmp_path / 'x', m),
            }
            for call in calls.values():
                message = refusal(call, of=ConfigError)
                assert 'tokenizer.model needs sentencepiece' in message
                assert "pip install -U 'cllm_jax[sentencepiece]'" in message
                assert 'tiktoken' not in message
    assert not (tmp_path / 'x').exists()


def test_a_damaged_sentencepiece_model_is_named(tmp_path):
    pytest.importorskip('sentencepiece')
    place = write_single(tmp_path / 'm')
    for content in (b'\n', b'\n\xff\xff\xff', b'\n' * 4000):
        (place / PIECES).write_bytes(content)
        message = refusal(load, str(place), of=ConfigError)
        assert 'tokenizer.model is not a sentencepiece model' in message


def test_a_class_without_a_vocabulary_is_no_tokenizer(tmp_path):
    """transformers makes one of three tokens of it, which knows no text."""
    place = write_single(tmp_path / 'm')
    (place / CONFIG).write_text(json.dumps({'tokenizer_class': 'LlamaTokenizer'}))
    assert 'tokenizer_config.json without' in refusal(load, str(place), of=ConfigError)
